"""What the pictures show, as numbers: pure functions of a run's files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.comm.base import LANES
from dtrain.measure.runfiles import Record, Run, number, numbers
from dtrain.measure.stopwatch import PHASES
from dtrain.measure.summary import summarise

Points = list[tuple[float, float]]

COMPUTE = PHASES
COMMUNICATION = ("wait", "transfer", "codec")
POINTS = 1000
"""Points of a curve at most."""


def thin(points: Points, most: int = POINTS) -> Points:
    """At most so many points of a curve: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return points
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(points)), most // 2):
        values = [points[i][1] for i in stretch]
        kept += sorted({int(stretch[int(np.argmin(values))]), int(stretch[int(np.argmax(values))])})
    return [points[i] for i in kept]


def per_worker(run: Run) -> list[dict[str, float]]:
    """Each worker's typical boxes: as the summary has them, else from steps.jsonl; worker 0's at least."""
    given = run.summary.get("per_worker")
    if isinstance(given, list) and any(numbers(row) for row in given):
        return [numbers(row) for row in given]
    rows: dict[int, list[Record]] = defaultdict(list)
    for row in run.steps:
        rows[row["worker"]].append(row)
    if rows:
        return [typical(rows.get(worker, [])) for worker in range(max(rows) + 1)]
    alone = {name: value for name, value in numbers(run.summary).items() if name.endswith("_ms")}
    return [alone or typical(run.records)]


def typical(rows: Sequence[Record]) -> dict[str, float]:
    """The boxes of a typical step, as `summarise` makes them of whole rows; nothing where there are none."""
    needed = {"step_ms", "exposed_comm_ms", "bytes_sent"}
    whole = [found for row in rows if needed <= (found := numbers(row)).keys()]
    return {name: value for name, value in summarise(whole).items() if name.endswith("_ms")}


@dataclass(frozen=True)
class Part:
    """A part of a step, in ms."""

    box: str
    ms: float


def parts(boxes: dict[str, float]) -> list[Part]:
    """The parts of a step in the order of its bar, without those that are not known.

    The exposed communication is one part where it is not split into waiting, transfer and codec.
    """
    split = COMMUNICATION if {"wait_ms", "transfer_ms"} <= boxes.keys() else ()
    known = {**boxes, "exposed_ms": boxes.get("exposed_comm_ms")}
    order = (*COMPUTE, *(split or ["exposed"]), "rest")
    return [Part(name, max(0.0, value)) for name in order if (value := known.get(f"{name}_ms")) is not None]


def clock(run: Run) -> Points:
    """(step, seconds since the first step began) at the end of each of worker 0's steps, where the run tells.

    Of steps.jsonl; without it, of the records in metrics.jsonl, whose `time_s` begins a little earlier.
    """
    found: Points = []
    for row in run.steps:
        start_s, step_ms = number(row.get("start_s")), number(row.get("step_ms"))
        if row["worker"] == 0 and start_s is not None and step_ms is not None:
            found.append((float(row["step"]), start_s + step_ms / 1e3))
    return found or [(step, time_s) for step, time_s in curve(run.records, "time_s", "step")]


def curve(rows: Sequence[Record], name: str, against: str = "samples") -> Points:
    """A figure of metrics.jsonl against another."""
    pairs = ((number(row.get(against)), number(row.get(name))) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def over_time(run: Run, points: Points) -> Points:
    """The same points, with x from step to seconds; nothing where the run has kept no time."""
    times = clock(run)
    if not times or not points:
        return []
    known, wanted = np.array(times), np.array(points)
    seconds = np.interp(wanted[:, 0], known[:, 0], known[:, 1])
    return [(float(x), float(y)) for x, y in zip(seconds, wanted[:, 1], strict=True)]


def score_rows(run: Run) -> list[Record]:
    """The scores after each epoch, as flat as records are."""
    return [{"step": row.get("step"), "samples": row.get("samples"), **numbers(row["metrics"])} for row in run.scores]


def score_names(runs: Sequence[Run]) -> list[str]:
    """Scores other than the loss, in the order in which they come."""
    names = [name for run in runs for row in run.scores for name in numbers(row["metrics"]) if name != "loss"]
    return list(dict.fromkeys(names))


def step_times(run: Run) -> Points:
    """(step, ms) of the slowest worker; of worker 0, where there is no steps.jsonl."""
    longest: dict[float, float] = {}
    for step, took_ms in curve(run.steps or run.records, "step_ms", "step"):
        longest[step] = max(took_ms, longest.get(step, 0.0))
    return sorted(longest.items())


@dataclass(frozen=True)
class Late:
    """A worker, and what waiting for it cost the others."""

    worker: int
    cost_s: float
    steps: int


def late(run: Run) -> list[Late]:
    """Of each worker, in the order of rank; nothing where workers do not wait for each other."""
    given = run.summary.get("late")
    rows = [numbers(row) for row in given] if isinstance(given, list) else []
    return [
        Late(int(row.get("worker", place)), row["cost_s"], int(row.get("steps", 0)))
        for place, row in enumerate(rows)
        if "cost_s" in row
    ]


def bytes_by_lane(run: Run) -> dict[str, tuple[float, float]]:
    """Lane -> (sent, received) bytes of worker 0's mean step: as the summary has them, else from steps.jsonl."""
    summary = numbers(run.summary)
    mine = [numbers(row) for row in run.steps if row["worker"] == 0]

    def mean(name: str) -> float:
        if f"{name}_per_step" in summary or not mine:
            return summary.get(f"{name}_per_step", 0.0)
        return statistics.fmean(row.get(name, 0.0) for row in mine)

    found = {lane: (mean(f"sent_{lane}"), mean(f"received_{lane}")) for lane in LANES}
    return {lane: both for lane, both in found.items() if any(both)}


def bytes_per_step(run: Run) -> tuple[float | None, float | None]:
    """(sent, received) of worker 0."""
    found = numbers(run.summary)
    sent, received = (found.get(f"bytes_{way}_per_step") for way in ("sent", "received"))
    return sent, received


def staleness(run: Run) -> list[dict[int, int]]:
    """Of each worker: staleness of a gradient in steps -> how often; nothing where no gradient can be stale."""
    given = run.summary.get("staleness")
    rows = [numbers(row) for row in given] if isinstance(given, list) else []
    rows = [{k: v for k, v in row.items() if k.isdigit()} for row in rows]
    return [{int(k): int(v) for k, v in row.items()} for row in rows] if any(rows) else []


def memory(run: Run) -> tuple[dict[str, float], float | None]:
    """Bytes by what they are for, the largest first, and the most of all together at any moment."""
    given = run.summary.get("memory")
    if isinstance(given, list) and given:
        given = given[0]
    found = {name.removesuffix("_bytes"): nbytes for name, nbytes in numbers(given).items()}
    peak = found.pop("peak", None)
    return dict(sorted(found.items(), key=lambda item: -item[1])), peak


@dataclass(frozen=True)
class RatioPoint:
    """A run's ratio, and what it depends on."""

    run: int
    """Position of the run."""
    global_batch: float
    workers: int
    ratio: float


def ratios(runs: Sequence[Run]) -> list[RatioPoint]:
    """Of the runs that have one."""
    found = []
    for place, run in enumerate(runs):
        ratio, batch = number(run.summary.get("ratio")), number(run.config.get("global_batch"))
        if ratio is not None and batch is not None:
            found.append(RatioPoint(place, batch, run.workers, ratio))
    return found


def differences(configs: Sequence[Record]) -> dict[str, list[object]]:
    """Fields that are not the same in all configurations -> their values; what only names files is left out."""
    flat = [flatten(config) for config in configs]
    names = list(dict.fromkeys(name for config in flat for name in config))
    kept = [name for name in names if name not in NOT_COMPARED and name.split(".")[0] != "buffers"]
    rows = {name: [config.get(name, "") for config in flat] for name in kept}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


NOT_COMPARED = frozenset(("run_dir", "json", "quiet", "progress", "live"))
"""Fields of a configuration that say nothing about what was computed."""


def flatten(config: Record) -> dict[str, object]:
    """Groups of a configuration as `group.field`."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places of labels, moved apart until they are `gap` from each other, within bounds where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [0.0] * len(places)
    below = low - gap
    for i in order:
        below = moved[i] = max(places[i], below + gap)
    above = high + gap
    for i in reversed(order):
        above = moved[i] = min(moved[i], above - gap)
    return moved
