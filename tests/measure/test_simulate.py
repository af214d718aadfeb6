"""The player of jobs: order, sharing, latencies, and what it refuses. The expected times are worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.measure.simulate import Job, play

LINK = {"link": 10.0, "core": 1.0}


def job(name: str, amount: float = 10.0, **more: object) -> Job:
    return Job(name=name, uses={"link": amount}, **{"lane": name, **more})  # type: ignore[arg-type]


def test_one_job_takes_its_amount_over_the_capacity():
    one = job("a", 25.0)
    assert play([one], LINK) == pytest.approx(2.5)
    assert (one.start_s, one.end_s) == pytest.approx((0.0, 2.5))


def test_jobs_of_a_lane_follow_each_other():
    a, b = job("a", lane="x"), job("b", lane="x")
    assert play([a, b], LINK) == pytest.approx(2.0)
    assert b.start_s == pytest.approx(a.end_s)


def test_jobs_that_share_a_resource_are_slowed_down_alike_and_nothing_is_lost():
    a, b = job("a", 10.0), job("b", 30.0)
    # Each has half of the link until the first is done at 2 s; the second then has 20 of 30 left, at full rate.
    assert play([a, b], LINK) == pytest.approx(4.0)
    assert a.end_s == pytest.approx(2.0)


def test_a_job_that_is_bound_elsewhere_leaves_the_rest_of_a_link_to_others():
    slow = Job(name="slow", lane="slow", uses={"link": 10.0, "core": 4.0})  # 4 s alone: a quarter of the link
    fast = job("fast", 15.0)  # 1.5 s alone
    assert play([slow, fast], LINK) >= 4.0
    # At equal shares both get 1/1.25 of their speed, until the fast one is done at 1.5 * 1.25.
    assert fast.end_s == pytest.approx(1.875)
    assert slow.end_s == pytest.approx(1.875 + (4.0 - 1.5))


def test_a_latency_uses_nothing():
    a = job("a")
    b = job("b", after=(a,), delay_s=3.0)
    c = job("c", 20.0, after=(a,))
    assert play([a, b, c], LINK) == pytest.approx(5.0)
    assert (b.start_s, c.end_s) == pytest.approx((4.0, 3.0))


def test_the_first_of_a_lane_holds_up_those_behind_it():
    a, first, behind = job("a"), job("first", lane="x", delay_s=5.0), job("behind", lane="x")
    play([a, first, behind], LINK)
    assert behind.start_s == pytest.approx(6.0)


def test_jobs_without_an_amount_end_where_they_start():
    a = Job(name="a", lane="a")
    b = Job(name="b", lane="b", after=(a,), delay_s=2.0)
    assert play([a, b], {}) == pytest.approx(2.0)


def test_jobs_that_wait_for_each_other_are_refused():
    a, b = job("a"), job("b")
    a.after, b.after = (b,), (a,)
    with pytest.raises(ValueError, match="wait for each other"):
        play([a, b], LINK)
    with pytest.raises(ValueError, match="wait for each other"):
        play([job("c", after=(job("elsewhere"),))], LINK)


AMOUNTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(AMOUNTS, st.integers(1, 4))
def test_a_busy_link_is_never_idle(amounts: list[float], lanes: int):
    jobs = [job(str(i), amount, lane=str(i % lanes)) for i, amount in enumerate(amounts)]
    assert play(jobs, LINK) == pytest.approx(sum(amounts) / 10.0, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(AMOUNTS, st.floats(1.0, 5.0))
def test_more_capacity_never_takes_longer(amounts: list[float], factor: float):
    def jobs() -> list[Job]:
        chain: list[Job] = []
        for i, amount in enumerate(amounts):
            uses = {"link": amount, "core": amount / 30}
            chain.append(Job(name=str(i), lane=str(i % 3), uses=uses, after=tuple(chain[-2:-1])))
        return chain

    assert play(jobs(), {name: factor * much for name, much in LINK.items()}) <= play(jobs(), LINK) * (1 + 1e-9)
