"""The socket that a server or a scheduler listens at: bound, limited, and with keys where there are some."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket as net
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import zmq

from dtrain.errors import DtrainError, UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets

log = logging.getLogger(__name__)

_MOST_REFUSED = 1000
_MOST_STRANGERS = 10_000


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
        self._refused: Counter[bytes] = Counter()
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

    def warn(self, error: DtrainError, *, known: bool = False) -> None:
        """Log what was refused: of members always, of strangers seldom, who could fill a disk."""
        self._warnings += not known
        if known or self._warnings in (1, 10, 100, 1000, 10_000, 100_000):
            log.warning("refused %s%s", error, f" ({self._warnings} so far)" if self._warnings > 1 else "")

    def refuse(self, stranger: bytes) -> None:
        """Count a message of a peer that is no member."""
        if len(self._refused) >= _MOST_STRANGERS:
            self._refused.clear()
        self._refused[stranger] += 1

    def hears(self, peer: bytes) -> bool:
        """Whether it is worth while to read what a peer sends: one that was refused so often is not answered again."""
        return self._refused[peer] <= _MOST_REFUSED if peer in self._refused else True

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


def _check_free(address: str) -> None:
    """ZeroMQ would take the socket's file away from a server that listens there already."""
    url = urlparse(address)
    if url.scheme != "ipc":
        return
    with net.socket(net.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(url.path)
        raise UsageError(f"cannot listen at {address}: another server does already")
