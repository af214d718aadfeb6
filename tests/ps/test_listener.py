"""Which connection a session is answered by, and what a message must begin with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.errors import ProtocolError
from dtrain.ps import wire
from dtrain.ps.listener import Came, Listener
from tests.ps.serving import Stranger, dealer, hello, own_socket

PING = wire.encode(wire.Ping())


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(own_socket(tmp_path), keys=None, insecure_no_encryption=False, send_queue=10)
    yield made
    made.close()


@pytest.fixture
def one(listener: Listener) -> Iterator[Stranger]:
    with dealer(listener.address) as made:
        yield made


@pytest.fixture
def other(listener: Listener, one: Stranger) -> Iterator[Stranger]:
    """Another connection of the same session."""
    with dealer(listener.address) as made:
        made.name = one.name
        yield made


def comes(listener: Listener) -> Came:
    assert listener.router.poll(5000)
    came = listener.receive()
    assert came is not None
    return came


def heard(listener: Listener, stranger: Stranger, *frames: bytes) -> Came:
    stranger.say(*frames)
    came = comes(listener)
    assert (came.error, [frame.bytes for frame in came.frames]) == (None, list(frames))
    return came


def answered(listener: Listener, session: bytes, stranger: Stranger) -> None:
    assert listener.send(session, [b"answer"])
    assert stranger.poll(5000)
    assert stranger.recv_multipart() == [b"answer"]


def test_the_newest_connection_is_answered(listener: Listener, one: Stranger, other: Stranger):
    sessions = {heard(listener, each, PING).session for each in (one, other)}
    assert sessions == {one.name}
    answered(listener, one.name, other)
    assert heard(listener, one, PING, b"late").session == one.name
    answered(listener, one.name, other)
    assert not one.poll(50)


def test_an_older_one_is_where_the_newest_is_gone(listener: Listener, one: Stranger, other: Stranger):
    """What came late may have come by a connection that had not been heard of."""
    heard(listener, one, PING)
    heard(listener, other, PING)
    other.close(linger=0)
    deadline = time.monotonic() + 5
    while not one.poll(10):
        assert time.monotonic() < deadline
        listener.send(one.name, [b"answer"])
    one.close(linger=0)
    while listener.send(one.name, [b"answer"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_connections_of_one_session_are_not_remembered_for_ever(listener: Listener, one: Stranger):
    heard(listener, one, PING)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            last = stack.enter_context(dealer(listener.address))
            last.name = one.name
            heard(listener, last, PING)
        assert len(listener._session_of) == len(listener._routes[one.name]) < 20
        answered(listener, one.name, last)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], "checksum is wrong"),
        ([wire.encode(hello(0))], "without the name"),
        ([wire.encode(hello(0)), b"payload"], "without the name"),
        ([bytes(5000)], "5000 bytes"),
        ([wire.new_name(), PING], "another session"),
        ([b"\1" * 20, PING], "checksum is wrong"),
    ],
    ids=["nothing", "header", "header and payload", "long", "another name", "no name"],
)
def test_a_message_without_its_name(listener: Listener, one: Stranger, frames: list[bytes], words: str):
    """It is of the connection's session, where that has one; else of nobody, who can be answered all the same."""
    if words != "another session":
        one.send_multipart(frames)
        came = comes(listener)
        assert isinstance(came.error, ProtocolError)
        assert not wire.is_name(came.session)
        answered(listener, came.session, one)
    heard(listener, one, PING)
    one.send_multipart(frames)
    came = comes(listener)
    assert came.session == one.name
    assert isinstance(came.error, ProtocolError)
    assert words in str(came.error)


def test_a_damaged_name_is_damage(listener: Listener, one: Stranger):
    """Whichever bit it is."""
    heard(listener, one, PING)
    for bit in range(8 * len(one.name)):
        damaged = bytearray(one.name)
        damaged[bit // 8] ^= 1 << bit % 8
        one.send_multipart([bytes(damaged), PING])
        came = comes(listener)
        assert came.session == one.name
        assert isinstance(came.error, wire.Damaged)
    heard(listener, one, PING)


def test_names_are_not_alike():
    names = {wire.new_name() for _ in range(1000)}
    assert len(names) == 1000
    assert all(map(wire.is_name, names))
