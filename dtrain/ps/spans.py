"""What a server did lately: when each round's first and last part came, and when it was done."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from typing import Any

from dtrain.comm.base import Span

MOST = 2000
"""Rounds that are remembered; of them, names of up to so many characters."""
_NAME = 60


class Spans:
    """Remembers the latest rounds. Parts of one tensor, and of all workers, are one round."""

    def __init__(self) -> None:
        self._rounds: OrderedDict[tuple[str, int], list[float]] = OrderedDict()
        self._open: dict[str, int] = {}

    def came(self, name: str, number: int, rank: int) -> None:
        """A part of the round came from that worker."""
        now = time.monotonic()
        found = self._rounds.get((name, number))
        if found is not None:
            found[1], found[3] = now, rank
            return
        self._rounds[name, number] = [now, now, now, rank]
        self._open.setdefault(name, number)
        if len(self._rounds) > MOST:
            (old, _), _ = self._rounds.popitem(last=False)
            self._open.pop(old, None)

    def done(self, name: str, number: int | None = None) -> None:
        """A part of the round has been answered. Without a number: of the oldest that is not done."""
        which = self._open.pop(name, None) if number is None else number
        found = None if which is None else self._rounds.get((name, which))
        if found is not None:
            found[2] = time.monotonic()

    def encode(self) -> bytes:
        """The rounds that are remembered, and what the clock says now, as JSON."""
        rows = [(name[:_NAME], *values) for (name, _), values in self._rounds.items()]
        return json.dumps({"now_s": time.monotonic(), "rounds": rows}).encode()


def decode(data: bytes, asked_s: float, told_s: float) -> list[Span]:
    """What `encode` gave, on the clock of one who asked and was told at those times.

    The server looked at its clock somewhere between: the error is at most half of that time (Cristian 1989).

    Raises:
        ValueError, KeyError, TypeError: that is not what `encode` gives.
    """
    try:
        return _decode(json.loads(data), asked_s, told_s)
    except (ArithmeticError, RecursionError) as error:
        raise ValueError(f"numbers or nesting that nobody means: {error}") from error


def _decode(told: Any, asked_s: float, told_s: float) -> list[Span]:
    ahead_s = float(told["now_s"]) - (asked_s + told_s) / 2
    if abs(ahead_s) <= (told_s - asked_s) / 2:
        ahead_s = 0.0  # one host, one clock
    spans = []
    for name, first_s, last_s, done_s, rank in told["rounds"]:
        first_s, last_s, done_s = (float(moment) - ahead_s for moment in (first_s, last_s, done_s))
        if not all(map(math.isfinite, (first_s, last_s, done_s))):
            raise ValueError(f"{name} at {first_s}, {last_s}, {done_s}")
        spans.append(Span(str(name), first_s, last_s, max(last_s, done_s), int(rank)))
    return spans
