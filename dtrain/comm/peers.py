"""Who the other processes are, and which of them is to blame when a transfer breaks."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch.distributed as dist

T = TypeVar("T")

_ANSWER_S = 2.0

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


class Board:
    """What workers tell each other in the store when a transfer breaks. It may be gone, or stopped, with its keeper."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store

    def first(self, text: str) -> str:
        """What the first worker to see the fault said: later ones would blame whoever ended because of it."""
        return self._ask(lambda store: store.compare_set("fault", "", text).decode(), text) or text

    def note(self, what: str, rank: int, text: str = "") -> None:
        """Leave word that this worker waits, or has left and why."""
        self._ask(lambda store: store.set(f"{what}/{rank}", text), None)

    def noted(self, what: str, world_size: int) -> dict[int, str]:
        """Such words, by worker."""

        def read(store: dist.Store) -> dict[int, str]:
            ranks = [r for r in range(world_size) if store.check([f"{what}/{r}"])]
            return {r: store.get(f"{what}/{r}").decode() for r in ranks}

        return self._ask(read, {})

    def _ask(self, question: Callable[[dist.Store], T], otherwise: T) -> T:
        store, answers = self._store, list[T]()
        if store is None:
            return otherwise

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(store))

        thread = threading.Thread(target=ask, daemon=True, name="dtrain-board")
        thread.start()
        thread.join(_ANSWER_S)
        if not answers:
            self._store = None  # nobody will answer the next question either
        return answers[0] if answers else otherwise
