"""What the bytes alone cost: a server over plain TCP sockets that sends back to each worker as much as came from it.

It does no sums, knows no messages and checks nothing: a parameter server over sockets of the same host cannot be
faster. `python benchmarks/echo.py WORKERS` prints its address, and ends when all workers have left; `Echo` is the
worker's end. Used by sync.py.
"""

from __future__ import annotations

import socket
import sys
import threading

from torch import Tensor

PART_BYTES = 2**20


class Echo:
    """A connection to the server."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, flat: Tensor, back: Tensor) -> None:
        """Send a tensor and receive one of its size, at the same time."""
        out = memoryview(flat.numpy()).cast("B")
        if len(out) <= PART_BYTES:  # a thread would cost more than it saves
            self._socket.sendall(out)
            _receive(self._socket, memoryview(back.numpy()).cast("B"))
            return
        sender = threading.Thread(target=self._socket.sendall, args=(out,))
        sender.start()
        _receive(self._socket, memoryview(back.numpy()).cast("B"))
        sender.join()

    def close(self) -> None:
        self._socket.close()


def _receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        count = connection.recv_into(into)
        if not count:
            raise ConnectionError("the other end has left")
        into = into[count:]


def _serve(connection: socket.socket) -> None:
    buffer = bytearray(PART_BYTES)
    view = memoryview(buffer)
    while count := connection.recv_into(buffer):
        connection.sendall(view[:count])


def main() -> None:
    workers = int(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"listening at 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        threads = []
        for _ in range(workers):
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threads.append(threading.Thread(target=_serve, args=(connection,)))
            threads[-1].start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
