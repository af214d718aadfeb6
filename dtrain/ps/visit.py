"""A connection to a server or a scheduler for a question or two, without taking part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from dtrain.errors import UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets, wire


@dataclass(frozen=True)
class Visit:
    """A socket, and what tells of its connection."""

    socket: zmq.Socket[bytes]
    watch: sockets.Watch
    _name: bytes

    def say(self, message: wire.Message) -> None:
        """Send, once the handshake is over."""
        sockets.say(self.socket, self._name, message)


@contextlib.contextmanager
def visiting(address: str, pair: curve.Keys | None, role: str) -> Iterator[Visit]:
    """A connection to the address: await the handshake before sending.

    Args:
        pair: CURVE keys to come with; None: no encryption.
        role: what is expected there, `server` or `scheduler`, for messages.

    Raises:
        UsageError: the address cannot be used.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    watch: sockets.Watch | None = None
    try:
        socket = sockets.make(context, zmq.DEALER)
        if pair is not None:
            curve.secure(socket, pair, "worker")
        watch = sockets.Watch(socket, address, role)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise UsageError(f"{role} is {address!r}: {error.strerror}; give tcp://host:port") from error
        yield Visit(socket, watch, wire.new_name())
    finally:
        if watch is not None:
            watch.close()
        context.destroy(linger=0)
