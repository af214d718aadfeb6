"""A server's part of the parameters and of the optimizer's state: the arithmetic of its steps.

A bucket is worked on in chunks that fit in cache: gradients are summed, the optimizer steps, and the new parameters are
copied to whoever waits for them, while the chunk is there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dtrain.comm.ordered import HALVES, total
from dtrain.errors import ProtocolError
from dtrain.optim import squares
from dtrain.ps.effects import Direct, Gradient, Update
from dtrain.ps.layout import BucketRange, Layout
from dtrain.ps.optimizers import Hyper, decode_hyper
from dtrain.ps.pieces import Chunk, chunks
from dtrain.ps.tasks import Pool, Task
from dtrain.ps.update import ShardOptimizer
from dtrain.ps.wire import DTYPE_NAMES

CHUNK_ELEMENTS = 2**18


class _Held:
    """One bucket's range."""

    def __init__(self, layout: Layout, range_: BucketRange) -> None:
        self.range = range_
        self.values = torch.zeros(range_.numel, dtype=DTYPE_NAMES[range_.dtype])
        pieces = [piece for _, piece in range_.pieces]
        limit = max(CHUNK_ELEMENTS, layout.rules.grain)
        self.chunks = chunks(pieces, limit, layout.rules.grain, whole=layout.whole)
        self.optimizers = [
            ShardOptimizer(layout.optimizer, c.pieces, self.values[c.start : c.stop], whole=layout.whole)
            for c in self.chunks
        ]
        self.members = _members(range_, self.chunks)
        self.sum: Tensor | None = None  # of a gradient whose norm is being agreed on
        self.direction = torch.empty(range_.numel if layout.rules.ratios else 0, dtype=self.values.dtype)
        self.before: dict[int, Tensor] = {}  # what each worker last pulled, for delay compensation
        self.begun: Tensor | None = None  # what those have that have pulled nothing


class Holder:
    """All that one server holds."""

    def __init__(self, layout: Layout, pool: Pool | None = None) -> None:
        self.layout = layout
        self._pool = pool
        self._held = {r.bucket: _Held(layout, r) for r in layout.ranges}
        self._found: list[Tensor] = []
        self._scratch = threading.local()

    # -- where they lie -----------------------------------------------------------------------------------------------

    def settle(self, bucket: int, place: Tensor) -> None:
        """Keep a bucket's values in that memory from now on, where workers read them."""
        held = self._held[bucket]
        if place.data_ptr() == held.values.data_ptr():
            return
        place.copy_(held.values)
        held.values = place
        for chunk, optimizer in zip(held.chunks, held.optimizers, strict=True):
            optimizer.settle(place[chunk.start : chunk.stop])

    # -- steps --------------------------------------------------------------------------------------------------------

    def settings(self, packed: Tensor) -> Hyper:
        """The optimizer's settings, from the bytes that a worker sent.

        Raises:
            ProtocolError: not settings of this optimizer.
        """
        try:
            data: Any = msgpack.unpackb(packed.numpy().tobytes(), max_ext_len=0, max_bin_len=0)
        except Exception as error:
            raise ProtocolError(f"settings that cannot be read ({type(error).__name__})") from error
        return decode_hyper(self.layout.optimizer, data)

    def update(self, update: Update, outputs: Sequence[Tensor]) -> Task:
        """The task of making one step of one bucket.

        Args:
            outputs: flat tensors, which receive the new parameters.
        """
        held = self._held[update.bucket]
        rules = self.layout.rules
        if update.ratios is not None:
            return self._move(held, update, outputs)
        settings = self.settings(update.settings)
        if rules.damp and update.behind > 1:
            settings = tuple({**group, "lr": float(group["lr"]) / update.behind} for group in settings)  # type: ignore[arg-type]
        used = _used(held.range, update.gradients)
        parts = [held.sum] if update.measured and held.sum is not None else _whole(update.gradients)
        before = held.before.get(update.gradients[0].rank, held.begun) if rules.compensation else None

        def do(number: int) -> None:
            chunk, optimizer = held.chunks[number], held.optimizers[number]
            part = slice(chunk.start, chunk.stop)
            gradient = self._total([p[part] for p in parts])
            if update.factor != 1.0:
                gradient = gradient * update.factor
            if before is not None:  # Zheng et al. 2017, equation 5
                gradient = gradient + rules.compensation * gradient * gradient * (held.values[part] - before[part])
            optimizer.step(gradient, [used[m] for m in held.members[number]], settings)
            for output in outputs:
                output[part].copy_(held.values[part])

        return Task(len(held.chunks), do, pool=self._pool)

    def _move(self, held: _Held, update: Update, outputs: Sequence[Tensor]) -> Task:
        """The second half of a step that `direct` has begun."""
        used = _used(held.range, update.gradients)
        ratios = self._ratios_of(held, update.ratios or [])

        def do(number: int) -> None:
            chunk, optimizer, members = held.chunks[number], held.optimizers[number], held.members[number]
            part = slice(chunk.start, chunk.stop)
            optimizer.move(held.direction[part], [used[m] for m in members], [ratios[m] for m in members])
            for output in outputs:
                output[part].copy_(held.values[part])

        return Task(len(held.chunks), do, pool=self._pool)

    def _ratios_of(self, held: _Held, told: Sequence[float]) -> dict[int, float]:
        """By position in the bucket; told are those of all pieces that this server has, in order."""
        first = sum(len(h.range.pieces) for h in self._held.values() if h.range.bucket < held.range.bucket)
        return {member: told[first + n] for n, (member, _) in enumerate(held.range.pieces)}

    def direct(self, work: Direct) -> Task:
        """The task of making the first half of a step with trust ratios: sums of squares are told, values stay."""
        settings = self.settings(work.settings)
        parts, used = {}, {}
        for held, gradients in zip(self._held.values(), work.gradients, strict=True):
            parts[held.range.bucket] = [held.sum] if work.measured and held.sum is not None else _whole(gradients)
            used[held.range.bucket] = _used(held.range, gradients)
        turns = [(held, number) for held in self._held.values() for number in range(len(held.chunks))]
        found: list[Tensor] = [torch.zeros(0)] * len(turns)

        def do(turn: int) -> None:
            held, number = turns[turn]
            chunk, bucket = held.chunks[number], held.range.bucket
            part = slice(chunk.start, chunk.stop)
            total_ = self._total([p[part] for p in parts[bucket]])
            torch.mul(total_, work.factor, out=held.direction[part])
            present = [used[bucket][m] for m in held.members[number]]
            found[turn] = held.optimizers[number].direct(held.direction[part], present, settings)

        self._found = found
        return Task(len(turns), do, pool=self._pool)

    def measure(self, gradients: Sequence[Sequence[Gradient]], factor: float) -> Task:
        """The task of summing gradients of all buckets, and taking the squares of their mean by block."""
        buckets = list(self._held.values())
        found: list[Tensor] = [torch.zeros(0)] * len(buckets)

        def do(number: int) -> None:
            held = buckets[number]
            held.sum = total(_whole(gradients[number]))
            if factor != 1.0:
                held.sum = held.sum * factor
            used = _used(held.range, gradients[number])
            sizes = [piece.numel for _, piece in held.range.pieces]
            for (member, _), part in zip(held.range.pieces, held.sum.split(sizes), strict=True):
                if not used[member]:
                    part.zero_()
            found[number] = squares(held.sum, sizes, self.layout.rules.grain)

        task = Task(len(buckets), do, pool=self._pool)
        self._found = found
        return task

    def measured(self) -> Tensor:
        """Sums of squares, float64 and flat, bucket by bucket: of the last `measure`, or of both that `direct` has."""
        return torch.cat(self._found, dim=-1).view(-1) if self._found else torch.zeros(0, dtype=torch.float64)

    def _total(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of a chunk, in memory that each thread uses over and over: fresh memory costs as much as the sum."""
        first = parts[0]
        if len(parts) == 1 or first.dtype in HALVES or first.numel() > CHUNK_ELEMENTS:
            return total(parts)
        name = str(first.dtype)
        scratch: Tensor | None = getattr(self._scratch, name, None)
        if scratch is None:
            scratch = torch.empty(CHUNK_ELEMENTS, dtype=first.dtype)
            setattr(self._scratch, name, scratch)
        return total(parts, out=scratch[: first.numel()])

    # -- pulls --------------------------------------------------------------------------------------------------------

    def values(self, bucket: int) -> Tensor:
        """The parameters of a bucket's range; the next step changes them."""
        return self._held[bucket].values

    def pulled(self, rank: int, bucket: int) -> None:
        """A worker has been given them: from these it computes its next gradient."""
        if self.layout.rules.compensation:
            self._held[bucket].before[rank] = self._held[bucket].values.clone()

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Parameters and the optimizer's state, as safetensors."""
        tensors: dict[str, Tensor] = {}
        for bucket, held in self._held.items():
            tensors[f"{bucket}"] = held.values
            for number, optimizer in enumerate(held.optimizers):
                for piece, state in enumerate(optimizer.state()):
                    tensors.update({f"{bucket}/{number}/{piece}/{k}": t.clone() for k, t in state.items()})
        data: bytes = save_tensors(tensors)
        return data

    def load(self, data: bytes) -> None:
        """Go on from what `save` has given; states that are not in it begin anew.

        Raises:
            ProtocolError: not of these parameters.
        """
        try:
            tensors = load_tensors(data)
        except Exception as error:  # safetensors has an exception of its own
            raise ProtocolError(f"values that cannot be read ({type(error).__name__})") from error
        states: dict[tuple[int, int], dict[int, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            bucket, *rest = name.split("/", 3)
            if not bucket.isdecimal() or int(bucket) not in self._held:
                raise ProtocolError(f"values of {name!r:.40}, which this server does not hold")
            held = self._held[int(bucket)]
            if not rest:
                if (tensor.shape, tensor.dtype) != (held.values.shape, held.values.dtype):
                    raise ProtocolError(
                        f"bucket {bucket} is {tuple(held.values.shape)} here, {tuple(tensor.shape)} there"
                    )
                held.values.copy_(tensor)
            elif len(rest) == 3 and rest[0].isdecimal() and rest[1].isdecimal():
                states.setdefault((int(bucket), int(rest[0])), {}).setdefault(int(rest[1]), {})[rest[2]] = tensor
            else:
                raise ProtocolError(f"values of {name!r:.40}, which this server does not hold")
        for index, held in self._held.items():
            for number, optimizer in enumerate(held.optimizers):
                found = states.pop((index, number), {})
                optimizer.load([found.pop(i, {}) for i in range(len(optimizer.pieces))])
            held.before.clear()
            held.begun = held.values.clone() if self.layout.rules.compensation else None
        if states:
            raise ProtocolError("optimizer states of parameters that this server does not hold")


def _whole(gradients: Sequence[Gradient]) -> list[Tensor]:
    return [g.payloads[0] if len(g.payloads) == 1 else torch.cat(g.payloads) for g in gradients]


def _used(range_: BucketRange, gradients: Sequence[Gradient]) -> list[bool]:
    """Which parameters of the bucket have a gradient on any worker."""
    bits = [int.from_bytes(g.flags, "little") for g in gradients]
    together = 0
    for word in bits:
        together |= word
    return [bool(together >> member & 1) for member in range(range_.flags)]


def _members(range_: BucketRange, parts: Sequence[Chunk]) -> list[list[int]]:
    """For each chunk, the positions in the bucket of its pieces' parameters."""
    member_of = {piece.parameter: member for member, piece in range_.pieces}
    return [[member_of[piece.parameter] for piece in chunk.pieces] for chunk in parts]
