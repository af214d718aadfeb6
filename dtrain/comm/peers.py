"""Who the other processes are, and which of them is to blame when a transfer breaks."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

_STATES = {
    psutil.STATUS_STOPPED: "is stopped",
    psutil.STATUS_TRACING_STOP: "is held by a debugger",
    psutil.STATUS_ZOMBIE: "has died",
    psutil.STATUS_DEAD: "has died",
}


@dataclass(frozen=True)
class Peer:
    """A process of the job."""

    host: str
    pid: int

    def encode(self) -> bytes:
        return json.dumps([self.host, self.pid]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Peer:
        host, pid = json.loads(data)
        return cls(str(host), int(pid))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def trouble(self) -> str | None:
        """What is wrong with the process, if it can be seen from here; None when it lives, or is on another host."""
        if self.host != socket.gethostname():
            return None
        try:
            return _STATES.get(psutil.Process(self.pid).status())
        except psutil.NoSuchProcess:
            return "has died"
        except psutil.AccessDenied:
            return None


def suspects(peers: Sequence[Peer], rank: int) -> str:
    """Names the workers of this host that are dead or stopped; the empty string when none is.

    Workers on other hosts cannot be seen; where all workers here are well, they are the ones named.
    """
    found = [(r, peer.trouble(), peer) for r, peer in enumerate(peers) if r != rank]
    bad = [f"worker {r} ({peer}) {trouble}" for r, trouble, peer in found if trouble]
    if bad:
        return "; ".join(bad)
    here = socket.gethostname()
    away = [f"{r} ({peer})" for r, _, peer in found if peer.host != here]
    return f"one of the workers on other hosts does not answer: {', '.join(away)}" if away else ""
