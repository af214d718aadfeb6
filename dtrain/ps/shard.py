"""One server's mind: what follows from a message, or from time that passes. No socket, no thread and no clock.

Messages and the time come in; messages to send and work to do go out. Of the work, `Sum` is done by the shell, which
then says `answer`. A fault is told to all workers by the same words, or ends in a new epoch, as the server's terms say.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtrain.errors import CommError, DtrainError, LayoutError, ProtocolError, UsageError
from dtrain.ps import wire
from dtrain.ps.effects import Build, Effect, Forget, GiveUp, Map, SumUp, Tell
from dtrain.ps.layout import Layout
from dtrain.ps.members import Member, Members, Send, Session, Terms, refusal
from dtrain.ps.rounds import Part, Rounds
from dtrain.ps.store import Store
from dtrain.ps.wire import (
    Add,
    AddShared,
    Answer,
    Await,
    Bye,
    Done,
    Hello,
    Inquire,
    Message,
    Ping,
    Request,
    Resume,
    Share,
    Unshare,
)


@dataclass(frozen=True)
class _Waiting:
    """A worker that waits at the workers' common board."""

    told: Await
    """What it has told last."""
    since_s: float
    """When it told of that first."""
    looks_again: bool
    """Whether one of those it waits for had left by then: it has been answered, and is to look once more."""


class Shard:
    """The mind of a server of `terms`."""

    def __init__(self, terms: Terms, now: float) -> None:
        self.members = Members(terms, now)
        self._terms = terms
        self._rounds = Rounds(terms.timeout_s)
        self._awaits: dict[int, _Waiting] = {}  # who waits at the workers' common board
        self.store: Store | None = None

    def receive(self, session: Session, message: Message, payload: Tensor | None, now: float) -> list[Effect]:
        """What follows from one message. A message that cannot be meant is answered to its sender alone.

        Args:
            payload: of the kinds in `wire.WITH_PAYLOAD`; for those in shared memory, what lies there.
        """
        members = self.members
        if members.failed:
            return [] if isinstance(message, Bye) else [Send(session, members.failed)]
        if isinstance(message, Inquire):
            return [Send(session, members.standing)]
        member = members.get(session)
        try:
            if isinstance(message, Hello):
                return self._join(session, message, now)
            if member is None:
                return [] if isinstance(message, Bye) else list(members.stranger(session))
            members.back(member)
            if isinstance(message, Ping):
                return []
            if isinstance(message, Bye):
                return self._leave(member, message.reason, now)
            if isinstance(message, Request):
                return self._request(member, message, payload, now)
            raise ProtocolError(f"{member} sent {type(message).__name__}, which a worker does not send")
        except (UsageError, ProtocolError) as error:
            if member is not None:
                return self._fail(error, also=session)
            members.refused(error)
            return [refusal(session, error)]

    def refuse(self, session: Session, error: DtrainError) -> list[Effect]:
        """A message that could not be read: the end of the job if a worker sent it, else of that peer alone."""
        if self.members.failed:
            return [Send(session, self.members.failed)]
        member = self.members.get(session)
        if member is None:
            return [refusal(session, error)]
        self.members.back(member)
        if isinstance(error, wire.Damaged):
            return [Send(session, wire.Again())]
        return self._fail(type(error)(f"{member} sent {error}"))

    def fail(self, error: DtrainError) -> list[Effect]:
        """The shell cannot do what follows from what workers sent: the end of the job."""
        return [] if self.members.failed else self._fail(error)

    def answer(self, session: Session, answer: Answer, payload: Tensor | None = None) -> list[Send]:
        """The work that a request asked for has been done."""
        return self.members.answer(session, answer, payload)

    def answer_rank(self, rank: int, answer: Answer, payload: Tensor | None = None) -> list[Send]:
        """The same, for a worker by its number."""
        member = self.members.of_rank(rank)
        return [] if member is None else self.members.answer(member.session, answer, payload)

    def away(self, session: Session, now: float) -> list[Effect]:
        """A message could not be delivered."""
        self.members.away(session, now)
        return self._look_for_lost(now)

    @property
    def meets(self) -> bool:
        """Whether workers' gradients of one step make one step."""
        layout = None if self.store is None else self.store.layout
        return layout is not None and layout.rules.synchronous

    def back(self, session: Session) -> None:
        """A message could be delivered."""
        if (member := self.members.get(session)) is not None:
            self.members.back(member)

    def tick(self, now: float) -> list[Effect]:
        """What follows from the passing of time: who is too late."""
        members = self.members
        if members.failed:
            return []
        if absent := members.absent(now):
            return self._fail(absent)
        late = self._rounds.late(members.expected, now)
        if late is None and self.store is not None:
            late = self.store.late(members.expected, now, self._terms.timeout_s)
        for waiting in self._awaits.values():
            if late is None and now - waiting.since_s > self._terms.timeout_s:
                late = waiting.told.ranks, f"{waiting.told.key}, round {waiting.told.call}"
        if late is not None and members.complete:
            who = "; ".join(members.name(r) for r in late[0])
            text = f"{who}: late with {late[1]}, by {self._terms.timeout_s:g} s; alive, but no progress"
            lost = [m for r in late[0] if (m := members.of_rank(r))]
            return [*(GiveUp(m.hello.pid) for m in lost), *self._lose(lost, CommError(text), now)]
        return self._look_for_lost(now)

    # -- coming and going ---------------------------------------------------------------------------------------------

    def _join(self, session: Session, hello: Hello, now: float) -> list[Effect]:
        before = self.members.epoch
        sends = self.members.join(session, hello, now)
        return [*self._forget_epoch(before), *sends]

    def _forget_epoch(self, before: int) -> list[Effect]:
        if self.members.epoch == before:
            return []
        self._rounds.clear()
        self._awaits.clear()
        self.store = None
        return [Forget([])]

    def _leave(self, member: Member, reason: str, now: float) -> list[Effect]:
        member.left = reason or "it had finished"
        if reason:
            return self._lose([member], CommError(f"{member} failed with {reason}"), now)
        if not self.members.complete:
            return self._lose([member], CommError(f"{member} left before all had joined"), now)
        if waits := self._needs(member.rank):
            remedy = "it had finished without an error; give every worker the same number of steps"
            return self._fail(CommError(f"{member} left while others waited for its {waits}: {remedy}"))
        self.members.over = True
        if self.store is not None:
            return list(self.store.leave(member.rank, self.members.expected))
        return []

    def _look_for_lost(self, now: float) -> list[Effect]:
        lost = [] if self.members.failed else self.members.lost(now)
        if not lost:
            return []
        for member in lost:
            member.left = "its connection closed"
        waits = self._waits_for(lost[0].rank)
        during = f" while others waited for its {waits}" if waits else ""
        return self._lose(lost, CommError(f"{lost[0]} is gone: its connection closed{during}"), now)

    def _lose(self, lost: list[Member], error: CommError, now: float) -> list[Effect]:
        """Act on the loss of workers as the terms say."""
        members, on_loss = self.members, self._terms.on_loss
        for member in lost:
            member.left = member.left or "it was lost"
        if members.over and on_loss != "fail" and not any(self._waits_for(m.rank) for m in lost):
            return self._drop(lost)  # what the job was for is done
        if on_loss == "wait" and not members.over:
            before = members.epoch
            sends = members.rewind(str(error), now)
            return [*self._forget_epoch(before), *sends]
        if on_loss == "drop" and members.complete and len(members.expected) > len(lost):
            return self._drop(lost)
        return self._fail(error)

    def _drop(self, lost: list[Member]) -> list[Effect]:
        effects: list[Effect] = [Forget([m.session for m in lost])]
        members = self.members
        for member in lost:
            members.dropped.add(member.rank)
        for member in lost:
            effects += [self._sum_up(parts) for parts in self._rounds.drop(member.rank, members.expected)]
            if self.store is not None:
                try:
                    effects += self.store.drop(member.rank, members.expected)
                except ProtocolError as error:
                    return self._fail(error)
        return effects

    def _fail(self, error: DtrainError, also: Session | None = None) -> list[Effect]:
        self._rounds.clear()
        self._awaits.clear()
        self.store = None
        return [Forget([]), *self.members.fail(error, also)]

    def _waits_for(self, rank: int) -> str:
        """What others wait for from this worker, in words."""
        for waiting in self._awaits.values():
            if rank in waiting.told.ranks:
                return f"{waiting.told.key}, round {waiting.told.call}"
        return self._needs(rank)

    def _needs(self, rank: int) -> str:
        """The same, without the board: what this worker has shown there may not have been seen yet."""
        return self._rounds.waits_for(rank) or (self.store.waits_for(rank) if self.store is not None else "")

    # -- requests -----------------------------------------------------------------------------------------------------

    def _request(self, member: Member, request: Request, payload: Tensor | None, now: float) -> list[Effect]:
        held = payload is not None and isinstance(request, wire.WITH_PAYLOAD)
        repeated = self.members.admit(member, request, payload.nbytes if payload is not None and held else 0)
        if repeated is not None:
            return list(repeated)
        if isinstance(request, Share | Unshare):
            return [Map(member.session, request)]
        if isinstance(request, wire.Recall):
            return [Tell(member.session, request.seq)]
        if isinstance(request, Await | Resume):
            return self._await(member, request, now)
        if isinstance(request, Add | AddShared) and payload is not None:
            return self._add(member, request, payload, now)
        if self.store is None:
            self.store = Store(self._terms.world_size, self._terms.server)
        store, members = self.store, self.members
        if isinstance(request, wire.Begin) and store.is_due(request.step) and (gone := members.gone()):
            named = "; ".join(f"{m} ({m.left})" for m in gone)
            return self._fail(CommError(f"{member} began step {request.step}: not all are here any more: {named}"))
        work = store.receive(member.rank, request, payload, members.expected, now)
        for build in (w for w in work if isinstance(w, Build)):
            self._take_on(build.layout)
        return list(work)

    def _take_on(self, layout: Layout) -> None:
        rules, terms = layout.rules, self._terms
        if terms.on_loss == "drop" and terms.world_size > 1 and rules.synchronous and not rules.agreed:
            raise ProtocolError("rules without agreement, where lost workers are dropped: steps could be made in part")
        self.members.allow(3 * layout.nbytes)  # a gradient, the parameters, and sums of squares

    def _await(self, member: Member, request: Await | Resume, now: float) -> list[Effect]:
        """Workers that sum among themselves tell only what they wait for, again and again: so the late can be named.

        What a worker has shown on the board lies there when it leaves, but others may tell of it still, not having
        looked since. So who waits for one that has left is answered; only if it then tells of the same is it missing.
        """
        before = self._awaits.pop(member.rank, None)
        answered: list[Effect] = list(self.members.answer(member.session, Done(request.seq)))
        if isinstance(request, Resume):
            return answered
        if before is not None and (before.told.key, before.told.call) != (request.key, request.call):
            before = None
        left = [m for rank in request.ranks if (m := self.members.of_rank(rank)) is not None and m.left is not None]
        self._awaits[member.rank] = _Waiting(request, before.since_s if before else now, bool(left))
        if left and before is not None and before.looks_again:
            remedy = "give every worker the same number of steps"
            text = f"{member} waits for {request.key}, round {request.call}, and {left[0]} has left ({left[0].left})"
            return [*answered, *self._fail(CommError(f"{text}: {remedy}"))]
        if self._rounds.waits_for(member.rank, request.key):
            raise LayoutError(f"{request.key}, round {request.call}: {member} sent less of it than the others")
        return answered

    def _add(self, member: Member, add: Add | AddShared, payload: Tensor, now: float) -> list[Effect]:
        gone = self.members.gone()
        if gone or not self.members.complete:
            named = "; ".join(f"{m} ({m.left})" for m in gone) or "some workers"
            return self._fail(CommError(f"{add.key}, round {add.call}: not all are here any more: {named}"))
        wheres = self._rounds.add(member.rank, add, payload, now)
        closed = [self._rounds.close(where, self.members.expected) for where in wheres]
        return [self._sum_up(parts) for parts in closed if parts]

    def _sum_up(self, parts: list[Part]) -> SumUp:
        found = [(m.session, part) for part in parts if (m := self.members.of_rank(part.rank)) is not None]
        return SumUp(found)
