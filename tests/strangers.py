"""Things that listen at a port and are not what a worker looks for."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator

Answer = Callable[[socket.socket], None]


def says_nothing(peer: socket.socket) -> None:
    """Takes everything and never answers."""
    while peer.recv(65536):
        pass


def http(peer: socket.socket) -> None:
    """A web server that ends the connection after its answer."""
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def http_keeps_open(peer: socket.socket) -> None:
    """A web server that waits for the next request."""
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    says_nothing(peer)


def ssh(peer: socket.socket) -> None:
    """Speaks first."""
    peer.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    says_nothing(peer)


def noise(peer: socket.socket) -> None:
    """Random bytes."""
    peer.sendall(random.Random(5).randbytes(100_000))
    says_nothing(peer)


def noise_after_greeting(peer: socket.socket) -> None:
    """Begins like a ZeroMQ peer, and goes on at random."""
    peer.sendall(b"\xff" + bytes(8) + b"\x7f" + random.Random(5).randbytes(100_000))
    says_nothing(peer)


def closes(peer: socket.socket) -> None:
    """Accepts and hangs up."""


def resets_with_keys(peer: socket.socket) -> None:
    """A ZeroMQ peer with CURVE keys whose words are lost, as whoever writes more than it wants is reset."""
    said = b""
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
    peer.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while len(said) < 12:
            said += peer.recv(12 - len(said)) or said.ljust(12)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return peer.close()
    peer.sendall(b"\x01" + b"CURVE".ljust(52, b"\0"))
    peer.settimeout(None)
    says_nothing(peer)


STRANGERS: list[Answer] = [says_nothing, http, http_keeps_open, ssh, noise, noise_after_greeting, closes]


@contextlib.contextmanager
def listening(answer: Answer) -> Iterator[int]:
    """The port at which every connection gets this answer."""
    listener = socket.create_server(("127.0.0.1", 0))
    peers: list[socket.socket] = []

    def serve(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            answer(peer)
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
        peer.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                peers.append(peer)
                threading.Thread(target=serve, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        for closing in (listener, *peers):
            with contextlib.suppress(OSError):
                closing.shutdown(socket.SHUT_RDWR)
        listener.close()


def closed_port() -> int:
    """A port at which nobody listens any more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
