"""Who takes part in a job, as one server sees it: joining, leaving, being lost, coming twice. No socket and no clock.

All that a worker says has the same random name, its session: one life of one worker in one epoch of the job. What comes
from another session than the current one is not counted (fencing). Requests are numbered, so that one that comes twice
is answered twice and counted once.
"""

from __future__ import annotations

import hmac
from collections import deque
from dataclasses import dataclass, field, replace

from torch import Tensor

from dtrain.errors import ConnectError, DtrainError, Fenced, Finished, ProtocolError, StateLost, UsageError
from dtrain.ps.wire import Answer, Failed, Hello, Message, Request, Rewind, Standing, Welcome, fitting

Session = bytes
"""Names one life of one worker; random, never the rank, and known to that worker and its server alone."""

ON_LOSS = ("fail", "wait", "drop")
_MOST_UNANSWERED = 100_000
_MOST_REWOUND = 10_000


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a server is told when it is started."""

    world_size: int
    """Number of workers."""
    job_id: str = ""
    """Refuse workers of another job; empty: take any."""
    host: str = ""
    pid: int = 0
    server: int = 0
    """Which of the servers this is."""
    num_servers: int = 1
    on_loss: str = "fail"
    """When a worker is lost: `fail` ends the job, `wait` rewinds it when a replacement has come, `drop` goes on without
    it."""
    timeout_s: float = 60.0
    """Longest time that a round or a step waits for its last worker."""
    connect_timeout_s: float = 60.0
    """Longest time until all workers have joined; also after a loss. Less, if a worker is less patient."""
    grace_s: float = 0.0
    """How long a worker may be out of reach before it counts as lost."""
    credit_bytes: int = 2**30
    """Most payload bytes that one worker may have under way, unanswered or unacknowledged."""

    def __post_init__(self) -> None:
        if self.on_loss not in ON_LOSS:
            raise UsageError(f"on_loss is {self.on_loss!r}: it is one of {', '.join(ON_LOSS)}")


@dataclass(frozen=True)
class Send:
    """A message that is to go out."""

    to: Session
    message: Message
    payload: Tensor | None = None


@dataclass
class Member:
    """A worker that has joined."""

    session: Session
    hello: Hello
    left: str | None = None  # why, once it has
    away_s: float | None = None  # since when it cannot be reached
    low: int = 0  # it has the answers to all requests before this one
    pending: dict[int, int] = field(default_factory=dict)  # unanswered requests and their payload bytes
    answers: dict[int, tuple[Answer, Tensor | None]] = field(default_factory=dict)
    held_bytes: int = 0

    @property
    def rank(self) -> int:
        return self.hello.rank

    def __str__(self) -> str:
        return _who(self.hello)


class Members:
    """The workers of one epoch of a job."""

    def __init__(self, terms: Terms, now: float) -> None:
        self.terms = terms
        self.epoch = 0
        self.failed: Failed | None = None
        self.dropped: set[int] = set()  # ranks that the job goes on without
        self.complete = False  # whether all have joined in this epoch
        self.over = False  # whether some have left well: the job is done, and cannot be rewound
        self._by_rank: dict[int, Member] = {}
        self._by_session: dict[Session, Member] = {}
        self._rewound: deque[Session] = deque(maxlen=_MOST_REWOUND)  # of earlier epochs: they are to come again
        self._incarnations: dict[int, int] = {}  # the newest of each rank, in all epochs
        self._credit_bytes = terms.credit_bytes
        self._since_s = now
        self._join_by_s = now + terms.connect_timeout_s
        self._refused = ""

    # -- who is there -------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all joined and all have left."""
        return self.complete and all(m.left is not None for m in self._by_rank.values())

    @property
    def present(self) -> list[Member]:
        """Those that have joined and not left, in worker order."""
        return [m for _, m in sorted(self._by_rank.items()) if m.left is None]

    @property
    def expected(self) -> list[int]:
        """Ranks that a round waits for."""
        return [r for r in range(self.terms.world_size) if r not in self.dropped]

    def get(self, session: Session) -> Member | None:
        """Who speaks on that connection, if it takes part."""
        member = self._by_session.get(session)
        return member if member is not None and member.left is None else None

    def of_rank(self, rank: int) -> Member | None:
        return self._by_rank.get(rank)

    def name(self, rank: int) -> str:
        return str(self._by_rank[rank]) if rank in self._by_rank else f"worker {rank}"

    def gone(self) -> list[Member]:
        """Those that have left and were not dropped."""
        return [m for m in self._by_rank.values() if m.left is not None and m.rank not in self.dropped]

    @property
    def standing(self) -> Standing:
        """What is told to whoever asks how the server is."""
        terms = self.terms
        return Standing(terms.server, terms.num_servers, len(self.present), terms.world_size)

    def stranger(self, session: Session) -> list[Send]:
        """The answer to a message other than Hello from a connection that does not take part."""
        if self.failed is not None:
            return [Send(session, self.failed)]
        if session in self._rewound:
            return [Send(session, Rewind(self.epoch, "the job has been rewound"))]
        if session in self._by_session:
            return [refusal(session, Fenced("the job goes on without this worker: it was lost"))]
        text = "this server does not know this worker: a message before Hello, or the server was started anew"
        return [refusal(session, StateLost(text))]

    # -- coming -------------------------------------------------------------------------------------------------------

    def join(self, session: Session, hello: Hello, now: float) -> list[Send]:
        """A worker asks to take part.

        Raises:
            UsageError: it has no place here.
        """
        self._refuse_misplaced(hello)
        if (member := self.get(session)) is not None and replace(hello, probe=member.hello.probe) == member.hello:
            return [self._welcome(member)] if self.complete else []  # sent again, as the network may have lost it
        if session in self._by_session:
            raise ProtocolError(f"{self.name(hello.rank)} said Hello twice on one connection")
        if self.over or hello.rank in self.dropped:
            text = "has finished" if self.over else f"goes on without worker {hello.rank}, which it had lost"
            return [refusal(session, Finished(f"the job {text}"))]
        newest = self._incarnations.get(hello.rank, 0)
        if hello.incarnation < newest:
            return [refusal(session, Fenced(f"worker {hello.rank} has been started again: another has its place"))]
        self._incarnations[hello.rank] = hello.incarnation
        if hello.epoch < self.epoch or session in self._rewound:
            return [Send(session, Rewind(self.epoch, "it comes from an earlier epoch of the job"))]
        sends: list[Send] = []
        if hello.epoch > self.epoch:
            if self.terms.on_loss != "wait":
                raise UsageError(f"worker {hello.rank} comes from epoch {hello.epoch} of a job that is never rewound")
            sends = self.rewind(f"worker {hello.rank} came from epoch {hello.epoch}", now, epoch=hello.epoch)
        known = self._by_rank.get(hello.rank)
        if known is not None and self.terms.on_loss == "wait" and hello.incarnation > known.hello.incarnation:
            sends = self.rewind(f"{_who(hello)} was started again", now)
            return [*sends, Send(session, Rewind(self.epoch, "the job is being rewound"))]
        if known is not None:
            raise UsageError(f"two workers say that they are {known}: give each its own rank")
        member = Member(session, hello)
        self._by_rank[hello.rank] = self._by_session[session] = member
        self._join_by_s = min(self._join_by_s, now + hello.patience_ms / 1000)
        if len(self._by_rank) < self.terms.world_size:
            return sends
        self.complete = True
        return [*sends, *map(self._welcome, self._by_rank.values())]

    def _welcome(self, member: Member) -> Send:
        terms, probe = self.terms, member.hello.probe
        welcome = Welcome(terms.host, terms.pid, self.epoch, terms.credit_bytes, probe, terms.on_loss)
        return Send(member.session, welcome)

    def refused(self, error: DtrainError) -> None:
        """Remember why somebody was not taken: perhaps that is why all wait."""
        self._refused = f"; refused: {error}"

    def _refuse_misplaced(self, hello: Hello) -> None:
        terms = self.terms
        who = _who(hello)
        if terms.job_id and hello.job_id and not hmac.compare_digest(hello.job_id.encode(), terms.job_id.encode()):
            raise UsageError(f"{who} belongs to another job than this server")
        if hello.world_size != terms.world_size:
            raise UsageError(
                f"{who} was started with world_size {hello.world_size}, the server with {terms.world_size}: start all "
                "alike"
            )
        if (hello.server, hello.num_servers) != (terms.server, terms.num_servers):
            raise UsageError(
                f"{who} takes this for server {hello.server} of {hello.num_servers}, and it is server {terms.server} "
                f"of {terms.num_servers}: name all servers to all workers, in the same order"
            )
        if hello.rank >= terms.world_size:
            raise UsageError(f"rank {hello.rank} in a job of {terms.world_size} workers")

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, member: Member, request: Request, nbytes: int) -> list[Send] | None:
        """Take a request in; None if it is new, else what a repeated one is answered with.

        Raises:
            ProtocolError: more under way than the worker may have.
        """
        if request.low > request.seq:
            raise ProtocolError(f"request {request.seq}, with all answers before {request.low}: cannot be meant")
        if request.low > member.low:
            for seq in [s for s in member.answers if s < request.low]:
                _, payload = member.answers.pop(seq)
                member.held_bytes -= 0 if payload is None else payload.nbytes
            member.low = request.low
        if request.seq < member.low or request.seq in member.pending:
            return []
        if request.seq in member.answers:
            answer, payload = member.answers[request.seq]
            return [Send(member.session, answer, payload)]
        if request.seq >= member.low + _MOST_UNANSWERED:
            raise ProtocolError(f"request {request.seq}, and {member.low} is unanswered: the number cannot be meant")
        if member.held_bytes + nbytes > self._credit_bytes:
            limit_mib = self._credit_bytes / 2**20
            raise ProtocolError(f"overload: {member} has more than {limit_mib:.0f} MiB under way at once")
        member.pending[request.seq] = nbytes
        member.held_bytes += nbytes
        return None

    def allow(self, nbytes: int) -> None:
        """Workers may have so much more under way: gradients and parameters of what the server holds."""
        self._credit_bytes = self.terms.credit_bytes + nbytes

    def answer(self, session: Session, answer: Answer, payload: Tensor | None = None) -> list[Send]:
        """The one answer to a request; kept until the worker says that it has it. Nothing, if the worker is gone."""
        member = self.get(session)
        if member is None or answer.seq not in member.pending:
            return []
        member.held_bytes += (0 if payload is None else payload.nbytes) - member.pending.pop(answer.seq)
        member.answers[answer.seq] = (answer, payload)
        return [Send(session, answer, payload)]

    # -- going --------------------------------------------------------------------------------------------------------

    def away(self, session: Session, now: float) -> None:
        """A worker cannot be reached just now."""
        member = self.get(session)
        if member is not None and member.away_s is None:
            member.away_s = now

    def back(self, member: Member) -> None:
        """It has been heard of."""
        member.away_s = None

    def lost(self, now: float) -> list[Member]:
        """Those that have been out of reach for too long."""
        return [m for m in self.present if m.away_s is not None and now - m.away_s >= self.terms.grace_s]

    def fail(self, error: DtrainError, also: Session | None = None) -> list[Send]:
        """The job is over: everyone is told, and whoever comes later."""
        self.failed = Failed(type(error).__name__, fitting(str(error)))
        everyone = {m.session for m in self._by_rank.values() if m.left is None} | ({also} if also else set())
        return [Send(session, self.failed) for session in sorted(everyone)]

    def rewind(self, reason: str, now: float, epoch: int | None = None) -> list[Send]:
        """A new epoch: everyone is to come again."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        sends = [Send(m.session, Rewind(self.epoch, fitting(reason, 1000))) for m in self.present]
        self._rewound.extend(self._by_session)  # who was lost too: perhaps it only could not be reached
        self._credit_bytes = self.terms.credit_bytes
        self._by_rank.clear()
        self._by_session.clear()
        self.dropped.clear()
        self.complete = False
        self._since_s, self._join_by_s, self._refused = now, now + self.terms.connect_timeout_s, ""
        return sends

    def absent(self, now: float) -> ConnectError | None:
        """The error, if some have not joined in time."""
        missing = [r for r in range(self.terms.world_size) if r not in self._by_rank]
        if not missing or now <= self._join_by_s:
            return None
        waited_s = now - self._since_s
        text = f"workers {missing} of {self.terms.world_size} have not joined within {waited_s:.0f} s"
        return ConnectError(text + self._refused)


def refusal(session: Session, error: DtrainError) -> Send:
    """An error that concerns one peer alone."""
    return Send(session, Failed(type(error).__name__, fitting(str(error))))


def _who(hello: Hello) -> str:
    """A worker in words; its host's name is what it says, and may hold anything."""
    host = "".join(c if c.isprintable() else "?" for c in hello.host[:255])
    return f"worker {hello.rank} (pid {hello.pid} on {host})"
