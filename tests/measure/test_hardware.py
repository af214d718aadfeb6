"""Links: rates in words, links by name, and a line through measured times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.measure.hardware import HARDWARE, Link, fit, named, parse_rate
from dtrain.measure.hardware import given as given_link


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("200mbit", 25e6),
        ("10gbit", 1.25e9),
        ("10 Gbit/s", 1.25e9),
        ("10Gbps", 0.0),  # bit or byte? refused
        ("1.5GB", 1.5e9),
        ("2MiB/s", 2 * 2**20),
        ("300B", 300.0),
        ("fast", 0.0),
        ("0gbit", 0.0),
        ("1.2.3gbit", 0.0),
        ("-5mbit", 0.0),
    ],
)
def test_rates(text: str, bytes_per_s: float):
    if bytes_per_s:
        assert parse_rate(text) == pytest.approx(bytes_per_s)
    else:
        with pytest.raises(UsageError, match="200mbit, 10gbit"):
            parse_rate(text)


def test_links_by_name_are_ordered_and_say_where_they_are_from():
    rates = [named(name).bytes_per_s for name in ("1gbit", "10gbit", "25gbit", "100gbit", "nvlink")]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(1.25e9 * 0.9415, rel=1e-3)  # TCP in full frames
    assert all(link.source for link in HARDWARE.values())
    with pytest.raises(UsageError, match="infiniband: it is one of 1gbit"):
        named("infiniband")


def test_a_given_rate_or_latency_goes_before_that_of_the_hardware():
    assert given_link(None, None, None) is None
    link = given_link(named("10gbit"), "200mbit", 500.0)
    assert link is not None
    assert (link.bytes_per_s, link.alpha_s) == pytest.approx((25e6, 500e-6))
    kept = given_link(named("10gbit"), None, 5.0)
    assert kept is not None
    assert kept.bytes_per_s == named("10gbit").bytes_per_s
    with pytest.raises(UsageError, match="latency-us -1"):
        given_link(None, None, -1.0)


def test_links_that_cannot_be():
    for wrong in ({"alpha_s": -1.0, "bytes_per_s": 1.0}, {"alpha_s": 0.0, "bytes_per_s": 0.0}):
        with pytest.raises(UsageError, match="rate above 0"):
            Link(name="x", **wrong)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-6))
def test_a_line_is_found_again(base_s: float, per_byte_s: float):
    sizes = [2.0**k for k in range(10, 25, 2)]
    times = [[base_s + per_byte_s * n] * 3 for n in sizes]
    found = fit(sizes, times)
    assert found == pytest.approx((base_s, per_byte_s, 0.0), rel=1e-3, abs=1e-9)


def test_neither_part_of_a_line_is_below_zero():
    base_s, per_byte_s, misfit = fit([1.0, 2.0, 4.0], [[1.0], [3.0], [9.0]])
    assert base_s == 0.0
    assert per_byte_s > 0
    assert misfit > 0.1
    base_s, per_byte_s, _ = fit([1.0, 2.0, 4.0], [[9.0], [5.0], [4.0]])
    assert per_byte_s == 0.0
    assert base_s == 5.0


def test_scatter_is_that_of_the_middle_of_the_times():
    times = [[0.9 + 0.02 * i for i in range(11)] for _ in range(3)]  # 0.9 to 1.1
    *_, scatter = fit([1.0, 2.0, 3.0], times)
    assert scatter == pytest.approx(0.08)
