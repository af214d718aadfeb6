"""ZeroMQ sockets with every limit and time-out set: the library's defaults wait for ever and drop in silence."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import secrets
import socket as net
import time
from collections.abc import Iterator
from urllib.parse import ParseResult, urlparse

import zmq
from zmq.utils.monitor import recv_monitor_message

from dtrain.errors import ConnectError, DtrainError, KeyRefused, ProtocolError, UsageError
from dtrain.ps.wire import PART_BYTES, Message, encode

HEARTBEAT_S = 1.0
DEAD_AFTER_S = 3.0
"""A peer whose ZMTP heartbeat is missing for this long (a stopped process, a broken link) is disconnected."""

GRACE_S = 1.5
"""How long a disconnected peer may take to come back over a network. On one host nothing breaks but processes."""

_KERNEL_BYTES = 4 * 2**20
"""What the kernel may hold of a connection in each direction, if the system allows it: fewer, larger copies."""

_HANDSHAKE_S = 5.0
_TELL_S = 2.0
"""How long to go on after the first failed handshake: the side that hangs up first does not always say why."""

_GREETING_BYTES = 64

ZERO_COPY_BYTES = 256 * 2**10
"""From this size on a payload is handed over as it lies: what libzmq and Python then have to tell each other, through a
thread, costs as much as to copy that much."""

_POLLIN, _LAST, _MORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""As numbers: to combine zmq's enums takes as long as to ask libzmq something."""

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED


def make(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket of that kind.

    The queue of what comes must have no limit: libzmq 4.3 aborts when it pings a peer whose input it has stopped
    reading (its issue 4364), and a stranger could bring that about. Members keep to their credit.

    Nobody may take a route that another connection has (ROUTER_HANDOVER): that makes libzmq stop reading too. So those
    that connect give themselves none, and a session is known by the name in its messages.
    """
    if kind == zmq.ROUTER:
        _scatter_routes()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDBUF, _KERNEL_BYTES)
    socket.setsockopt(zmq.RCVBUF, _KERNEL_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, PART_BYTES + 4096)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(_HANDSHAKE_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(DEAD_AFTER_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(DEAD_AFTER_S * 1000))
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else what cannot be delivered is dropped in silence
    return socket


def _scatter_routes() -> None:
    """Let a ROUTER count its routes from a number that nobody knows.

    libzmq aborts when the next one is taken, by a stranger that gave it to itself. It begins at C's rand(), which it
    does not seed.
    """
    ctypes.CDLL(None).srand(secrets.randbits(32))


def say(socket: zmq.Socket[bytes], name: bytes, message: Message, payload: memoryview | None = None) -> bool:
    """Send a message to a server or a scheduler, as the session of that name.

    False if it cannot be sent, now or later: what came was not ZeroMQ's protocol, and libzmq has ended the connection.
    """
    try:
        socket.send(name, _MORE)
        if payload is None:
            socket.send(encode(message), _LAST)
        else:
            socket.send(encode(message), _MORE)
            socket.send(payload, _LAST, copy=len(payload) < ZERO_COPY_BYTES)
    except zmq.Again:
        return False
    return True


def has_one(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message has come. To ask costs a third of what it costs to receive nothing."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


def check_address(address: str, *, insecure_no_encryption: bool = False) -> str:
    """The address, if it may be used.

    Raises:
        UsageError: of another form than `ipc:///path` and `tcp://host:port`, or a path that is too long, or beyond
            this host without `insecure_no_encryption`.
    """
    try:
        url = urlparse(address)
        port = url.port
    except ValueError:
        url, port = urlparse(""), None
    if url.scheme == "ipc" and not url.netloc and url.path.startswith("/"):
        if len(url.path.encode()) > 107:
            raise UsageError(f"{address}: a socket's path has at most 107 bytes, this one {len(url.path.encode())}")
        return address
    if url.scheme != "tcp" or not url.hostname or port is None:
        raise UsageError(f"server address is {address!r}: give ipc:///path or tcp://host:port")
    if not insecure_no_encryption and not _is_loopback(url.hostname):
        raise UsageError(
            f"{address} is not on this host, and nothing there is encrypted or authenticated: use an address on "
            "127.0.0.1, or say --insecure-no-encryption on a network that you trust"
        )
    return address


def is_far(address: str) -> bool:
    """Whether what goes to an address leaves this host, as far as the address tells."""
    url = urlparse(address)
    return url.scheme == "tcp" and not _is_loopback(url.hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        try:
            return all(ipaddress.ip_address(i[4][0]).is_loopback for i in net.getaddrinfo(host, None))
        except (OSError, ValueError):
            return False


def _unresolved(address: str) -> str:
    """What is wrong with the name of a host, if it is that."""
    url = urlparse(address)
    if url.scheme != "tcp":
        return ""
    try:
        net.getaddrinfo(url.hostname, url.port)
    except OSError as error:
        return f"the name {url.hostname} does not resolve ({error.strerror})"
    return ""


def _mechanism(address: str) -> bytes | None:
    """How a ZeroMQ peer wants those that connect to prove themselves: `NULL`, `CURVE`; None where none answers.

    A peer that has been sent the signature and the version sends its whole greeting, and waits for the rest (ZMTP 3.1,
    RFC 37, "greeting").
    """
    greeting = b""
    try:
        with _plainly(urlparse(address)) as peer:
            peer.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03")
            while len(greeting) < _GREETING_BYTES and (more := peer.recv(_GREETING_BYTES - len(greeting))):
                greeting += more
    except OSError:
        return None
    zeromq = len(greeting) == _GREETING_BYTES and (greeting[0], greeting[9]) == (0xFF, 0x7F)
    return greeting[12:32].rstrip(b"\0") if zeromq else None


def _plainly(url: ParseResult) -> net.socket:
    """A connection without ZeroMQ."""
    if url.scheme == "tcp":
        return net.create_connection((url.hostname, url.port or 0), timeout=_TELL_S)
    peer = net.socket(net.AF_UNIX)
    try:
        peer.settimeout(_TELL_S)
        peer.connect(url.path)
    except OSError:
        peer.close()
        raise
    return peer


class Watch:
    """Sees what happens to the connection of a socket that connects to one peer."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, peer: str = "server") -> None:
        self.monitor = socket.get_monitor_socket(_WATCHED)
        self._socket = socket
        self._keyed = socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
        self._address = address
        self._peer = peer  # what is to be there, in words
        self.connected = False
        """Whether a ZeroMQ peer has answered."""

    def await_handshake(self, timeout_s: float) -> None:
        """Return when the peer has answered as a ZeroMQ socket does, and the keys of both fit.

        Raises:
            ConnectError: nobody did within the time.
            KeyRefused: it does not take this side's key.
            ProtocolError: somebody else lives there, or with other keys.
        """
        accepted = hung_up = False
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not self.monitor.poll(int(left_s * 1000) + 1):
                break
            for event, value in self._events():
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connected = True
                    return
                if event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                    raise self._refusal(event, value)  # libzmq does not try again
                accepted = accepted or event == zmq.EVENT_CONNECTED
                if event in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_DISCONNECTED) and not hung_up:
                    hung_up = True
                    deadline = min(deadline, time.monotonic() + _TELL_S)
        if hung_up:
            raise self._refusal(0, zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH if self._keys_differ() else 0)
        if accepted:
            raise ProtocolError(
                f"{self._address} is not dtrain's {self._peer}: it accepts connections, but has not answered as a "
                f"ZeroMQ peer does within {timeout_s:g} s"
            )
        why = _unresolved(self._address) or f"is the {self._peer} started?"
        raise ConnectError(f"nobody answers at {self._address} within {timeout_s:g} s: {why}")

    def _keys_differ(self) -> bool:
        """Whether one side uses keys and the other does not.

        Of two ZeroMQ peers of which that is so, the first to see it ends the connection, and where it has not read all
        that came, the kernel drops what it had said. So it is asked, in a way that leaves nothing unread.
        """
        mechanism = _mechanism(self._address)
        return mechanism is not None and self._keyed is (mechanism == b"NULL")

    def _refusal(self, event: int, value: int) -> DtrainError:
        """What a failed handshake means; 0 where the other side hung up without a word."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return KeyRefused(
                f"{self._address} refused this worker's key: it is not the worker.public of the server's keys; copy "
                "worker.public and worker.secret from the folder in which the server's keys were made"
            )
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            why = (
                f"it uses no keys and this worker does: start the {self._peer} with keys too, or the worker without"
                if self._keyed
                else "it asks for a key and this worker has none: give the worker the job's keys"
            )
            return ProtocolError(f"{self._address} is not dtrain's {self._peer}, or {why}")
        if self._keyed and not event:
            return ProtocolError(
                f"{self._address} is not dtrain's {self._peer}, or server.public here is not its key: it hangs up at "
                "this worker's first message; copy server.public from the server's keys"
            )
        why = (
            "it speaks something else than ZeroMQ's protocol"
            if event
            else "it hangs up, and does not answer as a ZeroMQ peer does"
        )
        return ProtocolError(f"{self._address} is not dtrain's {self._peer}: {why}")

    def look(self) -> Iterator[str]:
        """What has happened since the last look, in order: `away` for a broken connection, `back` for a new one."""
        for event, _ in self._events():
            if event == zmq.EVENT_DISCONNECTED:
                yield "away"
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                yield "back"

    def close(self) -> None:
        """Stop watching."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.disable_monitor()
        self.monitor.close(linger=0)

    def _events(self) -> Iterator[tuple[int, int]]:
        while self.monitor.poll(0):
            message = recv_monitor_message(self.monitor)
            yield message["event"], message["value"]
