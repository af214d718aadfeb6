"""The critical batch: steps against samples, gain, and the fit to runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.largebatch.critical import (
    TradeOff,
    adascale_gain,
    fit,
    optimal_lr,
    sample_efficiency,
    step_efficiency,
    temperature,
)

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1400]
sizes = st.floats(1e-2, 1e6)


@given(sizes, sizes, sizes)
def test_steps_and_samples_lie_on_the_hyperbola(steps_min, critical, batch):
    curve = TradeOff(steps_min=steps_min, critical_batch=critical)
    steps, samples = curve.steps(batch), curve.samples(batch)
    assert math.isclose(samples, batch * steps, rel_tol=1e-9)
    product = (critical / batch) * (batch / critical)
    assert math.isclose((steps / steps_min - critical / batch) * product, 1, rel_tol=1e-6)
    if 1e-3 < critical / batch < 1e3:
        assert math.isclose((steps / steps_min - 1) * (samples / curve.samples_min - 1), 1, rel_tol=1e-6)


def test_at_the_critical_batch_both_are_twice_their_least():
    curve = TradeOff(steps_min=100, critical_batch=64)
    assert (curve.steps(64), curve.samples(64), curve.samples_min) == (200, 12800, 6400)


@given(sizes, sizes)
def test_efficiencies_add_up_to_one(batch, noise):
    assert math.isclose(step_efficiency(batch, noise) + sample_efficiency(batch, noise), 1, rel_tol=1e-9)


def test_the_best_rate_is_linear_in_a_small_batch_and_has_a_limit():
    assert math.isclose(optimal_lr(1, 1000, lr_max=2.0) * 10, optimal_lr(10, 1000, lr_max=2.0), rel_tol=0.01)
    assert math.isclose(optimal_lr(10**9, 1000, lr_max=2.0), 2.0, rel_tol=1e-5)
    assert math.isclose(temperature(0.5, 1000, 1000, lr_max=2.0), 0.5)


@given(st.floats(1, 1000), sizes, sizes)
def test_the_gain_is_that_of_adascale(scale, noise, base):
    variance, square = noise / base, 1.0  # of a base batch, in units of |G|²
    gain = adascale_gain(scale, noise, base_batch=base)
    assert math.isclose(gain, (variance + square) / (variance / scale + square), rel_tol=1e-9)
    assert 1 - 1e-12 <= gain <= scale * (1 + 1e-12)
    # It is the ratio of what a step brings.
    assert math.isclose(gain, step_efficiency(base * scale, noise) / step_efficiency(base, noise), rel_tol=1e-9)


def test_the_gain_without_noise_and_without_anything_else():
    assert adascale_gain(8, 0, base_batch=32) == 1
    assert adascale_gain(8, math.inf, base_batch=32) == 8


@settings(deadline=None, max_examples=30)  # the first one imports SciPy
@given(st.floats(10, 1e5), st.floats(4, 400))
def test_the_fit_finds_the_curve_that_points_were_taken_from(steps_min, critical):
    curve = TradeOff(steps_min=steps_min, critical_batch=critical)
    found = fit(BATCHES, [curve.steps(b) for b in BATCHES])
    assert math.isclose(found.steps_min, steps_min, rel_tol=1e-6)
    assert math.isclose(found.critical_batch, critical, rel_tol=1e-6)
    assert found.residual < 1e-6


def test_its_interval_holds_the_truth_as_often_as_said():
    curve = TradeOff(steps_min=30, critical_batch=40)
    random = np.random.default_rng(6)
    held = 0
    for _ in range(400):
        steps = [curve.steps(b) * math.exp(random.normal(0, 0.1)) for b in BATCHES]
        found = fit(BATCHES, steps)
        held += found.low <= 40 <= found.high
        assert 0.01 < found.residual < 0.25
    assert 0.92 < held / 400 < 0.98


def test_the_fit_to_measured_runs():
    """Steps to a loss of 0.15 on the digits, best of 7 rates."""
    steps = [1035, 550, 270, 145, 100, 60, 45, 35, 30, 30, 25]
    found = fit(BATCHES, steps)
    assert math.isclose(found.steps_min, 26.6, abs_tol=0.1)
    assert math.isclose(found.critical_batch, 38.6, abs_tol=0.1)
    assert found.low < found.critical_batch < found.high


def test_batches_on_one_side_leave_the_critical_one_open():
    curve = TradeOff(steps_min=30, critical_batch=1e5)
    noisy = [curve.steps(b) * f for b, f in zip([1, 2, 4, 8], [1.02, 0.97, 1.03, 0.98], strict=True)]
    found = fit([1, 2, 4, 8], noisy)
    assert found.high > 100 * found.low


def test_two_runs_have_a_curve_and_no_interval():
    found = fit([8, 64], [150.0, 45.0])
    assert math.isclose(TradeOff.steps(found, 8), 150, rel_tol=1e-6)
    assert (found.low, found.high) == (0, math.inf)


@pytest.mark.parametrize(
    ("batches", "steps"),
    [([8], [100]), ([8, 8], [100, 90]), ([8, 16], [100]), ([8, 16], [0, 1]), ([8, 16], [9, math.inf])],
)
def test_pairs_that_say_nothing_are_refused(batches, steps):
    with pytest.raises(UsageError, match="batches"):
        fit(batches, steps)


def test_a_batch_has_samples():
    for call in (step_efficiency, sample_efficiency):
        with pytest.raises(UsageError, match="batch is 0"):
            call(0, 10)
    with pytest.raises(UsageError, match="scale is 0"):
        adascale_gain(0, 10, base_batch=8)


def test_a_noise_scale_is_no_less_than_0_and_a_confidence_a_probability():
    for call in (
        lambda: step_efficiency(8, -1),
        lambda: sample_efficiency(8, -1),
        lambda: adascale_gain(2, -1, base_batch=8),
    ):
        with pytest.raises(UsageError, match="noise_scale is -1"):
            call()
    assert math.isnan(step_efficiency(8, math.nan))
    with pytest.raises(UsageError, match="confidence is 95"):
        fit([8, 16, 32], [90, 60, 50], confidence=95)
