"""One training step, played through event by event: what computes, what travels, what waits.

`play` knows jobs and resources only. A job needs an amount of some resources (bytes of a link, core-seconds of a
processor) and may start when the jobs before it are over and it is the first of its lane. Jobs that run at once and
want more of a resource than there is are slowed down by the same share of the speed that each would have alone
(max-min fairness over shares), so a link that two transfers use, or a processor on which a transfer runs beside the
model, is divided, and nothing of it is lost.

`dtrain.measure.step` builds the jobs of a training step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_EPSILON = 1e-12
"""Of a job: what is less than this part of it is done."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Something that takes time. `play` sets when it starts and ends."""

    name: str
    lane: str
    """Jobs of a lane run one after the other, in the order in which they were given."""
    uses: Mapping[str, float] = field(default_factory=dict)
    """Resource -> how much of it: bytes, or core-seconds."""
    least_s: float = 0.0
    """Shortest duration, however much there is of everything."""
    after: Sequence[Job] = ()
    """Jobs that must be over."""
    delay_s: float = 0.0
    """Time between the end of those and the earliest start: a latency, in which nothing is used."""
    start_s: float = math.nan
    end_s: float = math.nan

    @property
    def over(self) -> bool:
        return not math.isnan(self.end_s)

    @property
    def released_s(self) -> float:
        """The earliest start; needs the jobs before it to be over."""
        return max((job.end_s for job in self.after), default=0.0) + self.delay_s

    def alone_s(self, capacity: Mapping[str, float]) -> float:
        """Duration without any other job."""
        return max((amount / capacity[name] for name, amount in self.uses.items() if amount), default=0.0)


def play(jobs: Iterable[Job], capacity: Mapping[str, float]) -> float:
    """Run the jobs to their end, from time 0; when the last one ends, in seconds.

    Args:
        jobs: in the order of their lanes.
        capacity: of each resource, per second: bytes, or core-seconds (cores).

    Raises:
        ValueError: jobs that wait for each other, or for one that is not among them.
    """
    lanes: dict[str, deque[Job]] = {}
    for job in jobs:
        lanes.setdefault(job.lane, deque()).append(job)
    running: dict[Job, float] = {}  # job -> the part of it that is left
    now_s = last_s = 0.0
    while lanes:
        next_s = _start(lanes, running, now_s)
        if not running and math.isinf(next_s):
            raise ValueError(f"jobs wait for each other: {[lane[0].name for lane in lanes.values()]}")
        rates = _rates(list(running), capacity)
        step_s = min([next_s - now_s, *(left / rates[job] for job, left in running.items())])
        now_s += step_s
        for job in list(running):
            running[job] -= rates[job] * step_s
            if running[job] <= _EPSILON or running[job] / rates[job] <= _EPSILON * now_s:
                del running[job]
                job.end_s = last_s = now_s
                lanes[job.lane].popleft()
                if not lanes[job.lane]:
                    del lanes[job.lane]
    return last_s


def _start(lanes: Mapping[str, deque[Job]], running: dict[Job, float], now_s: float) -> float:
    """Start what may start now; the next time at which something may."""
    next_s = math.inf
    for lane in lanes.values():
        job = lane[0]
        if job in running or not all(other.over for other in job.after):
            continue
        released_s = job.released_s
        if released_s <= now_s * (1 + _EPSILON):
            job.start_s = now_s
            running[job] = 1.0
        else:
            next_s = min(next_s, released_s)
    return next_s


def _rates(jobs: Sequence[Job], capacity: Mapping[str, float]) -> dict[Job, float]:
    """Jobs per second of each: its speed alone, times its share. Shares rise together until a resource is used up."""
    full = {job: 1.0 / max(job.least_s, job.alone_s(capacity), 1e-15) for job in jobs}
    share: dict[Job, float] = {}
    left = dict(capacity)
    while len(share) < len(jobs):
        rising = [job for job in jobs if job not in share]
        wanted: dict[str, float] = {}
        for job in rising:
            for name, amount in job.uses.items():
                wanted[name] = wanted.get(name, 0.0) + amount * full[job]
        level = {name: left[name] / want for name, want in wanted.items() if want > 0}
        lowest = min([1.0, *level.values()])
        tight = {name for name, at in level.items() if at <= lowest * (1 + _EPSILON)}
        stops = [job for job in rising if lowest >= 1.0 or any(job.uses.get(name) for name in tight)]
        for job in stops:
            share[job] = lowest
            for name, amount in job.uses.items():
                left[name] = max(0.0, left[name] - amount * full[job] * lowest)
    return {job: full[job] * share[job] for job in jobs}
