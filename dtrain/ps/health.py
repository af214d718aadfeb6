"""Whether a server answers: asked from outside the job, which does not notice."""

from __future__ import annotations

import time
from pathlib import Path

from dtrain.errors import CommError, ProtocolError, UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets, wire
from dtrain.ps.visit import visiting
from dtrain.ps.wire import Inquire, Standing


def ask(address: str, *, keys: Path | None = None, timeout_s: float = 3.0) -> Standing:
    """How the server at an address is, by its own loop: libzmq's threads would say yes for a server that is stuck.

    Args:
        keys: directory with the workers' CURVE keys or the servers'; None: no encryption.

    Raises:
        ConnectError: nobody listens there.
        CommError: somebody does, and is no server, or does not answer, or takes no such key; or its job has failed.
        UsageError: the address or the keys cannot be used.
    """
    sockets.check_address(address, insecure_no_encryption=True)
    if address.startswith("tcp://") and address.endswith(":0"):
        raise UsageError(f"server address is {address!r}: give the port that it says it listens at")
    if not timeout_s > 0:
        raise UsageError(f"timeout_s is {timeout_s}: give seconds, more than 0")
    pair = None if keys is None else _pair(keys)
    deadline = time.monotonic() + timeout_s
    with visiting(address, pair, "server") as visit:
        try:
            visit.watch.await_handshake(timeout_s)
            visit.say(Inquire())
            if visit.socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                return _read(visit.socket.recv_multipart(), address)
        except ProtocolError as error:
            if time.monotonic() < deadline:
                raise CommError(str(error)) from error
        raise CommError(
            f"{address} takes connections, and has not answered within {timeout_s:g} s: the server there is stopped or "
            "stuck, or it is none of dtrain's"
        )


def _pair(keys: Path) -> curve.Keys:
    """The keys to come with: on a server's host there may be the servers' alone."""
    if (keys / "server.secret").exists() and not (keys / "worker.secret").exists():
        return curve.among_servers(curve.load(keys, "server"))
    return curve.load(keys, "worker")


def _read(frames: list[bytes], address: str) -> Standing:
    try:
        answer = wire.decode(frames[0])
    except ProtocolError as error:
        raise ProtocolError(f"{address} is not dtrain's server: it sent {error}") from error
    if isinstance(answer, wire.Failed):
        raise CommError(f"the server at {address}: {answer.text}")
    if not isinstance(answer, Standing) or len(frames) != 1:
        raise ProtocolError(f"{address} is not dtrain's server: it answered with {type(answer).__name__}")
    return answer
