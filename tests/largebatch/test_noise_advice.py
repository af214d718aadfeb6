"""Advice from a measured noise scale, and the rule that follows it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.largebatch.advice import Decision, Rule, advise, decide
from dtrain.largebatch.noise_estimate import Estimate, Sums, estimate


def found(scale: float, low: float | None = None, high: float | None = None) -> Estimate:
    return Estimate(
        noise=scale,
        square=1.0,
        scale=scale,
        low=scale * 0.8 if low is None else low,
        high=scale * 1.25 if high is None else high,
        confidence=0.95,
        steps=50,
        samples=64.0,
        doubt="" if high != math.inf else "the gradient cannot be told from noise",
    )


ONE_PIECE = estimate([Sums(pieces=1, samples=8, of_pieces=1.0, of_mean=1.0)])


def test_a_small_batch_is_told_what_doubling_saves():
    advice = advise(found(960), 64)
    assert math.isclose(advice.steps_ratio, (1 + 960 / 128) / (1 + 960 / 64))
    assert advice.text == (
        "Batch 64 is small, the noise scale is 960 (95%: 768 to 1.2e+03): twice the batch would take 47 % fewer steps "
        "and 6 % more samples."
    )


def test_a_large_batch_is_told_what_halving_saves():
    advice = advise(found(64), 960)
    assert "Batch 960 is large" in advice.text
    assert "half the batch would take 6 % more steps and 47 % fewer samples" in advice.text


def test_the_critical_batch_is_called_so():
    assert "about the critical one" in advise(found(100), 110).text


def test_without_an_upper_end_it_says_what_is_sure():
    assert "at least 300: a larger batch pays" in advise(found(5000, low=300, high=math.inf), 64).text
    unsure = advise(found(5000, low=30, high=math.inf), 64)
    assert "pays" not in unsure.text
    assert math.isclose(unsure.steps_ratio, 0.75)  # as if the noise scale were the batch
    assert math.isfinite(advise(found(math.inf, low=30, high=math.inf), 64).steps_ratio)


def test_no_advice_from_one_piece():
    advice = advise(ONE_PIECE, 64)
    assert math.isnan(advice.steps_ratio)
    assert "more workers, or micro-batches" in advice.text


# --- the rule


@pytest.mark.parametrize(
    ("estimate", "batch", "rule", "decision"),
    [
        (found(960), 64, Rule(), Decision(batch=960, reason="batch 64 becomes 960: 1 x noise scale 960 is 960")),
        (
            found(960),
            64,
            Rule(ratio=0.5, largest=400, multiple_of=32),
            Decision(
                batch=384,
                reason="batch 64 becomes 384: 0.5 x noise scale 960 is 480, in bounds and multiples 384",
            ),
        ),
        (
            found(90),
            64,
            Rule(),
            Decision(batch=64, reason="batch stays 64: 1 x noise scale 90 is 90, less than a factor of 1.5 away"),
        ),
        (
            found(10),
            64,
            Rule(),
            Decision(batch=64, reason="batch stays 64: 1 x noise scale 10 is 10, and it does not shrink"),
        ),
        (
            found(10),
            64,
            Rule(shrinks=True, smallest=16),
            Decision(batch=16, reason="batch 64 becomes 16: 1 x noise scale 10 is 10, in bounds and multiples 16"),
        ),
        (
            found(5000, low=300, high=math.inf),
            64,
            Rule(),
            Decision(batch=300, reason="batch 64 becomes 300: 1 x noise scale at least 300 is 300"),
        ),
        (
            found(math.inf, low=0, high=math.inf),
            64,
            Rule(shrinks=True),
            Decision(
                batch=64,
                reason="batch stays 64: 1 x noise scale at least 0 is 0, in bounds and multiples 1, and it does not "
                "shrink",
            ),
        ),
    ],
)
def test_the_rule_decides_and_says_why(estimate, batch, rule, decision):
    assert decide(estimate, batch, rule) == decision


def test_what_is_not_identifiable_changes_nothing():
    decision = decide(ONE_PIECE, 64, Rule(shrinks=True))
    assert decision.batch == 64
    assert "more workers" in decision.reason


@given(
    scale=st.floats(0, 1e9),
    batch=st.integers(1, 10**6),
    ratio=st.floats(0.01, 100),
    unit=st.integers(1, 64),
    bounds=st.tuples(st.integers(1, 1000), st.integers(64, 10**5)),
    jump=st.floats(1, 4),
    shrinks=st.booleans(),
)
def test_the_rule_keeps_its_bounds(scale, batch, ratio, unit, bounds, jump, shrinks):
    smallest, more = bounds
    rule = Rule(ratio=ratio, smallest=smallest, largest=smallest + more, multiple_of=unit, jump=jump, shrinks=shrinks)
    after = decide(found(scale), batch, rule)
    if after.batch != batch:
        assert smallest <= after.batch <= smallest + more
        assert after.batch % unit == 0
        assert max(after.batch, batch) >= jump * min(after.batch, batch)
        assert shrinks or after.batch > batch
        assert decide(found(scale), after.batch, rule).batch == after.batch or jump == 1  # it stays there


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 0},
        {"largest": 0},
        {"jump": 0.9},
        {"smallest": 0},
        {"largest": 3, "smallest": 4},
        {"largest": 7, "multiple_of": 8},
    ],
)
def test_rules_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)) if len(wrong) == 1 else "no multiple"):
        Rule(**wrong)
