"""Learning-rate schedules as functions of progress: from epochs done, which may be part of one, to a factor.

Progress is samples seen over samples of the data set, so that a schedule means the same for every batch, and for one
that grows. A function has no state: a run that is resumed finds its place by the samples that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from dtrain.errors import UsageError

Schedule = Callable[[float], float]
"""Epochs done -> what the optimizer's learning rate is multiplied by; 1 at its height."""


def constant() -> Schedule:
    """1 throughout."""
    return lambda epochs: 1.0


def decay(milestones: Sequence[float], factor: float = 0.1) -> Schedule:
    """Multiplied by `factor` at each milestone, in epochs: 30, 60, 80 for ImageNet (He et al. 2016, section 3.4).

    Raises:
        UsageError: milestones that do not rise, or a factor that is not between 0 and 1.
    """
    if not isinstance(milestones, Sequence):
        raise UsageError(f"milestones is {milestones}: give a list of epochs, such as [30, 60, 80]")
    if any(a >= b for a, b in pairwise(milestones)) or any(m <= 0 for m in milestones):
        raise UsageError(f"milestones are {list(milestones)}: give epochs above 0, each later than the one before")
    if not 0 < factor < 1:
        raise UsageError(f"factor is {factor}: give what the rate is multiplied by, above 0 and below 1")
    return lambda epochs: float(factor ** sum(epochs >= milestone for milestone in milestones))


def cosine(epochs: float) -> Schedule:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, equation 5, one cycle)."""
    _check_epochs(epochs)
    return lambda done: 0.5 * (1 + math.cos(math.pi * min(done / epochs, 1.0)))


def polynomial(epochs: float, power: float = 2.0) -> Schedule:
    """(1 - done / epochs) ** power: the decay of LARS (You et al. 2017, section 5), with power 1 that of LAMB."""
    _check_epochs(epochs)
    if not power > 0:
        raise UsageError(f"power is {power}: give more than 0")
    return lambda done: float(max(0.0, 1 - done / epochs) ** power)


def warm_up(schedule: Schedule, epochs: float, start: float = 0.0) -> Schedule:
    """Gradual warm-up: for `epochs`, the schedule times what rises from `start` to 1 in a straight line.

    With a rate that was scaled by k, `start` is 1 / k: training begins with the rate that was tuned for the small batch
    (Goyal et al. 2017, section 2.2, with 5 epochs).

    Raises:
        UsageError: a length below 0, or a start that is not between 0 and 1.
    """
    if not 0 <= epochs < math.inf or not 0 <= start <= 1:
        raise UsageError(f"warm-up of {epochs} epochs from {start}: give 0 or more epochs, and a start from 0 to 1")

    def risen(done: float) -> float:
        if done >= epochs:
            return schedule(done)
        return schedule(done) * (start + (1 - start) * done / epochs)

    return risen


def _check_epochs(epochs: float) -> None:
    if not 0 < epochs < math.inf:
        raise UsageError(f"epochs is {epochs}: give more than 0")
