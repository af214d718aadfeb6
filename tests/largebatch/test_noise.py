"""The noise scale of SGD, and what keeps it."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.largebatch.noise import SGDNoise, what_keeps_it

FIELDS = ("lr", "batch", "num_samples", "momentum")
SETTING = SGDNoise(lr=0.1, batch=128, num_samples=50_000, momentum=0.9)


def test_the_scale_is_that_of_smith_and_le():
    assert math.isclose(SETTING.scale, 0.1 / 0.1 * (50_000 / 128 - 1), rel_tol=1e-14)
    assert SGDNoise(lr=0.1, batch=32, num_samples=32).scale == 0


@given(
    lr=st.floats(1e-4, 10),
    batch=st.integers(1, 1000),
    rest=st.integers(1, 10**6),
    momentum=st.floats(0, 0.99),
    free=st.sampled_from(FIELDS),
    changed=st.sampled_from(FIELDS),
    factor=st.floats(0.3, 3),
)
def test_what_is_found_keeps_it(lr, batch, rest, momentum, free, changed, factor):
    assume(free != changed)
    setting = SGDNoise(lr=lr, batch=batch, num_samples=batch + rest, momentum=momentum)
    value = getattr(setting, changed) * factor if changed != "momentum" else 1 - (1 - momentum) / (1 + factor)
    try:
        kept = setting.keep(free, **{changed: value})
    except UsageError:
        # There is none: a batch outside 1 to N, or a negative momentum.
        assert changed in ("batch", "num_samples") or free in ("batch", "momentum")
        return
    assert getattr(kept, changed) == value
    assert math.isclose(kept.scale, setting.scale, rel_tol=1e-6)


def test_linear_scaling_is_what_keeps_it_where_batches_are_small():
    small = SGDNoise(lr=0.1, batch=32, num_samples=10**9)
    assert math.isclose(small.keep("lr", batch=320).lr, 1.0, rel_tol=1e-6)
    assert math.isclose(small.keep("lr", momentum=0.9).lr, 0.01, rel_tol=1e-6)
    assert math.isclose(SETTING.keep("lr", batch=1024).lr, 0.1 * (50_000 / 128 - 1) / (50_000 / 1024 - 1))


@pytest.mark.parametrize(
    ("free", "changed", "said"),
    [
        ("rate", {"batch": 2}, "name one of lr, batch"),
        ("lr", {"lr": 2}, "name one of lr, batch"),
        ("lr", {"batch": 50_000}, "no lr gives the noise scale 389.6"),
        ("momentum", {"lr": 2.0}, "no momentum keeps the noise scale 389.6.*it would be -1$"),
        ("lr", {"momentum": 1.0}, "momentum is 1.0"),
        ("lr", {"batch": 60_000}, "batch is 60000"),
    ],
)
def test_what_cannot_be_kept_is_said(free, changed, said):
    with pytest.raises(UsageError, match=said):
        SETTING.keep(free, **changed)


def test_without_noise_there_is_nothing_to_keep():
    with pytest.raises(UsageError, match="without noise"):
        SGDNoise(lr=0.1, batch=32, num_samples=32).keep("lr", batch=16)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"lr": math.nan}, {"batch": 0}, {"momentum": -0.1}])
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SGDNoise(**{"lr": 0.1, "batch": 8, "num_samples": 100} | wrong)


def test_what_keeps_it_is_printed():
    assert what_keeps_it(SETTING).splitlines() == [
        "SGD noise scale 389.6 = lr 0.1 / (1 - momentum 0.9) x (samples 50000 / batch 128 - 1).",
        "  lr 0.2: kept by batch 255.3, or num_samples 25064, or momentum 0.8",
        "  batch 256: kept by lr 0.2005, or num_samples 100000, or momentum 0.9501",
        "  num_samples 100000: kept by lr 0.04994, or batch 256, or momentum 0.7997",
        "  momentum 0.95: kept by lr 0.05, or batch 255.3, or num_samples 25064",
    ]
    plain = what_keeps_it(SGDNoise(lr=0.1, batch=10, num_samples=100))
    assert "lr 0.2: kept by batch 18.18, or num_samples 55\n" in plain
    assert "momentum" not in plain.splitlines()[1]  # it would have to be negative
