"""A connection to a server or a scheduler for a question or two, without taking part."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import zmq

from dtrain.errors import UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets


@contextlib.contextmanager
def visiting(address: str, pair: curve.Keys | None, role: str) -> Iterator[tuple[zmq.Socket[bytes], sockets.Watch]]:
    """A socket that connects to the address, and what tells of its connection: await the handshake before sending.

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
        socket.setsockopt(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(15))
        if pair is not None:
            curve.secure(socket, pair, "worker")
        watch = sockets.Watch(socket, address, role)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise UsageError(f"{role} is {address!r}: {error.strerror}; give tcp://host:port") from error
        yield socket, watch
    finally:
        if watch is not None:
            watch.close()
        context.destroy(linger=0)
