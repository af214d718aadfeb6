"""The server's process: a ZeroMQ ROUTER around `Rounds`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket as net
import time
from pathlib import Path
from urllib.parse import urlparse

import zmq

from dtrain.errors import CommError, ConnectError, DtrainError, LayoutError, ProtocolError, UsageError
from dtrain.ps import sockets, wire
from dtrain.ps.rounds import Rounds, Send, Session

log = logging.getLogger(__name__)

_TICK_S = 0.25
_PING_S = 1.0
_LAST_WORDS_S = 2.0


class Server:
    """One synchronous server: adds what workers send, in worker order, and answers with the sum."""

    def __init__(
        self,
        address: str,
        world_size: int,
        *,
        job_id: str = "",
        timeout_s: float = 60.0,
        connect_timeout_s: float = 60.0,
        insecure_no_encryption: bool = False,
    ) -> None:
        """Bind.

        Args:
            address: `ipc:///path` or `tcp://host:port`; port 0 takes a free one, see `address` afterwards.
            timeout_s: how long a round waits for its last worker.
            connect_timeout_s: how long to wait for all workers to join.

        Raises:
            UsageError: the address cannot be used or is taken.
        """
        sockets.check_address(address, insecure_no_encryption=insecure_no_encryption)
        _check_free(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = sockets.make(self._context, zmq.ROUTER)
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise UsageError(f"cannot listen at {address}: {error.strerror}") from error
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._checksums = self.address.startswith("tcp://")
        self._rounds = Rounds(
            world_size,
            job_id=job_id,
            host=net.gethostname(),
            pid=os.getpid(),
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            now=time.monotonic(),
        )

    def run(self) -> None:
        """Serve until all workers have left.

        Raises:
            DtrainError: the job failed; the workers have been told the same.
        """
        ping_at = tick_at = 0.0
        end_at = float("inf")
        while not self._rounds.finished and time.monotonic() < end_at:
            if self._router.poll(int(_TICK_S * 1000)):
                self._drain()
            now = time.monotonic()
            if now >= tick_at:
                self._send(self._rounds.tick(now))
                tick_at = now + _TICK_S
            if now >= ping_at and not self._rounds.failed:
                self._send([Send(session, wire.Ping()) for session in self._rounds.sessions])
                ping_at = now + _PING_S
            if self._rounds.failed and end_at == float("inf"):
                end_at = now + _LAST_WORDS_S
        if self._rounds.failed:
            raise _as_error(self._rounds.failed)

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._context.destroy(linger=200)
        url = urlparse(self.address)
        if url.scheme == "ipc":
            with contextlib.suppress(OSError):
                Path(url.path).unlink()

    def _drain(self) -> None:
        """Take what has arrived, up to a bound, so that time-outs keep being looked at."""
        for _ in range(1000):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            session = frames[0].bytes
            self._send(self._handle(session, frames[1:]))

    def _handle(self, session: Session, frames: list[zmq.Frame]) -> list[Send]:
        try:
            if not 1 <= len(frames) <= 2:
                raise ProtocolError(f"a message of {len(frames)} frames")
            if len(frames[0]) > wire.MAX_HEADER_BYTES:
                raise ProtocolError(f"a header of {len(frames[0])} bytes")
            message = wire.decode(frames[0].bytes)
            if (len(frames) == 2) != isinstance(message, wire.WITH_PAYLOAD):
                raise ProtocolError(f"{type(message).__name__} with {len(frames) - 1} payloads")
            payload = None
            if isinstance(message, wire.Add):
                payload = wire.tensor_of(frames[1].buffer, message.dtype, message.checksum)
        except ProtocolError as error:
            log.warning("refused %s", error)
            return self._rounds.refuse(session, error)
        return self._rounds.receive(session, message, payload, time.monotonic())

    def _send(self, sends: list[Send]) -> None:
        checksums: dict[int, int] = {}
        for send in sends:
            message, frames = send.message, [send.to]
            if send.payload is not None and isinstance(message, wire.Sum):
                payload = wire.bytes_of(send.payload)
                if self._checksums:
                    crc = checksums.setdefault(id(send.payload), 0) or wire.checksum_of(payload)
                    checksums[id(send.payload)] = crc
                    message = wire.Sum(message.key, message.call, message.part, crc)
                frames += [wire.encode(message), payload]  # type: ignore[list-item]
            else:
                frames.append(wire.encode(message))
            try:
                self._router.send_multipart(frames, zmq.NOBLOCK, copy=send.payload is None)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._send(self._rounds.lost(send.to))


def _check_free(address: str) -> None:
    """ZeroMQ would take the socket's file away from a server that listens there already."""
    url = urlparse(address)
    if url.scheme != "ipc":
        return
    with net.socket(net.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(url.path)
        raise UsageError(f"cannot listen at {address}: another server does already")


def _as_error(failed: wire.Failed) -> DtrainError:
    return error_of(failed.kind, failed.text)


def error_of(kind: str, text: str) -> DtrainError:
    """The error that was told by its name; a CommError if this side does not know the name."""
    kinds: tuple[type[DtrainError], ...] = (ConnectError, LayoutError, ProtocolError, UsageError)
    return {k.__name__: k for k in kinds}.get(kind, CommError)(text)
