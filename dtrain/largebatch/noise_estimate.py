"""The gradient noise scale from squared norms: B_simple = tr Σ / |G|² (McCandlish et al. 2018, 1812.06162, A.1).

G is the true gradient and Σ the covariance of one sample's gradient. The gradient of a batch of B samples has an
expected squared norm of |G|² + tr Σ / B. Larger batches than B_simple mostly repeat themselves; smaller ones mostly
average away noise, and could be larger at little cost.

A step's batch comes in n pieces, the micro-batches of all workers. A piece has b of the B samples, weight w = b / B,
and the mean gradient g. From S1 = Σ w |g|² and S2 = |Σ w g|² both unknowns follow without bias, whatever the sizes:

    E S1 = |G|² + n tr Σ / B        tr Σ ≈ B (S1 - S2) / (n - 1)
    E S2 = |G|² +   tr Σ / B        |G|² ≈ (n S2 - S1) / (n - 1)

For two batch sizes this is the paper's pair of equations. The mean of ratios would be biased, so the ratio is that of
means over steps; each step weighs n - 1, its degrees of freedom, in both.

What it assumes: the samples of a step are drawn independently, and a piece's gradient is a mean of its samples' own.
With batch normalisation that is inexact, since a sample's gradient depends on its companions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What one step tells, of all workers together."""

    pieces: int
    """n, at least 1: gradients that were looked at, each of a micro-batch of a worker; empty ones not counted."""
    samples: float
    """B, over all pieces."""
    of_pieces: float
    """S1 = Σ (b / B) |g|²."""
    of_mean: float
    """S2 = |Σ (b / B) g|²."""


def moments(sums: Sums) -> tuple[float, float]:
    """Unbiased (tr Σ, |G|²) from one step; either may come out negative.

    Raises:
        UsageError: one piece, from which they cannot be told apart.
    """
    if sums.pieces < 2:
        raise UsageError(f"pieces is {sums.pieces}: {_ONE_PIECE}")
    (noise, square), *_ = _moments(np.array([[sums.pieces, sums.samples, sums.of_pieces, sums.of_mean]])).tolist()
    return noise, square


def _moments(table: Floats) -> Floats:
    """[steps, 4], the fields of `Sums`, with two pieces or more -> [steps, 2], tr Σ and |G|²."""
    n, samples, of_pieces, of_mean = table.T
    found: Floats = np.stack([samples * (of_pieces - of_mean), n * of_mean - of_pieces], axis=1) / (n - 1)[:, None]
    return found


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A gradient noise scale, as means over steps say it is."""

    noise: float
    """tr Σ, unbiased: the variance of one sample's gradient, summed over parameters. NaN: not identifiable."""
    square: float
    """|G|², unbiased. NaN: not identifiable."""
    scale: float
    """B_simple = tr Σ / |G|², in samples; 0 or more. NaN: not identifiable; infinite: |G|² came out as 0 or less."""
    low: float
    """Lower end of the interval of `scale`; 0 where nothing is known."""
    high: float
    """Upper end; infinite where |G|² cannot be told from 0."""
    confidence: float
    """Of the interval."""
    steps: int
    """That were used: measured, and with two pieces or more."""
    samples: float
    """In the mean such step."""
    doubt: str
    """Why the scale is not identifiable, or its interval has no end, and what helps; empty where all is well."""

    @property
    def identified(self) -> bool:
        """Whether the interval has an end."""
        return math.isfinite(self.high)

    def __str__(self) -> str:
        if not self.steps:
            return f"gradient noise scale not identifiable: {self.doubt}"
        interval = f"{self.confidence:.0%}: {self.low:.4g} to {self.high:.4g}" if self.identified else self.doubt
        at_least = "" if self.identified else f"at least {self.low:.4g}, perhaps "
        return (
            f"gradient noise scale {at_least}{self.scale:.4g} samples ({interval}), from {self.steps} steps of "
            f"{self.samples:.4g} samples"
        )


def estimate(steps: Sequence[Sums], *, confidence: float = 0.95, population: float | None = None) -> Estimate:
    """The noise scale over some steps, as ratio of means, with Fieller's interval for a ratio.

    The interval takes the spread over steps as it is. Where the scale itself drifts in the meantime, that is part of
    the spread, and the interval is too wide rather than too narrow.

    Args:
        steps: those with one piece are left out.
        confidence: probability that the interval holds the ratio of the true means.
        population: samples of the training set, if G is to be their mean gradient. None: G is that of the source which
            they were drawn from. Where batches are drawn without repetition, as from a `Loader`, S1 and S2 tell of the
            source: |G|² of the training set is larger by tr Σ / population. It matters late in a training, when
            B_simple comes near the number of samples.

    Raises:
        UsageError: a confidence that is not between 0 and 1.
    """
    rows = [(sums.pieces, sums.samples, sums.of_pieces, sums.of_mean) for sums in steps]
    return estimate_table(np.array(rows).reshape(-1, 4), confidence=confidence, population=population)


def estimate_table(table: Floats, *, confidence: float = 0.95, population: float | None = None) -> Estimate:
    """`estimate`, of a table [steps, 4] of the fields of `Sums`."""
    check_confidence(confidence)
    if population is not None and not population > 0:
        raise UsageError(f"population is {population}: samples of the training set, above 0")
    used = table[table[:, 0] > 1]
    if not len(used):
        doubt = _ONE_PIECE if len(table) else _NO_STEP
        unknown = {"noise": math.nan, "square": math.nan, "scale": math.nan}
        return Estimate(
            **unknown, low=0.0, high=math.inf, confidence=confidence, steps=0, samples=math.nan, doubt=doubt
        )
    found = _moments(used)
    if population is not None:
        found[:, 1] += found[:, 0] / population
    weights = used[:, 0] - 1
    noise, square = (weights @ found / weights.sum()).tolist()
    low, high = _interval(found, weights, confidence)
    doubt = ""
    if len(used) == 1:
        doubt = "one step was measured, and the spread over steps is not known: measure more"
    elif math.isinf(high):
        doubt = "the gradient cannot be told from noise: measure more steps, or with a larger batch"
    return Estimate(
        noise=noise,
        square=square,
        scale=max(noise, 0.0) / square if square > 0 else math.inf,
        low=low,
        high=high,
        confidence=confidence,
        steps=len(used),
        samples=float(used[:, 1].mean()),
        doubt=doubt,
    )


_ONE_PIECE = (
    "a step had one sample of the gradient, whose noise cannot be told from it: use more workers, or micro-batches "
    "smaller than a worker's share"
)


_NO_STEP = (
    "no step was measured yet: a Replica has to observe it, with this model, and to be the one that calls backward"
)


def check_confidence(confidence: float) -> None:
    """
    Raises:
        UsageError: it is no probability.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}: a probability between 0 and 1, such as 0.95")


def _interval(found: Floats, weights: Floats, confidence: float) -> tuple[float, float]:
    """Fieller's interval for the ratio of two weighted means, cut at 0 from below.

    It is where (a - R d)² ≤ q² var(a - R d), with q Student's quantile: an interval, or, if d is not told from 0, all
    above a bound.

    Args:
        found: [steps, 2], numerators and denominators.
        weights: [steps].
    """
    if len(found) < 2:
        return 0.0, math.inf
    from scipy import special  # takes half a second

    shares = weights / weights.sum()
    a, d = (shares @ found).tolist()
    off = (shares / np.sqrt(1 - shares))[:, None] * (found - (a, d))  # a step pulls the mean towards itself
    (aa, ad), (_, dd) = (off.T @ off).tolist()
    freedom = 1 / float(shares @ shares) - 1  # the steps less one, where all weigh the same
    q = float(special.stdtrit(freedom, (1 + confidence) / 2))
    square, half, rest = d * d - q * q * dd, a * d - q * q * ad, a * a - q * q * aa  # square R² - 2 half R + rest ≤ 0
    inside = half * half - square * rest
    if square > 0 and d > 0:
        root = math.sqrt(max(inside, 0.0))
        return max(0.0, (half - root) / square), max(0.0, (half + root) / square)
    if square >= 0 or inside <= 0 or rest <= 0:
        return 0.0, math.inf  # a gradient that is told from 0, below it, is none; and 0 is as good as any other scale
    # Both roots are outside of the set's gap; with rest > 0 they have different signs, and the upper one is the bound.
    return (half - math.sqrt(inside)) / square, math.inf
