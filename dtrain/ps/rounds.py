"""The server's mind: who is here, which rounds are open, who is missing. No socket, no thread and no clock.

Messages and the time come in, messages go out. A round is one part of one transfer: it opens with the first worker's
contribution and closes with the last one's, when its sum goes to everyone. The job fails as a whole: the first fault
is told to all workers, and to whoever comes later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.comm.ordered import OrderedSum
from dtrain.errors import CommError, ConnectError, DtrainError, LayoutError, ProtocolError, UsageError
from dtrain.ps.wire import Add, Bye, Failed, Hello, Message, Sum, Welcome, fitting

Session = bytes
"""Names one connection of one worker; random, never the rank."""

_Where = tuple[str, int, int]  # key, call, part


@dataclass(frozen=True)
class Send:
    """A message that is to go out."""

    to: Session
    message: Message
    payload: Tensor | None = None


@dataclass
class _Member:
    session: Session
    hello: Hello
    left: str | None = None  # why, once it has

    def __str__(self) -> str:
        return f"worker {self.hello.rank} (pid {self.hello.pid} on {self.hello.host})"


@dataclass
class _Round:
    since_s: float
    dtype: str
    numel: int
    total: OrderedSum
    came: set[int] = field(default_factory=set)


class Rounds:
    """Synchronous rounds over `world_size` workers."""

    def __init__(
        self,
        world_size: int,
        *,
        job_id: str = "",
        host: str,
        pid: int,
        timeout_s: float,
        connect_timeout_s: float,
        now: float,
    ) -> None:
        """
        Args:
            job_id: refuse workers of another job; empty: take any.
            timeout_s: longest time that a round stays open, in seconds.
            connect_timeout_s: longest time from `now` until all workers have joined; less, if a worker that waits for
                them is less patient.
        """
        self.world_size = world_size
        self._job_id = job_id
        self._welcome = Welcome(host, pid)
        self._timeout_s = timeout_s
        self._started_s = now
        self._members: dict[int, _Member] = {}
        self._ranks: dict[Session, int] = {}
        self._open: dict[_Where, _Round] = {}
        self._join_by_s = now + connect_timeout_s
        self._refused = ""
        self.failed: Failed | None = None

    @property
    def finished(self) -> bool:
        """Whether all workers joined and all have left."""
        return len(self._members) == self.world_size and all(m.left is not None for m in self._members.values())

    @property
    def sessions(self) -> list[Session]:
        """Connections that are in use."""
        return [s for s, rank in self._ranks.items() if self._members[rank].left is None]

    def receive(self, session: Session, message: Message, payload: Tensor | None, now: float) -> list[Send]:
        """What follows from one message. A message that cannot be meant is answered to its sender alone."""
        if self.failed:
            return [] if isinstance(message, Bye) else [Send(session, self.failed)]
        try:
            if isinstance(message, Hello):
                return self._join(session, message, now)
            rank = self._ranks.get(session)
            if rank is None:
                raise ProtocolError("a message before Hello")
            if isinstance(message, Bye):
                return self._leave(rank, message.reason)
            if isinstance(message, Add) and payload is not None:
                return self._add(rank, message, payload, now)
            raise ProtocolError(f"{self._name(rank)} sent {type(message).__name__}, which a worker does not send")
        except (UsageError, ProtocolError) as error:
            if isinstance(error, LayoutError) or session in self._ranks:
                return self._fail(error, also=session)
            self._refused = f"; refused: {error}"
            return [_refuse(session, error)]

    def refuse(self, session: Session, error: DtrainError) -> list[Send]:
        """A message that could not be read: the end of the job if a worker sent it, else of that peer alone."""
        if session in self._ranks and not self.failed:
            return self._fail(type(error)(f"{self._members[self._ranks[session]]} sent {error}"))
        return [_refuse(session, error)]

    def lost(self, session: Session) -> list[Send]:
        """The connection is gone."""
        rank = self._ranks.get(session)
        if rank is None or self._members[rank].left is not None or self.failed:
            return []
        member = self._members[rank]
        member.left = "its connection closed"
        return self._fail(CommError(f"{member} is gone: its connection closed{self._during(rank)}"))

    def tick(self, now: float) -> list[Send]:
        """What follows from the passing of time: who is too late."""
        if self.failed:
            return []
        absent = self._absent(range(self.world_size))
        if absent and now > self._join_by_s:
            text = f"workers {absent} of {self.world_size} have not joined within {now - self._started_s:.0f} s"
            return self._fail(ConnectError(text + self._refused))
        for (key, call, _), round_ in self._open.items():
            if now - round_.since_s > self._timeout_s:
                late = "; ".join(self._name(r) for r in range(self.world_size) if r not in round_.came)
                text = f"{late}: late with {key}, round {call}, by {self._timeout_s:g} s; alive, but no progress"
                return self._fail(CommError(text))
        return []

    def _join(self, session: Session, hello: Hello, now: float) -> list[Send]:
        if hello.world_size != self.world_size:
            raise UsageError(
                f"worker {hello.rank} (pid {hello.pid} on {hello.host}) was started with world_size "
                f"{hello.world_size}, the server with {self.world_size}: start all alike"
            )
        if self._job_id and hello.job_id and hello.job_id != self._job_id:
            raise UsageError(f"worker {hello.rank} belongs to job {hello.job_id}, the server to job {self._job_id}")
        if hello.rank >= self.world_size:
            raise UsageError(f"rank {hello.rank} in a job of {self.world_size} workers")
        if hello.rank in self._members or session in self._ranks:
            raise UsageError(f"two workers say that they are {self._name(hello.rank)}: give each its own rank")
        self._members[hello.rank] = _Member(session, hello)
        self._ranks[session] = hello.rank
        self._join_by_s = min(self._join_by_s, now + hello.patience_ms / 1000)
        if len(self._members) < self.world_size:
            return []
        return [Send(m.session, self._welcome) for m in self._members.values()]

    def _leave(self, rank: int, reason: str) -> list[Send]:
        member = self._members[rank]
        member.left = reason or "it had finished"
        waited_for = [where for where, round_ in self._open.items() if rank not in round_.came]
        if reason:
            return self._fail(CommError(f"{member} failed with {reason}"))
        if waited_for:
            remedy = "it had finished without an error; give every worker the same number of steps"
            return self._fail(CommError(f"{member} left{self._during(rank)}: {remedy}"))
        return []

    def _add(self, rank: int, add: Add, payload: Tensor, now: float) -> list[Send]:
        where = (add.key, add.call, add.part)
        round_ = self._open.get(where)
        if round_ is None:
            gone = [m for m in self._members.values() if m.left is not None]
            if gone or self._absent(range(self.world_size)):
                named = "; ".join(f"{m} ({m.left})" for m in gone) or "some workers"
                return self._fail(CommError(f"{add.key}, round {add.call}: not all are here any more: {named}"))
            round_ = _Round(now, add.dtype, payload.numel(), OrderedSum(self.world_size))
            self._open[where] = round_
        if rank in round_.came:
            raise ProtocolError(f"{self._name(rank)} sent {add.key}, round {add.call}, part {add.part} twice")
        if (add.dtype, payload.numel()) != (round_.dtype, round_.numel):
            raise LayoutError(
                f"{add.key}, round {add.call}: {self._name(rank)} sent {payload.numel()} x {add.dtype}, "
                f"workers {sorted(round_.came)} sent {round_.numel} x {round_.dtype}"
            )
        round_.came.add(rank)
        round_.total.add(rank, payload)
        if not round_.total.complete:
            return []
        del self._open[where]
        answer = Sum(add.key, add.call, add.part, 0)
        return [Send(m.session, answer, round_.total.result()) for m in self._members.values()]

    def _fail(self, error: DtrainError, also: Session | None = None) -> list[Send]:
        self.failed = Failed(type(error).__name__, fitting(str(error)))
        self._open.clear()
        everyone = {m.session for m in self._members.values() if m.left is None} | ({also} if also else set())
        return [Send(session, self.failed) for session in sorted(everyone)]

    def _during(self, rank: int) -> str:
        """The first open round that waits for this worker, in words."""
        for (key, call, _), round_ in self._open.items():
            if rank not in round_.came:
                return f" while others waited for its {key}, round {call}"
        return ""

    def _absent(self, ranks: Iterable[int]) -> list[int]:
        return [r for r in ranks if r not in self._members]

    def _name(self, rank: int) -> str:
        return str(self._members[rank]) if rank in self._members else f"worker {rank}"


def _refuse(session: Session, error: DtrainError) -> Send:
    return Send(session, Failed(type(error).__name__, fitting(str(error))))
