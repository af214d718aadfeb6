"""The gradient noise scale from squared norms: no bias, and an interval that holds the truth as often as said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.largebatch.noise_estimate import Estimate, Sums, estimate, moments

DIMENSIONS = 50


def sums_of(pieces: np.ndarray, sizes: Sequence[int]) -> Sums:
    """What a step tells whose pieces have these sizes and mean gradients [pieces, d]."""
    weights = np.array(sizes) / sum(sizes)
    mean = weights @ pieces
    own = float(weights @ np.square(pieces).sum(1))
    return Sums(pieces=len(sizes), samples=sum(sizes), of_pieces=own, of_mean=float(mean @ mean))


def cut_up(gradients: np.ndarray, sizes: Sequence[int]) -> Sums:
    """The same, of samples' gradients [samples, d] that are cut into pieces of those sizes."""
    parts = np.split(gradients, np.cumsum(sizes)[:-1])
    assert [len(part) for part in parts] == list(sizes)
    return sums_of(np.array([part.mean(0) for part in parts]), sizes)


def truth(population: np.ndarray, *, ddof: int) -> tuple[float, float]:
    """(tr Σ, |G|²)."""
    mean = population.mean(0)
    return float(population.var(0, ddof=ddof).sum()), float(mean @ mean)


# --- no bias: the mean over all draws there are is the truth


POPULATION = np.random.default_rng(0).normal(0.3, 1.0, (5, 3))
CUTS = [(2, 2), (1, 3), (1, 1, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize("sizes", CUTS)
def test_no_bias_for_any_cut_with_repetition(sizes):
    draws = list(itertools.product(range(5), repeat=4))
    found = np.mean([moments(cut_up(POPULATION[list(draw)], sizes)) for draw in draws], axis=0)
    assert np.allclose(found, truth(POPULATION, ddof=0), rtol=1e-12)


@pytest.mark.parametrize("sizes", CUTS)
def test_without_repetition_it_is_the_source_or_with_population_the_set(sizes):
    steps = [cut_up(POPULATION[list(draw)], sizes) for draw in itertools.permutations(range(5), 4)]
    noise, square = truth(POPULATION, ddof=1)
    assert np.allclose(np.mean([moments(s) for s in steps], axis=0), (noise, square - noise / 5), rtol=1e-12)
    of_set = estimate(steps, population=5)
    assert np.allclose((of_set.noise, of_set.square, of_set.scale), (noise, square, noise / square), rtol=1e-12)


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 100), st.floats(0.01, 100))
def test_two_workers_are_the_two_batch_sizes_of_mccandlish(small, more, of_small, of_big):
    """With pieces of one size: |G|² = (B |G_B|² - b |G_b|²) / (B - b), tr Σ = (|G_b|² - |G_B|²) / (1/b - 1/B)."""
    b, big = small, small * (more + 1)
    noise, square = moments(Sums(pieces=more + 1, samples=big, of_pieces=of_small, of_mean=of_big))
    assert math.isclose(square, (big * of_big - b * of_small) / (big - b), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(noise, (of_small - of_big) / (1 / b - 1 / big), rel_tol=1e-9, abs_tol=1e-9)


# --- Gaussian gradients


class Gaussian:
    """Steps of made-up gradients with a known noise scale of about 9, as a fixed seed draws them."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.mean = np.random.default_rng(1).normal(0, 0.34, DIMENSIONS)
        self.deviations = np.random.default_rng(2).uniform(0.5, 1.5, DIMENSIONS)

    def step(self, sizes: Sequence[int]) -> Sums:
        noise = self.random.normal(size=(len(sizes), DIMENSIONS)) * self.deviations
        return sums_of(self.mean + noise / np.sqrt(sizes)[:, None], sizes)

    @property
    def noise(self) -> float:
        return float(np.square(self.deviations).sum())

    @property
    def square(self) -> float:
        return float(self.mean @ self.mean)

    @property
    def scale(self) -> float:
        return self.noise / self.square


@pytest.mark.parametrize("sizes", [[8] * 8, [3, 5, 8, 8, 8, 8, 12, 12]])
def test_within_two_percent_of_the_truth_where_the_naive_ratio_is_not(sizes):
    source = Gaussian(seed=7)
    steps = [source.step(sizes) for _ in range(3000)]
    found = estimate(steps)
    assert math.isclose(found.noise, source.noise, rel_tol=0.02)
    assert math.isclose(found.square, source.square, rel_tol=0.02)
    assert math.isclose(found.scale, source.scale, rel_tol=0.02)
    assert found.low < source.scale < found.high
    assert found.high - found.low < 0.04 * found.scale
    naive = found.noise / np.mean([s.of_mean for s in steps])
    assert naive < 0.92 * source.scale


def test_the_mean_of_ratios_would_be_off():
    source = Gaussian(seed=8)
    pairs = np.array([moments(source.step([2] * 4)) for _ in range(3000)])
    positive = pairs[pairs[:, 1] > 0]
    assert abs(np.mean(positive[:, 0] / positive[:, 1]) / source.scale - 1) > 0.2


CHANGING = [[8] * 4, [4, 9], [16] * 4, [5] * 12, [1, 30, 7]]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("sizes", [lambda _: [8] * 4, lambda k: CHANGING[k % len(CHANGING)]], ids=["same", "changing"])
def test_the_interval_holds_the_truth_as_often_as_said(sizes: Callable[[int], list[int]], confidence):
    source = Gaussian(seed=9)
    repetitions = 1200
    held = 0
    for _ in range(repetitions):
        found = estimate([source.step(sizes(k)) for k in range(20)], confidence=confidence)
        held += found.low <= source.scale <= found.high
    error = math.sqrt(confidence * (1 - confidence) / repetitions)
    assert abs(held / repetitions - confidence) < 3 * error + 0.012


def test_a_drift_makes_the_interval_wider_and_not_wrong():
    steps = []
    source = Gaussian(seed=10)
    for k in range(100):
        source.deviations = np.full(DIMENSIONS, 0.5 + k / 100)
        steps.append(source.step([8] * 4))
    noise = np.mean([DIMENSIONS * (0.5 + k / 100) ** 2 for k in range(100)])
    found = estimate(steps)
    assert found.low < noise / source.square < found.high


# --- what cannot be known


def test_one_piece_is_not_identifiable_and_says_what_helps():
    one = Gaussian(seed=1).step([8])
    with pytest.raises(UsageError, match="more workers, or micro-batches"):
        moments(one)
    found = estimate([one] * 5)
    assert math.isnan(found.scale)
    assert (found.low, found.high, found.steps, found.identified) == (0, math.inf, 0, False)
    assert "more workers, or micro-batches" in str(found)


def test_steps_of_one_piece_among_others_are_left_out():
    source = Gaussian(seed=1)
    several, single = [source.step([8] * 4) for _ in range(5)], source.step([64])
    assert estimate([*several, single]) == estimate(several)


def test_nothing_measured():
    assert "no step was measured" in str(estimate([]))


def test_one_step_has_a_value_and_no_interval():
    found = estimate([Gaussian(seed=1).step([64] * 8)])
    assert 0 < found.scale < math.inf
    assert (found.low, found.high) == (0, math.inf)
    assert "one step" in found.doubt


def test_a_gradient_that_cannot_be_told_from_noise_leaves_a_lower_bound():
    """B_simple is 400, batches are of 8: its lower end is still right, and mostly above 0."""
    source = Gaussian(seed=3)
    source.mean = source.mean / source.mean.std() / math.sqrt(400)
    scale = source.scale
    found = [estimate([source.step([2] * 4) for _ in range(20)]) for _ in range(200)]
    open_ended = [f for f in found if not f.identified]
    assert len(open_ended) > 100
    assert all("cannot be told from noise" in str(f) for f in open_ended)
    assert sum(f.low > 0 for f in open_ended) > 0.9 * len(open_ended)
    assert sum(f.low <= scale for f in found) > 0.93 * len(found)


def test_no_noise_at_all_is_a_scale_of_zero():
    steps = [Sums(pieces=4, samples=32, of_pieces=2.0 + k, of_mean=2.0 + k) for k in range(5)]
    found = estimate(steps)
    assert (found.scale, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(UsageError, match="confidence"):
        estimate([], confidence=confidence)


def test_it_reads_as_a_sentence():
    found = Estimate(
        noise=90.0,
        square=0.1,
        scale=900.0,
        low=700.0,
        high=1234.5,
        confidence=0.95,
        steps=20,
        samples=64.0,
        doubt="",
    )
    assert str(found) == "gradient noise scale 900 samples (95%: 700 to 1234), from 20 steps of 64 samples"


def test_the_mean_weighs_a_step_by_its_degrees_of_freedom():
    few = Sums(pieces=2, samples=16, of_pieces=2.0, of_mean=1.0)  # tr Σ 16, |G|² 0
    many = Sums(pieces=4, samples=12, of_pieces=2.0, of_mean=1.0)  # tr Σ 4, |G|² 2/3
    found = estimate([few, many])
    assert math.isclose(found.noise, (16 + 3 * 4) / 4)
    assert math.isclose(found.square, 3 * (2 / 3) / 4)
