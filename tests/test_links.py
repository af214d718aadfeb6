"""Links: what messages between processes of this host cost, and how the figures come from the times."""

from __future__ import annotations

import pytest
import torch

from dtrain.links import LINKS, SIZES_BYTES, link_of, measure_link
from dtrain.measure.hardware import SMALL_BYTES


def rows(seconds_of: object, workers: int = 2) -> list[dict[str, object]]:
    times = {n: [seconds_of(n)] * 5 for n in SIZES_BYTES}  # type: ignore[operator]
    early = {n: [t / 2 for t in column] for n, column in times.items()}
    return [{"times": early if r else times, "core_s_per_byte": 4e-9} for r in range(workers)]


def test_a_ring_has_2_latencies_and_moves_the_tensor_twice():
    link = link_of("allreduce", rows(lambda n: 2 * 50e-6 + 2 * n / 1e9))
    assert (link.alpha_s, link.bytes_per_s) == pytest.approx((50e-6, 1e9), rel=1e-3)
    assert link.core_s_per_byte == pytest.approx(2e-9)
    assert link.shared


@pytest.mark.parametrize("name", ["ps", "allreduce"])
def test_links_are_measured_with_halves(name: str):
    assert measure_link(name, 0.1, dtype=torch.bfloat16).bytes_per_s > 0


def test_servers_take_the_tensor_from_each_and_give_it_back():
    link = link_of("ps", rows(lambda n: 20e-6 if n < SMALL_BYTES else 2 * 100e-6 + 4 * n / 8e9))
    assert (link.alpha_s, link.bytes_per_s) == pytest.approx((100e-6, 8e9), rel=1e-3)
    assert link.small_alpha_s == pytest.approx(10e-6)


@pytest.mark.parametrize("name", LINKS)
def test_links_are_measured_by_processes_of_this_host(name: str):
    link = measure_link(name, 0.1)
    assert link.bytes_per_s > 0
    assert link.small_alpha_s is not None
    assert link.small_alpha_s > 0
    assert link.shared
