"""Valid messages, damaged in a few places, by the thousand: nothing but a refusal follows, on either side."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq

from dtrain.errors import DtrainError, ProtocolError
from dtrain.ps import layout as layouts
from dtrain.ps import wire
from dtrain.ps.link import Joining, Link
from dtrain.ps.sockets import make
from dtrain.ps.wire import Message
from tests.ps.serving import (
    LARS_SETTINGS,
    SETTINGS,
    VALUES,
    Bench,
    Running,
    dealer,
    header,
    hello,
    layout,
    own_socket,
    sealed,
    work_and_leave,
    workers_of,
)

LAYOUT = bytes(layout().tolist())
VALUE_BYTES = bytes(VALUES.tolist())
SETTING_BYTES = bytes(SETTINGS.tolist())
SESSIONS = (b"0", b"1", b"a stranger", b"another")
NUMBERS = (0, 1, 2, 3, 7, -1, 255, 256, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD = (None, True, False, 0.0, -0.0, 1.5, float("nan"), float("inf"), "", "x" * 3000, b"", b"\xff" * 40, [], {}, [[]])

MESSAGES: list[tuple[Message, bytes | None]] = [
    (hello(0), None),
    (hello(1), None),
    (wire.Bye(""), None),
    (wire.Share(0, 0, 0, "dtrain-1-" + "0" * 32, 4096), None),
    (wire.Unshare(1, 0, 0), None),
    (wire.Add(2, 0, "metric/x", 0, 0, "float32", 0), bytes(8)),
    (wire.AddShared(3, 0, "metric/x", 0, 0, "float32", 0, 0, 1), None),
    (wire.Open(4, 0, 0), LAYOUT),
    (wire.Put(5, 0, 0, 1, 0), VALUE_BYTES),
    (wire.Fetch(6, 0, 0), None),
    (wire.Begin(7, 0, 0, 0.5, 0), SETTING_BYTES),
    (wire.Push(8, 0, 0, 0, 0, b"\3", 0), bytes(4000)),
    (wire.Push(9, 0, 0, 3, 0, b"\1", 0), bytes(8000)),
    (wire.PushShared(10, 0, 0, 0, b"\3", 0, 0), None),
    (wire.Pull(11, 0, 0, 0, 0), None),
    (wire.PullShared(12, 0, 0, 0, 0, 0), None),
    (wire.Ready(13, 0, 0), None),
    (wire.Commit(14, 0, 0, b"\0\0\1\0"), None),
    (wire.Clip(15, 0, 0, 0.5), None),
    (wire.Recall(16, 0), None),
    (wire.Scale(17, 0, 0, 0), bytes(24)),
    (wire.Inquire(), None),
    (wire.Done(0), None),
    (wire.Failed("CommError", "x"), None),
]
ANSWERS: list[tuple[Message, bytes | None]] = [
    (wire.Welcome("h", 1, 0, 2**30, "", "fail"), None),
    (wire.Done(0), None),
    (wire.Sum(1, 0), bytes(8)),
    (wire.Piece(2, 1, 0), bytes(8)),
    (wire.Received(3), None),
    (wire.Chosen(4, b"\0\0"), None),
    (wire.Squares(5, 0), bytes(8)),
    (wire.Again(), None),
    (wire.Ping(), None),
    (wire.Rewind(1, "x"), None),
    (wire.Failed("CommError", "x"), None),
    (wire.Standing(0, 1, 2, 2), None),
    (wire.Fetch(0, 0, 0), None),
]


def scratched(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut away or put in."""
    changed = bytearray(data)
    where = rng.randrange(len(changed) + 1)
    what = rng.randrange(4)
    if what == 0 and where < len(changed):
        changed[where] = rng.randrange(256)
    elif what == 1:
        del changed[where:]
    elif what == 2:
        changed[where:where] = rng.randbytes(rng.randrange(1, 9))
    else:
        del changed[where : where + rng.randrange(1, 9)]
    return bytes(changed)


class Mutant:
    """A message and what becomes of it."""

    def __init__(self, message: Message, payload: bytes | None, rng: random.Random) -> None:
        self.values: list[Any] = [wire.PROTOCOL, wire._KINDS.index(type(message))]
        self.values += [getattr(message, f.name) for f in fields(message)]
        self.payload = payload
        self.rng = rng
        self.extra: list[bytes] = []
        self.scratches = 0

    def mutate(self) -> None:
        rng = self.rng
        what = rng.randrange(10)
        if what < 5:
            self.values[rng.randrange(len(self.values))] = rng.choice(NUMBERS if rng.random() < 0.7 else ODD)
        elif what == 5:
            self.values[rng.randrange(len(self.values))] = rng.randbytes(rng.randrange(40))
        elif what == 6:
            del self.values[rng.randrange(len(self.values))]
            self.values = self.values or [0]
        elif what == 7:
            self.scratches += 1
        elif what == 8:
            self.payload = None if self.payload is None else scratched(self.payload, rng)
        else:
            self.extra.append(rng.randbytes(rng.randrange(20)))
            if rng.random() < 0.5:
                self.payload = rng.randbytes(8) if self.payload is None else None

    def frames(self) -> list[bytes]:
        packed = msgpack.packb(self.values)
        for _ in range(self.scratches):
            packed = scratched(packed, self.rng)
        head = sealed(packed) if self.rng.random() < 0.95 else scratched(sealed(packed), self.rng)
        extra = self.extra if self.rng.random() < 0.1 else []
        return [head, *([] if self.payload is None else [self.payload]), *extra]


def mutants(messages: list[tuple[Message, bytes | None]], count: int, seed: int) -> Iterator[list[bytes]]:
    """Each message changed in one to three places; now and then none."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = Mutant(*rng.choice(messages), rng)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            mutant.mutate()
        yield mutant.frames()


def prepared(bench: Bench, rng: random.Random) -> None:
    """Another job, at one of the places where jobs are."""
    bench.anew()
    stage = rng.randrange(5)
    if stage == 4:
        bench.open(ratios=True)
        for rank in range(2):
            bench.begin(rank, LARS_SETTINGS)
    elif stage:
        bench.open(**rng.choice(({}, {"agreed": True}, {"clip": True}, {"staleness": 2}, {"staleness": None})))
    if stage == 2:
        for rank in range(2):
            bench.ask(rank, wire.Begin, 0, 0.5, 1, payload=SETTING_BYTES)
    if stage == 3:
        bench.ask(0, wire.Push, 0, 0, 0, b"\3", 1, payload=bytes(4000))
    bench.said.clear()


COUNTS = [pytest.param(20_000, id="20k"), pytest.param(100_000, id="100k", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_the_servers_door(own_temporary_directory: Path, count: int, caplog: pytest.LogCaptureFixture):
    """No message raises anything, or makes the server fail in a way that has no name."""
    caplog.set_level("ERROR")
    bench = Bench(own_socket(own_temporary_directory))
    rng = random.Random(count)
    failures: set[str] = set()
    try:
        bench.anew()
        for frames in mutants(MESSAGES, count, count):
            if bench.failed is not None or rng.random() < 0.02:
                prepared(bench, rng)
            session = rng.choice(SESSIONS)
            before = bench.failed
            bench.feed(session, *frames)
            if bench.failed is not None and before is None:
                assert session in (b"0", b"1"), (frames, bench.failed)
                assert "failed with" not in bench.failed.text or "worker" in bench.failed.text, (frames, bench.failed)
                failures.add(bench.failed.kind)
            bench.said.clear()
        bench.anew()
        bench.add()
        bench.open()
        bench.step()
    finally:
        bench.server.close()
    assert failures >= {"ProtocolError"}
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_strangers_mutants_at_a_real_port():
    """A few thousand, while two workers work."""
    running = Running("tcp://127.0.0.1:0")
    workers = workers_of(running.address)
    flats = [torch.ones(1000) for _ in workers]
    with dealer(running.address) as stranger:
        stranger.linger = 0
        for number, frames in enumerate(mutants(MESSAGES, 3000, 7)):
            stranger.say(*frames)
            if number % 500 == 0:
                works = [w.all_reduce(f, "gradient/9") for w, f in zip(workers, flats, strict=True)]
                for work in works:
                    work.wait()
        stranger.say(wire.encode(wire.Fetch(0, 0, 0)))
        while stranger.poll(5000):
            last = wire.decode(stranger.recv_multipart()[0])
            if isinstance(last, wire.Failed) and last.kind == "StateLost" and not stranger.poll(50):
                break
        work_and_leave(workers)
    assert running.ended() is None


def test_a_workers_mutants_end_the_job_by_a_name(own_temporary_directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dtrain.ps.server._LAST_WORDS_S", 0.05)
    for seed in range(8):
        running = Running(own_socket(own_temporary_directory))
        with dealer(running.address) as bad, dealer(running.address) as good:
            good.say(wire.encode(hello(0)))
            bad.say(wire.encode(hello(1)))
            assert bad.poll(5000)
            for frames in mutants(MESSAGES, 300, seed):
                bad.say(*frames)
            error = running.ended()
        assert isinstance(error, DtrainError), error


def test_the_workers_door():
    """Answers of a server, to a worker that waits for some."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = make(context, zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    joining = Joining(
        job_id="",
        rank=0,
        world_size=1,
        num_servers=1,
        incarnation=0,
        connect_timeout_s=5,
        lanes=False,
        keys=None,
    )
    link = Link(context, f"tcp://127.0.0.1:{port}", 0, joining)
    refused = 0
    try:
        link.watch.await_handshake(5)
        link.socket.send(b"me")
        me = router.recv_multipart()[0]
        monkey: Callable[..., None] = lambda *_: None  # noqa: E731
        link._put = monkey  # type: ignore[method-assign]
        for number, frames in enumerate(mutants(ANSWERS, 20_000, 3)):
            if number % 10 == 0:
                link._asked.clear()
                link._next = 0
                for _ in range(6):
                    link.ask(wire.Fetch, 0, take=monkey)
            try:
                link._handle([zmq.Frame(f) for f in frames])
            except DtrainError:
                refused += 1
            link._failure = None
        router.send_multipart([me, wire.encode(wire.Ping())])
        assert link.socket.poll(5000)
        assert link.receive()
    finally:
        link.close(None)
        context.destroy(linger=0)
    assert refused > 1000


@pytest.mark.parametrize("seed", range(3))
def test_layouts(seed: int):
    """Nothing but a ProtocolError, and nothing is made of a number that came."""
    rng = random.Random(seed)
    fine = 0
    for _ in range(1500):
        data = LAYOUT
        for _ in range(rng.randrange(1, 4)):
            data = scratched(data, rng)
        try:
            layouts.decode(data)
            fine += 1
        except ProtocolError:
            pass
    assert fine < 1500


def test_headers():
    rng = random.Random(11)
    whole = header(wire.PROTOCOL, 0, *vars(replace(hello(1), host="h")).values())
    for _ in range(5000):
        data = whole[:-4]
        for _ in range(rng.randrange(1, 4)):
            data = scratched(data, rng)
        try:
            message = wire.decode(sealed(data))
        except ProtocolError:
            continue
        assert wire.decode(wire.encode(message)) == message
