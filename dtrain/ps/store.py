"""Which steps a server makes, of whose gradients, and who may have the parameters when. No socket and no clock.

A worker's step begins with its settings, goes on with its gradient in buckets, and ends when the server has used them.
Synchronously, a step is made of the gradients of all workers, added in worker order; with backup workers, of those that
are ready first (Chen et al. 2016, section 3). With staleness s, each worker's gradient is an update of its own, and a
worker that is s steps ahead of the slowest waits for it (Ho et al. 2013, section 3); without a bound, nobody waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from dtrain.errors import LayoutError, ProtocolError
from dtrain.ps import layout as layouts
from dtrain.ps.effects import (
    Build,
    Direct,
    Give,
    Gradient,
    Load,
    Measure,
    Reply,
    Save,
    StoreWork,
    TellSquares,
    Update,
)
from dtrain.ps.layout import BucketRange, Layout
from dtrain.ps.turn import Turn, part_sizes
from dtrain.ps.wire import (
    PART_BYTES,
    Begin,
    Chosen,
    Clip,
    Closed,
    Commit,
    Done,
    Fetch,
    Open,
    Pull,
    PullShared,
    Push,
    PushShared,
    Put,
    Ready,
    Received,
    Request,
    Scale,
    pack_ranks,
    unpack_ranks,
)

_REMEMBERED = 1024
"""Steps made of which a server knows the workers."""


class Store:
    """The steps of one server."""

    def __init__(self, world_size: int, server: int) -> None:
        self._world_size = world_size
        self._server = server
        self._opening: dict[int, tuple[int, bytes]] = {}
        self._opening_s = 0.0
        self._parts: dict[int, tuple[int, Tensor]] = {}
        self.layout: Layout | None = None
        self._ranges: dict[int, BucketRange] = {}
        self.version = 0  # updates made
        self._clocks: Counter[int] = Counter()  # steps that each worker has made, where they are its own
        self._pulled: dict[
            int, tuple[int, int]
        ] = {}  # each worker's clock and the version, when it last got parameters
        self._turns: dict[int, Turn] = {}
        self._pulls: dict[tuple[int, int, int], tuple[Pull | PullShared, float]] = {}
        self._updated: set[int] = set()  # buckets that are a step ahead already
        self._ready: dict[int, int] = {}  # ranks that are ready, and their requests
        self._chosen: list[int] | None = None  # ranks that the step is made of
        self._left: set[int] = set()
        self._measured = self._directed = False
        self._made: dict[int, tuple[list[int], float]] = {}  # the last steps: of whom, and what they were clipped by

    # -- the shell asks -----------------------------------------------------------------------------------------------

    def dtype_of(self, bucket: int) -> str:
        """Type of a bucket's numbers.

        Raises:
            ProtocolError: there is no such bucket here.
        """
        return self._range(bucket).dtype

    def nbytes_of(self, bucket: int) -> int:
        """Bytes of this server's part of a bucket."""
        return self._range(bucket).nbytes

    def _range(self, bucket: int) -> BucketRange:
        if bucket not in self._ranges:
            raise ProtocolError(f"bucket {bucket}, which this server does not hold")
        return self._ranges[bucket]

    # -- messages -----------------------------------------------------------------------------------------------------

    def receive(
        self, rank: int, request: Request, payload: Tensor | None, expected: list[int], now: float
    ) -> list[StoreWork]:
        """What follows from a worker's request.

        Raises:
            LayoutError: workers describe different parameters.
            ProtocolError: a request that cannot be meant here and now.
        """
        if isinstance(request, Open) and payload is not None:
            return self._open(rank, request, payload, expected, now)
        if self.layout is None:
            raise ProtocolError(f"{type(request).__name__} before the parameters were described")
        if isinstance(request, Put) and payload is not None:
            return self._put(rank, request, payload)
        if isinstance(request, Fetch):
            return [Save(rank, request)]
        if isinstance(request, Pull | PullShared):
            return self._pull(rank, request, expected, now)
        if isinstance(request, Begin | Push | PushShared) and payload is not None:
            return self._take(rank, request, payload, expected, now)
        if isinstance(request, Ready):
            return self._be_ready(rank, request, expected)
        if isinstance(request, Commit):
            return self._commit(rank, request, expected)
        if isinstance(request, Clip):
            return self._clip(rank, request, expected)
        if isinstance(request, Scale) and payload is not None:
            return self._scale(rank, request, payload, expected)
        raise ProtocolError(f"{type(request).__name__} from worker {rank}, which does not fit here")

    def _open(self, rank: int, request: Open, payload: Tensor, expected: list[int], now: float) -> list[StoreWork]:
        if rank in self._opening:
            raise ProtocolError(f"worker {rank} described its parameters twice")
        self._opening_s = self._opening_s if self._opening else now
        self._opening[rank] = (request.seq, payload.numpy().tobytes())
        return self._agree(expected)

    def _agree(self, expected: list[int]) -> list[StoreWork]:
        """Take on what all have described, once they have."""
        if any(r not in self._opening for r in expected):
            return []
        first = self._opening[expected[0]][1]
        odd = [r for r in expected if self._opening[r][1] != first]
        if odd:
            raise LayoutError(f"workers {odd} describe other parameters, optimizer or rules than worker {expected[0]}")
        asked = [(r, seq) for r, (seq, _) in self._opening.items()]
        self.layout = layouts.decode(first)
        self._ranges = {r.bucket: r for r in self.layout.ranges}
        self._opening.clear()
        self._restart()
        return [Build(self.layout, asked)]

    def _restart(self) -> None:
        self.version = 0
        for state in (self._clocks, self._pulled, self._turns, self._pulls, self._updated, self._ready, self._parts):
            state.clear()
        self._made.clear()
        self._chosen, self._measured, self._directed = None, False, False

    def _put(self, rank: int, request: Put, payload: Tensor) -> list[StoreWork]:
        assert self.layout is not None  # noqa: S101
        limit = 8 * self.layout.nbytes // PART_BYTES + 16
        if rank != 0 or self._turns or not (0 <= request.part < request.parts <= limit):
            raise ProtocolError(f"Put of part {request.part} of {request.parts} from worker {rank}: not here, not now")
        if request.part in self._parts:
            raise ProtocolError(f"part {request.part} was put twice")
        self._parts[request.part] = (request.seq, payload)
        if len(self._parts) < request.parts:
            return [Reply(rank, Done(request.seq))]
        parts = [payload for _, (_, payload) in sorted(self._parts.items())]
        self._parts.clear()
        return [Load(parts, (rank, request.seq))]

    # -- a worker's step ----------------------------------------------------------------------------------------------

    def _take(
        self, rank: int, request: Begin | Push | PushShared, payload: Tensor, expected: list[int], now: float
    ) -> list[StoreWork]:
        assert self.layout is not None  # noqa: S101
        turn = self._turn(rank, request.step, now)
        if isinstance(request, Begin):
            if turn.begin is not None:
                raise ProtocolError(f"worker {rank} began step {request.step} twice")
            turn.begin, turn.settings, turn.answer_to = request, payload, request.seq
        else:
            turn.take(rank, request, payload, self._range(request.bucket))
        work: list[StoreWork] = []
        rules = self.layout.rules
        if rules.early:
            work += self._update_early(expected)
        if self._is_complete(turn):
            turn.complete, turn.since_s = True, now
            if rules.agreed:
                work.append(Reply(rank, Received(turn.answered())))
            elif not rules.synchronous:
                work += self._update_alone(rank, turn, expected)
            else:
                work += self._close_if_all(expected)
        return work

    def _turn(self, rank: int, step: int, now: float) -> Turn:
        assert self.layout is not None  # noqa: S101
        turn = self._turns.get(rank)
        if turn is None:
            rules = self.layout.rules
            due = self.version if rules.synchronous else self._clocks[rank]
            # A worker that came too late may be behind, and one that was told so by another server ahead by a little.
            if step != due and not (rules.agreed and step <= due + 1024):
                raise ProtocolError(f"worker {rank} sent step {step}, and step {due} is due")
            turn = self._turns[rank] = Turn(step, now)
        if turn.step != step:
            raise ProtocolError(f"worker {rank} sent step {step} while its step {turn.step} is not over")
        return turn

    def _is_complete(self, turn: Turn) -> bool:
        return turn.begin is not None and all(turn.has(r) for r in self._ranges.values())

    # -- synchronous --------------------------------------------------------------------------------------------------

    def _update_early(self, expected: list[int]) -> list[StoreWork]:
        """Buckets that all workers have sent, in order, without waiting for the rest of the step."""
        turns = [self._turns.get(r) for r in expected]
        if any(t is None or t.begin is None for t in turns):
            return []
        work: list[StoreWork] = []
        for bucket, range_ in self._ranges.items():
            if bucket in self._updated or not all(t is not None and t.has(range_) for t in turns):
                continue
            self._updated.add(bucket)
            next_ = [k for k in sorted(self._pulls) if k[1] == bucket and self._pulls[k][0].step <= self.version + 1]
            pulls = [(key[0], self._pulls.pop(key)[0]) for key in next_]
            work.append(self._update(bucket, expected, 1.0, pulls=pulls))
        return work

    def _close_if_all(self, expected: list[int]) -> list[StoreWork]:
        assert self.layout is not None  # noqa: S101
        if not all(self._complete_at(r, self.version) for r in expected):
            return []
        self._chosen = list(expected)
        if self.layout.rules.clip:
            return [self._measure(), *(TellSquares((r, self._turns[r].answered())) for r in expected)]
        if self.layout.rules.ratios:
            return [self._direct(1.0), *(TellSquares((r, self._turns[r].answered())) for r in expected)]
        return self._close(expected, 1.0)

    def _measure(self) -> Measure:
        chosen = self._chosen or []
        self._measured = True
        return Measure(self._gradients(chosen), self._mean_factor(chosen))

    def _direct(self, factor: float) -> Direct:
        chosen = self._chosen or []
        self._directed = True
        settings = self._turns[chosen[0]].settings
        assert settings is not None  # noqa: S101
        return Direct(self._gradients(chosen), factor, settings, self._measured)

    def _gradients(self, ranks: list[int]) -> list[list[Gradient]]:
        return [[self._turns[r].gradient(r, b) for r in ranks] for b in self._ranges]

    def _close(self, expected: list[int], factor: float, ratios: list[float] | None = None) -> list[StoreWork]:
        """Make the step of the chosen workers' gradients; everyone whose step it was is done with it."""
        chosen = self._chosen or []
        work: list[StoreWork] = []
        if not self._measured:
            factor = self._mean_factor(chosen)
        for bucket in self._ranges:
            if bucket not in self._updated:
                work.append(self._update(bucket, chosen, factor, measured=self._measured, ratios=ratios))
        for rank in chosen:
            self._turns[rank].counted = len(chosen)
        self._made[self.version] = (chosen, factor if self._measured else 1.0)
        self._made.pop(self.version - _REMEMBERED, None)
        self.version += 1
        self._chosen, self._measured, self._directed = None, False, False
        self._updated.clear()
        for rank in [r for r, t in self._turns.items() if t.step < self.version and r in self._left]:
            del self._turns[rank]
        for rank in [r for r, t in self._turns.items() if t.step < self.version and t.answer_to is not None]:
            work += self._end_turn(rank)
        return [*work, *self._choose(expected), *self._give(expected)]

    def _end_turn(self, rank: int) -> list[StoreWork]:
        """A worker's step is over, with its gradient or without."""
        turn = self._turns[rank]
        if not turn.complete:
            return []
        del self._turns[rank]
        self._clocks[rank] = turn.step + 1
        unused = [] if turn.counted else [r for parts in turn.pushed.values() for r, _ in parts.values()]
        _, factor = self._made.get(turn.step, ((), 1.0))
        closed = Closed(turn.answered(), self.version, 0, turn.counted, factor)
        return [*(Reply(rank, Done(r.seq)) for r in unused), Reply(rank, closed)]

    def _mean_factor(self, chosen: Iterable[int]) -> float:
        """What the sum of the chosen workers' gradients is multiplied by, to be a mean over their samples."""
        ranks = list(chosen)
        if len(ranks) == self._world_size:
            return 1.0
        share = sum(begin.share for r in ranks if (begin := self._turns[r].begin) is not None)
        return 1.0 / share if share > 0 else 0.0

    def _update(
        self,
        bucket: int,
        ranks: Iterable[int],
        factor: float,
        *,
        behind: int = 0,
        measured: bool = False,
        pulls: list[tuple[int, Pull | PullShared]] | None = None,
        ratios: list[float] | None = None,
    ) -> Update:
        ranks = list(ranks)
        gradients = [self._turns[r].gradient(r, bucket) for r in ranks]
        settings = self._turns[ranks[0]].settings
        assert settings is not None  # noqa: S101
        return Update(bucket, gradients, factor, settings, behind, measured, pulls or [], ratios)

    # -- synchronous, of those that are ready first -------------------------------------------------------------------

    def _be_ready(self, rank: int, request: Ready, expected: list[int]) -> list[StoreWork]:
        assert self.layout is not None  # noqa: S101
        if self._server != 0 or not self.layout.rules.agreed:
            raise ProtocolError(f"Ready from worker {rank} to server {self._server}: not asked for")
        turn = self._turns.get(rank)
        if turn is None or turn.step != request.step or not turn.complete:
            raise ProtocolError(f"worker {rank} is ready with step {request.step}, and has not sent it")
        if request.step < self.version:
            chosen, _ = self._made.get(request.step, ([], 1.0))
            return [Reply(rank, Chosen(request.seq, pack_ranks(chosen)))]  # another server may not have heard of it
        if self._chosen is not None and request.step == self.version:
            return [Reply(rank, Chosen(request.seq, pack_ranks(self._chosen)))]
        self._ready[rank] = request.seq
        return self._choose(expected)

    def _choose(self, expected: list[int]) -> list[StoreWork]:
        """Close the step to others, once enough are ready for it."""
        assert self.layout is not None  # noqa: S101
        ready = sorted(r for r in self._ready if self._turns[r].step == self.version)
        quorum = max(1, len(expected) - self.layout.rules.backup_workers)
        if self._chosen is not None or len(ready) < quorum:
            return []
        self._chosen = ready
        return [Reply(r, Chosen(self._ready.pop(r), pack_ranks(ready))) for r in ready]

    def _commit(self, rank: int, request: Commit, expected: list[int]) -> list[StoreWork]:
        assert self.layout is not None  # noqa: S101
        turn = self._turns.get(rank)
        if turn is None or turn.step != request.step or not turn.complete or turn.answer_to is not None:
            raise ProtocolError(f"Commit from worker {rank} for step {request.step}, which it is not at")
        turn.answer_to = request.seq
        if request.step < self.version:
            return self._end_turn(rank)
        chosen = unpack_ranks(request.ranks)
        if request.step > self.version or not chosen:
            return []  # answered when the step is made here
        if chosen != sorted(set(chosen)):
            raise ProtocolError(f"step {request.step} of workers {chosen}: not in order")
        if self._chosen not in (None, chosen) or any(not self._complete_at(r, request.step) for r in chosen):
            raise ProtocolError(f"step {request.step} of workers {chosen}: not what this server was told before")
        if self._measured:
            return [TellSquares((rank, turn.answered()))]
        self._chosen = chosen
        if self.layout.rules.clip:
            return [self._measure(), TellSquares((rank, turn.answered()))]
        return self._close(expected, 1.0)

    def _complete_at(self, rank: int, step: int) -> bool:
        turn = self._turns.get(rank)
        return turn is not None and turn.complete and turn.step == step

    def _clip(self, rank: int, request: Clip, expected: list[int]) -> list[StoreWork]:
        turn = self._turns.get(rank)
        if turn is None or turn.step != request.step or not turn.complete or turn.answer_to is not None:
            raise ProtocolError(f"Clip from worker {rank} for step {request.step}, which it is not at")
        turn.answer_to = request.seq
        if request.step < self.version:
            return self._end_turn(rank)  # another worker was first
        if not self._measured:
            raise ProtocolError(f"Clip from worker {rank} before the norm was told")
        assert self.layout is not None  # noqa: S101
        if not self.layout.rules.ratios:
            return self._close(expected, request.factor)
        directed = [] if self._directed else [self._direct(request.factor)]
        return [*directed, TellSquares((rank, turn.answered()))]

    def _scale(self, rank: int, request: Scale, payload: Tensor, expected: list[int]) -> list[StoreWork]:
        """A worker passes on the ratios. The step is made when all have, or one may still have to ask for the norms."""
        turn = self._turns.get(rank)
        if turn is None or turn.step != request.step or turn.answer_to is not None or not self._directed:
            raise ProtocolError(f"Scale from worker {rank} for step {request.step}, whose norms it was not told")
        pieces = sum(len(r.pieces) for r in self._ranges.values())
        if payload.nbytes != 8 * pieces:
            raise ProtocolError(f"ratios of {payload.nbytes} bytes from worker {rank}, for {pieces} pieces")
        turn.answer_to, turn.ratios = request.seq, payload
        for other, known in self._turns.items():
            if known.ratios is not None and not torch.equal(known.ratios, payload):
                raise ProtocolError(
                    f"workers {min(other, rank)} and {max(other, rank)} passed on different trust ratios: their "
                    "optimizers' settings differ"
                )
        if any(self._turns[r].ratios is None for r in expected):
            return []
        return self._close(expected, 1.0, payload.clone().view(torch.float64).tolist())

    def _unagreed(self, ranks: list[int]) -> list[int]:
        """Of these, whose word the step waits for: all have to pass on the same trust ratios."""
        assert self.layout is not None  # noqa: S101
        asked = self.layout.rules.ratios and (self._measured or self._directed)
        return [r for r in ranks if asked and (turn := self._turns.get(r)) and turn.ratios is None]

    # -- each worker by itself ----------------------------------------------------------------------------------------

    def _update_alone(self, rank: int, turn: Turn, expected: list[int]) -> list[StoreWork]:
        behind = self.version - self._pulled.get(rank, (0, 0))[1]
        share = turn.begin.share if turn.begin is not None else 0.0
        factor = 1.0 / share if share > 0 else 0.0
        work: list[StoreWork] = [self._update(b, [rank], factor, behind=behind) for b in self._ranges]
        self.version += 1
        self._clocks[rank] += 1
        del self._turns[rank]
        work.append(Reply(rank, Closed(turn.answered(), self.version, behind, 1, 1.0)))
        return work + self._give(expected)

    # -- pulls --------------------------------------------------------------------------------------------------------

    def _pull(self, rank: int, request: Pull | PullShared, expected: list[int], now: float) -> list[StoreWork]:
        part = request.part if isinstance(request, Pull) else 0
        if part >= len(part_sizes(self._range(request.bucket))):
            raise ProtocolError(f"bucket {request.bucket} has no part {part}")
        key = (rank, request.bucket, part)
        if key in self._pulls:
            raise ProtocolError(f"worker {rank} pulled bucket {request.bucket}, part {part} twice at once")
        self._pulls[key] = (request, now)
        return self._give(expected)

    def _give(self, expected: list[int]) -> list[StoreWork]:
        """Answer the pulls that may be answered now."""
        work: list[StoreWork] = []
        for key, (request, _) in list(self._pulls.items()):
            if self._may_have(key[0], request.step, request.bucket, expected):
                del self._pulls[key]
                clock = self._clocks[key[0]]
                if self._pulled.get(key[0], (-1, 0))[0] != clock:  # the first bucket's counts: it is the oldest
                    self._pulled[key[0]] = (clock, self.version)
                work.append(Give(key[0], request))
        return work

    def _may_have(self, rank: int, step: int, bucket: int, expected: list[int]) -> bool:
        assert self.layout is not None  # noqa: S101
        rules = self.layout.rules
        if rules.synchronous:
            return step <= self.version + (bucket in self._updated)
        if rules.staleness is None:
            return step <= self._clocks[rank]
        slowest = min((self._clocks[r] for r in expected if r not in self._left), default=step)
        return step <= self._clocks[rank] and step - slowest <= rules.staleness

    # -- going, and being late ----------------------------------------------------------------------------------------

    def leave(self, rank: int, expected: list[int]) -> list[StoreWork]:
        """A worker has finished."""
        self._left.add(rank)
        return self._give(expected)

    def drop(self, rank: int, expected: list[int]) -> list[StoreWork]:
        """A worker is gone, and the job goes on without it. A step that it had sent to all servers may still count.

        Raises:
            LayoutError: it was waited for, and the others describe different parameters.
        """
        self._left.add(rank)
        self._opening.pop(rank, None)
        for key in [k for k in self._pulls if k[0] == rank]:
            del self._pulls[key]
        self._ready.pop(rank, None)
        turn = self._turns.get(rank)
        if turn is not None and not (turn.complete and turn.step >= self.version):
            del self._turns[rank]
        if self._opening:
            return self._agree(expected)
        if self.layout is None:
            return []
        return [*self._choose(expected), *self._give(expected)]

    def is_due(self, step: int) -> bool:
        """Whether a step is one that all workers have a part in, and is not made."""
        return self.layout is not None and self.layout.rules.synchronous and step >= self.version

    def waits_for(self, rank: int) -> str:
        """What others wait for from this worker, in words; empty if they do not."""
        if self._opening:
            return "" if rank in self._opening else "description of the parameters"
        if self.layout is None or not self.layout.rules.synchronous:
            return ""
        others = [r for r, t in self._turns.items() if r != rank and t.step == self.version]
        if rank in self._unagreed([rank]) and others:
            return f"word on the norms of step {self.version}"
        return f"gradient of step {self.version}" if others and not self._complete_at(rank, self.version) else ""

    def late(self, expected: list[int], now: float, timeout_s: float) -> tuple[list[int], str] | None:
        """(ranks, what) if somebody has been waited for for too long."""
        if self._opening and now - self._opening_s > timeout_s:
            return [r for r in expected if r not in self._opening], "the description of its parameters"
        if self.layout is None:
            return None
        if self.layout.rules.synchronous:
            waiting = [t.since_s for t in self._turns.values() if t.step == self.version and t.complete]
            if not waiting or now - min(waiting) <= timeout_s:
                return None
            if ranks := self._unagreed(expected):
                return ranks, f"its word on the norms of step {self.version}"
            ranks = [r for r in expected if not self._complete_at(r, self.version)]
            if not ranks and self._server == 0 and self.layout.rules.agreed and self._chosen is None:
                ranks = [r for r in expected if r not in self._ready]
            return (ranks, f"the gradient of step {self.version}") if ranks else None
        oldest = min((since for _, since in self._pulls.values()), default=now)
        if now - oldest > timeout_s:
            clocks = {r: self._clocks[r] for r in expected if r not in self._left}
            ranks = [r for r, c in clocks.items() if c == min(clocks.values())]
            return ranks, f"the gradient of its step {min(clocks.values())}"
        return None
