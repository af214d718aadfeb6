"""ZeroMQ sockets with every limit and time-out set: the library's defaults wait for ever and drop in silence."""

from __future__ import annotations

import ipaddress
import socket as net
import time
from collections.abc import Iterator
from urllib.parse import urlparse

import zmq
from zmq.utils.monitor import recv_monitor_message

from dtrain.errors import ConnectError, ProtocolError, UsageError
from dtrain.ps.wire import PART_BYTES

HEARTBEAT_S = 1.0
DEAD_AFTER_S = 4.0
"""A peer whose ZMTP heartbeat is missing for this long (a stopped process, a broken link) is disconnected."""

_HANDSHAKE_S = 5.0
_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it does not answer as a ZeroMQ peer does",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it speaks something else than ZeroMQ's protocol",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refused this side's key",
}
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sum(_FAILURES)


def make(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket of that kind. Queues have no limit here: what is in flight is bounded by what workers hold anyway."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
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


def check_address(address: str, *, insecure_no_encryption: bool = False) -> str:
    """The address, if it may be used.

    Raises:
        UsageError: of another form than `ipc:///path` and `tcp://host:port`, or a path that is too long, or beyond
            this host without `insecure_no_encryption`.
    """
    url = urlparse(address)
    try:
        port = url.port
    except ValueError:
        port = None
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


class Watch:
    """Sees what happens to the connection of a socket that connects to one peer."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self.monitor = socket.get_monitor_socket(_WATCHED)
        self._address = address
        self.connected = False
        """Whether a ZeroMQ peer has answered."""

    def await_handshake(self, timeout_s: float) -> None:
        """Return when the peer has answered as a ZeroMQ socket does.

        Raises:
            ConnectError: nobody did within the time.
            ProtocolError: somebody else lives there.
        """
        accepted = False
        deadline = time.monotonic() + timeout_s
        failure = ""
        while (left_s := deadline - time.monotonic()) > 0:
            if not self.monitor.poll(int(left_s * 1000) + 1):
                break
            for event in self._events():
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connected = True
                    return
                accepted = accepted or event == zmq.EVENT_CONNECTED
                failure = failure or _FAILURES.get(event, "")
            if failure:
                raise ProtocolError(f"{self._address} is not dtrain's server: {failure}")
        if accepted:
            raise ProtocolError(
                f"{self._address} is not dtrain's server: it accepts connections, but has not answered as a "
                f"ZeroMQ peer does within {timeout_s:g} s"
            )
        raise ConnectError(f"nobody answers at {self._address} within {timeout_s:g} s: is the server started?")

    def disconnected(self) -> bool:
        """Whether the connection has broken since the handshake."""
        return any(event == zmq.EVENT_DISCONNECTED for event in self._events())

    def _events(self) -> Iterator[int]:
        while self.monitor.poll(0):
            yield recv_monitor_message(self.monitor)["event"]
