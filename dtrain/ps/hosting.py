"""The worker's side of parameters that servers keep: what is pushed where, what is pulled, who is waited for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgpack
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import Parameter

from dtrain.buckets import lay
from dtrain.comm import collectives
from dtrain.comm.base import dtype_name
from dtrain.comm.hosts import HostedBucket, ServerUpdate, StepReport
from dtrain.errors import ProtocolError, UsageError
from dtrain.optim import BLOCK, Layerwise, total_norm
from dtrain.ps import layout as layouts
from dtrain.ps import wire
from dtrain.ps.holder import CHUNK_ELEMENTS
from dtrain.ps.layout import BucketRange, Layout, Rules
from dtrain.ps.link import Link, Take, copy_into
from dtrain.ps.memory import Common
from dtrain.ps.optimizers import hyper, spec_of
from dtrain.ps.outbox import window_bytes
from dtrain.ps.pieces import Piece, chunks, cut, whole_pieces
from dtrain.ps.placement import Range, grain, place, table
from dtrain.ps.states import merge_states, split_state
from dtrain.ps.wire import Answer, Closed

if TYPE_CHECKING:
    from dtrain.ps.client import ParameterServer


class Hosting:
    """See `dtrain.comm.hosts.Hosted`."""

    def __init__(
        self,
        comm: ParameterServer,
        buckets: Sequence[HostedBucket],
        model: Sequence[tuple[str, Parameter]],
        update: ServerUpdate,
    ) -> None:
        self.steps = 0
        self._comm = comm
        self._buckets = list(buckets)
        self._update = update
        self._optimizer = update.optimizer
        spec = spec_of(update.optimizer)
        self._like, pieces = whole_pieces(update.optimizer, [bucket.named for bucket in buckets], model)
        sizes = [[p.numel() for _, p in bucket.named] for bucket in buckets]
        total = sum(map(sum, sizes))
        links = comm.links
        itemsizes = [b.gradient.element_size() for b in buckets]
        self._sizes, self._itemsizes = sizes, itemsizes
        agreed = update.synchronous and (update.backup_workers > 0 or comm.on_loss == "drop")
        if update.backup_workers >= comm.world_size:
            raise UsageError(
                f"backup_workers is {update.backup_workers} of {comm.world_size} workers: leave one at least"
            )
        self._rules = Rules(
            staleness=update.staleness,
            agreed=agreed,
            backup_workers=update.backup_workers,
            clip=update.synchronous and update.clip_grad_norm is not None,
            ratios=spec.layerwise and update.synchronous and not agreed,
            damp=update.damping,
            compensation=update.delay_compensation,
            grain=BLOCK if spec.layerwise else grain(total),
        )
        whole = Layout(self._rules, spec, ()).whole
        self._placement = place(sizes, itemsizes, len(links), whole=whole, step=self._rules.grain)
        self._layouts = [Layout(self._rules, spec, self._ranges_of(link.server, pieces)) for link in links]
        self._used = [
            link
            for link, layout in zip(links, self._layouts, strict=True)
            if layout.ranges or (agreed and link.server == 0)  # which counts who is ready
        ]
        self._owed = 0  # requests without an answer, of those whose answer says nothing more
        self._coming: Counter[int] = Counter()  # of these, by bucket: parts of the values
        self._here: set[int] = set()  # buckets whose values are those after the step under way
        self._closed: list[Closed] | None = None  # what servers said of the step under way, where it was asked for
        self._answers: dict[int, tuple[Answer, bytes]] = {}  # by server, of those whose answer does
        self._settings: list[dict[str, Any]] = []  # of the step under way
        self._open()
        self._commons = [self._common(bucket) for bucket in self._buckets]
        self._values = [self._lay(number) for number in range(len(buckets))]
        self.restore({})
        update.optimizer._opt_called = True  # type: ignore[attr-defined]  # its steps are made elsewhere

    def _ranges_of(self, server: int, pieces: Sequence[Sequence[Piece]]) -> tuple[BucketRange, ...]:
        found = []
        for number, (bucket, ranges) in enumerate(zip(self._buckets, self._placement, strict=True)):
            members = {piece.parameter: member for member, piece in enumerate(pieces[number])}
            dtype = dtype_name(bucket.gradient.dtype)
            for range_ in ranges:
                if range_.server == server:
                    inside = [(members[p.parameter], p) for p in cut(pieces[number], range_.start, range_.stop)]
                    found.append(BucketRange(number, dtype, len(bucket.named), tuple(inside)))
        return tuple(found)

    def _open(self) -> None:
        """Describe the parameters to all servers, which compare what workers say."""
        for link in self._used:
            data = layouts.encode(self._layouts[link.server])
            if len(data) > layouts.MAX_BYTES:
                raise UsageError(f"the model has too many parameters for a server's layout ({len(data)} bytes)")
            self._ask(link, wire.Open, payload=_tensor(data))
        self._await("the other workers' description of the parameters")
        for link in self._used:
            link.allow(2 * self._layouts[link.server].nbytes)

    def _common(self, bucket: HostedBucket) -> Common | None:
        """Memory for parameters that servers keep there once, for all workers of this host."""
        like = bucket.gradient
        if not self._rules.synchronous or self._rules.agreed:
            return None
        return self._comm.common(bucket.numel if like.device.type == "cpu" else 0, like.dtype)

    def _lay(self, number: int) -> Tensor:
        """Lay the parameters of a bucket where servers write them."""
        common, bucket = self._commons[number], self._buckets[number]
        like = bucket.gradient
        if common is not None:
            values = common.flat
        else:
            values = self._comm.empty(bucket.numel, like.dtype, f"gradient/values{number}", like.device)
        lay([parameter for _, parameter in bucket.named], values)
        return values

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self, share: float) -> None:
        self._settings = hyper(self._optimizer)
        settings = _tensor(msgpack.packb(self._settings))
        for link in self._used:
            self._query(link, wire.Begin, self.steps, float(share), payload=settings)

    def push(self, bucket: int, present: Sequence[bool]) -> None:
        flat = self._buckets[bucket].gradient
        bits = sum(1 << member for member, there in enumerate(present) if there)
        flags = bits.to_bytes(-(-len(present) // 8), "little")
        self._comm.traffic.count("gradient/push", flat.nbytes, 0)
        self._comm.on_host(flat, f"gradient/push{bucket}", lambda host: self._push(bucket, host, flags))

    def _push(self, bucket: int, flat: Tensor, flags: bytes) -> None:
        if not self._rules.agreed:  # before the gradient: where all have asked, the step writes where they want it
            self._pull(bucket, self.steps + 1)
        where = self._comm.find(flat)
        for range_ in self._placement[bucket]:
            link = self._comm.links[range_.server]
            if where is not None and link.shares:
                offset = where.offset + range_.start * flat.element_size()
                self._ask(link, wire.PushShared, self.steps, bucket, flags, where.segment, offset)
            else:
                self._send(link, bucket, flat[range_.start : range_.stop], flags)
        if where is None or not self._comm.shares:  # something went by a socket
            self._comm.take_what_came()

    def _send(self, link: Link, bucket: int, flat: Tensor, flags: bytes) -> None:
        """Push by the socket: over a network, where buckets are used one by one, when the ones before have been."""
        step = self.steps

        def send() -> None:
            for number, part in enumerate(wire.parts_of(flat)):
                self._ask(link, wire.Push, step, bucket, number, flags, payload=part)

        box = self._comm.outboxes[link.server]
        window = window_bytes(flat.nbytes) if link.far and self._rules.early else 0
        box.put(flat.nbytes, window, send, haste=bucket - len(self._buckets))  # the last bucket has the first layers
        box.feed()

    def finish(self) -> None:
        self._comm.flush()
        if self._update.early_forward:
            with self._comm.lock:
                for link in self._used:
                    self._comm.outboxes[link.server].hurry()
                self._comm.take_what_came()

    def conclude(self) -> None:
        if not self._rules.early:
            self._closed = self._close(f"step {self.steps}")

    def arrive(self, bucket: int) -> None:
        self._comm.progress(lambda: not self._coming[bucket], f"bucket {bucket} of step {self.steps}")
        self._bring_values(bucket)

    def pull(self) -> StepReport:
        what = f"step {self.steps}"
        closed = self._closed = self._closed or self._close(what)
        self._await(what)
        self._bring_all_values()
        self._closed = None  # only now: who was interrupted waits again
        self.steps = min(c.version for c in closed) if self._rules.agreed else self.steps + 1
        return StepReport(max(c.version for c in closed), max(c.behind for c in closed), min(c.counted for c in closed))

    def _close(self, what: str) -> list[Closed]:
        """What all servers say of the step, when it is made; the values are under way then."""
        answers = self._gather(what)
        if self._rules.agreed:
            answers = self._agree(what)
        if self._rules.clip:
            answers = self._clip(what, answers)
        if self._rules.ratios:
            answers = self._scale(what, answers)
        closed = [answer for answer, _ in answers if isinstance(answer, Closed)]
        if len(closed) < len(self._used):
            raise ProtocolError(f"{what}: a server that has not said that it made the step")
        if self._rules.agreed:  # else they were asked for with the gradients
            for bucket in range(len(self._buckets)):
                self._pull(bucket, min(c.version for c in closed))
        return closed

    def _agree(self, what: str) -> list[tuple[Answer, bytes]]:
        """Have the step made of the workers that are ready first, the same on all servers."""
        ranks = b""
        self._query(self._used[0], wire.Ready, self.steps)
        ((chosen, _),) = self._gather(what, 1)
        if isinstance(chosen, wire.Chosen):
            ranks = chosen.ranks
        for link in self._used:
            self._query(link, wire.Commit, self.steps, ranks)
        return self._gather(what)

    def _clip(self, what: str, answers: list[tuple[Answer, bytes]]) -> list[tuple[Answer, bytes]]:
        """Agree on the factor that brings the mean gradient's norm under the limit; it is the same on all workers."""
        told = self._told(answers)
        if len(told) == len(self._used):
            limit = self._update.clip_grad_norm or 0.0
            norm = total_norm([sums for _, sums in self._in_order(told)])
            factor = limit / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
            for link in self._used:
                self._query(link, wire.Clip, self.steps, min(1.0, factor) if factor > 0 else 0.0)
            return self._gather(what)
        made = [answer for answer, _ in answers if isinstance(answer, Closed)]
        for link in self._used:  # another worker was faster, and the factor is known
            if link.server in told:
                self._query(link, wire.Clip, self.steps, made[0].factor)
        late = dict(
            zip([link.server for link in self._used if link.server in told], self._gather(what, len(told)), strict=True)
        )
        return [late.get(link.server, answer) for link, answer in zip(self._used, answers, strict=True)]

    def _scale(self, what: str, answers: list[tuple[Answer, bytes]]) -> list[tuple[Answer, bytes]]:
        """Agree on the trust ratio of each parameter, which all workers compute alike, and pass them on."""
        told = {server: sums.view(2, -1) for server, sums in self._told(answers).items()}
        if len(told) < len(self._used):
            raise ProtocolError(f"{what}: a server that has not told its norms")
        parts: dict[int, tuple[Piece, list[Tensor]]] = {}
        for piece, sums in self._in_order(told):
            parts.setdefault(piece.parameter, (piece, []))[1].append(sums)
        ratios = {number: self._ratio(piece, sums) for number, (piece, sums) in parts.items()}
        for link in self._used:
            pieces = [piece for range_ in self._layouts[link.server].ranges for _, piece in range_.pieces]
            payload = torch.tensor([ratios[piece.parameter] for piece in pieces], dtype=torch.float64)
            self._query(link, wire.Scale, self.steps, payload=payload.view(torch.uint8))
        return self._gather(what)

    def _ratio(self, piece: Piece, sums: Sequence[Tensor]) -> float:
        """Of a parameter, from its blocks' sums of squares: of its values, and of what moves it."""
        optimizer, group = self._optimizer, self._settings[piece.group]
        assert isinstance(optimizer, Layerwise)  # noqa: S101
        if not optimizer.adapts(group, self._like[piece.parameter].dim()):
            return 1.0
        weights, update = (total_norm([part[row] for part in sums]) for row in (0, 1))
        return optimizer.ratio(group, weights, update)

    def _told(self, answers: Sequence[tuple[Answer, bytes]]) -> dict[int, Tensor]:
        """Sums of squares by server, of those that have told any."""
        return {
            link.server: torch.frombuffer(bytearray(data), dtype=torch.float64)
            for link, (answer, data) in zip(self._used, answers, strict=True)
            if isinstance(answer, wire.Squares)
        }

    def _in_order(self, told: Mapping[int, Tensor]) -> list[tuple[Piece, Tensor]]:
        """Sums of squares in the order of the model, by piece; blocks are the last dimension."""
        found: dict[tuple[int, int, int], tuple[Piece, Tensor]] = {}
        for server, sums in told.items():
            offset = 0
            for range_ in self._layouts[server].ranges:
                for member, piece in range_.pieces:
                    blocks = -(-piece.numel // self._rules.grain)
                    part = sums[..., offset : offset + blocks]
                    found[range_.bucket, member, piece.start] = piece, part
                    offset += blocks
        return [found[key] for key in sorted(found)]

    def _pull(self, bucket: int, step: int) -> None:
        values = self._comm.host_twin(self._values[bucket], f"gradient/pull{bucket}")
        common = self._commons[bucket]
        where = (common and common.place) or self._comm.find(values)
        self._comm.traffic.count("gradient/pull", 0, values.nbytes)
        for range_ in self._placement[bucket]:
            link = self._comm.links[range_.server]
            if where is not None and link.shares:
                offset = where.offset + range_.start * values.element_size()
                self._ask(link, wire.PullShared, step, bucket, where.segment, offset, bucket=bucket)
                continue
            for number, part in enumerate(wire.parts_of(values[range_.start : range_.stop])):
                self._ask(
                    link,
                    wire.Pull,
                    step,
                    bucket,
                    number,
                    take=functools.partial(copy_into, part, what=f"bucket {bucket}"),
                    bucket=bucket,
                )

    def _bring_all_values(self) -> None:
        for bucket in range(len(self._buckets)):
            if bucket not in self._here:
                self._bring_values(bucket)
        self._here.clear()

    def _bring_values(self, bucket: int) -> None:
        """What has come of a bucket is to be seen in its parameters."""
        common, values = self._commons[bucket], self._values[bucket]
        if common is not None:
            common.show_theirs()
        host = self._comm.host_twin(values, f"gradient/pull{bucket}")
        if host is not values:
            values.copy_(host, non_blocking=True)
        self._here.add(bucket)

    # -- between steps ------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        collectives.barrier(self._comm)
        for bucket in range(len(self._buckets)):
            self._pull(bucket, self.steps)
        self._await("the newest parameters")
        self._bring_all_values()
        collectives.barrier(self._comm)

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        if self._comm.rank != 0:
            return {}
        parts = []
        for link in self._used:
            tensors = load_tensors(self._fetch(link))
            for range_ in self._layouts[link.server].ranges:
                for number, chunk in enumerate(self._chunks(link.server, range_)):
                    prefix = f"{range_.bucket}/{number}/"
                    states: list[dict[str, Tensor]] = [{} for _ in chunk]
                    for name in [n for n in tensors if n.startswith(prefix)]:
                        piece, key = name.removeprefix(prefix).split("/")
                        states[int(piece)][key] = tensors[name]
                    parts += list(zip(chunk, states, strict=True))
        return merge_states(parts, self._like)

    def restore(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        collectives.barrier(self._comm)
        if self._comm.rank == 0:
            for link in self._used:
                self._put(link, self._saved_for(link.server, state))
            self._await("parameters to be taken in")
        collectives.barrier(self._comm)

    def state_bytes(self) -> int:
        found = 0
        for link in self._used if self._comm.rank == 0 else []:
            tensors = load_tensors(self._fetch(link))
            found += sum(t.nbytes for name, t in tensors.items() if "/" in name)
        return int(collectives.sum_numbers(self._comm, [found], "metric/state")[0])

    def table(self) -> str:
        names = [f"{link.server} {link.address}" for link in self._comm.links]
        return table(names, self._placement, self._sizes, self._itemsizes)

    def _saved_for(self, server: int, state: Mapping[int, Mapping[str, Any]]) -> bytes:
        """What `Holder.load` takes."""
        tensors: dict[str, Tensor] = {}
        ranges = {number: r for number, rs in enumerate(self._placement) for r in rs if r.server == server}
        for held in self._layouts[server].ranges:
            span: Range = ranges[held.bucket]
            values = self._values[held.bucket][span.start : span.stop]
            tensors[f"{held.bucket}"] = values.detach().to("cpu", copy=True)
            for number, chunk in enumerate(self._chunks(server, held)):
                for piece, kept in enumerate(split_state(state, chunk, self._like)):
                    tensors.update(
                        {f"{held.bucket}/{number}/{piece}/{k}": t.to("cpu").clone() for k, t in kept.items()}
                    )
        data: bytes = save_tensors(tensors)
        return data

    def _chunks(self, server: int, range_: BucketRange) -> list[tuple[Piece, ...]]:
        pieces = [piece for _, piece in range_.pieces]
        limit = max(CHUNK_ELEMENTS, self._rules.grain)
        whole = self._layouts[server].whole
        return [chunk.pieces for chunk in chunks(pieces, limit, self._rules.grain, whole=whole)]

    def _put(self, link: Link, data: bytes) -> None:
        parts = [data[i : i + wire.PART_BYTES] for i in range(0, len(data), wire.PART_BYTES)]
        for number, part in enumerate(parts):
            self._comm.await_credit(link, "parameters")
            self._ask(link, wire.Put, number, len(parts), payload=_tensor(part))

    def _fetch(self, link: Link) -> bytes:
        found: list[bytes] = []
        total = 1
        while len(found) < total:
            self._query(link, wire.Fetch, len(found))
            ((answer, data),) = self._gather("parameters", 1)
            total = answer.parts if isinstance(answer, wire.Piece) else 1
            found.append(data)
        return b"".join(found)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        link: Link,
        kind: type[wire.Request],
        *fields: object,
        take: Take | None = None,
        payload: Tensor | None = None,
        bucket: int | None = None,
    ) -> None:
        """A request that is waited for by `_await`; where it is for a bucket's values, by `arrive` too."""

        def taken(answer: Answer, data: memoryview | None) -> None:
            if take is not None:
                take(answer, data)
            self._owed -= 1
            if bucket is not None:
                self._coming[bucket] -= 1

        with self._comm.lock:
            self._owed += 1
            if bucket is not None:
                self._coming[bucket] += 1
            link.ask(kind, *fields, take=taken, payload=payload)

    def _query(self, link: Link, kind: type[wire.Request], *fields: object, payload: Tensor | None = None) -> None:
        """A request whose answer is wanted from `_gather`; one at a time to each server."""

        def taken(answer: Answer, data: memoryview | None) -> None:
            self._answers[link.server] = (answer, b"" if data is None else bytes(data))

        with self._comm.lock:
            link.ask(kind, *fields, take=taken, payload=payload)

    def _gather(self, what: str, count: int | None = None) -> list[tuple[Answer, bytes]]:
        """The answers of all servers, or of those that were asked, in the order of servers."""
        wanted = len(self._used) if count is None else count
        self._comm.progress(lambda: len(self._answers) >= wanted, what)
        found = [self._answers[server] for server in sorted(self._answers)]
        self._answers.clear()
        return found

    def _await(self, what: str) -> None:
        self._comm.progress(lambda: not self._owed, what)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
