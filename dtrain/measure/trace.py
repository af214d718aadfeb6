"""A few steps of all workers as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" (Google, 2016), complete events, times in microseconds from the first step kept.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.comm.base import LANES, Span, lane_of
from dtrain.measure.stopwatch import StepTimes

_WARM_UP = 3
_TYPICAL = 5
LANE_ROWS = 10
"""A transfer that overlaps another one of its lane goes to a row (a trace's tid) so far below."""

SERVERS = 10_000
"""Process number of server 0 in a trace; those of workers are their ranks."""

Event = dict[str, Any]


@dataclass
class _Kept:
    longest_ms: float
    step: StepTimes
    servers: list[list[Span]] = field(default_factory=list)


class Chosen:
    """Keeps the times of a few steps: some of the first after warm-up, and the slowest. All workers choose the same."""

    def __init__(self) -> None:
        self._steps: dict[int, _Kept] = {}
        self._seen = 0
        self._slowest: int | None = None

    def see(self, step: StepTimes, longest_ms: float) -> bool:
        """Look at this worker's next step; whether it is kept.

        Args:
            longest_ms: how long it took the slowest worker.
        """
        self._seen += 1
        if self._seen <= _WARM_UP:
            return False
        if self._seen > _WARM_UP + _TYPICAL:
            if self._slowest is not None:
                if longest_ms <= self._steps[self._slowest].longest_ms:
                    return False
                del self._steps[self._slowest]
            self._slowest = step.number
        self._steps[step.number] = _Kept(longest_ms, step)
        return True

    def see_servers(self, servers: Sequence[Sequence[Span]]) -> None:
        """Keep of the latest rounds of servers, on this worker's clock, those of the steps that are kept."""
        for kept in self._steps.values():
            if not kept.servers:
                kept.servers = [
                    [s for s in spans if kept.step.begin_s <= s.last_s <= kept.step.end_s] for spans in servers
                ]

    @property
    def notable(self) -> dict[str, int]:
        """The number of a typical step, and of the slowest one that is kept."""
        if not self._steps:
            return {}
        middle = statistics.median_low(kept.longest_ms for kept in self._steps.values())
        typical = next(number for number, kept in self._steps.items() if kept.longest_ms == middle)
        return {"typical_step": typical, "slowest_step": max(self._steps, key=lambda n: self._steps[n].longest_ms)}

    def events(self, rank: int, offset_s: float) -> list[Event]:
        """This worker's events, and those of servers that it knows of; in microseconds on worker 0's clock."""
        found: list[Event] = []
        for kept in self._steps.values():
            found += events_of(kept.step, rank, offset_s)
            for server, spans in enumerate(kept.servers):
                found += events_of_server(spans, server, kept.step.number, offset_s)
        return found


def events_of_server(spans: Sequence[Span], server: int, number: int, offset_s: float = 0.0) -> list[Event]:
    """What a server did in a step: it waited for the last worker's part of a round, and worked on it."""
    events: list[Event] = []
    busy: dict[int, float] = {}
    for span in sorted(spans, key=lambda s: s.first_s):
        row = next(row for row in itertools.count() if busy.get(row, -math.inf) <= span.first_s)
        busy[row] = span.done_s
        parts = {f"wait, {span.name}": (span.first_s, span.last_s), span.name: (span.last_s, span.done_s)}
        for name, (since_s, to_s) in parts.items():
            when = (since_s + offset_s, to_s + offset_s)
            events.append(_event(SERVERS + server, row, name, *when, step=number, last_worker=span.last_rank))
    return events


def events_of(step: StepTimes, rank: int, offset_s: float = 0.0) -> list[Event]:
    """A step of a worker: what it computed and when it was blocked in row 0, each transfer in a row of its lane."""

    def event(name: str, row: int, since_s: float, to_s: float, **more: object) -> Event:
        return _event(rank, row, name, since_s + offset_s, to_s + offset_s, step=step.number, **more)

    events = [event(name, 0, since, to) for name, since, to in step.spans]
    events += [event("blocked", 0, t.wait_s, t.done_s, on=t.key) for t in step.sent if t.done_s > t.wait_s]
    busy: dict[int, float] = {}  # row -> until when
    for t in step.sent:
        row = 1 + LANES.index(lane_of(t.key))
        while busy.get(row, 0.0) > t.called_s:
            row += LANE_ROWS
        busy[row] = t.arrived_s
        events.append(event(t.key, row, t.called_s, t.arrived_s, nbytes=t.nbytes))
    return events


def _event(process: int, row: int, name: str, since_s: float, to_s: float, **about: object) -> Event:
    """A complete event."""
    when = {"ts": round(since_s * 1e6, 1), "dur": round(max(0.0, to_s - since_s) * 1e6, 1)}
    return {"ph": "X", "pid": process, "tid": row, "name": name, **when, "args": about}


def document(by_worker: Sequence[Sequence[Event]], notable: dict[str, int]) -> str:
    """The file, from each worker's events."""
    start = min((e["ts"] for events in by_worker for e in events), default=0.0)
    moved = [{**e, "ts": round(e["ts"] - start, 1)} for events in by_worker for e in events]
    rows = sorted({(e["pid"], e["tid"]) for e in moved})
    names = [_name("process_name", pid, 0, _process(pid)) for pid in sorted({pid for pid, _ in rows})]
    names += [_name("thread_name", pid, tid, _row_name(tid)) for pid, tid in rows if pid < SERVERS]
    return json.dumps({"displayTimeUnit": "ms", "otherData": notable, "traceEvents": names + moved})


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _process(pid: int) -> str:
    return f"worker {pid}" if pid < SERVERS else f"server {pid - SERVERS}"


def _row_name(row: int) -> str:
    if row == 0:
        return "compute"
    below, lane = divmod(row, LANE_ROWS)
    return LANES[lane - 1] + (f" {below + 1}" if below else "")
