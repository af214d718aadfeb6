"""What a measured gradient noise scale says about the batch, in words, and a rule that follows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.errors import UsageError
from dtrain.largebatch.critical import step_efficiency
from dtrain.largebatch.noise_estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether another batch would pay. Figures are NaN where the noise scale is not identifiable."""

    steps_ratio: float
    """Steps to the same loss with twice the batch, over those with this one: from 0.5 to 1."""
    samples_ratio: float
    """The same for samples: from 1 to 2."""
    text: str
    """The advice."""


def advise(found: Estimate, batch: float) -> Advice:
    """What doubling or halving a batch of so many samples would save and cost (McCandlish et al. 2018, section 2.3).

    It speaks of learning rates that are the best for each batch, and takes B_simple for the critical batch, which holds
    to the order of magnitude.
    """
    if math.isnan(found.scale):
        return Advice(steps_ratio=math.nan, samples_ratio=math.nan, text=f"No advice: {found.doubt}.")
    noise = found.scale if found.identified else max(found.low, min(found.scale, batch))
    fewer = step_efficiency(batch, noise) / step_efficiency(2 * batch, noise)
    if not found.identified:
        text = f"Batch {batch:g}: {found.doubt}."
        if found.low > batch:
            text += f" The noise scale is at least {found.low:.3g}: a larger batch pays."
        return Advice(steps_ratio=fewer, samples_ratio=2 * fewer, text=text)
    where = f"the noise scale is {found.scale:.3g} ({found.confidence:.0%}: {found.low:.3g} to {found.high:.3g})"
    if batch < found.low:
        text = f"Batch {batch:g} is small, {where}: {_changed('twice', fewer, 2 * fewer)}."
    elif batch > found.high:
        more = step_efficiency(batch, noise) / step_efficiency(batch / 2, noise)
        text = f"Batch {batch:g} is large, {where}: {_changed('half', more, more / 2)}."
    else:
        text = f"Batch {batch:g} is about the critical one, {where}: {_changed('twice', fewer, 2 * fewer)}."
    return Advice(steps_ratio=fewer, samples_ratio=2 * fewer, text=text)


def _changed(times: str, steps: float, samples: float) -> str:
    return f"{times} the batch would take {_percent(steps)} steps and {_percent(samples)} samples"


def _percent(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return "as many" if abs(change) < 0.5 else f"{abs(change):.0f} % {'more' if change > 0 else 'fewer'}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The batch follows the noise scale: B = ratio · B_simple, within bounds, in jumps, and upwards."""

    ratio: float = 1.0
    """r: more saves steps, less saves samples. 1: both within a factor of 2 of their least."""
    smallest: int = 1
    """Samples."""
    largest: int | None = None
    """Samples; None: no limit."""
    jump: float = 1.5
    """The batch is left alone until it would change by this factor, at least."""
    multiple_of: int = 1
    """The batch is a multiple of this: workers times micro-batch, say."""
    shrinks: bool = False
    """Whether it may become smaller again."""

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise UsageError(f"ratio is {self.ratio}: above 0")
        if not self.jump >= 1:
            raise UsageError(f"jump is {self.jump}: a factor, 1 or more")
        if self.smallest < 1 or self.multiple_of < 1:
            raise UsageError(f"smallest is {self.smallest}, multiple_of {self.multiple_of}: samples, 1 or more")
        if self.largest is not None and self.largest < 1:
            raise UsageError(f"largest is {self.largest}: samples, 1 or more; None for no limit")
        if self._least > self._most:
            raise UsageError(
                f"no multiple of {self.multiple_of} lies from {self.smallest} to {self.largest}: widen them"
            )

    def allowed(self, batch: float) -> int:
        """The batch within bounds, and a multiple, that is next to this one."""
        return min(max(round(batch / self.multiple_of) * self.multiple_of, self._least), self._most)

    @property
    def _least(self) -> int:
        return -(-self.smallest // self.multiple_of) * self.multiple_of

    @property
    def _most(self) -> int:
        return (2**62 if self.largest is None else self.largest) // self.multiple_of * self.multiple_of


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The batch of the next steps."""

    batch: int
    """Samples in one optimizer step, over all workers."""
    reason: str
    """Why it is changed, or left."""


def decide(found: Estimate, batch: int, rule: Rule) -> Decision:
    """The next batch, by a rule. A function of its arguments alone: workers that give the same get the same.

    Where the noise scale's interval has no upper end, its lower end is taken for it: so much is sure.
    """
    if math.isnan(found.scale):
        return Decision(batch=batch, reason=f"batch stays {batch}: {found.doubt}")
    scale, sure = (found.scale, "") if found.identified else (found.low, "at least ")
    wanted = rule.allowed(rule.ratio * scale)
    why = f"{rule.ratio:g} x noise scale {sure}{scale:.3g} is {rule.ratio * scale:.3g}"
    if wanted != round(rule.ratio * scale):
        why += f", in bounds and multiples {wanted}"
    if wanted < batch and not (rule.shrinks and found.identified):
        return Decision(batch=batch, reason=f"batch stays {batch}: {why}, and it does not shrink")
    if max(wanted, batch) < rule.jump * min(wanted, batch):
        return Decision(batch=batch, reason=f"batch stays {batch}: {why}, less than a factor of {rule.jump:g} away")
    return Decision(batch=wanted, reason=f"batch {batch} becomes {wanted}: {why}")
