"""Grow the batch where a schedule would decay the learning rate (Smith, Kindermans, Ying and Le 2018, 1711.00489).

The scale of the noise of SGD is eps N / (B (1 - m)): what divides the rate by k, and what multiplies the batch by k,
lower it alike (section 3). Training passes over as many samples, in fewer steps. Beyond a largest batch, about a tenth
of the data, the rest of the decay falls to the rate again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dtrain.errors import UsageError
from dtrain.largebatch.schedules import Schedule


@dataclass(frozen=True)
class Setting:
    """What a step has."""

    factor: float
    """What the optimizer's learning rate is multiplied by."""
    batch: int
    """Its global batch, in samples."""


Course = Callable[[float], Setting]
"""Epochs done, which may be part of one -> the setting of the step that begins there. A function without state."""


def steady(schedule: Schedule, batch: int) -> Course:
    """A schedule with a batch that stays."""
    _check_batch("batch", batch)
    return lambda epochs: Setting(schedule(epochs), batch)


def grow(
    schedule: Schedule, *, batch: int, max_batch: int, after: float = 0.0, multiple_of: int = 1, jump: float = 1.0
) -> Course:
    """The course that keeps the noise scale of a schedule, by a batch that grows while the rate stays.

    Where the schedule has fallen by k since `after`, the batch is k times `batch`, but no more than `max_batch`; what
    that leaves of k, the roundings too, falls to the rate. So factor / batch is that of the schedule throughout. The
    paper's "hybrid", which raises the batch once and then decays the rate, is a `max_batch` of k times `batch`.

    Args:
        schedule: any; for example `decay([60, 120, 160], 0.2)`.
        batch: samples at the start.
        max_batch: most samples; about a tenth of the data set (section 5).
        after: epochs during which the schedule is left as it is: those of a warm-up.
        multiple_of: batches are multiples of this, such as workers times micro-batch; `max_batch` is rounded down.
        jump: the batch grows by whole powers of this; between them the rate falls. For schedules that fall all the
            time, which would change the batch at each step. 1: at any time.

    Raises:
        UsageError: a batch that is no multiple, or that is to shrink.
    """
    _check_batch("batch", batch)
    if max_batch < batch:
        raise UsageError(f"max_batch is {max_batch} and batch {batch}: give a batch to grow to")
    if multiple_of < 1 or batch % multiple_of:
        raise UsageError(f"multiple_of is {multiple_of}, and batch {batch} is no multiple of it")
    if not 1 <= jump < math.inf:
        raise UsageError(f"jump is {jump}: a factor, 1 or more")
    height = schedule(after)
    if not height > 0:
        raise UsageError(f"the schedule is {height} after {after} epochs: it has to begin above 0")
    most = max_batch // multiple_of * multiple_of

    def setting(epochs: float) -> Setting:
        factor = schedule(epochs)
        if epochs < after or factor >= height:
            return Setting(factor, batch)
        fall = height / factor if factor > 0 else math.inf
        if jump > 1 and fall < math.inf:
            fall = jump ** math.floor(math.log(fall, jump) + 1e-9)
        wanted = batch * fall
        grown = most if wanted >= most else max(batch, round(wanted / multiple_of) * multiple_of)
        return Setting(factor * grown / batch, grown)

    return setting


def updates(course: Course, *, samples: int, milestones: Sequence[float], carry: bool = True) -> int:
    """Optimizer steps of a course that changes only at its milestones, by the arithmetic of the paper (section 5.1).

    Batches reach over the ends of epochs there; a `dtrain.Loader` ends each epoch with a smaller one, see `steps`.

    Args:
        samples: of the data set.
        milestones: epochs, the end included: [60, 120, 160, 200].
        carry: samples that do not fill a batch at a milestone go on into the next phase; else they are left out.
    """
    found, left = 0, 0.0
    for start, end in pairwise([0.0, *milestones]):
        there = (end - start) * samples + (left if carry else 0.0)
        size = course(start).batch
        found += int(there // size)
        left = there % size
    return found


def steps(course: Course, *, samples: int, epochs: int) -> int:
    """Optimizer steps that a `dtrain.Trainer` makes of a course, whose epochs each end with what is left."""
    found = 0
    for epoch in range(epochs):
        first = 0
        while first < samples:
            first += course(epoch + first / samples).batch
            found += 1
    return found


def _check_batch(name: str, batch: int) -> None:
    if batch < 1:
        raise UsageError(f"{name} is {batch}: a batch has at least one sample")
