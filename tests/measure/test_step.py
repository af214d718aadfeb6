"""A simulated step: closed forms in the limits, more of everything never slower, and a budget that adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.measure.step import (
    Boxes,
    Bucket,
    NormMessage,
    Place,
    Wiring,
    Work,
    apart_s,
    beside_s,
    boxes,
    ring_s,
    slowest_arrival,
)

SIZES = st.floats(1e3, 1e8)
RATES = st.floats(1e6, 1e11)
WORKERS = st.integers(2, 16)
SECONDS = st.floats(1e-4, 1.0)

PARTS = 50
"""Of a bucket, where the limit of small parts is meant; it is off by one part in so many."""


def only(nbytes: float) -> Work:
    """One bucket and no computing."""
    return Work(forward_s=0.0, backward_s=0.0, buckets=(Bucket(nbytes=nbytes, ready=1.0),))


def server(nbytes: float, **more: object) -> Wiring:
    return Wiring(backend="ps", part_bytes=int(nbytes / PARTS), **more)  # type: ignore[arg-type]


@st.composite
def works(draw: st.DrawFn) -> Work:
    ready = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=5)))
    norms = draw(st.lists(st.floats(10, 1e4), max_size=3))
    return Work(
        data_s=draw(SECONDS),
        forward_s=draw(SECONDS),
        backward_s=draw(SECONDS),
        optimizer_s=draw(SECONDS),
        rest_s=draw(SECONDS),
        micro_batches=draw(st.integers(1, 3)),
        buckets=tuple(Bucket(nbytes=draw(SIZES), ready=at) for at in ready),
        norms=tuple(NormMessage(forward_bytes=n, backward_bytes=n) for n in norms),
    )


@st.composite
def wirings(draw: st.DrawFn) -> Wiring:
    workers = draw(st.integers(1, 8))
    backend = draw(st.sampled_from(["ps", "allreduce"]))
    return Wiring(
        backend=backend,
        workers=workers,
        servers=draw(st.integers(1, workers)),
        place=draw(st.sampled_from(["apart", "beside", "host"])),
        alpha_s=draw(st.floats(0, 1e-2)),
        bytes_per_s=draw(st.floats(1e8, 1e10)),
        core_s_per_byte=draw(st.floats(0, 1e-9)),
        cores=draw(st.integers(1, 8)),
        part_bytes=2**23,
        lateness=draw(st.floats(0, 0.5)),
        sharded=backend == "allreduce" and draw(st.booleans()),
    )


# --- closed forms


@settings(deadline=None, max_examples=60)
@given(SIZES, WORKERS, RATES, st.floats(0, 1e-2))
def test_one_bucket_over_a_ring(nbytes: float, n: int, rate: float, alpha_s: float):
    wiring = Wiring(backend="allreduce", workers=n, alpha_s=alpha_s, bytes_per_s=rate)
    expected_s = ring_s(nbytes, n, alpha_s=alpha_s, bytes_per_s=rate)
    assert boxes(only(nbytes), wiring).step_ms == pytest.approx(expected_s * 1e3, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(SIZES, WORKERS, RATES, st.floats(0, 1e-2), st.sampled_from(["apart", "host"]))
def test_sharded_the_same_bytes_pass_and_an_nth_is_stepped(
    nbytes: float, n: int, rate: float, alpha_s: float, place: Place
):
    work = replace(only(nbytes), optimizer_s=1.0)
    wiring = Wiring(backend="allreduce", workers=n, alpha_s=alpha_s, bytes_per_s=rate, place=place, cores=n)
    whole, sharded = boxes(work, wiring), boxes(work, replace(wiring, sharded=True))
    assert sharded.optimizer_ms == pytest.approx(1e3 / n)
    assert sharded.exposed_comm_ms == pytest.approx(whole.exposed_comm_ms)


def test_sharded_gathers_go_on_beside_the_steps_of_later_buckets():
    buckets = tuple(Bucket(nbytes=1e8, ready=1.0) for _ in range(4))
    work = Work(forward_s=0.0, backward_s=0.0, optimizer_s=0.8, buckets=buckets)
    found = boxes(work, Wiring(backend="allreduce", workers=2, bytes_per_s=1e9, sharded=True))
    # A half takes 0.05 s, a step 0.1: the last sum arrives at 0.2, its step is over at 0.45, and its gather at 0.5.
    assert found.step_ms == pytest.approx(500)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e7, 1e8), WORKERS, st.integers(1, 16), RATES)
def test_one_bucket_over_servers_apart(nbytes: float, n: int, k: int, rate: float):
    expected_ms = apart_s(nbytes, n, k, bytes_per_s=rate) * 1e3
    found_ms = boxes(only(nbytes), server(nbytes, workers=n, servers=k, bytes_per_s=rate)).step_ms
    assert expected_ms * (1 - 1e-6) <= found_ms <= expected_ms * (1 + 2 / PARTS)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e7, 1e8), WORKERS, RATES)
def test_one_bucket_over_a_server_beside_each_worker(nbytes: float, n: int, rate: float):
    expected_ms = beside_s(nbytes, n, bytes_per_s=rate) * 1e3
    found_ms = boxes(only(nbytes), server(nbytes, workers=n, servers=n, bytes_per_s=rate, place="beside")).step_ms
    assert expected_ms * (1 - 1e-6) <= found_ms <= expected_ms * (1 + 2 / PARTS)


@settings(deadline=None, max_examples=60)
@given(SIZES, WORKERS, RATES, st.floats(0, 1e-2))
def test_one_part_goes_up_and_comes_back(nbytes: float, n: int, rate: float, alpha_s: float):
    wiring = Wiring(backend="ps", workers=n, alpha_s=alpha_s, bytes_per_s=rate, part_bytes=2**30)
    expected_s = 2 * n * nbytes / rate + 2 * alpha_s
    assert boxes(only(nbytes), wiring).step_ms == pytest.approx(expected_s * 1e3, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(SIZES, WORKERS, RATES)
def test_on_one_host_all_bytes_go_one_way(nbytes: float, n: int, rate: float):
    ring = Wiring(backend="allreduce", workers=n, bytes_per_s=rate, place="host", cores=n)
    served = server(nbytes, workers=n, bytes_per_s=rate, place="host", cores=n)
    assert boxes(only(nbytes), ring).step_ms == pytest.approx(2 * (n - 1) * nbytes / rate * 1e3, rel=1e-6)
    assert boxes(only(nbytes), served).step_ms == pytest.approx(2 * n * nbytes / rate * 1e3, rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(works(), st.sampled_from(["ps", "allreduce", "solo"]))
def test_one_worker_only_computes(work: Work, backend: str):
    found = boxes(work, Wiring(backend=backend, workers=1, alpha_s=1.0, bytes_per_s=1.0))  # type: ignore[arg-type]
    alone_s = work.data_s + work.micro_batches * (work.forward_s + work.backward_s) + work.optimizer_s + work.rest_s
    assert found.step_ms == pytest.approx(alone_s * 1e3)
    assert found.exposed_comm_ms == pytest.approx(0.0, abs=1e-6)
    assert found.hidden_comm_ms == 0.0


def test_what_is_sent_early_is_hidden_and_what_is_sent_late_is_not():
    wiring = Wiring(backend="allreduce", workers=2, bytes_per_s=1e9)
    work = Work(forward_s=0.1, backward_s=0.2, optimizer_s=0.01, buckets=(Bucket(nbytes=1e8, ready=0.5),))
    found = boxes(work, wiring)  # 0.1 s of transfer, from 0.2 s to 0.3 s
    assert (found.exposed_comm_ms, found.hidden_comm_ms) == pytest.approx((0.0, 100.0), abs=1e-6)
    late = boxes(replace(work, buckets=(Bucket(nbytes=1e8, ready=1.0),)), wiring)
    assert (late.exposed_comm_ms, late.hidden_comm_ms) == pytest.approx((100.0, 0.0), abs=1e-6)
    assert late.step_ms == pytest.approx(410.0)


def test_every_batch_norm_message_blocks():
    work = Work(forward_s=0.1, backward_s=0.2, norms=(NormMessage(forward_bytes=8, backward_bytes=8),) * 3)
    found = boxes(work, Wiring(backend="allreduce", workers=2, alpha_s=0.005))
    assert found.exposed_comm_ms == pytest.approx(6 * 2 * 5.0)


def test_only_the_last_micro_batch_sends():
    work = Work(forward_s=0.1, backward_s=0.2, micro_batches=4, buckets=(Bucket(nbytes=1e8, ready=0.0),))
    found = boxes(work, Wiring(backend="allreduce", workers=2, bytes_per_s=1e9))
    assert found.step_ms == pytest.approx(1200.0)
    assert found.hidden_comm_ms == pytest.approx(100.0)


def test_servers_that_step_share_the_optimizer():
    work = Work(forward_s=0.0, backward_s=0.0, optimizer_s=0.4, buckets=(Bucket(nbytes=1e8, ready=1.0),))
    here = boxes(work, Wiring(backend="ps", workers=2, servers=4))
    there = boxes(work, Wiring(backend="ps", workers=2, servers=4, update_on_servers=True))
    assert here.optimizer_ms == pytest.approx(400.0)
    assert there.optimizer_ms == 0.0
    assert there.step_ms == pytest.approx(100.0, rel=1e-3)


def test_a_late_worker_is_waited_for():
    work = Work(forward_s=0.1, backward_s=0.2, buckets=(Bucket(nbytes=1e8, ready=1.0),))
    found = boxes(work, Wiring(backend="allreduce", workers=2, bytes_per_s=1e9, lateness=0.2))
    assert (found.wait_ms, found.transfer_ms) == pytest.approx((60.0, 100.0))


def test_transfers_take_cores_from_the_model_where_all_are_in_use():
    work = Work(forward_s=0.0, backward_s=1.0, buckets=(Bucket(nbytes=1e8, ready=0.0),))
    wiring = Wiring(backend="allreduce", workers=2, place="host", cores=2.0, core_s_per_byte=2e-9, bytes_per_s=1e9)
    # 2 core-seconds of computing and 0.4 of transfers, on 2 cores.
    assert boxes(work, wiring).step_ms == pytest.approx(1200.0)
    assert boxes(work, replace(wiring, cores=8.0)).step_ms == pytest.approx(1000.0)


# --- laws


def total_ms(found: Boxes) -> float:
    phases = found.data_ms + found.forward_ms + found.backward_ms + found.optimizer_ms + found.rest_ms
    return phases + found.exposed_comm_ms


@settings(deadline=None, max_examples=60)
@given(works(), wirings())
def test_the_boxes_are_the_step(work: Work, wiring: Wiring):
    found = boxes(work, wiring)
    assert total_ms(found) == pytest.approx(found.step_ms)
    assert found.wait_ms + found.transfer_ms == pytest.approx(found.exposed_comm_ms)
    assert min(found.exposed_comm_ms, found.hidden_comm_ms, found.wait_ms, found.transfer_ms) >= 0
    assert found.hidden_comm_ms <= found.step_ms - found.exposed_comm_ms + 1e-6


@settings(deadline=None, max_examples=60)
@given(works(), wirings())
def test_a_step_is_no_shorter_than_its_computing(work: Work, wiring: Wiring):
    own_s = work.optimizer_s / wiring.workers if wiring.sharded else work.optimizer_s
    alone = boxes(replace(work, optimizer_s=own_s), Wiring(backend="solo"))
    assert boxes(work, wiring).step_ms >= alone.step_ms * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(works(), wirings(), st.floats(1.0, 100.0))
def test_a_faster_link_is_never_slower(work: Work, wiring: Wiring, factor: float):
    wiring = replace(wiring, core_s_per_byte=0.0)
    faster = replace(wiring, bytes_per_s=wiring.bytes_per_s * factor)
    assert boxes(work, faster).step_ms <= boxes(work, wiring).step_ms * (1 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(works(), wirings(), st.floats(0, 1e-2))
def test_more_latency_is_never_faster(work: Work, wiring: Wiring, more_s: float):
    wiring = replace(wiring, core_s_per_byte=0.0)
    slower = replace(wiring, alpha_s=wiring.alpha_s + more_s)
    assert boxes(work, slower).step_ms >= boxes(work, wiring).step_ms * (1 - 1e-6)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e7, 1e8), WORKERS, st.integers(1, 8), RATES)
def test_another_server_is_never_slower(nbytes: float, n: int, k: int, rate: float):
    one, more = (server(nbytes, workers=n, servers=s, bytes_per_s=rate) for s in (k, k + 1))
    assert boxes(only(nbytes), more).step_ms <= boxes(only(nbytes), one).step_ms * (1 + 1e-6)


@pytest.mark.parametrize(("nbytes", "ready"), [(-1.0, 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_buckets_that_cannot_be(nbytes: float, ready: float):
    with pytest.raises(ValueError, match="ready"):
        Bucket(nbytes=nbytes, ready=ready)


def test_a_job_without_workers_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        Wiring(backend="ps", workers=0)


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_slowest_of_uneven_transfers_ends_with_all_of_them(workers, uneven, part, more):
    """Alike: each part comes in its turn. Uneven: the slowest's parts come later, and the last one at the same time."""
    low, high = sorted((part, more))
    early, late = (slowest_arrival(workers, uneven, p) for p in (low, high))
    assert early <= late + 1e-9
    assert slowest_arrival(workers, 0.0, part) == pytest.approx(part)
    assert early >= low - 1e-9
    assert slowest_arrival(workers, uneven, 1.0) == pytest.approx(1.0)


def test_the_slowest_of_two_by_hand():
    """Shares of 1/4 and 3/4: the fast one ends at 2/3 of the time, and the slow one has a third by then."""
    assert slowest_arrival(2, 1.0, 1 / 3) == pytest.approx(2 / 3)
    assert slowest_arrival(2, 1.0, 2 / 3) == pytest.approx(5 / 6)


@given(st.integers(2, 8), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_uneven_links_are_never_faster(workers, servers, uneven, less):
    """Answers begin later, and what has to pass is the same."""
    work = Work(forward_s=0.01, backward_s=0.02, buckets=(Bucket(nbytes=3e6, ready=0.4), Bucket(nbytes=5e6, ready=1.0)))
    wiring = Wiring(backend="ps", workers=workers, servers=servers, bytes_per_s=1e7)
    even, some, more = (boxes(work, replace(wiring, uneven=u)).step_ms for u in (0.0, uneven * less, uneven))
    assert even <= some * (1 + 1e-9)
    assert some <= more * (1 + 1e-9)
