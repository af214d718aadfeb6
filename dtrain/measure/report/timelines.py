"""One step of all workers, from trace.json: who did what when, and why a slow one was slow."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from dtrain.comm.base import LANES
from dtrain.measure.report.figures import parts, per_worker
from dtrain.measure.runfiles import Record, Run, number, numbers
from dtrain.measure.trace import LANE_ROWS

SPANS = 2000
"""Rectangles of a timeline at most."""
_TRACKS = ("compute", *LANES)


@dataclass(frozen=True)
class Span:
    """A rectangle of a timeline."""

    name: str
    start_ms: float
    ms: float
    nbytes: float | None


@dataclass(frozen=True)
class Track:
    """A row of a worker, or of a server, in a timeline."""

    owner: str
    """worker 0, server 1, ..."""
    name: str
    """`compute`, or the lane."""
    spans: list[Span]
    row: int = 0
    """Which of its lane's rows it is: transfers that overlap have one each."""


def timeline(run: Run, step: int, most: int = SPANS) -> list[Track]:
    """A step's lanes by worker; time counts from the first event. Of too many spans the longest stay."""
    rows = _events(run, step)
    if not rows:
        return []
    begin = min(row["ts"] for row in rows)
    tracks: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row["dur"])[:most]:
        span = Span(row["name"], (row["ts"] - begin) / 1e3, row["dur"] / 1e3, row["nbytes"])
        tracks[row["pid"], row["tid"]].append(span)
    order = sorted(tracks, key=lambda key: (key[0], key[1] % LANE_ROWS, key[1] // LANE_ROWS))
    owners = _owners(run)
    return [
        Track(
            owner=owners.get(pid, f"worker {pid}"),
            name=_track_name(tid % LANE_ROWS),
            spans=sorted(tracks[pid, tid], key=_start),
            row=tid // LANE_ROWS,
        )
        for pid, tid in order
    ]


def marked_steps(run: Run) -> tuple[int | None, int | None]:
    """The typical step and the slowest one, as trace.json names them."""
    other = run.trace.get("otherData")
    found = numbers(other)
    typical, slowest = (found.get(name) for name in ("typical_step", "slowest_step"))
    return None if typical is None else int(typical), None if slowest is None else int(slowest)


def _owners(run: Run) -> dict[int, str]:
    """pid -> what a trace calls it."""
    events = run.trace.get("traceEvents")
    found = {}
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict) and event.get("name") == "process_name" and isinstance(event.get("args"), dict):
            pid, name = number(event.get("pid")), event["args"].get("name")
            if pid is not None and isinstance(name, str):
                found[int(pid)] = name
    return found


def _start(span: Span) -> float:
    return span.start_ms


def _track_name(tid: int) -> str:
    return _TRACKS[tid] if 0 <= tid < len(_TRACKS) else f"lane {tid}"


def _events(run: Run, step: int) -> list[Record]:
    events = run.trace.get("traceEvents")
    found = []
    for event in events if isinstance(events, list) else []:
        if not isinstance(event, dict) or event.get("ph") != "X":
            continue
        args = event.get("args")
        values, about = numbers(event), numbers(args)
        if about.get("step") == step and {"ts", "dur", "pid", "tid"} <= values.keys() and values["dur"] >= 0:
            found.append(
                {
                    **{name: values[name] for name in ("ts", "dur")},
                    **{name: int(values[name]) for name in ("pid", "tid")},
                    "name": str(event.get("name", "")),
                    "nbytes": about.get("nbytes"),
                }
            )
    return found


@dataclass(frozen=True)
class Slower:
    """What of a step took longer than it usually does, most of all."""

    worker: int
    box: str
    ms: float
    """How much longer."""


def slower(run: Run, step: int) -> Slower | None:
    """Why a step was slow: the box that grew most over its worker's typical one.

    A worker that began long after the first one has one more box, `start`. Waiting is left out while something else
    grew: it is what another worker's growth looks like from here.
    """
    usual = per_worker(run)
    starts = {
        row["worker"]: start
        for row in run.steps
        if row["step"] == step
        for start in [number(row.get("start_s"))]
        if start is not None
    }
    grown = [
        Slower(row["worker"], part.box, part.ms - typical[part.box])
        for row in run.steps
        if row["step"] == step and row["worker"] < len(usual)
        for typical in [{part.box: part.ms for part in parts(usual[row["worker"]])}]
        for part in parts(numbers(row))
        if part.box in typical
    ]
    grown += [Slower(worker, "start", 1e3 * (start - min(starts.values()))) for worker, start in starts.items()]
    grown = [one for one in grown if one.ms > 0]
    causes = [one for one in grown if one.box not in ("wait", "exposed")]
    largest = max(grown, key=_growth, default=None)
    cause = max(causes, key=_growth, default=None)
    return cause if cause and largest and cause.ms > largest.ms / 2 else largest


def _growth(one: Slower) -> float:
    return one.ms
