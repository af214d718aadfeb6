"""What goes wrong with emulated hosts (`hosts.py`): slow ones, late ones, links that are cut, hosts that are lost.

with hosts(4, rate="200mbit") as h, slow(h, 2, factor=4.0):
    job(h, ...)                                 # host 2 computes at a quarter of its speed
with hosts(4, rate="200mbit") as h, slow(h, 2, factor=lambda: random.lognormvariate(0, 0.5)):
    ...                                         # each tenth of a second at another speed
late(h, 1, seconds=2.0)                         # all on host 1 stops, and goes on
cut(h, 1); mend(h, 1)                           # its link
lose(h, 1)                                      # its link and all its processes, for good
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from hosts import Hosts

_TURN_S = 0.020
"""A slowed host runs for a part of each such turn: short against a step, long against a scheduler's slice."""
_DRAW_S = 0.100


@contextlib.contextmanager
def slow(h: Hosts, host: int, *, factor: float | Callable[[], float]) -> Iterator[None]:
    """All processes on a host are so many times slower, those that are started meanwhile too.

    They are stopped and continued 50 times a second, and lose what they would have sent meanwhile as a busy host would.

    Args:
        factor: 1 or more; or what draws one each tenth of a second (less than 1 counts as 1).

    Raises:
        ValueError: a factor below 1.
    """
    if not callable(factor) and factor < 1:
        raise ValueError(f"factor is {factor}: give how many times slower, 1 or more")
    over = threading.Event()
    thread = threading.Thread(target=_hold_back, args=(h, host, factor, over), daemon=True, name="hosts-slow")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _hold_back(h: Hosts, host: int, factor: float | Callable[[], float], over: threading.Event) -> None:
    drawn_s = float("-inf")
    now = 1.0
    while not over.is_set():
        if time.monotonic() - drawn_s >= _DRAW_S:
            drawn_s, now = time.monotonic(), max(1.0, factor() if callable(factor) else factor)
        running = h.on(host)
        for process in running:
            process.signal(signal.SIGSTOP)
        over.wait(_TURN_S * (1 - 1 / now))
        for process in running:
            process.signal(signal.SIGCONT)
        over.wait(_TURN_S / now)


def late(h: Hosts, host: int, *, seconds: float) -> None:
    """All processes on a host stop for a while; returns when they go on."""
    running = h.on(host)
    for process in running:
        process.signal(signal.SIGSTOP)
    time.sleep(seconds)
    for process in running:
        process.signal(signal.SIGCONT)


def cut(h: Hosts, host: int) -> None:
    """Nothing gets through to a host or from it, and nobody is told."""
    h.set_link(host, up=False)


def mend(h: Hosts, host: int) -> None:
    """Undo `cut`."""
    h.set_link(host, up=True)


def lose(h: Hosts, host: int) -> None:
    """A host is gone: its processes die, and its connections do not even close."""
    cut(h, host)
    for process in h.on(host):
        process.kill()
