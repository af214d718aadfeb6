"""A TCP proxy that does to connections what networks do: silence, resets, delay, flipped bits, repeated messages."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass

_CHUNK = 65536
_QUEUED = 16  # chunks between reading and writing, so that a delay does not limit the throughput
_MARKER = 256  # bytes, the longest
_MORE, _LONG, _COMMAND = 1, 2, 4  # flags of a ZMTP frame


@dataclass(eq=False)
class _Armed:
    """A fault that happens once, `left` bytes from now: a flip if there is a bit, else the end of the connection."""

    left: int
    bit: int | None = None
    fin: bool = False
    marker: bytes = b""  # not yet seen, and counted from there on
    lane: _Lane | None = None  # where it was seen


class _Way:
    """One direction, of all connections together."""

    def __init__(self) -> None:
        self.passed = self.fired = self.duplicates = self.swaps = 0
        self.delay_s = self.rate = self.free_at = self.held_until = 0.0
        self.armed: list[_Armed] = []

    async def gate(self, size: int = 0) -> None:
        """Until the link is free for so many bytes, and open."""
        if self.rate:
            now = time.monotonic()
            self.free_at = max(self.free_at, now - 0.02) + size / self.rate
            await asyncio.sleep(self.free_at - now)
        while (left_s := self.held_until - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.005))


class _Messages:
    """Finds the messages of a ZMTP 3 stream, to repeat or exchange them; any other stream passes as it is."""

    def __init__(self, way: _Way) -> None:
        self._way, self._greeting, self._pending = way, b"", bytearray()
        self._left = self._command = self._more = 0  # of this frame; more follows in this message
        self._wanted, self._kept = 0, list[bytearray]()  # messages for this fault

    def feed(self, data: bytes) -> bytes:
        need = 64 - len(self._greeting)  # passed on at once: a peer waits for the other's first bytes
        start, data = data[:need], data[need:]
        self._greeting += start
        if self._greeting[:1] + self._greeting[9:11] + self._greeting[12:17] != b"\xff\x7f\x03NULL\0":
            return start + data
        out = bytearray(start)
        self._pending += data
        while self._pending and (self._left or self._header()):
            taken = self._pending[: self._left]
            del self._pending[: self._left]
            self._left -= len(taken)
            (out if self._command or not self._wanted else self._kept[-1]).extend(taken)
            if not (self._left or self._command or self._more) and self._wanted and len(self._kept) == self._wanted:
                out += self._kept[-1] + self._kept[0]  # the same one twice, or the second and the first
                self._wanted, self._kept = 0, []
                self._way.fired += 1
        return bytes(out)

    def _header(self) -> bool:
        flags = self._pending[0]
        size = 9 if flags & _LONG else 2
        if len(self._pending) < size:
            return False
        self._left, self._command = size + int.from_bytes(self._pending[1:size], "big"), flags & _COMMAND
        if not self._command:  # a heartbeat can come between the frames of a message
            if not self._more and not self._wanted:
                self._wanted = 2 if self._way.swaps else 1 if self._way.duplicates else 0
                self._way.swaps -= self._wanted == 2
                self._way.duplicates -= self._wanted == 1
            if not self._more and self._wanted:
                self._kept.append(bytearray())
            self._more = flags & _MORE
        return True


class _Lane:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, destination: socket.socket, way: _Way, was_cut: asyncio.Event) -> None:
        self._source, self._destination, self._way, self._was_cut = source, destination, way, was_cut
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(_QUEUED)
        self._messages, self._tail = _Messages(way), b""
        self.held_until = 0.0

    async def read(self) -> None:
        data: bytes | None = b"-"
        while data:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._source, _CHUNK)
            except OSError:
                data = None  # a reset, which travels behind the bytes before it
            await self._queue.put((time.monotonic() + self._way.delay_s, data))

    async def write(self) -> None:
        data: bytes | None = b"-"
        while data:
            due, data = await self._queue.get()
            await asyncio.sleep(due - time.monotonic())
            await self._forward(self._messages.feed(data or b""))
        await self._way.gate()
        if self.held_until:
            await asyncio.Event().wait()
        if data is None:
            raise ConnectionResetError
        _fin(self._destination)

    async def _forward(self, data: bytes) -> None:
        while data:
            size = max(1, min(_CHUNK, int(self._way.rate / 100))) if self._way.rate else _CHUNK
            await self._way.gate(min(size, len(data)))
            while (left_s := self.held_until - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            if self._was_cut.is_set():
                return
            piece, end = self._alter(data[:size])
            data = data[size:]
            with contextlib.suppress(OSError):  # the other direction may still have something to bring
                await asyncio.get_running_loop().sock_sendall(self._destination, piece)
            if end is not None and not end.fin:
                raise ConnectionResetError
            if end is not None:
                self._was_cut.set()
                _fin(self._source, self._destination)

    def _alter(self, piece: bytes) -> tuple[bytes, _Armed | None]:
        """What is to be sent, and the end that is due behind it."""
        ends = [a for a in self._way.armed if a.bit is None and a.left <= len(piece)]
        end = min(ends, key=lambda a: a.left, default=None)
        piece = piece if end is None else piece[: end.left]
        out, seen, start = bytearray(piece), self._tail + piece, dict[bytes, int]()
        before, self._tail = len(self._tail), seen[1 - _MARKER :]
        for armed in list(self._way.armed):
            if size := len(armed.marker):
                at = seen.find(armed.marker, start.get(armed.marker, max(0, before - size + 1)))
                if at < 0:
                    continue
                start[armed.marker] = at + 1  # each flip has an occurrence of its own
                armed.left, armed.marker, armed.lane = at + size - before + armed.left, b"", self
            if armed.lane not in (None, self):
                continue
            if armed is end or (armed.bit is not None and armed.left < len(out)):
                if armed.bit is not None:
                    out[armed.left] ^= 1 << armed.bit
                self._way.armed.remove(armed)
                self._way.fired += 1
            else:
                armed.left -= len(out)
        self._way.passed += len(out)
        return bytes(out), end


def _fin(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_WR)


class Proxy:
    """Listens at a port of its own and forwards to a target, with faults that can be switched at any time.

    A fault is in effect when its call returns. `up` is towards the server. Bytes count as they leave the proxy, from
    the call on, over all connections; a fault at a count hits the connection that this byte belongs to, once.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._ways = {"up": _Way(), "down": _Way()}
        self._serving: set[asyncio.Task[None]] = set()
        self._upward: dict[socket.socket, _Lane] = {}  # by the client's end
        self.connections = 0  # accepted since the beginning

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{self.port}"
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="proxy", daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    bytes_up = property(lambda self: self._ways["up"].passed)
    bytes_down = property(lambda self: self._ways["down"].passed)
    fired = property(lambda self: sum(way.fired for way in self._ways.values()))
    """How many faults that happen once have happened: at a count, at a marker, to a message."""

    def blackhole(self, seconds: float = math.inf, direction: str = "both") -> None:
        """Nothing passes for so long or until `heal`, then what was held does: TCP repeats what is lost."""
        self._do(self._set(direction, held_until=time.monotonic() + seconds))

    def heal(self) -> None:
        """End a blackhole."""
        self._do(self._set("both", held_until=0.0))

    def delay(self, seconds: float) -> None:
        """Each byte arrives so much later, in both directions; 0 ends it."""
        self._do(self._set("both", delay_s=seconds))

    def rate(self, bytes_per_s: float) -> None:
        """So much passes in each direction; 0 ends it."""
        self._do(self._set("both", rate=bytes_per_s, free_at=0.0))

    def reset(self) -> None:
        """RST to both ends of every connection; new ones are served."""
        self._do(self._reset())

    def strand(self, seconds: float) -> None:
        """FIN to the client of every connection; what it has sent there arrives so much later, and no end behind it."""
        self._do(self._strand(seconds))

    def reset_after(self, nbytes: int, direction: str) -> None:
        """RST to both ends, right behind that byte."""
        self._do(self._arm(direction, _Armed(nbytes)))

    def cut(self, after_bytes: int, direction: str) -> None:
        """FIN to both ends, right behind that byte; the rest is thrown away."""
        self._do(self._arm(direction, _Armed(after_bytes, fin=True)))

    def flip(self, after_bytes: int, direction: str, bit: int = 0) -> None:
        """Flip a bit of the byte behind so many others."""
        self._do(self._arm(direction, _Armed(after_bytes, bit)))

    def flip_in(self, marker: bytes, offset: int, direction: str, bit: int = 0) -> None:
        """Flip a bit of the byte behind the next such marker and `offset` others."""
        assert 0 < len(marker) <= _MARKER
        self._do(self._arm(direction, _Armed(offset, bit, marker=marker)))

    def duplicate(self, n: int = 1, direction: str = "up") -> None:
        """Each of the next n ZeroMQ messages arrives twice."""
        self._do(self._set(direction, duplicates=n))

    def swap(self, n: int = 1, direction: str = "up") -> None:
        """The next two ZeroMQ messages of a connection change places, n times: the first waits for the second."""
        self._do(self._set(direction, swaps=n))

    def _do(self, doing: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(doing, self._loop).result(10)

    async def _set(self, direction: str, **values: float) -> None:
        for way in self._ways.values() if direction == "both" else [self._ways[direction]]:
            vars(way).update(values)

    async def _arm(self, direction: str, armed: _Armed) -> None:
        self._ways[direction].armed.append(armed)

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.add_reader(self._listener, self._accept)
        ready.set()
        await self._stop.wait()
        self._loop.remove_reader(self._listener)
        await self._reset()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                serving = self._loop.create_task(self._serve(self._listener.accept()[0]))
                self.connections += 1
                self._serving.add(serving)
                serving.add_done_callback(self._serving.discard)

    async def _reset(self) -> None:
        self._accept()  # those too that connected a moment ago
        await asyncio.sleep(0)  # each has begun, and so will close its sockets
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _strand(self, seconds: float) -> None:
        for client, lane in self._upward.items():
            lane.held_until = time.monotonic() + seconds
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    async def _serve(self, client: socket.socket) -> None:
        server, was_cut, tasks = socket.socket(), asyncio.Event(), list[asyncio.Task[None]]()
        with client, server:
            try:
                for end in (client, server):
                    end.setblocking(False)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._ways["up"].gate()
                await self._loop.sock_connect(server, self._target)
                up = self._upward[client] = _Lane(client, server, self._ways["up"], was_cut)
                down = _Lane(server, client, self._ways["down"], was_cut)
                tasks += [self._loop.create_task(c) for c in (up.read(), up.write(), down.read(), down.write())]
                await asyncio.gather(*tasks)
            except (OSError, asyncio.CancelledError):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for end in (client, server):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            finally:
                self._upward.pop(client, None)
