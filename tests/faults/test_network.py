"""What a network does to a worker's connection: numbers stay exact, nothing counts twice, and nobody waits for ever.

What a worker finds at an address in the first place is in `tests/test_connect.py`, what strangers send to a server in
`tests/ps/test_bad_input.py`.
"""

from __future__ import annotations

import contextlib
import functools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import dtrain
from dtrain.comm.hosts import HostedBucket, ServerUpdate
from dtrain.errors import CommError, ConnectError, DtrainError, Fenced, ProtocolError, Rewound, UsageError
from dtrain.ps import wire
from dtrain.ps.client import ParameterServer
from tests.faults.proxy import Proxy
from tests.ps.serving import Running, all_of, listens_at, process, workers_of
from tests.strangers import closed_port, http, listening

NUMELS = (300_000, 1, 4000)
"""Of tensors that are under way together: the first has two parts."""

At = Callable[[int], object]
"""Called before each round, by the worker whose connection has the faults."""

Work = Callable[..., object]
Faults = dict[int, Callable[[], object]]
"""By the number of the round before which they happen."""


@pytest.fixture(autouse=True)
def brief_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.ps.server._LAST_WORDS_S", 0.3)


@pytest.fixture(autouse=True)
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies stand for a network: little is under way at a time, and answers are taken by a thread."""
    monkeypatch.setattr("dtrain.ps.sockets.is_far", lambda address: True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead are found out sooner than by default."""
    for name, seconds in {"HEARTBEAT_S": 0.2, "DEAD_AFTER_S": 0.7, "GRACE_S": 0.5}.items():
        monkeypatch.setattr(f"dtrain.ps.sockets.{name}", seconds)
    monkeypatch.setattr("dtrain.ps.server._PING_S", 0.2)


def nothing(_: int) -> None:
    """No fault."""


class Job:
    """Servers in threads, and two workers; the connections of worker 1 go through proxies."""

    def __init__(self, servers: int = 1, before: Callable[[Proxy], object] | None = None, **terms: object) -> None:
        """
        Args:
            before: what happens to each proxy before worker 1 joins.
        """
        self.workers: list[ParameterServer] = []
        self.running = [Running("tcp://127.0.0.1:0", server=s, num_servers=servers, **terms) for s in range(servers)]
        self._stack = contextlib.ExitStack()
        ports = [int(r.address.rsplit(":", 1)[1]) for r in self.running]
        self.proxies = [self._stack.enter_context(Proxy("127.0.0.1", port)) for port in ports]
        self.proxy = self.proxies[-1]
        self._timeout_s = terms.get("timeout_s", 10.0)
        if before is not None:
            for proxy in self.proxies:
                before(proxy)
        joined = self.each(self.join)
        self.workers = [w for w in joined if isinstance(w, ParameterServer)]
        if len(self.workers) < 2:
            pytest.fail(f"{joined}, {self.end()}")

    def join(self, rank: int, **options: object) -> ParameterServer:
        addresses = [where.address for where in (self.proxies if rank else self.running)]
        options = {"timeout_s": self._timeout_s, "connect_timeout_s": 10.0, "lanes": "off", **options}
        return ParameterServer(addresses, rank, 2, **options)  # type: ignore[arg-type]

    def each(self, call: Callable[[int], object]) -> list[object]:
        """What each worker's call returns or raises, at once in threads."""
        outcomes: list[object] = [None, None]
        self.ended_at = [0.0, 0.0]

        def run(rank: int) -> None:
            try:
                outcomes[rank] = call(rank)
            except Exception as error:
                outcomes[rank] = error
                self.ended_at[rank] = time.monotonic()
                if self.workers:
                    self.workers[rank].close()  # while the error is on its way, so that servers hear of it

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive(), "a worker waits for ever"
        return outcomes

    def both(self, work: Work, at: At = nothing, **options: object) -> list[object]:
        """What the work returns or raises, for both workers."""
        return self.each(lambda rank: work(self.workers[rank], at if rank else nothing, **options))

    def end(self) -> list[Exception | None]:
        """What the servers ended with, when the workers have left."""
        with self._stack:
            for worker in self.workers:
                worker.close()
            return [r.ended() for r in self.running]


def noise(*seed: int, numel: int) -> Tensor:
    number = functools.reduce(lambda a, b: a * 1009 + b, seed)
    return torch.randn(numel, generator=torch.Generator().manual_seed(number))


def sums(worker: ParameterServer, at: At, rounds: int = 4, numels: tuple[int, ...] = NUMELS) -> None:
    """Sums of several tensors at once, which are looked at here."""
    for number in range(rounds):
        flats = [noise(worker.rank, number, i, numel=n) for i, n in enumerate(numels)]
        at(number)
        works = [worker.all_reduce(f, f"gradient/{i}") for i, f in enumerate(flats)]
        for each in works:
            each.wait()
        for i, flat in enumerate(flats):
            assert torch.equal(flat, noise(0, number, i, numel=len(flat)) + noise(1, number, i, numel=len(flat)))


def steps(worker: ParameterServer, at: At, rounds: int = 4, numels: tuple[int, ...] = NUMELS) -> list[Tensor]:
    """Steps of an optimizer with a memory, made by the servers; the parameters after them."""
    named = [(str(i), Parameter(noise(7, i, numel=n))) for i, n in enumerate(numels)]
    buckets = []
    for name, parameter in named:
        gradient = worker.empty(parameter.numel(), torch.float32, f"gradient/{name}")
        buckets.append(HostedBucket(gradient, [(name, parameter)]))
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9)
    hosted = worker.host(buckets, named, ServerUpdate(optimizer=optimizer))
    for number in range(rounds):
        at(number)
        hosted.begin(0.5)
        for i, bucket in enumerate(buckets):
            bucket.gradient.copy_(noise(worker.rank, number, i, numel=len(bucket.gradient)))
            hosted.push(i, [True])
        hosted.finish()
        report = hosted.pull()
        assert (report.version, report.counted) == (number + 1, 2)
    return [parameter.detach().clone() for _, parameter in named]


def training(worker: ParameterServer, at: At, rounds: int = 4) -> list[Tensor]:
    """A model's training, as a program has it; its parameters after that."""
    model = torch.nn.Sequential(torch.nn.Linear(500, 700), torch.nn.Tanh(), torch.nn.Linear(700, 10))
    for i, parameter in enumerate(model.parameters()):  # threads share the generator that they are made with
        parameter.data = noise(7, i, numel=parameter.numel()).view_as(parameter) / 50
    update = ServerUpdate(optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    replica = dtrain.replicate(model, worker, update=update)
    for number in range(rounds):
        at(number)
        model(noise(worker.rank, number, numel=32 * 500).view(32, 500)).square().mean().backward()
        replica.publish()
    return [p.detach().clone() for p in model.parameters()]


@functools.cache
def undisturbed(work: Work, servers: int, **options: object) -> list[Tensor]:
    """What a worker has after the same without a fault."""
    job = Job(servers)
    first, second = job.both(work, **options)
    assert job.end() == [None] * servers
    assert isinstance(first, list), first
    assert isinstance(second, list), second
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
    return first


def exact(job: Job, work: Work, faults: Faults, **options: object) -> None:
    """The work's results are those of an undisturbed run, and the job ends well."""
    outcomes = job.both(work, lambda n: faults.get(n, lambda: None)(), **options)
    ended = job.end()
    for outcome in (*outcomes, *ended):
        if isinstance(outcome, Exception):
            raise AssertionError(f"{outcomes}, {ended}") from outcome
    if work is not sums:
        for found in outcomes:
            wanted = undisturbed(work, len(ended), **options)
            assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))  # type: ignore[call-overload]


BOTH = pytest.mark.parametrize("work", [sums, steps])
WAYS = pytest.mark.parametrize("direction", ["up", "down"])


# --- what passes unnoticed


@pytest.mark.parametrize(("work", "direction"), [(sums, "up"), (sums, "both"), (steps, "down"), (training, "both")])
def test_silence_for_a_second(work: Work, direction: str):
    job = Job()
    exact(job, work, {1: lambda: job.proxy.blackhole(1.0, direction)})
    assert job.proxy.connections == 1


PLACES = (1, 9, 60, 100, 500, 5000, 2**20 - 1, 2**20 + 70, 2**20 + 80_000)
"""Bytes behind which a connection breaks: within headers, within payloads, and between."""


@BOTH
@WAYS
@pytest.mark.parametrize("how", ["reset_after", "cut"])
def test_a_connection_that_breaks_again_and_again(work: Work, direction: str, how: str):
    job = Job()
    faults: Faults = {n: lambda p=p: getattr(job.proxy, how)(p, direction) for n, p in enumerate(PLACES)}  # type: ignore[misc]
    exact(job, work, faults, rounds=len(PLACES) + 1)
    assert job.proxy.fired == len(PLACES)
    assert job.proxy.connections == len(PLACES) + 1
    sent = 4 * sum(NUMELS) * (len(PLACES) + 1)
    assert job.proxy.bytes_up < 4 * sent  # what is sent again does not make more be sent again


@WAYS
@pytest.mark.parametrize("place", [1, 70, 100, 150])
def test_a_connection_that_breaks_while_a_worker_joins(place: int, direction: str):
    job = Job(before=lambda proxy: proxy.reset_after(place, direction))
    exact(job, sums, {}, rounds=1)
    assert job.proxy.fired == 1


@pytest.mark.parametrize("how", ["reset_after", "cut"])
def test_training_over_two_servers_and_bad_links(how: str):
    job = Job(servers=2)
    faults: Faults = {
        n: lambda n=n: getattr(job.proxies[n % 2], how)(100_000 * n, ("up", "down")[n // 2])  # type: ignore[misc]
        for n in range(4)
    }
    exact(job, training, faults, rounds=6)
    assert sum(proxy.fired for proxy in job.proxies) == 4


@pytest.mark.parametrize("far", [True, False])
def test_a_connection_that_breaks_while_a_worker_computes(far: bool, monkeypatch: pytest.MonkeyPatch):
    """It comes back by itself; nobody asks for anything, but the server's Ping finds out."""
    monkeypatch.setattr("dtrain.ps.sockets.is_far", lambda address: far)
    monkeypatch.setattr("dtrain.ps.server._PING_S", 0.1)
    monkeypatch.setattr("dtrain.ps.sockets.GRACE_S", 1.0)
    job = Job()

    def fault() -> None:
        job.proxy.blackhole(0.4)
        job.proxy.reset()
        time.sleep(1.7)

    exact(job, steps, {1: fault})


@BOTH
@pytest.mark.parametrize("late_s", [0.0, 0.3])
def test_what_comes_late_by_an_older_connection(work: Work, late_s: float):
    """The worker speaks by a newer one by then, and is answered there: it never learns of the old one's bytes."""
    job = Job()

    def break_() -> None:
        job.proxy.strand(late_s)
        job.proxy.heal()

    def fault() -> None:
        job.proxy.blackhole(direction="up")
        breaking = threading.Timer(0.1, break_)
        breaking.start()
        timers.append(breaking)

    timers: list[threading.Timer] = []
    exact(job, work, dict.fromkeys(range(1, 8, 2), fault), rounds=10)
    assert job.proxy.connections == 5
    for timer in timers:
        timer.join()


@BOTH
@WAYS
@pytest.mark.parametrize(("how", "times"), [("duplicate", 3), ("swap", 1)])
def test_messages_that_come_twice_or_in_another_order(work: Work, direction: str, how: str, times: int):
    job = Job()
    faults: Faults = {n: lambda: getattr(job.proxy, how)(times, direction) for n in range(0, 8, 2)}
    exact(job, work, faults, rounds=10)
    assert job.proxy.fired == 4 * times


@BOTH
@WAYS
def test_flipped_bits_in_large_messages(work: Work, direction: str):
    job = Job()
    source = random.Random(direction)
    places = [(source.randrange(200, 1_000_000), source.randrange(8)) for _ in range(12)]
    faults: Faults = {n: lambda at=at: job.proxy.flip(at[0], direction, at[1]) for n, at in enumerate(places)}  # type: ignore[misc]
    exact(job, work, faults, rounds=len(places) + 1)
    assert job.proxy.fired == len(places)


@BOTH
def test_a_flipped_bit_in_a_sessions_name(work: Work):
    job = Job()
    link = job.workers[1].links[0]
    faults: Faults = {n: lambda n=n: job.proxy.flip_in(link._name[:8], n, "up") for n in range(12)}  # type: ignore[misc]
    exact(job, work, faults, rounds=13)
    assert job.proxy.fired == 12
    assert job.proxy.connections == 1


@pytest.mark.parametrize(
    ("work", "how", "value"),
    [(sums, "delay", 0.2), (steps, "delay", 0.05), (sums, "rate", 5e6), (steps, "rate", 5e6)],
)
def test_a_slow_link(work: Work, how: str, value: float):
    """No heartbeat is missed while megabytes take longer than one."""
    job = Job()
    numels = (1_200_000, 10) if (work, how) == (sums, "rate") else (600_000, 10, 100_000)
    exact(job, work, {0: lambda: getattr(job.proxy, how)(value)}, rounds=1, numels=numels)
    assert job.proxy.connections == 1


@BOTH
def test_a_message_that_is_lost_though_the_connection_is_not(work: Work, monkeypatch: pytest.MonkeyPatch):
    """The proxy holds the last message until another one comes: there would be none."""
    monkeypatch.setattr("dtrain.ps.link._NUDGE_S", 0.4)
    job = Job()
    last = 4  # of what a round asks for
    asked = []

    def fault() -> None:
        link = job.workers[1].links[0]
        ask = link.ask

        def count(*args: object, **options: object) -> None:
            if args[0] in (wire.Add, wire.Pull):
                asked.append(args)
                if len(asked) == last:
                    job.proxy.swap(1, "up")
            ask(*args, **options)  # type: ignore[arg-type]

        link.ask = count  # type: ignore[method-assign]

    exact(job, work, {1: fault})
    assert job.proxy.fired == 1


def test_answers_that_a_server_has_no_room_for(monkeypatch: pytest.MonkeyPatch):
    """The worker is not disconnected, so it does not know that anything is lost."""
    monkeypatch.setattr("dtrain.ps.link._NUDGE_S", 0.4)
    monkeypatch.setattr("dtrain.ps.server._SEND_QUEUE", 4)
    job = Job()
    exact(job, sums, {1: lambda: job.proxy.blackhole(0.8, "down")}, rounds=2, numels=(3_000_000, 10))
    assert job.proxy.connections == 1


# --- what may end the job, but not in silence, nor with wrong numbers


@WAYS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("quick")
def test_flipped_bits_anywhere(direction: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    """In small messages: half of what is hit is not dtrain's, but ZeroMQ's framing, which has no checksum."""
    monkeypatch.setattr("dtrain.ps.link._NUDGE_S", 0.4)
    source = random.Random(seed)
    job = Job(timeout_s=2.0)
    started = time.monotonic()

    def fault(_: int) -> None:
        job.proxy.flip(source.randrange(120), direction, source.randrange(8))

    outcomes = job.both(sums, fault, rounds=10, numels=(1, 1))
    assert time.monotonic() - started < 8
    (ended,) = job.end()
    assert job.proxy.fired > 0
    assert all(o is None or isinstance(o, CommError | ProtocolError) for o in (*outcomes, ended)), outcomes
    assert ended is not None or outcomes == [None, None]


@pytest.mark.usefixtures("quick")
def test_a_connection_that_zeromq_gives_up():
    """It does not connect again after what is not its protocol: a worker that sends then does not wait for ever."""
    job = Job(timeout_s=2.0)
    ended_s = []

    def fault(number: int) -> None:
        if number == 1:
            job.proxy.flip(0, "down", bit=1)  # of a frame's flags: its length has eight bytes then
            while not job.proxy.fired:
                time.sleep(0.01)
            time.sleep(0.2)
            ended_s.append(time.monotonic())

    outcomes = job.both(sums, fault)
    assert max(job.ended_at) - ended_s[0] < 6
    assert all(isinstance(each, CommError) for each in (*outcomes, *job.end())), outcomes
    assert job.proxy.connections == 1


# --- what lasts too long


def partitioned(job: Job, work: Work, direction: str, within_s: float) -> None:
    """Both workers and the server say in time who is missing."""
    since = []

    def fault(number: int) -> None:
        if number == 1:
            job.proxy.blackhole(direction=direction)
            since.append(time.monotonic())

    first, second = job.both(work, fault)
    (ended,) = job.end()
    assert max(job.ended_at) - since[0] < within_s
    assert isinstance(first, CommError)
    assert "worker 0: worker 1 (pid" in str(first)
    assert "is gone: its connection closed while others waited for its gradient" in str(first)
    assert isinstance(second, CommError)
    assert f"worker 1: the server at {job.proxy.address} (pid" in str(second)
    assert "is gone while this worker waited for" in str(second)
    assert isinstance(ended, CommError)
    assert "worker 1 (pid" in str(ended)


def test_a_partition_by_default():
    partitioned(Job(), sums, "both", within_s=8)  # 5.3 s on a free machine


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("work", "direction"), [(steps, "down"), (training, "up")])
def test_a_partition(work: Work, direction: str):
    partitioned(Job(), work, direction, within_s=5)


@pytest.mark.usefixtures("quick")
def test_a_partition_from_one_of_two_servers():
    job = Job(servers=2)
    first, second = job.both(sums, lambda n: job.proxy.blackhole() if n == 1 else None)
    ended = job.end()
    assert all(isinstance(e, CommError) for e in (first, second, *ended))
    found_out = (f"the server at {job.proxies[1].address} (pid", "worker 1 (pid")
    for error in (first, second, *ended):
        assert any(f"{who}" in str(error) for who in found_out)
        assert "is gone" in str(error)


@pytest.mark.usefixtures("quick")
def test_a_worker_that_was_cut_off_for_long_and_replaced_is_fenced():
    """It does not know: it computed, and its connection is back."""
    job = Job(on_loss="wait")
    first, old = job.workers
    job.proxy.blackhole()
    with pytest.raises(Rewound, match=r"worker 1 .* is gone") as caught:
        first.all_reduce(torch.ones(1), "metric/x").wait()
    assert caught.value.epoch == 1
    job.proxy.heal()
    with pytest.raises(Rewound):
        old.all_reduce(torch.ones(1), "metric/x").wait()
    _, new = all_of(lambda: first.rejoin(1), lambda: job.join(1, incarnation=1))
    assert isinstance(new, ParameterServer)
    job.workers[1] = new
    with pytest.raises(Fenced, match="another has its place"):
        old.rejoin(1)
    old.close()
    exact(job, sums, {})


@pytest.mark.usefixtures("quick")
def test_a_worker_that_was_cut_off_and_not_replaced_comes_again():
    job = Job(on_loss="wait")

    def again(worker: ParameterServer, at: At) -> None:
        with pytest.raises(Rewound) as caught:
            sums(worker, at)
        if worker.rank == 0:
            job.proxy.heal()
        worker.rejoin(caught.value.epoch)
        sums(worker, nothing)

    for outcome in (*job.both(again, lambda n: job.proxy.blackhole() if n == 1 else None), *job.end()):
        assert outcome is None, outcome


# --- one of several addresses


@contextlib.contextmanager
def another_job() -> Iterator[str]:
    running = Running("tcp://127.0.0.1:0", job_id="theirs", server=1, num_servers=2, connect_timeout_s=0.5)
    yield running.address
    running.ended()


@contextlib.contextmanager
def larger_job() -> Iterator[str]:
    running = Running("tcp://127.0.0.1:0", 3, server=1, num_servers=2, connect_timeout_s=0.5)
    yield running.address
    running.ended()


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    with listening(http) as port:
        yield f"tcp://127.0.0.1:{port}"


MISTAKEN: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[str]], type[DtrainError], str]] = {
    "no such name": (
        lambda: contextlib.nullcontext("tcp://no-such-host.invalid:5555"),
        ConnectError,
        "the name no-such-host.invalid does not resolve",
    ),
    "a closed port": (
        lambda: contextlib.nullcontext(f"tcp://127.0.0.1:{closed_port()}"),
        ConnectError,
        "nobody answers",
    ),
    "a web server": (web_server, ProtocolError, "is not dtrain's server"),
    "another job": (another_job, UsageError, "belongs to another job"),
    "a larger job": (larger_job, UsageError, "world_size 2, the server with 3"),
}


@pytest.mark.parametrize(("mistaken", "kind", "words"), MISTAKEN.values(), ids=MISTAKEN.keys())
def test_the_wrong_one_of_two_addresses_is_named(
    mistaken: Callable[[], contextlib.AbstractContextManager[str]], kind: type[DtrainError], words: str
):
    good = Running("tcp://127.0.0.1:0", num_servers=2)
    with mistaken() as address:
        started = time.monotonic()
        with pytest.raises(kind, match=words) as caught:
            ParameterServer([good.address, address], 0, 2, job_id="ours", connect_timeout_s=0.6)
        assert time.monotonic() - started < 6
        assert address in str(caught.value)
        assert good.address not in str(caught.value)
    assert isinstance(good.ended(), CommError)  # its worker has left with that error


# --- peers that take too much


def test_a_worker_that_never_reads():
    """It sends a hundred megabytes and takes no answer: the server keeps what the credit allows, and says so."""
    credit, taken = 8 * 2**20, list[object]()
    running = Running("tcp://127.0.0.1:0", credit_bytes=credit)
    good, glutton = workers_of(running.address, lanes="off")
    part = torch.zeros((good._part_bytes if good.links[0].far else wire.PART_BYTES) // 4)  # as the other one cuts
    flat = torch.zeros(100 * len(part))
    before = psutil.Process().memory_info().rss
    for number in range(100):
        glutton.links[0].ask(wire.Add, "gradient/0", 0, number, "float32", take=taken.append, payload=part)
    started = time.monotonic()
    with pytest.raises(ProtocolError, match=r"overload: worker 1 .* more than 8 MiB under way"):
        good.all_reduce(flat, "gradient/0").wait()
    assert time.monotonic() - started < 5
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
    assert not taken
    good.close()
    with pytest.raises(ProtocolError, match="overload"):
        glutton.links[0].receive()
    glutton.close()
    assert isinstance(running.ended(), ProtocolError)


FLOODS = {
    "connections": """
import socket, sys
peers = []
for n in range(2000):
    peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    peer.sendall((b"", b"\\xff" + bytes(8), b"GET / HTTP/1.1\\r\\n\\r\\n")[n % 3])
    peers.append(peer)
print("done", flush=True)
sys.stdin.read()
""",
    "messages": """
import sys, zmq
peer = zmq.Context().socket(zmq.DEALER)
peer.linger = 0
peer.connect("tcp://127.0.0.1:" + sys.argv[1])
for n in range(100_000):
    peer.send(b"%d" % n)
print("done", flush=True)
sys.stdin.read()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_leaves_good_workers_half_of_their_speed(flood: str):
    numels = (4_000_000,)
    with process("--bind", "tcp://127.0.0.1:0", "-n", "2", stderr=subprocess.DEVNULL) as child:
        address = listens_at(child)
        workers = workers_of(address, lanes="off", timeout_s=30)
        flats = [torch.ones(numels[0]) for _ in workers]

        def took() -> float:
            started = time.monotonic()
            for _ in range(5):
                works = [w.all_reduce(f, "gradient/0") for w, f in zip(workers, flats, strict=True)]
                for work in works:
                    work.wait()
            return time.monotonic() - started

        took()
        alone = min(took() for _ in range(3))
        command = [sys.executable, "-c", flood, address.rsplit(":", 1)[1]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flooding:
            assert flooding.stdout is not None
            during = [took() for _ in range(3)]
            assert flooding.stdout.readline() == "done\n"
            after = [took() for _ in range(2)]
            flooding.kill()
        print("FLOOD", alone, during, after)
        assert min(during + after) < 2 * alone
        for worker in workers:
            worker.close()
        assert child.wait(10) == 0
