"""Property tests here are judged by what they find, not by how fast a busy machine runs one example."""

import pytest
import zmq
from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def zero_copy_thread() -> None:
    """pyzmq keeps a thread, for the whole process, from the first message that it sends without a copy."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://first")
        other.connect("inproc://first")
        one.send(bytes(1 << 20), copy=False)
        other.recv()
