"""The socket that a server or a scheduler listens at: bound, limited, and with keys where there are some.

A connection has a route, by which libzmq knows it, and a message the name of its session. Which connection is a
session's newest, and gets its answers, is known here alone. Routes and names are secrets: neither is told or logged.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket as net
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import zmq

from dtrain.errors import DtrainError, ProtocolError, UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets, wire
from dtrain.ps.members import Session

log = logging.getLogger(__name__)

_MOST_REFUSED = 1000
_MOST_STRANGERS = 10_000
_MOST_ROUTES = 16
"""Connections of one session that are remembered: bytes of older ones are long read."""

Route = bytes
"""Names one connection."""


class Came(NamedTuple):
    """A message. One with an error is of the session that its connection had before; without one, of `_nobody`."""

    route: Route
    session: Session
    frames: list[zmq.Frame]
    error: ProtocolError | None = None


class Listener:
    """A bound ROUTER in a context of its own."""

    def __init__(
        self,
        address: str,
        *,
        keys: Path | None,
        insecure_no_encryption: bool,
        send_queue: int,
        servers_too: bool = False,
    ) -> None:
        """Bind.

        Args:
            address: `ipc:///path` or `tcp://host:port`; port 0 takes a free one, see `address` afterwards.
            keys: directory of CURVE keys, see `dtrain keys`; None: no encryption.
            send_queue: messages that may wait for a peer that does not read.
            servers_too: let servers of the job in as well as workers.

        Raises:
            UsageError: the address cannot be used or is taken.
        """
        sockets.check_address(address, insecure_no_encryption=insecure_no_encryption or keys is not None)
        _check_free(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._gatekeeper: curve.Gatekeeper | None = None
        self.router = sockets.make(self._context, zmq.ROUTER)
        self.router.setsockopt(zmq.SNDHWM, send_queue)
        self._warnings = 0
        self._refused: Counter[Route] = Counter()
        self._session_of: dict[Route, Session] = {}
        self._routes: dict[Session, deque[Route]] = {}  # the newest last; the same, turned round
        self._room = _MOST_STRANGERS
        self.is_member: Callable[[Session], bool] = lambda _: False
        """Whose routes are kept, when there are too many sessions."""
        self.pair: curve.Keys | None = None
        """The servers' keys, where there are some."""
        try:
            if keys is not None:
                self.pair = curve.load(keys, "server")
                self._gatekeeper = curve.Gatekeeper(self._context, self.pair, servers_too=servers_too)
                curve.secure(self.router, self.pair, "server")
            self.router.bind(address)
        except zmq.ZMQError as error:
            self._end_context()
            raise UsageError(f"cannot listen at {address}: {error.strerror}") from error
        except BaseException:
            self._end_context()
            raise
        self.address = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        self._poller.register(self.router, zmq.POLLIN)

    def warn(self, error: DtrainError, *, known: bool = False) -> None:
        """Log what was refused: of members always, of strangers seldom, who could fill a disk."""
        self._warnings += not known
        if known or self._warnings in (1, 10, 100, 1000, 10_000, 100_000):
            log.warning("refused %s%s", error, f" ({self._warnings} so far)" if self._warnings > 1 else "")

    def poll(self, timeout_s: float) -> bool:
        """Wait for a message, that long at most; whether there is one."""
        return bool(self._poller.poll(int(timeout_s * 1000)))

    @property
    def has_one(self) -> bool:
        """Whether a message has come."""
        return sockets.has_one(self.router)

    def receive(self) -> Came | None:
        """A message that has arrived; None for one that is not worth while to read.

        Raises:
            zmq.Again: there is none.
        """
        frames = self.router.recv_multipart(zmq.NOBLOCK, copy=False)
        route = frames[0].bytes
        if self._refused and self._refused.get(route, 0) > _MOST_REFUSED:
            return None  # a peer that was refused so often is not answered again
        session = self._session_of.get(route)
        if session is None:
            if wire.is_name(session := _start(frames[1])):
                self._enter(route, session)
                return Came(route, session, frames[2:])
            return Came(route, _nobody(route), [], _nameless(frames[1]))
        if len(frames[1]) == len(session) and frames[1].bytes == session:
            return Came(route, session, frames[2:])
        return Came(route, session, [], _nameless(frames[1]))

    def send(self, session: Session, frames: Sequence[bytes | memoryview]) -> bool:
        """Send a message over a session's newest connection; False if none is there or it does not read."""
        copy = len(frames[-1]) < sockets.ZERO_COPY_BYTES
        for route in reversed(self._routes.get(session, (session[1:],))):
            try:
                self.router.send_multipart([route, *frames], zmq.NOBLOCK, copy=copy)
                return True
            except zmq.ZMQError as error:
                if error.errno == zmq.EAGAIN:
                    return False
                if error.errno != zmq.EHOSTUNREACH:
                    raise
        return False

    def _enter(self, route: Route, session: Session) -> None:
        """Remember a route that was not heard of before: bytes that come late by an older one do not bring it back."""
        if session not in self._routes:
            if len(self._routes) >= self._room:
                self._forget_strangers()
            self._routes[session] = deque()
        routes = self._routes[session]
        routes.append(route)
        self._session_of[route] = session
        if len(routes) > _MOST_ROUTES:
            del self._session_of[routes.popleft()]

    def _forget_strangers(self) -> None:
        """A stranger may come by many connections. One that still waits for an answer is known when it speaks again."""
        self._routes = {session: routes for session, routes in self._routes.items() if self.is_member(session)}
        self._session_of = {route: session for session, routes in self._routes.items() for route in routes}
        self._room = len(self._routes) + _MOST_STRANGERS

    def refuse(self, route: Route) -> None:
        """Count a message of a peer that is no member."""
        if len(self._refused) >= _MOST_STRANGERS:
            self._refused.clear()
        self._refused[route] += 1

    def is_servers(self, frame: zmq.Frame) -> bool:
        """Whether the servers' own key says that one of them has sent it."""
        return self.pair is not None and hmac.compare_digest(str(frame.get("User-Id")).encode(), self.pair.public)

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._end_context()
        url = urlparse(self.address)
        if url.scheme == "ipc":
            with contextlib.suppress(OSError):
                Path(url.path).unlink()

    def _end_context(self) -> None:
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self._context.destroy(linger=200)


def _nobody(route: Route) -> Session:
    """Stands for the session of a connection that has named none; it is no name."""
    return b"\0" + route


def _start(frame: zmq.Frame) -> bytes:
    """A frame that may be a name or a header; of a longer one, nothing."""
    return frame.bytes if len(frame) <= wire.MAX_HEADER_BYTES else b""


def _nameless(frame: zmq.Frame) -> ProtocolError:
    """Why a message that does not begin with its session's name is refused; an older dtrain begins with the header."""
    if len(frame) > wire.MAX_HEADER_BYTES:
        return ProtocolError(f"a header of {len(frame)} bytes")
    if wire.is_name(frame.bytes):
        return ProtocolError("a message of another session than the one before, on one connection")
    try:
        wire.decode(frame.bytes)
    except ProtocolError as error:
        return error
    return ProtocolError("a message without the name of its session")


def _check_free(address: str) -> None:
    """ZeroMQ would take the socket's file away from a server that listens there already."""
    url = urlparse(address)
    if url.scheme != "ipc":
        return
    with net.socket(net.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(url.path)
        raise UsageError(f"cannot listen at {address}: another server does already")
