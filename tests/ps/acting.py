"""A server without a socket, a worker without a model, and a network that loses things: for tests of the protocol."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtrain.optim import LARS
from dtrain.ps import layout as layouts
from dtrain.ps import turn, wire
from dtrain.ps.effects import (
    Build,
    Direct,
    Effect,
    Forget,
    Give,
    GiveUp,
    Gradient,
    Load,
    Map,
    Measure,
    Reply,
    Save,
    StoreWork,
    SumUp,
    TellSquares,
    Update,
)
from dtrain.ps.layout import BucketRange, Layout, Rules
from dtrain.ps.members import Send, Session, Terms
from dtrain.ps.optimizers import spec_of
from dtrain.ps.pieces import Piece
from dtrain.ps.shard import Shard
from dtrain.ps.sums import Reduction
from dtrain.ps.wire import Done, Message, Request

NUMEL = 3
RATIO = 0.25
"""The trust ratio of every parameter."""


def session(rank: int, server: int = 0) -> Session:
    return b"session-%d-%d" % (rank, server)


def hello(rank: int, world_size: int = 2, **more: Any) -> wire.Hello:
    fields = {"job_id": "", "host": f"host{rank}", "pid": 100 + rank, "patience_ms": 10**9, "epoch": 0}
    fields |= {"incarnation": 0, "server": 0, "num_servers": 1, "probe": ""}
    return wire.Hello(rank=rank, world_size=world_size, **{**fields, **more})


@functools.cache
def described(rules: Rules, buckets: tuple[int, ...], numel: int = NUMEL) -> Tensor:
    """A layout's bytes: of so many float64 numbers in each bucket."""
    cls: type[torch.optim.Optimizer] = LARS if rules.ratios else torch.optim.SGD
    spec = spec_of(cls([torch.nn.Parameter(torch.zeros(1))], lr=1.0))  # type: ignore[call-arg]
    ranges = tuple(BucketRange(b, "float64", 1, ((0, Piece(b, 0, 0, numel)),)) for b in buckets)
    return torch.frombuffer(bytearray(layouts.encode(Layout(rules, spec, ranges))), dtype=torch.uint8)


def gradient(rank: int, step: int, bucket: int, numel: int = NUMEL) -> Tensor:
    """Numbers that tell whose they are; their sums are exact."""
    return torch.arange(numel, dtype=torch.float64) / 4 + (rank + 1) * 4096 + step * 64 + bucket


class Host:
    """Does what a server does with the effects, on a few numbers; and writes down what was done."""

    def __init__(self, terms: Terms, now: float = 0.0, net: Net | None = None) -> None:
        self.terms = terms
        self.net = net
        self.shard = Shard(terms, now)
        self.sent: list[Send] = []
        self.forgotten: list[list[Session]] = []
        self.given_up: list[int] = []
        self.jobs: deque[Callable[[], None]] = deque()
        self.values: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.loaded = b""
        self.summed: list[tuple[int, list[int], Tensor]] = []  # epoch, ranks, sum
        self.updates: list[tuple[int, Update]] = []  # with the epoch
        self.snaps: dict[tuple[int, int], list[Tensor]] = {}  # values of a bucket in an epoch, by version

    def receive(self, who: Session, message: Message, payload: Tensor | None = None, now: float = 1.0) -> list[Send]:
        """What the server sends when this has come and all work is done."""
        self.act(self.shard.receive(who, message, payload, now))
        return self.flush()

    def flush(self) -> list[Send]:
        while self.jobs:
            self.jobs.popleft()()
        sent, self.sent = self.sent, []
        return sent

    def act(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.sent.append(effect)
            elif isinstance(effect, Map):
                self.act(self.shard.answer(effect.session, Done(effect.request.seq)))
            elif isinstance(effect, GiveUp):
                self.given_up.append(effect.pid)
            elif isinstance(effect, Forget):
                self.forgotten.append(effect.sessions)
                if not effect.sessions:
                    self.jobs.clear()
                    self.values.clear()
            elif isinstance(effect, Build):
                self.values = {r.bucket: torch.zeros(r.numel, dtype=torch.float64) for r in effect.layout.ranges}
                self.snaps |= {(self.epoch, b): [v.clone()] for b, v in self.values.items()}
                for rank, seq in effect.asked:
                    self._answer(rank, Done(seq))
            elif isinstance(effect, Load):
                self.loaded = b"".join(p.numpy().tobytes() for p in effect.parts)
                self._answer(effect.asked[0], Done(effect.asked[1]))
            else:
                self.jobs.append(functools.partial(self._do, effect))

    @property
    def epoch(self) -> int:
        return self.shard.members.epoch

    def _answer(self, rank: int, answer: wire.Answer, payload: Tensor | None = None) -> None:
        self.act(self.shard.answer_rank(rank, answer, payload))

    def _do(self, work: SumUp | StoreWork) -> None:
        if isinstance(work, SumUp):
            self._sum_up(work)
        elif isinstance(work, Reply):
            self._answer(work.rank, work.answer)
        elif isinstance(work, Save):
            self._answer(work.rank, wire.Piece(work.request.seq, 1, 0), torch.zeros(8, dtype=torch.uint8))
        elif isinstance(work, Measure):
            for bucket, gradients in zip(self.values, work.gradients, strict=True):
                self.sums[bucket] = added(gradients) * work.factor
        elif isinstance(work, Direct):
            for bucket, gradients in zip(self.values, work.gradients, strict=True):
                total = self.sums[bucket] if work.measured else added(gradients)
                self.sums[bucket] = total * work.factor
        elif isinstance(work, TellSquares):
            squares = torch.stack([t.square().sum() for t in self.sums.values()])
            self._answer(work.asked[0], wire.Squares(work.asked[1], 0), squares.view(torch.uint8))
        elif isinstance(work, Update):
            self._update(work)
        elif isinstance(work, Give):
            self._give(work.rank, work.request)

    def _sum_up(self, work: SumUp) -> None:
        payloads = [part.payload for _, part in work.parts]
        total = torch.empty_like(payloads[0])
        Reduction(payloads, [total]).finish()
        self.summed.append((self.epoch, [part.rank for _, part in work.parts], total))
        for who, part in work.parts:
            if part.shared:
                part.payload.copy_(total)
                if part.ends_request():
                    self.act(self.shard.answer(who, Done(part.seq)))
            else:
                self.act(self.shard.answer(who, wire.Sum(part.seq, 0), total))

    def _update(self, work: Update) -> None:
        self.updates.append((self.epoch, work))
        if work.ratios is not None:
            self.values[work.bucket] += self.sums[work.bucket] * work.ratios[list(self.values).index(work.bucket)]
        else:
            total = self.sums[work.bucket] if work.measured else added(work.gradients)
            self.values[work.bucket] += total * work.factor
        self.snaps[self.epoch, work.bucket].append(self.values[work.bucket].clone())
        for g in work.gradients:
            for seq in g.asked:
                self._answer(g.rank, Done(seq))
        for rank, pull in work.pulls:
            self._give(rank, pull)

    def _give(self, rank: int, pull: wire.Pull | wire.PullShared) -> None:
        if self.net is not None:
            self.net.on_give(self, rank, pull)
        values = self.values[pull.bucket]
        if isinstance(pull, wire.PullShared):
            self._answer(rank, Done(pull.seq))
        else:
            most = turn.PART_BYTES // 8
            self._answer(rank, wire.Sum(pull.seq, 0), values[pull.part * most : (pull.part + 1) * most].clone())


def added(gradients: Sequence[Gradient]) -> Tensor:
    total = torch.cat(gradients[0].payloads)
    for g in gradients[1:]:
        total = total + torch.cat(g.payloads)
    return total


# -- workers and their network ----------------------------------------------------------------------------------------


@dataclass
class Ticket:
    """A request and, once it has come, its answer."""

    message: Request
    payload: Tensor | None
    answer: wire.Answer | None = None
    brought: Tensor | None = None


@dataclass(frozen=True)
class Packet:
    """A message on its way between a worker's connection and a server."""

    up: bool
    server: int
    session: Session
    message: Message
    payload: Tensor | None


Script = Generator[list[Ticket], None, None]


@dataclass
class Line:
    """One connection."""

    session: Session
    welcome: wire.Welcome | None = None
    next: int = 0
    asked: dict[int, Ticket] = field(default_factory=dict)


class Worker:
    """Numbers its requests, sends the unanswered again, comes again when the job is rewound."""

    def __init__(self, net: Net, rank: int, script: Callable[[Worker], Script]) -> None:
        self.net = net
        self.rank = rank
        self.state = "runs"  # or done, late, dead
        self.incarnation = self.epoch = 0
        self.closed: list[tuple[int, int, list[wire.Closed]]] = []  # epoch, step, of all servers
        self.pulled: dict[tuple[int, int, int, int], Tensor] = {}  # by epoch, step, bucket and part
        self._make = script
        self.connect()

    def connect(self) -> None:
        """Say Hello to all servers, in this epoch."""
        self._script: Script | None = None
        self._waits: list[Ticket] = []
        self.lines = [Line(self.net.new_session()) for _ in self.net.hosts]
        for server in range(len(self.lines)):
            self._say_hello(server)

    def _say_hello(self, server: int) -> None:
        life = {"epoch": self.epoch, "incarnation": self.incarnation}
        place = {"server": server, "num_servers": len(self.lines)}
        self.net.put(
            True, server, self.lines[server].session, hello(self.rank, self.net.world_size, **life, **place), None
        )

    def restart(self) -> None:
        """Another process takes its place."""
        self.incarnation, self.epoch, self.state = self.incarnation + 1, 0, "runs"
        self.connect()

    def ask(self, server: int, kind: Callable[..., Request], *fields: object, payload: Tensor | None = None) -> Ticket:
        line = self.lines[server]
        seq, line.next = line.next, line.next + 1
        sums = () if payload is None else (0,)
        ticket = Ticket(kind(seq, next(iter(line.asked), seq), *fields, *sums), payload)
        line.asked[seq] = ticket
        self.net.put(True, server, line.session, ticket.message, payload)
        return ticket

    def resend(self, server: int) -> None:
        if self.state != "runs":
            return
        line = self.lines[server]
        if line.welcome is None:
            self._say_hello(server)
        for ticket in line.asked.values():
            self.net.put(True, server, line.session, ticket.message, ticket.payload)

    def take(self, packet: Packet) -> None:
        line, message = self.lines[packet.server], packet.message
        if self.state != "runs" or packet.session != line.session:
            return
        if isinstance(message, wire.Answer):
            ticket = line.asked.pop(message.seq, None)
            if ticket is not None:
                ticket.answer, ticket.brought = message, packet.payload
        elif isinstance(message, wire.Welcome):
            assert message.epoch == self.epoch
            line.welcome = message
        elif isinstance(message, wire.Again):
            self.resend(packet.server)
        elif isinstance(message, wire.Rewind):
            self.epoch = max(self.epoch, message.epoch)
            self.connect()
        else:
            assert isinstance(message, wire.Failed), message
            self._end(message)
        self._go_on()

    def _end(self, message: wire.Failed) -> None:
        if message.kind == "StateLost" and self.net.on_loss == "wait":
            self.epoch += 1
            self.connect()
            return
        assert message.kind in ("Fenced", "Finished"), message
        self.state = "late" if message.kind == "Finished" else "dead"

    def _go_on(self) -> None:
        if self.state != "runs" or not all(line.welcome for line in self.lines):
            return
        if self._script is None:
            self._script = self._make(self)
        while all(t.answer is not None for t in self._waits):
            try:
                self._waits = next(self._script)
            except StopIteration:
                self.state = "done"
                for server, line in enumerate(self.lines):
                    self.net.put(True, server, line.session, wire.Bye(""), None)
                return


class Net:
    """Servers, workers, and what is on its way between them."""

    def __init__(
        self, world_size: int, servers: int, on_loss: str, script: Callable[[Worker], Script], **terms: Any
    ) -> None:
        self.world_size, self.on_loss, self.now = world_size, on_loss, 0.0
        limits = {"timeout_s": 1e9, "connect_timeout_s": 1e9, "grace_s": 5.0, **terms}
        self._terms = [
            Terms(world_size=world_size, server=s, num_servers=servers, on_loss=on_loss, **limits)
            for s in range(servers)
        ]
        self.hosts = [Host(t, net=self) for t in self._terms]
        self.past: list[Host] = []
        self.on_give: Callable[[Host, int, wire.Pull | wire.PullShared], None] = lambda host, rank, pull: None
        self.packets: list[Packet] = []
        self.dead: set[Session] = set()
        self._sessions = 0
        self._owner: dict[Session, Worker] = {}
        self.workers: list[Worker] = []
        for rank in range(world_size):
            self.workers.append(Worker(self, rank, script))

    def new_session(self) -> Session:
        self._sessions += 1
        return b"%d" % self._sessions

    def put(self, up: bool, server: int, who: Session, message: Message, payload: Tensor | None) -> None:
        wire.encode(message)
        self.packets.append(Packet(up, server, who, message, payload))

    def deliver(self, index: int) -> None:
        packet = self.packets.pop(index)
        if packet.up:
            if packet.session not in self.dead:
                host = self.hosts[packet.server]
                if isinstance(packet.message, wire.Bye) and (member := host.shard.members.get(packet.session)):
                    assert (member.held_bytes, member.pending) == (0, {})
                    assert all(seq >= member.low for seq in member.answers)
                host.act(host.shard.receive(packet.session, packet.message, packet.payload, self.now))
                self.collect(packet.server)
            return
        for worker in self.workers:
            worker.take(packet)

    def damage(self, index: int) -> None:
        packet = self.packets.pop(index)
        if not packet.up:
            for worker in self.workers:
                if packet.session == worker.lines[packet.server].session:
                    worker.resend(packet.server)
        elif not isinstance(packet.message, wire.Hello) and packet.session not in self.dead:
            host = self.hosts[packet.server]
            if host.shard.members.get(packet.session) is not None:
                host.act(host.shard.refuse(packet.session, wire.Damaged("a payload whose checksum is wrong")))
                self.collect(packet.server)

    def work(self, server: int) -> None:
        """One piece of work of a server."""
        host = self.hosts[server]
        if host.jobs:
            host.jobs.popleft()()
        self.collect(server)

    def collect(self, server: int) -> None:
        host = self.hosts[server]
        sent, host.sent = host.sent, []
        for send in sent:
            self.put(False, server, send.to, send.message, send.payload)

    def kill(self, rank: int) -> None:
        worker = self.workers[rank]
        worker.state = "dead"
        self.dead |= {line.session for line in worker.lines}

    def notice(self, server: int) -> None:
        """The server finds that connections are gone."""
        host = self.hosts[server]
        found = [w.lines[server].session for w in self.workers if w.state == "dead"]
        for who in (self.dead | set(found)) & {m.session for m in host.shard.members.present}:
            host.act(host.shard.away(who, self.now))
        self.now += 6.0  # more than the grace
        host.act(host.shard.tick(self.now))
        self.collect(server)

    def restart_server(self, server: int) -> None:
        self.past.append(self.hosts[server])
        self.hosts[server] = Host(self._terms[server], self.now, self)
        self.packets = [p for p in self.packets if p.server != server]

    def settle(self) -> bool:
        """Let everything happen that is still to happen, without more trouble; whether the job has ended well."""
        for _ in range(100):
            while self.packets or any(host.jobs for host in self.hosts):
                if self.packets:
                    self.deliver(0)
                for server in range(len(self.hosts)):
                    self.work(server)
            for server in range(len(self.hosts)):
                self.notice(server)
            for worker in self.workers:
                if worker.state == "dead" and self.on_loss == "wait":
                    worker.restart()
                for server in range(len(self.hosts)):
                    worker.resend(server)
            if not self.packets and all(w.state != "runs" for w in self.workers):
                return True
        running = [w for w in self.workers if w.state == "runs"]
        early = (
            self.on_loss == "wait"
            and any(w.state == "done" for w in self.workers)
            and not any(line.welcome for w in running for line in w.lines)
        )
        # A worker was lost just when others had finished: the servers rewound the job, and wait for those in vain.
        assert early, f"nothing happens any more: {[w.state for w in self.workers]}"
        return False


def hosted(
    rules: Rules, buckets: Sequence[tuple[int, ...]], steps: int, factor: float = 0.5
) -> Callable[[Worker], Script]:
    """A worker's life with parameters that servers hold. `buckets` are those of each server."""

    def script(worker: Worker) -> Script:
        servers = range(len(buckets))
        share = 1 / worker.net.world_size
        yield [worker.ask(s, wire.Open, payload=described(rules, buckets[s])) for s in servers]
        yield [barrier(worker, 0)]
        if worker.rank == 0:
            yield [worker.ask(s, wire.Put, 0, 1, payload=torch.zeros(8, dtype=torch.uint8)) for s in servers]
        yield [barrier(worker, 1)]
        step = 0
        while step < steps:
            asked = [worker.ask(s, wire.Begin, step, share, payload=torch.zeros(1, dtype=torch.uint8)) for s in servers]
            others: list[Ticket] = []
            pulls: list[Ticket] = []
            for s in servers:
                for b in buckets[s]:
                    for part, piece in enumerate(gradient(worker.rank, step, b).split(turn.PART_BYTES // 8)):
                        others.append(worker.ask(s, wire.Push, step, b, part, b"\x01", payload=piece.clone()))
                    if not rules.agreed:
                        pulls += [worker.ask(s, wire.Pull, step + 1, b, part) for part in range(parts())]
            yield asked
            if rules.agreed:
                ready = worker.ask(0, wire.Ready, step)
                yield [ready]
                assert isinstance(ready.answer, wire.Chosen)
                asked = [worker.ask(s, wire.Commit, step, ready.answer.ranks) for s in servers]
                yield asked
            if rules.clip:
                asked = yield from clip(worker, step, asked)
            if rules.ratios:
                assert all(isinstance(t.answer, wire.Squares) for t in asked), asked  # nobody is ahead
                ratios = [torch.full((len(b),), RATIO, dtype=torch.float64).view(torch.uint8) for b in buckets]
                asked = [worker.ask(s, wire.Scale, step, payload=ratios[s]) for s in servers]
                yield asked
            closed = [t.answer for t in asked if isinstance(t.answer, wire.Closed)]
            assert len(closed) == len(buckets), asked
            worker.closed.append((worker.epoch, step, closed))
            step = min(c.version for c in closed) if rules.agreed else step + 1
            if rules.agreed:
                pulls = [
                    worker.ask(s, wire.Pull, step, b, part)
                    for s in servers
                    for b in buckets[s]
                    for part in range(parts())
                ]
            yield others + pulls
            for ticket in pulls:
                assert isinstance(ticket.message, wire.Pull)
                assert ticket.brought is not None
                where = (worker.epoch, ticket.message.step, ticket.message.bucket, ticket.message.part)
                worker.pulled[where] = ticket.brought
        yield [worker.ask(s, wire.Unshare, 0) for s in servers]

    def clip(worker: Worker, step: int, asked: list[Ticket]) -> Generator[list[Ticket], None, list[Ticket]]:
        """Pass on the factor that is known already, if one is."""
        known = [t.answer.factor for t in asked if isinstance(t.answer, wire.Closed)]
        wanted = [s for s, t in enumerate(asked) if isinstance(t.answer, wire.Squares)]
        told = {s: worker.ask(s, wire.Clip, step, known[0] if known else factor) for s in wanted}
        yield list(told.values())
        return [told.get(s, t) for s, t in enumerate(asked)]

    return script


def barrier(worker: Worker, call: int) -> Ticket:
    return worker.ask(0, wire.Add, "barrier", call, 0, "float64", payload=torch.ones(1, dtype=torch.float64))


def parts() -> int:
    return -(-NUMEL // (turn.PART_BYTES // 8))


def summing(calls: int) -> Callable[[Worker], Script]:
    """A worker's life with sums alone."""

    def script(worker: Worker) -> Script:
        waiting: list[Ticket] = []
        for call in range(calls):
            for s in range(len(worker.lines)):
                for part in range(2):
                    value = gradient(worker.rank, call, part)
                    waiting.append(worker.ask(s, wire.Add, "gradient/0", call, part, "float64", payload=value))
            if call % 2:
                yield waiting
                for ticket in waiting:
                    add, total = ticket.message, ticket.brought
                    assert isinstance(add, wire.Add)
                    assert total is not None
                    wanted = sum_of(range(worker.net.world_size), add.call, add.part)
                    assert torch.equal(total, wanted)
                waiting = []
        yield waiting
        yield [worker.ask(s, wire.Unshare, 0) for s in range(len(worker.lines))]

    return script


def sum_of(ranks: Iterable[int], step: int, bucket: int) -> Tensor:
    return added([Gradient(r, [gradient(r, step, bucket)], b"", []) for r in ranks])


def by_step(host: Host, epoch: int) -> dict[int, dict[int, list[Gradient]]]:
    """The gradients of each step and bucket that a server has used in an epoch; no bucket twice in a step."""
    found: dict[int, dict[int, list[Gradient]]] = defaultdict(dict)
    count: dict[int, int] = defaultdict(int)
    for e, update in host.updates:
        if e == epoch:
            found[count[update.bucket]][update.bucket] = update.gradients
            count[update.bucket] += 1
    return found
