"""Everything that should not come to a server's port: strangers change nothing, workers are named to the others."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import psutil
import pytest
import torch
import zmq

from dtrain import errors
from dtrain.ps import lanes, sockets, wire
from dtrain.ps.lanes import Segment
from dtrain.ps.layout import BucketRange
from dtrain.ps.pieces import Piece
from tests.ps.serving import (
    NUMEL,
    RANGES,
    SETTINGS,
    Bench,
    Pair,
    Running,
    dealer,
    header,
    hello,
    layout,
    listens_at,
    own_socket,
    process,
    sealed,
    work_and_leave,
    workers_of,
)

JOB = "the right job"


class Served:
    """A server's process with parameters, and two good workers."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self._errors = folder / "stderr"
        with self._errors.open("w") as stderr:
            arguments = ["--bind", "tcp://127.0.0.1:0", "-n", "2", "--timeout-s", "60"]
            self.child = stack.enter_context(process(*arguments, stderr=stderr.fileno()))
        self.address = listens_at(self.child)
        self.where = ("127.0.0.1", int(self.address.rsplit(":", 1)[1]))
        self.pair = Pair(self.address, job_id=JOB)
        stack.callback(self.pair.close)
        self.pair.step()
        self._digest = self.pair.digest()
        self._process = psutil.Process(self.child.pid)
        self._rss = self._process.memory_info().rss

    @property
    def lines(self) -> list[str]:
        return self._errors.read_text().splitlines()

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """Whatever comes meanwhile, the job goes on, and is little larger."""
        before = len(self.lines)
        yield
        self.pair.step()
        assert self.pair.digest() == self._digest
        assert self.child.poll() is None
        assert self._process.memory_info().rss < self._rss + 128 * 2**20
        told = [line for line in self.lines[before:] if "so far" not in line]
        assert len(told) <= 1, told


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Served]]:
    """One for all tests, unless one of them ends it."""
    found: list[Served] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("DTRAIN_JOB_ID", JOB)

        def get() -> Served:
            if not found or found[-1].child.poll() is not None or found[-1].pair.links[0]._failure:
                found.append(Served(stack, tmp_path_factory.mktemp("served")))
            return found[-1]

        get()  # before a test looks at what it leaves behind
        yield get


@pytest.fixture
def served(servers: Callable[[], Served]) -> Served:
    return servers()


# --- bytes at the port

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
MET = GREETING + READY
RAW: dict[str, bytes] = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "noise": random.Random(2).randbytes(2**20),
    "ZMTP 1": b"\x01\x00",
    "ZMTP 1 with a frame": b"\x01\x00\x05\x00data",
    "ZMTP 2": b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00",
    "half a greeting": GREETING[:20],
    "a greeting": GREETING,
    "CURVE": GREETING.replace(b"NULL\x00", b"CURVE"),
    "PLAIN": GREETING.replace(b"NULL\x00", b"PLAIN"),
    "an unknown mechanism": GREETING.replace(b"NULL", b"\xfe\xff\xfd\x01"),
    "a server's greeting": GREETING[:32] + b"\x01" + GREETING[33:] + READY,
    "READY of 2^63 bytes": GREETING + b"\x06" + struct.pack(">Q", 2**63) + b"\x05READY",
    "READY of 4 GiB of metadata": GREETING + b"\x04\x19\x05READY\x0bSocket-Type\xff\xff\xff\xff",
    "READY with a long name": GREETING + b"\x04\xff\x05READY\xff" + b"x" * 248,
    "an unknown socket type": MET.replace(b"DEALER", b"DEALED"),
    "an unknown command": MET + b"\x04\x05\x04EVIL",
    "PING without an end": MET + b"\x04\x05\x04PING",
    "SUBSCRIBE": MET + b"\x04\x0a\x09SUBSCRIBE",
    "a frame of 2^40 bytes": MET + b"\x02" + struct.pack(">Q", 2**40),
    "a frame of 2^63 bytes": MET + b"\x02" + struct.pack(">Q", 2**63),
    "a frame of 2^64 - 1 bytes": MET + b"\x02" + b"\xff" * 8,
    "a frame over the limit": MET + b"\x02" + struct.pack(">Q", wire.PART_BYTES + 4097),
    "a frame that stays away": MET + b"\x02" + struct.pack(">Q", 1000) + b"abc",
    "wrong flags": MET + b"\xff\x01a",
    "more frames that stay away": MET + b"\x01\x01a" * 1000,
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
def test_bytes_at_the_port(served: Served, data: bytes):
    """Three visitors: one waits for an answer, one hangs up, one resets the connection."""

    def visit() -> socket.socket:
        visitor = socket.create_connection(served.where, timeout=10)
        with contextlib.suppress(OSError):
            visitor.sendall(data)
        return visitor

    with served.unharmed(), visit() as stays:
        visit().close()
        with visit() as resets:
            resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stays.settimeout(0.01)
        with contextlib.suppress(OSError):
            stays.recv(100)
        served.pair.step()


def test_a_greeting_cut_anywhere(served: Served):
    with served.unharmed(), contextlib.ExitStack() as stack:
        for cut in range(len(MET)):
            visitor = stack.enter_context(socket.create_connection(served.where))
            visitor.sendall(MET[:cut])
            if cut % 2:
                visitor.close()


def test_a_thousand_connections(served: Served):
    with served.unharmed():
        for some in range(4):
            with contextlib.ExitStack() as stack:
                for number in range(250):
                    visitor = stack.enter_context(socket.create_connection(served.where, timeout=10))
                    visitor.sendall((b"", MET, b"\xff")[(some + number) % 3])
                served.pair.step()


# --- other sockets


@pytest.mark.parametrize(
    "kind", [zmq.REQ, zmq.PUB, zmq.SUB, zmq.PUSH, zmq.ROUTER, zmq.REP, zmq.PAIR], ids=lambda k: zmq.SocketType(k).name
)
def test_another_kind_of_socket(served: Served, kind: int):
    with served.unharmed(), dealer(served.address, kind) as stranger:
        if kind in (zmq.REQ, zmq.PUB, zmq.PUSH):
            with contextlib.suppress(zmq.Again):
                stranger.send(b"hello", zmq.NOBLOCK)
        served.pair.step()


@pytest.mark.parametrize("name", [b"\x01", b"w" * 255, b"a worker"], ids=["short", "255 bytes", "a name"])
def test_two_strangers_of_one_name(served: Served, name: bytes):
    """ZeroMQ lets a stranger name its connection as it likes, and as another one. The first has the name."""

    def stranger(stack: contextlib.ExitStack, number: int) -> zmq.Socket[bytes]:
        made = stack.enter_context(dealer(None))
        made.linger = 0
        made.routing_id = b"%d" % number + name[:250]
        made.connect(served.address)
        made.send(b"hello")
        return made

    with served.unharmed():
        for _ in range(2):
            with contextlib.ExitStack() as later, contextlib.ExitStack() as sooner:
                first = [stranger(sooner, number) for number in range(10)]
                assert all(each.poll(5000) for each in first)
                second = [stranger(later, number) for number in range(10)]
                served.pair.step()
                for each in first:
                    each.recv()
                    each.send(b"again")
                    assert each.poll(5000)
                for each in second:
                    assert not each.poll(0)
                time.sleep(0.05)
            time.sleep(sockets.HEARTBEAT_S + 0.3)  # libzmq looks at what is left of a connection when it next pings
            served.pair.step()


def test_a_stranger_that_takes_the_routes_of_those_who_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """libzmq aborts when a route that it makes is taken: it counts them from a number that is not told."""
    monkeypatch.setenv("DTRAIN_JOB_ID", JOB)
    unseeded = 0x6B8B4567
    with contextlib.ExitStack() as stack:
        served = Served(stack, tmp_path)
        with served.unharmed(), contextlib.ExitStack() as strangers:
            context = strangers.enter_context(zmq.Context())
            for number in range(100):
                stranger = strangers.enter_context(context.socket(zmq.DEALER))
                stranger.linger = 0
                if number < 60:
                    stranger.routing_id = b"\0" + (unseeded + 20 + number).to_bytes(4, "big")
                stranger.connect(served.address)
                stranger.send(b"hello")
                assert stranger.poll(5000)


def test_a_peer_that_never_reads(served: Served):
    with served.unharmed(), dealer(served.address) as stranger:
        stranger.rcvhwm = 1
        stranger.linger = 0
        for number in range(20_000):
            stranger.say(wire.encode(wire.Fetch(number, 0, 0)))
            if number % 5000 == 0:
                served.pair.step()


def test_a_flood(served: Served):
    """One that sends what it can, in large messages, does not stop the others."""
    with served.unharmed(), dealer(served.address) as stranger:
        stranger.linger = 0
        for _ in range(4):
            for _ in range(100):
                stranger.say(b"", bytes(wire.PART_BYTES), copy=False)
            served.pair.step()


# --- messages of strangers

HELLO = hello(job_id=JOB)
GOOD = msgpack.packb((wire.PROTOCOL, 0, *vars(HELLO).values()))
PICKLE = bytes.fromhex("8004951d000000000000008c05706f736978948c0673797374656d9493948c026c7394859452942e")


_FULL = """
import sys, time, zmq
from dtrain.ps import sockets
from dtrain.ps.listener import Listener

sockets.HEARTBEAT_S = 0.05
listener = Listener(sys.argv[1], keys=None, insecure_no_encryption=False, send_queue=2)
with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(listener.address)
    for _ in range(200):
        stranger.send(bytes(100_000))
    time.sleep(0.3)
time.sleep(0.3)
while listener.router.poll(100):
    listener.router.recv_multipart()
listener.close()
"""


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_stranger_that_sends_much_and_leaves(own_temporary_directory: Path, scheme: str):
    """libzmq aborts (its issue 4364) where a socket that pings stops to read for want of room."""
    address = own_socket(own_temporary_directory) if scheme == "ipc" else "tcp://127.0.0.1:0"
    done = subprocess.run([sys.executable, "-c", _FULL, address], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def with_rank(value: bytes) -> bytes:
    """A Hello whose rank is these bytes."""
    return sealed(GOOD.replace(msgpack.packb(JOB) + b"\x00", msgpack.packb(JOB) + value, 1))


def fetch(*fields: object) -> bytes:
    """A Fetch with these fields."""
    return header(wire.PROTOCOL, wire._KINDS.index(wire.Fetch), *fields)


def told(message: wire.Message, payload: bytes | None = bytes(8)) -> list[bytes]:
    return [wire.encode(message)] if payload is None else [wire.encode(message), payload]


ADD = wire.Add(0, 0, "metric/sum", 0, 0, "float64", 0)
FRAMES: dict[str, list[bytes]] = {
    "an empty frame": [b""],
    "two empty frames": [b"", b""],
    "three frames": [wire.encode(HELLO), b"", b""],
    "ten thousand frames": [b""] * 10_000,
    "50 MiB in frames": [bytes(2**20)] * 50,
    "a frame over the limit": [wire.encode(ADD), bytes(wire.PART_BYTES + 5000)],
    "a total over the limit": [bytes(2**20), bytes(2**20)],
    "a header of a megabyte": [bytes(2**20)],
    "hello with a payload": told(HELLO),
    "an addition without a payload": told(ADD, None),
    "a wrong checksum": [wire.encode(HELLO)[:-1] + b"\0"],
    "a checksum alone": [bytes(4)],
    **{f"cut to {n} bytes": [wire.encode(HELLO)[:n]] for n in (1, 3, 5, len(wire.encode(HELLO)) - 1)},
}
PACKED: dict[str, bytes] = {
    "nothing": sealed(b""),
    "never used": sealed(b"\xc1"),
    "zeros": sealed(bytes(100)),
    "noise": sealed(random.Random(1).randbytes(300)),
    "trailing bytes": sealed(GOOD + b"\0"),
    "two messages": sealed(GOOD + GOOD),
    **{
        f"{name} of 2^32-1": sealed(code + b"\xff" * 4)
        for name, code in {"array": b"\xdd", "map": b"\xdf", "bin": b"\xc6", "str": b"\xdb", "ext": b"\xc9"}.items()
    },
    **{
        f"{name} of 2^32-1 as rank": with_rank(code + b"\xff" * 4)
        for name, code in {"array": b"\xdd", "map": b"\xdf", "bin": b"\xc6", "str": b"\xdb", "ext": b"\xc9"}.items()
    },
    "deep": sealed(b"\x91" * 1000),
    "deeper": sealed(b"\x91" * 4000),
    "deepest": sealed(b"\x91" * 100_000),
    "deep as rank": with_rank(b"\x91" * 1000),
    "empty maps": sealed(b"\xdd\x00\x00\x0f\x00" + b"\x80" * 0xF00),
    "a million empty maps": sealed(b"\xdd\x00\x0f\x00\x00" + b"\x80" * 0xF0000),
    "a map": sealed(msgpack.packb({0: wire.PROTOCOL, 1: 0})),
    "a key twice": sealed(b"\x82\x01\x01\x01\x02"),
    "bytes as keys": sealed(msgpack.packb({b"a": 1})),
    "invalid UTF-8": sealed(GOOD.replace(b"elsewhere", b"else\xff\xfe\xfd\xfc\xfb")),
    "surrogates": sealed(GOOD.replace(b"elsewhere", b"else\xed\xa0\x80\xed\xa0")),
    "a time": with_rank(msgpack.packb(msgpack.Timestamp(1, 2))),
    "ext 42": with_rank(msgpack.packb(msgpack.ExtType(42, b"x"))),
    "NaN": with_rank(msgpack.packb(math.nan)),
    "infinity": with_rank(msgpack.packb(math.inf)),
    "-0.0": with_rank(msgpack.packb(-0.0)),
    "a float": with_rank(msgpack.packb(0.0)),
    "a bool": with_rank(b"\xc2"),
    "nil": with_rank(b"\xc0"),
    "a text": with_rank(msgpack.packb("0")),
    "bytes": with_rank(msgpack.packb(b"0")),
    "-1": with_rank(msgpack.packb(-1)),
    "-2^63": with_rank(msgpack.packb(-(2**63))),
    "2^31": with_rank(msgpack.packb(2**31)),
    "2^63": with_rank(msgpack.packb(2**63)),
    "2^64-1": with_rank(msgpack.packb(2**64 - 1)),
    "rank = world": with_rank(b"\x02"),
    "protocol 0": header(0, 0, *vars(HELLO).values()),
    "protocol 2^63": header(2**63, 0, *vars(HELLO).values()),
    "protocol true": header(True, 0, *vars(HELLO).values()),
    "an unknown kind": header(wire.PROTOCOL, 200),
    "kind -1": header(wire.PROTOCOL, -1),
    "kind true": header(wire.PROTOCOL, True),
    "too few fields": header(wire.PROTOCOL, 0, "", 0),
    "too many fields": header(wire.PROTOCOL, 0, *vars(HELLO).values(), 0),
    "bytes for text": header(wire.PROTOCOL, 0, b"", *list(vars(HELLO).values())[1:]),
    "a long text": header(wire.PROTOCOL, 0, "x" * 3000, *list(vars(HELLO).values())[1:]),
    "pickle": sealed(PICKLE),
    "pickle alone": PICKLE,
    "JSON": sealed(json.dumps(vars(HELLO)).encode()),
    "JSON alone": json.dumps(vars(HELLO)).encode(),
}
STRANGERS: dict[str, list[bytes]] = {
    "another job": told(replace(HELLO, job_id="another"), None),
    "another world": told(replace(HELLO, world_size=10**6), None),
    "another number of servers": told(replace(HELLO, num_servers=2), None),
    "a rank that is there": told(HELLO, None),
    "a later epoch": told(replace(HELLO, epoch=5), None),
    "the last epoch": told(replace(HELLO, epoch=2**63 - 1), None),
    "a later incarnation": told(replace(HELLO, incarnation=7), None),
    "no patience": told(replace(HELLO, patience_ms=0), None),
    "a probe elsewhere": told(replace(HELLO, probe="../../etc/passwd"), None),
    "a probe that is not there": told(replace(HELLO, probe="dtrain-1-" + "0" * 32), None),
    "terminal codes as host": told(replace(HELLO, host="\x1b[2J\n\n\nroot: all is well", rank=9), None),
    "a farewell": told(wire.Bye("ValueError: all of you, stop"), None),
    "share": told(wire.Share(0, 0, 0, "dtrain-1-" + "0" * 32, 4096), None),
    "unshare": told(wire.Unshare(0, 0, 0), None),
    "add": told(ADD),
    "add of an unknown type": told(replace(ADD, dtype="object")),
    "add of three bytes": told(ADD, bytes(3)),
    "add of nothing": told(ADD, b""),
    "add in shared memory": told(wire.AddShared(0, 0, "metric/sum", 0, 0, "float64", 0, 0, 1), None),
    "open": told(wire.Open(0, 0, 0)),
    "put": told(wire.Put(0, 0, 0, 1, 0)),
    "fetch": told(wire.Fetch(0, 0, 0), None),
    "begin": told(wire.Begin(0, 0, 0, 0.5, 0)),
    "push": told(wire.Push(0, 0, 0, 0, 0, b"\1", 0)),
    "push in shared memory": told(wire.PushShared(0, 0, 0, 0, b"\1", 0, 0), None),
    "pull": told(wire.Pull(0, 0, 0, 0, 0), None),
    "pull in shared memory": told(wire.PullShared(0, 0, 0, 0, 0, 0), None),
    "ready": told(wire.Ready(0, 0, 0), None),
    "commit": told(wire.Commit(0, 0, 0, b""), None),
    "clip": told(wire.Clip(0, 0, 0, 0.0), None),
    "welcome": told(wire.Welcome("h", 1, 0, 1, "", "fail"), None),
    "done": told(wire.Done(0), None),
    "sum": told(wire.Sum(0, 0)),
    "piece": told(wire.Piece(0, 1, 0)),
    "closed": told(wire.Closed(0, 1, 0, 2, 1.0), None),
    "again": told(wire.Again(), None),
    "ping": told(wire.Ping(), None),
    "rewind": told(wire.Rewind(9, "back you go"), None),
    "failed": told(wire.Failed("CommError", "all of you, stop"), None),
}
MESSAGES = {**FRAMES, **{name: [head] for name, head in PACKED.items()}, **STRANGERS}
SILENT = {
    "a farewell",
    "a frame over the limit",
    "a header of a megabyte",
    "50 MiB in frames",
    "a total over the limit",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_strangers_message(served: Served, what: str):
    with served.unharmed(), dealer(served.address) as stranger, dealer(served.address) as nameless:
        stranger.say(*MESSAGES[what])
        nameless.send_multipart(MESSAGES[what])
        for each in (stranger, nameless) if what not in SILENT else ():
            assert each.poll(5000)
            answer = wire.decode(each.recv_multipart()[0])
            assert isinstance(answer, wire.Failed)
            assert answer.kind in ("ProtocolError", "UsageError", "StateLost", "Fenced")
            assert each is stranger or answer.kind == "ProtocolError"
            assert "\x1b" not in answer.text
            assert "\n" not in answer.text
        served.pair.step()


def test_an_older_worker_is_told_what_to_do(served: Served):
    """Its message begins with the header, and it has named its connection."""
    with served.unharmed(), dealer(None) as older:
        older.routing_id = b"\x01" + bytes(15)
        older.connect(served.address)
        older.send(header(4, 0, *vars(HELLO).values()))
        assert older.poll(5000)
        answer = wire.decode(older.recv_multipart()[0])
    words = f"protocol 4, and this side speaks {wire.PROTOCOL}: install one version everywhere"
    assert answer == wire.Failed("ProtocolError", words)


# --- strangers that speak for others


def test_a_stranger_that_speaks_for_a_worker(tmp_path: Path):
    """It knows the worker's route and all but the last byte of its name, which nobody is told."""
    running = Running(own_socket(tmp_path))
    workers = workers_of(running.address, lanes="off")
    listener = running.server._listener
    farewell = wire.encode(wire.Bye("ValueError: all of you, stop"))
    members = {m.session for m in running.server._shard.members.present}
    routes = {session: listener._routes[session][-1] for session in members}
    assert len(routes) == 2
    for session, route in routes.items():
        almost = session[:-1] + bytes([session[-1] ^ 1])
        for name in (almost, session[:-1], session + b"\0", session[::-1], b"", bytes(20), route):
            for own in (None, route, session):
                with dealer(None) as stranger:
                    if own is not None:
                        stranger.routing_id = own
                    stranger.connect(running.address)
                    stranger.send_multipart([name, farewell])
                    stranger.send(farewell)
                    if own == route:
                        assert not stranger.poll(20)  # the route is taken: ZeroMQ does not read from it
                        continue
                    assert stranger.poll(5000)
                    answer = wire.decode(stranger.recv_multipart()[0])
                    assert isinstance(answer, wire.Failed)
                    assert answer.kind == "ProtocolError"
    assert {session: listener._routes[session][-1] for session in members} == routes
    work_and_leave(workers)
    assert running.ended() is None


def test_a_stranger_with_many_names_on_one_connection(tmp_path: Path):
    """It has the first, and is not heard for ever."""
    running = Running(own_socket(tmp_path))
    workers = workers_of(running.address, lanes="off")
    answers = 0
    with dealer(running.address) as stranger:
        for _ in range(3000):
            stranger.say(wire.encode(wire.Fetch(0, 0, 0)))
            stranger.name = wire.new_name()
        while stranger.poll(300):
            answer = wire.decode(stranger.recv_multipart()[0])
            assert isinstance(answer, wire.Failed)
            assert answer.kind == ("StateLost" if answers == 0 else "ProtocolError")
            answers += 1
    assert 900 < answers <= 1001
    assert len(running.server._listener._routes) == 3
    work_and_leave(workers)
    assert running.ended() is None


def test_many_strangers_push_no_worker_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their names are forgotten; one that speaks again is answered all the same."""
    monkeypatch.setattr("dtrain.ps.listener._MOST_STRANGERS", 20)
    running = Running(own_socket(tmp_path))
    listener = running.server._listener
    listener._room = 20
    workers = workers_of(running.address, lanes="off")
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(dealer(running.address)) for _ in range(100)]
        for stranger in (*strangers, *strangers):
            stranger.say(wire.encode(wire.Inquire()))
            assert stranger.poll(5000)
            assert isinstance(wire.decode(stranger.recv()), wire.Standing)
            assert len(listener._routes) <= 22
            assert len(listener._session_of) <= 22
        work_and_leave(workers)
    assert running.ended() is None


# --- messages of workers, each to a server of its own without a network


@pytest.fixture
def bench(own_temporary_directory: Path) -> Iterator[Bench]:
    bench = Bench(own_socket(own_temporary_directory), credit_bytes=4 * 2**20)
    bench.anew()
    yield bench
    bench.server.close()


@contextlib.contextmanager
def segment(nbytes: int = 4096) -> Iterator[Segment]:
    made = Segment.create(nbytes)
    try:
        yield made
    finally:
        made.close()


Misdeed = Callable[[Bench], object]


def ones(nbytes: int) -> bytes:
    return b"\0" * nbytes


def shares(bench: Bench, name: str, nbytes: int) -> None:
    bench.ask(1, wire.Share, 0, name, nbytes)


def shares_and(kind: type, *fields: object) -> Misdeed:
    """A segment of 4096 bytes, number 0, and a request that refers to it."""

    def misdeed(bench: Bench) -> None:
        with segment() as made:
            shares(bench, made.name, made.nbytes)
            bench.answered(1, wire.Done)
            bench.ask(1, kind, *fields)

    return misdeed


def shares_file(make: Callable[[Path], object], nbytes: int = 4096) -> Misdeed:
    """A file of the right name, made otherwise."""

    def misdeed(bench: Bench) -> None:
        path = Path(lanes.DIRECTORY, f"dtrain-{os.getpid()}-{secrets.token_hex(16)}")
        try:
            make(path)
            shares(bench, path.name, nbytes)
        finally:
            path.unlink(missing_ok=True)

    return misdeed


def written(path: Path, mode: int = 0o600, nbytes: int = 4096) -> None:
    path.touch(mode)
    path.chmod(mode)
    path.write_bytes(bytes(nbytes))


def asks(kind: type, *fields: object, payload: bytes | None = None) -> Misdeed:
    return lambda bench: bench.ask(1, kind, *fields, payload=payload)


def frames(*parts: bytes) -> Misdeed:
    return lambda bench: bench.feed(b"1", *parts)


def together(*misdeeds: Misdeed) -> Misdeed:
    return lambda bench: [misdeed(bench) for misdeed in misdeeds]


def sparse(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 4096)


CLOSED = [
    ("garbage", frames(sealed(b"junk")), "not msgpack|not an array"),
    ("three frames", frames(b"", b"", b""), "3 frames"),
    ("a long header", frames(bytes(5000)), "5000 bytes"),
    ("an answer", frames(wire.encode(wire.Done(0))), "Done"),
    ("a sum", frames(*told(wire.Sum(0, 0))), "Sum"),
    ("a welcome", frames(wire.encode(wire.Welcome("h", 1, 0, 1, "", "fail"))), "Welcome"),
    ("a rewind", frames(wire.encode(wire.Rewind(3, ""))), "Rewind"),
    ("a failure", frames(wire.encode(wire.Failed("CommError", ""))), "Failed"),
    ("hello again", frames(wire.encode(hello(1))), None),  # the network may have lost the first
    ("hello otherwise", frames(wire.encode(hello(1, pid=78))), "Hello twice"),
    ("hello as another", frames(wire.encode(hello(0))), "Hello twice"),
    ("add without a payload", frames(wire.encode(ADD)), "Add with 0 payloads"),
    ("add of nothing", asks(wire.Add, "k", 0, 0, "float64", 0, payload=b""), "payload of 0 bytes"),
    ("add of 3 bytes", asks(wire.Add, "k", 0, 0, "float32", 0, payload=ones(3)), "payload of 3 bytes"),
    ("add of objects", asks(wire.Add, "k", 0, 0, "object", 0, payload=ones(8)), "unknown type"),
    ("add twice", together(*[asks(wire.Add, "k", 0, 0, "float32", 0, payload=ones(8))] * 2), "twice"),
    ("far ahead", frames(*told(replace(ADD, seq=2**62))), "cannot be meant"),
    ("low above all", frames(*told(replace(ADD, low=2**62))), "cannot be meant"),
    (
        "overload",
        together(*(asks(wire.Add, "k", n, 0, "uint8", 0, payload=ones(2**20)) for n in range(5))),
        "overload",
    ),
    ("share of no name", lambda b: shares(b, "", 4096), "no name of a segment"),
    ("share of a path", lambda b: shares(b, "/etc/passwd", 4096), "no name of a segment"),
    ("share above", lambda b: shares(b, "../../etc/passwd", 4096), "no name of a segment"),
    ("share above, in disguise", lambda b: shares(b, "dtrain-1-" + "../" * 10 + "aa", 4096), "no name of a segment"),
    ("share of NUL", lambda b: shares(b, "dtrain-1-" + "0" * 32 + "\0", 4096), "no name of a segment"),
    ("share of what is not there", lambda b: shares(b, "dtrain-1-" + "0" * 32, 4096), None),
    ("share of a link", shares_file(lambda p: p.symlink_to("/etc/passwd")), "cannot be opened"),
    ("share of a folder", shares_file(lambda p: (p.mkdir(), p.rmdir())), None),
    ("share of a pipe", shares_file(lambda p: os.mkfifo(p, 0o600)), "not a regular file"),
    ("share of everybody's", shares_file(lambda p: written(p, 0o666)), "not this user's alone"),
    ("share of less", shares_file(lambda p: written(p, nbytes=100)), "has 100 bytes"),
    ("share of 2^62", shares_file(written, 2**62), "has 4096 bytes"),
    ("share of nothing", shares_file(lambda p: written(p, nbytes=0), 0), "has 0 bytes"),
    ("share without memory", shares_file(sparse), "no memory"),
    ("add in no segment", asks(wire.AddShared, "k", 0, 0, "float32", 0, 0, 1), "segment 0, which was not shared"),
    ("add beyond", shares_and(wire.AddShared, "k", 0, 0, "float32", 0, 4096, 1), "which has 4096 bytes"),
    ("add far beyond", shares_and(wire.AddShared, "k", 0, 0, "float32", 0, 2**62, 2**62), "which has 4096 bytes"),
    ("add of too many", shares_and(wire.AddShared, "k", 0, 0, "float32", 0, 0, 1025), "which has 4096 bytes"),
    ("add askew", shares_and(wire.AddShared, "k", 0, 0, "float32", 0, 2, 1), "no multiple"),
    ("add of an unknown type in shared memory", shares_and(wire.AddShared, "k", 0, 0, "q", 0, 0, 1), "unknown type"),
    (
        "add after unshare",
        together(shares_and(wire.Unshare, 0), asks(wire.AddShared, "k", 0, 0, "float32", 0, 0, 1)),
        "segment 0, which was not shared",
    ),
    ("put before open", asks(wire.Put, 0, 1, 0, payload=ones(8)), "before the parameters were described"),
    ("fetch before open", asks(wire.Fetch, 0), "before the parameters were described"),
    ("begin before open", asks(wire.Begin, 0, 0.5, 0, payload=ones(8)), "before the parameters were described"),
    ("push before open", asks(wire.Push, 0, 0, 0, b"", 0, payload=ones(8)), "before the parameters were described"),
    ("pull before open", asks(wire.Pull, 0, 0, 0), "before the parameters were described"),
    ("pull in shared memory before open", asks(wire.PullShared, 0, 0, 0, 0), "before the parameters were described"),
    ("push in shared memory before open", asks(wire.PushShared, 0, 0, b"", 0, 0), "before the parameters"),
    ("open of noise", lambda b: opens(b, b"\xc1" * 100), "layout that cannot be read"),
    ("open twice", together(*[asks(wire.Open, 0, payload=ones(8))] * 2), "twice"),
    ("open of nothing", asks(wire.Open, 0, payload=b""), "payload of 0 bytes"),
    ("open of zeros", lambda b: opens(b, bytes(100)), "layout that cannot be read"),
    ("open of lists", lambda b: opens(b, b"\x91" * 5000), "layout that cannot be read"),
    ("open of maps", lambda b: opens(b, b"\xdd\x00\x0f\x00\x00" + b"\x80" * 0xF0000), "layout that cannot be read"),
    ("open of pickle", lambda b: opens(b, PICKLE), "layout that cannot be read"),
    ("two layouts", lambda b: (b.ask(0, wire.Open, 1, payload=packed(layout())), opens_one(b)), "describe other"),
    ("more than there is", lambda b: opens(b, packed(layout(large(2**40 - 1)))), "host has"),
    ("buckets out of order", lambda b: opens(b, packed(layout(RANGES[::-1]))), "out of order"),
    ("a bucket twice", lambda b: opens(b, packed(layout((RANGES[0], RANGES[0])))), "out of order"),
    ("strides beyond", lambda b: opens(b, packed(layout(askew((2**39, 1))))), "layout that cannot be read"),
]


def packed(flat: torch.Tensor) -> bytes:
    return bytes(flat.tolist())


def opens(bench: Bench, data: bytes) -> None:
    """Both workers describe the same."""
    for rank in range(2):
        bench.ask(rank, wire.Open, 1, payload=data)


def opens_one(bench: Bench) -> None:
    bench.ask(1, wire.Open, 1, payload=packed(layout(clip=True)))


def large(numel: int) -> tuple[BucketRange, ...]:
    return (BucketRange(0, "float64", 1, ((0, Piece(0, 0, 0, numel)),)),)


def askew(strides: tuple[int, ...]) -> tuple[BucketRange, ...]:
    return (
        BucketRange(0, "float32", 2, ((0, Piece(0, 0, 0, 600, (20, 30), strides)), (1, Piece(1, 0, 0, 400, (400,))))),
        RANGES[1],
    )


def begins(settings: bytes, step: int = 0, share: float = 0.5) -> Misdeed:
    return asks(wire.Begin, step, share, 1, payload=settings)


def both_begin(settings: bytes) -> Misdeed:
    """Both make a step with these settings."""

    def misdeed(bench: Bench) -> None:
        for rank in range(2):
            bench.ask(rank, wire.Begin, 0, 0.5, 1, payload=settings)
            for r in RANGES:
                bench.ask(rank, wire.Push, 0, r.bucket, 0, b"\3", 1, payload=bytes(r.nbytes))

    return misdeed


def pushes(bucket: int, part: int, flags: bytes, nbytes: int, step: int = 0) -> Misdeed:
    return asks(wire.Push, step, bucket, part, flags, 1, payload=ones(nbytes))


def puts(data: bytes, part: int = 0, parts: int = 1, rank: int = 0) -> Misdeed:
    return lambda bench: bench.ask(rank, wire.Put, part, parts, 1, payload=data)


NAN_SETTINGS = SETTINGS.numpy().tobytes().replace(bytes(8), struct.pack(">d", math.nan), 1)
OPEN = [
    ("open again", asks(wire.Open, 0, payload=ones(8)), None),  # as after a rewind; nothing is asked of it yet
    ("put by another", puts(ones(8), rank=1), "not here, not now"),
    ("put of part 5 of 1", puts(ones(8), 5, 1), "not here, not now"),
    ("put of 2^40 parts", puts(ones(8), 0, 2**40), "not here, not now"),
    ("put of part 0 of 0", puts(ones(8), 0, 0), "not here, not now"),
    ("a part twice", together(puts(ones(8), 0, 2), puts(ones(8), 0, 2)), "put twice"),
    ("put of noise", puts(b"noise of ten thousand voices"), "cannot be read"),
    ("put of pickle", puts(PICKLE), "cannot be read"),
    ("put of 2^63 bytes", puts(struct.pack("<Q", 2**63) + b"{}"), "cannot be read"),
    ("put of an unknown bucket", puts(saved := b"", 0, 1), "payload of 0 bytes"),
    ("fetch of part 7", asks(wire.Fetch, 7), "no part 7"),
    ("fetch of part 2^62", asks(wire.Fetch, 2**62), "no part"),
    ("begin of noise", both_begin(b"\xc1" * 10), "settings"),
    ("begin of lists", both_begin(b"\x91" * 5000), "settings|hyperparameters"),
    ("begin of another optimizer", both_begin(msgpack.packb([{"lr": 1}])), "hyperparameters"),
    (
        "begin of NaN",
        both_begin(SETTINGS.numpy().tobytes().replace(bytes(8), struct.pack(">d", math.nan), 1)),
        "finite",
    ),
    ("begin of pickle", both_begin(PICKLE), "settings|hyperparameters"),
    ("begin of nothing", begins(b""), "payload of 0 bytes"),
    ("begin twice", together(begins(b"x"), begins(b"x")), "twice"),
    ("a step too far", begins(b"x", 7), "step 0 is due"),
    ("a step of 2^62", begins(b"x", 2**62), "step 0 is due"),
    ("a step that is past", lambda b: (b.step(), b.ask(1, wire.Begin, 0, 0.5, 1, payload=b"x")), "step 1 is due"),
    ("two steps at once", together(begins(b"x"), pushes(0, 0, b"\3", 4 * NUMEL, step=1)), "while its step 0"),
    ("an unknown bucket", pushes(1, 0, b"\3", 4), "does not hold"),
    ("a part that is not there", pushes(0, 1, b"\3", 4 * NUMEL), "numbers for bucket 0, part 1"),
    ("part 2^62", pushes(0, 2**62, b"\3", 4 * NUMEL), "numbers for bucket 0"),
    ("half a part", pushes(0, 0, b"\3", 2 * NUMEL), "500 numbers for bucket 0"),
    ("an odd number of bytes", pushes(0, 0, b"\3", 4 * NUMEL - 1), "no multiple"),
    ("more than a part", pushes(0, 0, b"\3", 4 * NUMEL + 4), "1001 numbers"),
    ("no flags", pushes(0, 0, b"", 4 * NUMEL), "bytes of flags"),
    ("many flags", pushes(0, 0, bytes(2000), 4 * NUMEL), "bytes of flags"),
    ("a part twice", together(*[pushes(0, 0, b"\3", 4 * NUMEL)] * 2), "twice"),
    ("push in no segment", asks(wire.PushShared, 0, 0, b"\3", 0, 0), "segment 0, which was not shared"),
    ("push beyond", shares_and(wire.PushShared, 0, 3, b"\1", 0, 0), "which has 4096 bytes"),
    ("push askew", shares_and(wire.PushShared, 0, 0, b"\3", 0, 2), "no multiple"),
    ("pull of an unknown bucket", asks(wire.Pull, 0, 2**62, 0), "does not hold"),
    ("pull of part 9", asks(wire.Pull, 0, 0, 9), "no part 9"),
    ("pull twice", together(*[asks(wire.Pull, 1, 0, 0)] * 2), "twice at once"),
    ("pull into no segment", asks(wire.PullShared, 0, 0, 9, 0), "segment 9, which was not shared"),
    ("pull beyond", shares_and(wire.PullShared, 0, 0, 0, 2000), "which has 4096 bytes"),
    (
        "pull into what is taken away",
        together(shares_and(wire.PullShared, 1, 0, 0, 0), asks(wire.Unshare, 0), lambda b: b.step()),
        "segment 0, which was not shared",
    ),
    ("ready", asks(wire.Ready, 0), "not asked for"),
    ("commit", asks(wire.Commit, 0, b"\0\0"), "which it is not at"),
    ("clip", asks(wire.Clip, 0, 1.0), "which it is not at"),
    ("clip of NaN", asks(wire.Clip, 0, math.nan), "Clip.factor is nan"),
]


@pytest.mark.parametrize(
    ("opened", "misdeed", "words"),
    [pytest.param(False, m, w, id=n) for n, m, w in CLOSED] + [pytest.param(True, m, w, id=n) for n, m, w in OPEN],
)
def test_a_workers_message_that_cannot_be_meant(bench: Bench, opened: bool, misdeed: Misdeed, words: str | None):
    """The job ends, and everybody is told why by the same words."""
    if opened:
        bench.open()
    with contextlib.suppress(AssertionError) if words else contextlib.nullcontext():
        misdeed(bench)
    if words is None:
        bench.said.clear()
        bench.add()
        return
    assert bench.failed is not None
    assert re.search(words, bench.failed.text), bench.failed
    for session in (b"0", b"1"):
        assert (session, bench.failed) in bench.said
    assert issubclass(getattr(errors, bench.failed.kind), errors.DtrainError)
    assert not bench.server._jobs
    assert not bench.server._segments
