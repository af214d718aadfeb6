"""Waiting for several sockets at once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq

from dtrain.ps.bells import Bells
from dtrain.ps.sockets import has_one


@pytest.fixture
def pairs() -> Iterator[list[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]]:
    """Three connections, each as (sender, receiver)."""
    with zmq.Context() as context:
        found = []
        for number in range(3):
            sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
            receiver.bind(f"inproc://{number}")
            sender.connect(f"inproc://{number}")
            found.append((sender, receiver))
        yield found
        for pair in found:
            for socket in pair:
                socket.close(linger=0)


def test_it_rings_for_those_that_have_something_until_all_is_read(pairs):
    bells: Bells[int] = Bells()
    for number, (_, receiver) in enumerate(pairs):
        bells.add(receiver, number)
        assert not has_one(receiver)  # what it took to connect
    assert bells.wait(0.0) == []
    for number in (0, 2):
        pairs[number][0].send(b"one")
        pairs[number][0].send(b"two")
    assert sorted(bells.wait(5.0)) == [0, 2]
    for number in (0, 2):
        while has_one(pairs[number][1]):
            pairs[number][1].recv()
    assert bells.wait(0.01) == []
    pairs[1][0].send(b"three")
    assert bells.wait(5.0) == [1]


def test_a_plain_file_descriptor_rings_too():
    read, write = os.pipe()
    try:
        bells: Bells[str | None] = Bells()
        bells.add(read, None)
        assert bells.wait(0.0) == []
        os.write(write, b"x")
        assert bells.wait(5.0) == [None]
    finally:
        os.close(read)
        os.close(write)
