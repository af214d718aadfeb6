"""Servers to test against, good workers beside the bad ones, and a server without a network."""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import torch
import zmq
from safetensors.torch import save
from torch import Tensor

from dtrain.optim import LARS
from dtrain.ps import layout as layouts
from dtrain.ps import optimizers, wire
from dtrain.ps.client import ParameterServer
from dtrain.ps.effects import Forget
from dtrain.ps.layout import BucketRange, Layout, Rules
from dtrain.ps.link import Joining, Link
from dtrain.ps.members import Send, Session, Terms
from dtrain.ps.pieces import Piece
from dtrain.ps.server import Server
from dtrain.ps.shard import Shard
from dtrain.ps.wire import Answer, Hello, Message

_sockets = itertools.count()


def own_socket(folder: Path) -> str:
    """An address of a socket's file that nobody has had."""
    return f"ipc://{folder}/s{next(_sockets)}"


class Running:
    """A server in a thread."""

    def __init__(
        self, address: str, workers: int = 2, *, timeout_s: float = 10, keys: Path | None = None, **terms: object
    ) -> None:
        given: dict[str, object] = {"timeout_s": timeout_s, "connect_timeout_s": 30.0, **terms}
        self.server = Server(address, Terms(world_size=workers, **given), keys=keys, threads=2)  # type: ignore[arg-type]
        self.address = self.server.address
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except Exception as error:
            self.error = error
        finally:
            self.server.close()

    def ended(self) -> Exception | None:
        """What it raised, once it has ended."""
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server outlives its job"
        return self.error


def all_of(*calls: Callable[[], object]) -> list[object]:
    """Their results, at once in threads; raises what the first of them raised."""
    results: list[object] = [None] * len(calls)
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def workers_of(addresses: str, world_size: int = 2, each: list[dict[str, object]] | None = None, **options: object):
    """Workers that have joined, in their order. `each` has options of one."""
    options = {"timeout_s": 10, "connect_timeout_s": 20.0, **options}

    def join(rank: int) -> Callable[[], ParameterServer]:
        own = {**options, **(each[rank] if each else {})}
        return lambda: ParameterServer(addresses, rank, world_size, **own)  # type: ignore[arg-type]

    return all_of(*(join(rank) for rank in range(world_size)))


def work_and_leave(workers: list[ParameterServer]) -> None:
    """A transfer of several parts; everyone gets the sum."""
    flats = [torch.full((300_000,), w.rank + 1.0) for w in workers]
    works = [w.all_reduce(f, "gradient/0") for w, f in zip(workers, flats, strict=True)]
    for work, flat in zip(works, flats, strict=True):
        work.wait()
        assert torch.equal(flat, torch.full((300_000,), sum(range(len(workers) + 1)) * 1.0))
    for worker in workers:
        worker.close()


@contextlib.contextmanager
def process(*arguments: str, stderr: int | None = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "dtrain", "server", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def listens_at(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith("listening at "), line + (child.stderr.read() if child.stderr else "")
    return line.split()[2]


class Stranger(zmq.Socket[bytes]):
    """A socket with the name of a session."""

    name = b""

    def say(self, *frames: bytes, copy: bool = True) -> None:
        """Send a message of that session."""
        self.send_multipart([self.name, *frames], copy=copy)


@contextlib.contextmanager
def dealer(address: str | None, kind: int = zmq.DEALER) -> Iterator[Stranger]:
    """A stranger's socket, connected if there is an address."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        stranger = context.socket(kind, socket_class=Stranger)
        stranger.name = wire.new_name()
        stranger.linger = 500
        if address is not None:
            stranger.connect(address)
        yield stranger
    finally:
        context.destroy()


def reply(stranger: Stranger) -> wire.Failed | None:
    """What the server says to a stranger, if anything."""
    while stranger.poll(3000):
        message = wire.decode(stranger.recv_multipart()[0])
        if isinstance(message, wire.Failed):
            return message
    return None


# --- by hand


def hello(rank: int = 0, world_size: int = 2, **others: object) -> Hello:
    fields = {
        **{"job_id": "", "host": "elsewhere", "pid": 77, "patience_ms": 5000, "epoch": 0, "incarnation": 0},
        **{"server": 0, "num_servers": 1, "probe": ""},
        **others,
    }
    return Hello(rank=rank, world_size=world_size, **fields)  # type: ignore[arg-type]


def sealed(packed: bytes) -> bytes:
    """A header of these bytes, whose checksum is right."""
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def header(*values: object) -> bytes:
    """A header of these values, whatever they are."""
    return sealed(msgpack.packb(values))


NUMEL = 1000
RANGES = (
    BucketRange(0, "float32", 2, ((0, Piece(0, 0, 0, 600, (20, 30))), (1, Piece(1, 0, 0, 400, (400,))))),
    BucketRange(3, "float64", 1, ((0, Piece(2, 0, 0, NUMEL, (NUMEL,))),)),
)
_SGD = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
_LARS = LARS([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
SETTINGS = torch.frombuffer(bytearray(msgpack.packb(optimizers.hyper(_SGD))), dtype=torch.uint8)
"""Of an optimizer that changes nothing."""
LARS_SETTINGS = torch.frombuffer(bytearray(msgpack.packb(optimizers.hyper(_LARS))), dtype=torch.uint8)
"""Of one with trust ratios, which changes nothing either."""
VALUES = torch.frombuffer(
    bytearray(save({"0": torch.arange(1.0, NUMEL + 1), "3": -torch.arange(1.0, NUMEL + 1, dtype=torch.float64)})),
    dtype=torch.uint8,
)


def layout(ranges: tuple[BucketRange, ...] = RANGES, **rules: object) -> Tensor:
    """The layout of two buckets, in bytes."""
    made = Layout(Rules(**rules), optimizers.spec_of(_LARS if rules.get("ratios") else _SGD), ranges)  # type: ignore[arg-type]
    return torch.frombuffer(bytearray(layouts.encode(made)), dtype=torch.uint8)


@functools.cache
def _layout_bytes(**rules: object) -> bytes:
    return bytes(layout(**rules).tolist())


class Pair:
    """Two good workers, by hand, of a server that holds parameters."""

    def __init__(self, address: str, *, job_id: str = "", **rules: object) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        common = {"world_size": 2, "num_servers": 1, "incarnation": 0, "connect_timeout_s": 30.0, "lanes": False}
        self.links = [
            Link(self._context, address, 0, Joining(rank=rank, job_id=job_id, keys=None, **common))  # type: ignore[arg-type]
            for rank in range(2)
        ]
        self.steps = 0
        try:
            for link in self.links:
                link.say_hello(0)
            self.until(lambda: all(link.welcome for link in self.links))
            self.ask_both(wire.Open, payload=layout(**rules))
            self.ask_both(wire.Put, 0, 1, payload=VALUES, links=self.links[:1])
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def until(self, done: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Take what comes."""
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, "no answer"
            for link in self.links:
                link.socket.poll(5)
                link.receive()
                link.look(time.monotonic(), "an answer")

    def ask_both(
        self, kind: type, *fields: object, payload: Tensor | None = None, links: list[Link] | None = None
    ) -> list[tuple[Answer, bytes]]:
        """Both workers' answers, in the order in which they come."""
        answers: list[tuple[Answer, bytes]] = []
        links = links or self.links
        for link in links:
            take = lambda answer, data: answers.append((answer, bytes(data or b"")))  # noqa: E731
            link.ask(kind, *fields, take=take, payload=payload)
        self.until(lambda: len(answers) == len(links))
        return answers

    def step(self) -> bytes:
        """Both make a step, which changes nothing, and get the parameters: these."""
        done: list[Answer] = []
        pulled: list[bytes] = []
        for link in self.links:
            take = lambda answer, data: done.append(answer)  # noqa: E731
            link.ask(wire.Begin, self.steps, 0.5, take=take, payload=SETTINGS)
            for range_ in RANGES:
                flat = torch.ones(range_.numel, dtype=wire.DTYPE_NAMES[range_.dtype])
                link.ask(wire.Push, self.steps, range_.bucket, 0, b"\3", take=take, payload=flat)
        self.steps += 1
        for link in self.links:
            for range_ in RANGES:
                take = lambda answer, data: pulled.append(bytes(data or b""))  # noqa: E731
                link.ask(wire.Pull, self.steps, range_.bucket, 0, take=take)
        self.until(lambda: len(done) == 6 and len(pulled) == 4)
        assert len(set(pulled)) == len(RANGES), "the workers got different parameters"
        return b"".join(sorted(set(pulled), key=len))

    def digest(self) -> int:
        """crc32 of all that the server holds."""
        answers = self.ask_both(wire.Fetch, 0)
        assert answers[0][1] == answers[1][1] != b""
        return zlib.crc32(answers[0][1])

    def close(self) -> None:
        for link in self.links:
            link.close("")
        self._context.term()


class Bench:
    """A server without a network: frames go in by hand, and what it says is kept."""

    def __init__(self, address: str, **terms: object) -> None:
        self.terms = Terms(**{"world_size": 2, "timeout_s": 10.0, **terms})  # type: ignore[arg-type]
        self.server = Server(address, self.terms, threads=1)
        self.server._send = self._keep  # type: ignore[method-assign]
        self.said: list[tuple[Session, Message]] = []
        self._seqs = itertools.count()

    def _keep(self, send: Send) -> None:
        self.said.append((send.to, wire.decode(wire.encode(send.message))))

    def anew(self) -> None:
        """Another job, of two workers b"0" and b"1"."""
        self.server._forget(Forget([]))
        self.server._shard = Shard(self.terms, time.monotonic())
        self._seqs = itertools.count()
        for rank in range(2):
            self.feed(b"%d" % rank, wire.encode(hello(rank)))
        self.said.clear()

    def open(self, **rules: object) -> None:
        """They describe parameters."""
        packed = _layout_bytes(**rules)
        for rank in range(2):
            self.ask(rank, wire.Open, 1, payload=packed)
        self.said.clear()

    def feed(self, session: bytes, *frames: bytes) -> None:
        """A message comes, and what follows from it is done."""
        server = self.server
        server._act(server._handle(session, [zmq.Frame(f) for f in frames]))
        while server._jobs:
            server._work()

    def ask(self, rank: int, kind: type, *fields: object, payload: bytes | None = None) -> None:
        """A worker's next request."""
        if payload is not None:  # its last field is the checksum
            fields = (*fields[:-1], wire.checksum_of(memoryview(payload))) if fields else ()
        message = kind(next(self._seqs), 0, *fields)
        self.feed(b"%d" % rank, wire.encode(message), *([] if payload is None else [payload]))

    @property
    def failed(self) -> wire.Failed | None:
        return self.server._shard.members.failed

    def begin(self, rank: int, settings: Tensor = SETTINGS, step: int = 0) -> None:
        """All that a worker's step begins with."""
        self.ask(rank, wire.Begin, step, 0.5, 1, payload=settings.numpy().tobytes())
        for r in RANGES:
            self.ask(rank, wire.Push, step, r.bucket, 0, b"\3", 1, payload=bytes(r.nbytes))

    def step(self, step: int = 0) -> None:
        """Both workers make one."""
        for rank in range(2):
            self.begin(rank, step=step)
        self.answered(2, wire.Closed)

    def answered(self, count: int, kind: type) -> None:
        """So many answers of that kind have been given."""
        assert self.failed is None, self.failed
        found = [m for _, m in self.said if isinstance(m, kind)]
        assert len(found) == count, self.said
        self.said.clear()

    def add(self) -> None:
        """Both workers add."""
        call = next(self._seqs)
        for rank in range(2):
            self.ask(rank, wire.Add, "metric/sum", call, 0, "float64", 1, payload=bytes(8))
        self.answered(2, wire.Sum)
