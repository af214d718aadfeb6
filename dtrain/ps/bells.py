"""Waiting for several ZeroMQ sockets by their file descriptors: a wait costs the same for many as for one."""

from __future__ import annotations

import math
import select
from typing import Generic, TypeVar

import zmq

Whose = TypeVar("Whose")


class Bells(Generic[Whose]):
    """Tells which sockets have something to say, each by what it was added with.

    libzmq rings once for all that has come, and takes note of it in any call, one that sends as well. So whoever was
    rung for reads until there is nothing more, and looks again after each message that it sends, before it waits.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._whose: dict[int, Whose] = {}

    def add(self, socket: zmq.Socket[bytes] | int, whose: Whose) -> None:
        """Wait for this one too; a number is a file descriptor."""
        fd = socket if isinstance(socket, int) else int(socket.getsockopt(zmq.FD))
        self._whose[fd] = whose
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_s: float) -> list[Whose]:
        """Whose bells have rung, after that time at the latest."""
        return [self._whose[fd] for fd, _ in self._poll.poll(math.ceil(timeout_s * 1000))]
