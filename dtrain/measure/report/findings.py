"""Titles that say what a picture shows, and the few sentences at the head of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dtrain.measure.report import words
from dtrain.measure.report.figures import Late, Points, RatioPoint
from dtrain.measure.report.timelines import Slower, Track
from dtrain.measure.runfiles import Run, number

NAMES = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "the optimizer",
    "rest": "everything else",
    "exposed": "exposed communication",
    "wait": "waiting for a late worker",
    "transfer": "transfer",
    "codec": "packing and checksums",
    "hidden": "hidden communication",
}
"""The boxes, in words."""
_SAME = 0.02
"""Relative change that is none."""


def in_short(run: Run) -> list[str]:
    """A run in a few sentences."""
    summary = run.summary
    found = {name: number(summary.get(name)) for name in ("samples_per_s", "step_ms", "exposed_comm_ms", "seconds")}
    backend, workers = run.of("backend"), words.plural(run.workers, "worker")
    sentences = []
    if found["samples_per_s"] is not None:
        took = f" A typical step takes {words.ms(found['step_ms'])}" if found["step_ms"] else ""
        part = _part(found["exposed_comm_ms"], found["step_ms"])
        blocked = f", of which {words.percent(part)} is communication that computing waits for" if part else ""
        speed = words.digits(found["samples_per_s"])
        sentences.append(f"{workers} over {backend} went through {speed} samples a second.")
        sentences += [f"{took.strip()}{blocked}."] if took else []
    elif not summary:
        sentences.append(f"{workers} over {backend}; the run has no summary: it has not ended, or was killed.")
    return sentences


def _part(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def learning(name: str, points: Points) -> str:
    """What became of a curve."""
    first, last = points[0][1], points[-1][1]
    text = f"{words.score(name, first)} to {words.score(name, last)}"
    what = words.named(name).capitalize()
    if len(points) == 1:
        return f"{what} is {words.score(name, last)}"
    if abs(last - first) <= _SAME * max(abs(first), abs(last)):
        return f"{what} stayed at {words.score(name, last)}"
    return f"{what} {'fell' if last < first else 'rose'} from {text}"


def best(name: str, ends: Sequence[tuple[str, float]], *, lowest: bool) -> str:
    """Which of several runs ends where."""
    label, value = (min if lowest else max)(ends, key=lambda end: end[1])
    return f"{words.named(name).capitalize()}: {label} ends {'lowest' if lowest else 'highest'}, at " + words.score(
        name, value
    )


def shortest(steps: Sequence[tuple[str, float]]) -> str:
    """Whose step is the shortest."""
    if len(steps) < 2:
        return "Worker 0's step in each run"
    label, least = min(steps, key=lambda step: step[1])
    return f"{label} has the shortest step: {words.ms(least)}"


def where_time_goes(workers: Sequence[dict[str, float]]) -> str:
    """The largest part of worker 0's step, or the worker that differs most."""
    boxes = workers[0]
    found = {name: boxes.get(f"{name}_ms", 0.0) for name in NAMES if name not in ("hidden", "exposed")}
    if not {"wait_ms", "transfer_ms"} & boxes.keys():
        found["exposed"] = boxes.get("exposed_comm_ms", 0.0)
    box = max(found, key=found.__getitem__)
    whole = boxes.get("step_ms") or sum(found.values())
    return f"{_capital(NAMES[box])} takes {words.percent(_part(found[box], whole))} of worker 0's step"


def hidden(boxes: dict[str, float]) -> str | None:
    """How much of the communication computing hides."""
    behind, exposed = boxes.get("hidden_comm_ms"), boxes.get("exposed_comm_ms")
    if behind is None or exposed is None or behind + exposed <= 0:
        return None
    part = behind / (behind + exposed)
    return (
        f"Of {words.ms(behind + exposed)} of communication, {words.ms(behind)} ({words.percent(part)}) hide behind "
        f"computing; {words.ms(exposed)} do not."
    )


def steadiness(points: Points) -> str:
    """How much longer slow steps take than typical ones."""
    values = sorted(y for _, y in points)
    typical = statistics.median(values)
    slow = values[min(len(values) - 1, int(0.95 * len(values)))]
    if slow <= 1.25 * typical:
        return f"Steps are steady: 19 of 20 take {words.ms(slow)} or less"
    return f"One step in 20 takes {words.ms(slow)} or more, a typical one {words.ms(typical)}"


def typical_step(step: int, tracks: Sequence[Track]) -> str:
    return f"A typical step, {step}: {words.ms(length(tracks))}"


def slow_step(step: int, tracks: Sequence[Track], why: Slower | None) -> str:
    """The slowest step, and what took longer in it than it usually does."""
    text = f"The slowest step, {step}: {words.ms(length(tracks))}"
    if why is None:
        return text
    if why.box == "start":
        return f"{text}; worker {why.worker} began {words.ms(why.ms)} after the first"
    return f"{text}; worker {why.worker}, {NAMES[why.box]}: {words.ms(why.ms)} longer than usual"


def length(tracks: Sequence[Track]) -> float:
    return max(span.start_ms + span.ms for track in tracks for span in track.spans)


def traffic(by_lane: dict[str, tuple[float, float]]) -> str:
    """Which lane carries most."""
    lane = max(by_lane, key=lambda name: by_lane[name][0])
    whole = sum(sent for sent, _ in by_lane.values())
    if not whole:
        return "Worker 0 sends nothing"
    part = words.percent(by_lane[lane][0] / whole)
    return f"{part} of the {words.nbytes(whole)} that worker 0 sends a step are on the {lane} lane"


def who_is_late(workers: Sequence[Late]) -> str:
    worst = max(workers, key=lambda one: one.cost_s)
    if not worst.cost_s:
        return "No worker was late"
    times = words.plural(worst.steps, "step")
    return f"Worker {worst.worker} came last in {times}, which cost the others {words.seconds(worst.cost_s)}"


def how_stale(workers: Sequence[dict[int, int]]) -> str:
    count = sum(n for row in workers for n in row.values())
    if not count:
        return "No gradient was counted"
    mean = sum(stale * n for row in workers for stale, n in row.items()) / count
    return (
        f"Gradients were {words.digits(mean)} steps behind on average, {max(k for row in workers for k in row)} at most"
    )


def what_fills_memory(found: dict[str, float], peak: float | None) -> str:
    name, most = next(iter(found.items()))
    text = f"Most memory is for {words.named(name)}: {words.nbytes(most)}"
    return text if peak is None else f"{text}; at most {words.nbytes(peak)} are in use at once"


def what_pays(points: Sequence[RatioPoint], by: str) -> str:
    """Whether the ratio grows with the batch, or with workers."""
    what = "global batch" if by == "global_batch" else "number of workers"
    ordered = sorted(points, key=lambda p: p.global_batch if by == "global_batch" else p.workers)
    first, last = ordered[0], ordered[-1]
    low, high = (p.global_batch if by == "global_batch" else p.workers for p in (first, last))
    if abs(first.ratio - last.ratio) <= _SAME * max(first.ratio, last.ratio):
        return f"The ratio does not depend on the {what} here"
    verb = "rises" if last.ratio > first.ratio else "falls"
    return (
        f"The ratio {verb} from {words.digits(first.ratio)} to {words.digits(last.ratio)} as the {what} goes from "
        f"{low:g} to {high:g}"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
