"""What a batch costs and saves: steps against samples, and the critical batch (McCandlish et al. 2018, 1812.06162).

A noise scale is in samples: measured by `GradientNoise`, or fitted to runs by `fit`, as the critical batch. To reach a
given loss with batch B takes S = S_min (1 + B_crit / B) steps and E = E_min (1 + B / B_crit) samples, where E = B S and
B_crit = E_min / S_min; so (S / S_min - 1) (E / E_min - 1) = 1 (section 2.3). At B = B_crit both are twice their least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.errors import UsageError
from dtrain.largebatch.noise_estimate import check_confidence


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Steps and samples to a given loss, by batch."""

    steps_min: float
    """S_min: steps with a batch without end."""
    critical_batch: float
    """B_crit, in samples."""

    @property
    def samples_min(self) -> float:
        """E_min: samples with the smallest batches."""
        return self.steps_min * self.critical_batch

    def steps(self, batch: float) -> float:
        """Steps with that batch."""
        return self.steps_min / step_efficiency(batch, self.critical_batch)

    def samples(self, batch: float) -> float:
        """Samples with that batch."""
        return self.samples_min / sample_efficiency(batch, self.critical_batch)


@dataclass(frozen=True, kw_only=True)
class Fit(TradeOff):
    """A `TradeOff` fitted to measured pairs of batch and steps."""

    low: float
    """Lower end of the interval of `critical_batch`."""
    high: float
    """Upper end."""
    confidence: float
    """Of the interval; it holds for the fit alone, if residuals are independent."""
    residual: float
    """Root mean square of log(measured / fitted steps), over the degrees of freedom: 0.05 is about 5 %."""


def step_efficiency(batch: float, noise_scale: float) -> float:
    """1 / (1 + B_noise / B): what one step brings, compared with a step on the true gradient (section 2.2)."""
    _check_batch(batch)
    _check_noise(noise_scale)
    return 1 / (1 + noise_scale / batch)


def sample_efficiency(batch: float, noise_scale: float) -> float:
    """1 / (1 + B / B_noise): what one sample brings, compared with one in the smallest batches (section 2.3)."""
    _check_batch(batch)
    _check_noise(noise_scale)
    return noise_scale / (noise_scale + batch)


def optimal_lr(batch: float, noise_scale: float, *, lr_max: float) -> float:
    """The best learning rate of SGD for a batch: lr_max / (1 + B_noise / B) (section 2.2).

    Proportional to the batch where it is small, and never above `lr_max`, which is the best one for the true gradient.
    """
    return lr_max * step_efficiency(batch, noise_scale)


def temperature(lr: float, batch: float, noise_scale: float, *, lr_max: float) -> float:
    """How hot a training runs: the learning rate over the best one for its batch (appendix C).

    The noise scale that a training settles at goes like 1 / temperature: one that was measured with too small a
    learning rate is too large.
    """
    return lr / optimal_lr(batch, noise_scale, lr_max=lr_max)


def adascale_gain(scale: float, noise_scale: float, *, base_batch: float) -> float:
    """By how much a step on a `scale` times larger batch may count for more, and its rate be higher (AdaScale SGD).

    (σ² + μ²) / (σ² / scale + μ²), with σ² = tr Σ / base_batch and μ² = |G|²: from 1, where there is no noise, up to
    `scale`, where there is nothing else (Johnson et al. 2020, 2007.05105, section 3). A schedule for the base batch is
    followed when it is read at the sum of gains, not at the number of steps.
    """
    _check_batch(base_batch)
    _check_noise(noise_scale)
    if not scale > 0:
        raise UsageError(f"scale is {scale}: the batch over the base batch, above 0")
    if math.isinf(noise_scale):
        return scale
    return (noise_scale + base_batch) / (noise_scale / scale + base_batch)


def fit(batches: Sequence[float], steps: Sequence[float], *, confidence: float = 0.95) -> Fit:
    """The trade-off that fits runs to one loss best, by least squares of log steps.

    Each run is to have the best learning rate for its batch, and batches are to reach from far below the critical one
    to far above; the interval tells whether they do.

    Args:
        batches: in samples, two different ones at least.
        steps: that each took.
        confidence: of the interval of the critical batch, which is Student's in its logarithm; it has no end with
            two runs.

    Raises:
        UsageError: too few pairs, or numbers that are not above 0; a confidence that is no probability.
    """
    check_confidence(confidence)
    b, s = np.asarray(batches, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if b.shape != s.shape or len(set(b.tolist())) < 2:
        raise UsageError(
            f"{len(b)} batches and {len(s)} numbers of steps: give pairs, of two different batches at least"
        )
    if not (np.all(b > 0) and np.all(s > 0) and np.all(np.isfinite([b, s]))):
        raise UsageError("batches and steps are finite and above 0: leave out runs that did not reach the loss")
    from scipy import optimize, special  # takes a second

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(logs[0] + np.logaddexp(0.0, logs[1] - np.log(b)) - np.log(s))

    start = np.array([np.log(s.min() / 2), np.log(np.median(b))])
    found = optimize.least_squares(residuals, start, method="trf", xtol=1e-12, ftol=1e-12, gtol=1e-12)
    log_steps, log_batch = (float(x) for x in found.x)
    freedom = len(b) - 2
    residual = math.sqrt(2 * float(found.cost) / freedom) if freedom else 0.0
    width = math.inf
    if freedom:
        precision = found.jac.T @ found.jac
        if np.linalg.cond(precision) < 1e12:
            deviation = residual * math.sqrt(float(np.linalg.inv(precision)[1, 1]))
            width = float(special.stdtrit(freedom, (1 + confidence) / 2)) * deviation
    return Fit(
        steps_min=math.exp(log_steps),
        critical_batch=math.exp(log_batch),
        low=math.exp(log_batch - width),
        high=math.exp(min(log_batch + width, 700.0)) if math.isfinite(width) else math.inf,
        confidence=confidence,
        residual=residual,
    )


def _check_batch(batch: float) -> None:
    if not batch > 0:
        raise UsageError(f"batch is {batch}: a number of samples, above 0")


def _check_noise(noise_scale: float) -> None:
    if noise_scale < 0:  # NaN, not identifiable, stays NaN
        raise UsageError(f"noise_scale is {noise_scale}: samples, 0 or more")
