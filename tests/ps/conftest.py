"""Property tests here are judged by what they find, not by how fast a busy machine runs one example."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zmq
from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a server has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def zero_copy_thread() -> None:
    """pyzmq keeps a thread, for the whole process, from the first message that it sends without a copy."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://first")
        other.connect("inproc://first")
        one.send(bytes(1 << 20), copy=False)
        other.recv()
