"""The worker's end of the parameter server: a Backend that sends its tensors to the server and gets the sum back.

There is no thread of ours here. libzmq's own thread sends and receives while the worker computes; `wait` copies what
has arrived into place.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket as net
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
import zmq
from torch import Tensor

from dtrain.comm.base import Traffic, Work, check_flat
from dtrain.errors import CommError, ConnectError, ProtocolError, UsageError
from dtrain.ps import sockets, wire
from dtrain.ps.server import error_of

log = logging.getLogger(__name__)

_ZERO_COPY_BYTES = 64 * 2**10
_MARGIN_S = 5.0


class ParameterServer:
    """A Backend over one synchronous parameter server. Sums are added in worker order: bitwise repeatable."""

    name = "ps"

    def __init__(
        self,
        address: str,
        rank: int,
        world_size: int,
        *,
        job_id: str = "",
        timeout_s: float = 60.0,
        connect_timeout_s: float = 30.0,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Join the job; returns when all workers have.

        Args:
            address: where the server listens.
            timeout_s: longest wait for another worker, as the server was told too.
            connect_timeout_s: longest wait for the server and the other workers here.
            on_close: what else is to be ended with this connection.

        Raises:
            ConnectError: nobody answers at the address, or some workers have not come in time.
            ProtocolError: something else answers.
            UsageError: the server was started for another world size, or the rank is taken.
        """
        self.rank = rank
        self.world_size = world_size
        self.traffic = Traffic()
        self.address = sockets.check_address(address, insecure_no_encryption=True)
        if address.startswith("tcp://") and address.endswith(":0"):
            raise UsageError(f"server address is {address!r}: give the port that the server says it listens at")
        # The server looks after late workers and names them; this side's limit is for a server that has gone silent.
        self._timeout_s = timeout_s + _MARGIN_S
        self._checksums = address.startswith("tcp://")
        self._calls: Counter[str] = Counter()
        self._awaited: dict[tuple[str, int, int], tuple[_Transfer, Tensor]] = {}
        self._lock = threading.RLock()  # hooks of CUDA models run in the engine's thread
        self._failure: Exception | None = None
        self._on_close = on_close
        self._context: zmq.Context[zmq.Socket[bytes]] | None = zmq.Context()
        self._server = f"the server at {address}"
        self._socket = sockets.make(self._context, zmq.DEALER)
        self._watch = sockets.Watch(self._socket, address)
        self._welcomed = False
        atexit.register(self._close_at_exit)
        try:
            self._socket.connect(address)
            self._watch.await_handshake(connect_timeout_s)
            patience_ms = int(min(connect_timeout_s, 1e6) * 1000)
            hello = wire.Hello(job_id, rank, world_size, net.gethostname(), os.getpid(), patience_ms)
            self._socket.send(wire.encode(hello))
            self._await_welcome(connect_timeout_s + _MARGIN_S)
        except BaseException:
            self.close()
            raise

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        check_flat(flat, key)
        with self._lock:
            self._check()
            call, self._calls[key] = self._calls[key], self._calls[key] + 1
            host = flat if flat.device.type == "cpu" else flat.to("cpu")
            transfer = _Transfer(self, flat, host, key)
            dtype = str(flat.dtype).removeprefix("torch.")
            for number, part in enumerate(wire.parts_of(host)):
                payload = wire.bytes_of(part)
                crc = wire.checksum_of(payload) if self._checksums else 0
                self._awaited[key, call, number] = (transfer, part)
                transfer.missing += 1
                self._socket.send(wire.encode(wire.Add(key, call, number, dtype, crc)), zmq.SNDMORE)
                self._socket.send(payload, 0, copy=len(payload) < _ZERO_COPY_BYTES)
                self.traffic.count(key, len(payload), len(payload))
            self._receive()
            return transfer

    def close(self) -> None:
        """Tell the server and leave. An error that ends the program is passed on to the other workers."""
        self._leave(sys.exc_info()[1])

    def _close_at_exit(self) -> None:
        self._leave(getattr(sys, "last_value", None))  # what ended the program, if an error did

    def _leave(self, error: BaseException | None) -> None:
        context, self._context = self._context, None
        if context is None:
            return
        atexit.unregister(self._close_at_exit)
        reason = "" if error is None or isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        self._awaited.clear()
        says_bye = self._failure is None and self._watch.connected
        if says_bye:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send(wire.encode(wire.Bye(wire.fitting(reason, 1000))), zmq.NOBLOCK)
        self._socket.disable_monitor()
        self._watch.monitor.close(linger=0)
        self._socket.close(linger=1000 if says_bye else 0)
        context.term()
        if self._on_close is not None:
            self._on_close()

    def progress(self, missing: _Transfer) -> None:
        """Receive until `missing` has all its parts."""
        deadline = time.monotonic() + self._timeout_s
        with self._lock:
            self._check()
            while missing.missing:
                if not self._receive() and not self._block(deadline, missing.key):
                    silent = f"{self._server} is silent for {self._timeout_s:g} s ({missing.key})"
                    self._fail(CommError(f"worker {self.rank}: {silent}"))

    def _block(self, deadline: float, what: str) -> bool:
        """Wait for a message or for trouble; whether there was still time."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._watch.monitor, zmq.POLLIN)
        ready = dict(poller.poll(int(min(left_s, 1.0) * 1000) + 1))
        if self._socket not in ready and self._watch.monitor in ready and self._watch.disconnected():
            self._receive()  # what came before the end, the reason for it perhaps
            self._fail(CommError(f"worker {self.rank}: {self._server} is gone while this worker waited for {what}"))
        return True

    def _await_welcome(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._welcomed:
            if not self._receive() and not self._block(deadline, "the other workers"):
                self._fail(ConnectError(f"worker {self.rank}: {self._server} said nothing for {timeout_s:g} s"))

    def _receive(self) -> bool:
        """Take everything that has arrived; whether anything had."""
        found = False
        while True:
            try:
                header, *payload = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return found
            found = True
            try:
                self._handle(wire.decode(header.bytes), payload)
            except ProtocolError as error:
                self._fail(error if error is self._failure else ProtocolError(f"{self._server} sent {error}"))

    def _handle(self, message: wire.Message, payload: list[zmq.Frame]) -> None:
        if isinstance(message, wire.Sum) and len(payload) == 1:
            self._take(message, payload[0])
        elif isinstance(message, wire.Welcome):
            self._welcomed = True
            self._server = f"the server at {self.address} (pid {message.pid} on {message.host})"
        elif isinstance(message, wire.Failed):
            self._fail(error_of(message.kind, f"worker {self.rank}: {message.text}"))
        elif not isinstance(message, wire.Ping):
            raise ProtocolError(f"{type(message).__name__} with {len(payload)} payloads")

    def _take(self, message: wire.Sum, payload: zmq.Frame) -> None:
        transfer, part = self._awaited.pop((message.key, message.call, message.part), (None, None))
        if transfer is None or part is None:
            raise ProtocolError(f"a sum nobody waits for: {message.key!r:.80}, round {message.call}")
        came = wire.tensor_of(payload.buffer, str(part.dtype).removeprefix("torch."), message.checksum)
        if came.numel() != part.numel():
            raise ProtocolError(f"{came.numel()} numbers for {message.key}, which has {part.numel()}")
        part.copy_(came)
        transfer.missing -= 1

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._context is None:
            raise CommError(f"worker {self.rank}: this backend was closed")

    def _fail(self, error: Exception) -> None:
        self._failure = error
        raise error


class _Transfer:
    """One tensor under way; done when no part is missing."""

    def __init__(self, comm: ParameterServer, flat: Tensor, host: Tensor, key: str) -> None:
        self._comm = comm
        self._flat = flat
        self._host = host
        self.key = key
        self.missing = 0

    def wait(self) -> None:
        if self.missing:
            self._comm.progress(self)
        if self._host is not self._flat:
            self._flat.copy_(self._host)
            self._host = self._flat
