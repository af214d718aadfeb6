"""Each worker keeps the optimizer's state of a part of the parameters, and steps that part for all.

A gradient is summed over workers part by part (reduce-scatter), each worker updates its part of the parameters, and the
parts are gathered: the bytes of an all-reduce, and an n-th of the optimizer's state on each (Rajbhandari et al. 2020,
"ZeRO", section 5.1: P_os). It is what servers do for `ServerUpdate`, with the workers as servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dtrain.buckets import lay
from dtrain.comm import collectives
from dtrain.comm.base import Backend, Done, Scatters, Work
from dtrain.comm.hosts import HostedBucket, StepReport
from dtrain.errors import UsageError
from dtrain.optim import BLOCK, Layerwise
from dtrain.ps.optimizers import decode_hyper, hyper, spec_of
from dtrain.ps.pieces import Piece, cut, whole_pieces
from dtrain.ps.states import merge_states, split_state
from dtrain.ps.update import ShardOptimizer
from dtrain.tables import table


@dataclass(frozen=True, kw_only=True)
class ShardedUpdate:
    """Shard the optimizer's state over the workers: for `replicate(..., update=ShardedUpdate(...))`, on any backend."""

    optimizer: Optimizer
    """Over the model's parameters: one of torch's that updates each element by itself, or LARS or LAMB. It is asked for
    its settings at each step, so that schedules work, and keeps no state itself."""
    clip_grad_norm: float | None = None
    """Largest norm of the mean gradient."""
    early_forward: bool = False
    """See `dtrain.ServerUpdate`."""

    staleness = 0
    backup_workers = 0
    synchronous = True

    def __post_init__(self) -> None:
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise UsageError(f"clip_grad_norm is {self.clip_grad_norm}: give more than 0")


@dataclass(frozen=True)
class _Shard:
    """A worker's part of a bucket."""

    where: slice
    """Elements of the flat tensors."""
    pieces: list[Piece]
    members: list[int]
    """Positions in the bucket of the pieces' parameters."""


class Sharded:
    """Parameters that the workers keep in parts: a `dtrain.comm.hosts.Hosted`.

    The buckets' flat tensors have as many elements for each worker; what is behind the last parameter means nothing.
    """

    def __init__(
        self,
        comm: Backend,
        buckets: Sequence[HostedBucket],
        model: Sequence[tuple[str, Parameter]],
        update: ShardedUpdate,
    ) -> None:
        """
        Raises:
            UsageError: an optimizer that looks at whole tensors, is not known, or lacks a parameter.
        """
        self.steps = 0
        self._comm = comm
        self._buckets = list(buckets)
        self._update = update
        self._spec = spec_of(update.optimizer, "workers that keep parts")
        if self._spec.whole:
            raise UsageError(f"{self._spec.name} needs whole tensors, and workers keep parts: give update='worker'")
        self._like, self._pieces = whole_pieces(update.optimizer, [bucket.named for bucket in buckets], model)
        self._mine = [self._shard(bucket, comm.rank) for bucket in range(len(buckets))]
        self._values = [self._lay(number) for number in range(len(buckets))]
        self._optimizers = [
            ShardOptimizer(self._spec, mine.pieces, values[mine.where]) if mine.pieces else None
            for values, mine in zip(self._values, self._mine, strict=True)
        ]
        self._works: list[Work] = []
        self._gathers: dict[int, Work] | None = None  # by bucket, of a step that was concluded
        self._present: list[bool] = []
        self._flags: tuple[Tensor, Work] = (torch.zeros(0), Done())
        update.optimizer._opt_called = True  # type: ignore[attr-defined]  # its steps are made elsewhere

    def _lay(self, bucket: int) -> Tensor:
        """The parameters of a bucket, and what is behind them."""
        like, named = self._buckets[bucket].gradient, self._buckets[bucket].named
        values = self._comm.empty(like.numel(), like.dtype, f"gradient/values{bucket}", like.device)
        lay([parameter for _, parameter in named], values)
        return values

    def _shard(self, bucket: int, rank: int) -> _Shard:
        each = self._buckets[bucket].gradient.numel() // self._comm.world_size
        members = {piece.parameter: member for member, piece in enumerate(self._pieces[bucket])}
        pieces = cut(self._pieces[bucket], each * rank, each * (rank + 1))
        stop = each * rank + sum(piece.numel for piece in pieces)
        return _Shard(slice(each * rank, stop), pieces, [members[piece.parameter] for piece in pieces])

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self, share: float) -> None:
        self._works, self._present = [], []

    def push(self, bucket: int, present: Sequence[bool]) -> None:
        self._works.append(reduce_scatter(self._comm, self._buckets[bucket].gradient, f"gradient/{bucket}"))
        self._present += present

    def finish(self) -> None:
        flags = torch.tensor(self._present, dtype=torch.int32)
        self._flags = flags, self._comm.all_reduce(flags, "metric/present")

    def conclude(self) -> None:
        flags, work = self._flags
        work.wait()
        used = flags.split([len(pieces) for pieces in self._pieces])
        settings = decode_hyper(self._spec, hyper(self._update.optimizer))
        gradients = [b.gradient[mine.where] for b, mine in zip(self._buckets, self._mine, strict=True)]
        turns = [[bool(u[m]) for m in mine.members] for u, mine in zip(used, self._mine, strict=True)]
        if self._update.clip_grad_norm is not None:
            self._arrive()
            self._clip(gradients)
        if self._spec.layerwise:
            self._arrive()
            self._step_by_layers(gradients, turns, settings)
        order = range(len(self._buckets))
        self._gathers = {}
        for number in reversed(order) if self._update.early_forward else order:
            self._works[number].wait()
            optimizer = self._optimizers[number]
            if optimizer is not None and not self._spec.layerwise:
                optimizer.step(gradients[number], turns[number], settings)
            self._gathers[number] = all_gather(self._comm, self._values[number], f"gradient/values{number}")

    def arrive(self, bucket: int) -> None:
        if self._gathers and bucket in self._gathers:
            self._gathers[bucket].wait()
            del self._gathers[bucket]

    def pull(self) -> StepReport:
        if self._gathers is None:
            self.conclude()
        for bucket in range(len(self._buckets)):
            self.arrive(bucket)
        self._gathers = None
        self.steps += 1
        return StepReport(self.steps, 0, self._comm.world_size)

    def _arrive(self) -> None:
        for work in self._works:
            work.wait()

    def _clip(self, gradients: Sequence[Tensor]) -> None:
        squares = [
            float(torch.linalg.vector_norm(g.double() if g.dtype != torch.float32 else g)) ** 2 for g in gradients
        ]
        norm = collectives.sum_numbers(self._comm, [sum(squares)], "metric/norm")[0] ** 0.5
        factor = (self._update.clip_grad_norm or 0.0) / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
        if not factor >= 1:
            for gradient in gradients:
                gradient.mul_(factor)

    def _step_by_layers(self, gradients: Sequence[Tensor], turns: Sequence[Sequence[bool]], settings: Any) -> None:
        """With a trust ratio for each parameter, of norms that are added up over workers."""
        sums = torch.zeros(2, max(self._like) + 1, dtype=torch.float64)
        for optimizer, gradient, turn in zip(self._optimizers, gradients, turns, strict=True):
            if optimizer is not None:
                found = optimizer.direct(gradient, turn, settings).cpu()
                blocks = [-(-piece.numel // BLOCK) for piece in optimizer.pieces]
                for piece, part in zip(optimizer.pieces, found.split(blocks, dim=1), strict=True):
                    sums[:, piece.parameter] += part.sum(1)
        self._comm.all_reduce(sums.view(-1), "metric/norms").wait()
        norms = sums.sqrt().tolist()
        layerwise = self._update.optimizer
        assert isinstance(layerwise, Layerwise)  # noqa: S101
        for optimizer, gradient, turn in zip(self._optimizers, gradients, turns, strict=True):
            if optimizer is None:
                continue
            ratios = [
                layerwise.ratio(settings[p.group], norms[0][p.parameter], norms[1][p.parameter])
                if layerwise.adapts(settings[p.group], self._like[p.parameter].dim())
                else 1.0
                for p in optimizer.pieces
            ]
            optimizer.move(gradient, turn, ratios)

    # -- between steps ------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Everyone has the newest values already."""

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        parts: list[tuple[Piece, Mapping[str, Tensor]]] = []
        for bucket, optimizer in enumerate(self._optimizers):
            states = [] if optimizer is None else optimizer.state()
            mine = {f"{i}/{key}": t.cpu().clone() for i, state in enumerate(states) for key, t in state.items()}
            everyone = collectives.gather_bytes(self._comm, save_tensors(mine), "metric/state")
            if self._comm.rank == 0:
                for rank, data in enumerate(everyone):
                    shard = self._shard(bucket, rank)
                    parts += zip(shard.pieces, _by_piece(load_tensors(data), len(shard.pieces)), strict=True)
        return merge_states(parts, self._like)

    def restore(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        collectives.broadcast(self._comm, self._values)
        for bucket, optimizer in enumerate(self._optimizers):
            first: dict[str, Tensor] = {}
            if self._comm.rank == 0:
                whole = split_state(state, self._pieces[bucket], self._like)
                first = {f"{i}/{key}": t.clone() for i, kept in enumerate(whole) for key, t in kept.items()}
            data = collectives.broadcast_bytes(self._comm, save_tensors(first) if first else b"", "metric/state")
            if optimizer is None:
                continue
            wholes = _by_piece(load_tensors(data) if data else {}, len(self._pieces[bucket]))
            optimizer.load(
                [
                    {key: _part(t, self._like[piece.parameter], piece) for key, t in wholes[member].items()}
                    for piece, member in zip(self._mine[bucket].pieces, self._mine[bucket].members, strict=True)
                ]
            )

    def state_bytes(self) -> int:
        mine = sum(optimizer.state_bytes for optimizer in self._optimizers if optimizer is not None)
        return int(collectives.sum_numbers(self._comm, [mine], "metric/state")[0])

    def table(self) -> str:
        total = sum(p.numel() * p.element_size() for p in self._like.values())
        rows = []
        for rank in range(self._comm.world_size):
            shards = [self._shard(bucket, rank) for bucket in range(len(self._buckets))]
            nbytes = sum(
                (s.where.stop - s.where.start) * b.gradient.element_size()
                for s, b in zip(shards, self._buckets, strict=True)
            )
            pieces = [piece for s in shards for piece in s.pieces]
            whole = sum(piece.shape is not None for piece in pieces)
            share = f"{100 * nbytes / max(1, total):.1f} %"
            rows.append([f"worker {rank}", f"{nbytes / 1e6:.3f}", share, str(whole), str(len(pieces) - whole)])
        return table(["keeps", "MB", "of all", "whole parameters", "in part"], rows)


def _by_piece(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        number, _, key = name.partition("/")
        found[int(number)][key] = tensor
    return found


def _part(kept: Tensor, parameter: Tensor, piece: Piece) -> Tensor:
    whole = kept.dim() == 1 and kept.numel() == parameter.numel()
    part = kept[piece.start : piece.start + piece.numel] if whole else kept
    return part.to(parameter.device) if whole else part


def reduce_scatter(comm: Backend, flat: Tensor, key: str) -> Work:
    """See `Scatters`; on a backend that cannot do it, everyone gets all of the sum."""
    return comm.reduce_scatter(flat, key) if isinstance(comm, Scatters) else comm.all_reduce(flat, key)


def all_gather(comm: Backend, flat: Tensor, key: str) -> Work:
    """See `Scatters`; on a backend that cannot do it, the others add zeros to each part, bit by bit."""
    if isinstance(comm, Scatters):
        return comm.all_gather(flat, key)
    parts = flat.view(comm.world_size, -1)
    for rank, part in enumerate(parts):
        if rank != comm.rank:
            part.zero_()
    return comm.all_reduce(flat.view(torch.uint8), key)
