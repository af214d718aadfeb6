"""Who waited for whom: by hand, and over clocks that are apart."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm import collectives
from dtrain.measure import Ledger, Offset, Sent, StepTimes, metered, offset_to_first
from dtrain.measure.clock import bounds
from dtrain.measure.stopwatch import Stopwatch
from dtrain.ps.board import MOST_BYTES
from tests.conftest import everywhere


def sent(called_s: float, wait_s: float, done_s: float, key: str = "gradient/0") -> Sent:
    return Sent(key, 8, called_s, called_s, wait_s, done_s, done_s)


def step(*transfers: Sent, number: int = 1, begin_s: float = 0.0, end_s: float = 1.0) -> StepTimes:
    traffic = {"bytes_sent": 8.0, "bytes_received": 8.0}
    traffic |= {f"{way}_{lane}": 0.0 for way in ("sent", "received") for lane in ("gradient", "norm", "metric")}
    return StepTimes(number, begin_s, end_s, (), transfers, traffic)


def together(ledgers: list[Ledger], steps: list[list[StepTimes]]) -> list[list[list[dict[str, float]]]]:
    """What each ledger makes of the sum of what all pack."""
    packed = [ledger.pack(s, [one.record() for one in s]) for ledger, s in zip(ledgers, steps, strict=True)]
    assert len({p.numel() for p in packed}) == 1
    total = torch.stack(packed).sum(dim=0)
    return [ledger.unpack(total) for ledger in ledgers]


def ledgers(workers: int, offsets: list[float] | None = None) -> list[Ledger]:
    return [Ledger(r, workers, Offset((offsets or [0.0] * workers)[r])) for r in range(workers)]


def test_what_was_before_the_last_one_was_ready_is_waiting() -> None:
    """Worker 2 is ready at 0.7: the others, blocked from 0.2 and 0.5 to 0.8, waited 0.5 and 0.2, and 0.1 each is the
    transfer's. All workers come to the same figures."""
    ours = ledgers(3)
    found = together(ours, [[step(sent(0.1, 0.2, 0.8))], [step(sent(0.4, 0.5, 0.8))], [step(sent(0.7, 0.7, 0.8))]])
    assert found[0] == found[1] == found[2]
    waits = [record["wait_ms"] for record in found[0][0]]
    assert waits == pytest.approx([500, 200, 0])
    assert [record["transfer_ms"] for record in found[0][0]] == pytest.approx([100, 100, 100])
    assert [late.cost_s for late in ours[0].late] == pytest.approx([0, 0, 0.7])
    assert [late.steps for late in ours[0].late] == [0, 0, 1]


def test_each_transfer_has_its_own_late_worker() -> None:
    """In one step worker 1 is late for the first message and worker 0 for the second."""
    ours = ledgers(2)
    first = step(sent(0.0, 0.0, 0.3, "norm/a"), sent(0.8, 0.8, 0.9))
    second = step(sent(0.2, 0.2, 0.3, "norm/a"), sent(0.4, 0.4, 0.9))
    found = together(ours, [[first], [second]])[0][0]
    assert [record["wait_ms"] for record in found] == pytest.approx([200, 400])
    assert [late.cost_s for late in ours[0].late] == pytest.approx([0.4, 0.2])
    assert [late.steps for late in ours[0].late] == [1, 0]


def test_clocks_that_are_apart_are_put_on_one() -> None:
    """The same as on one clock, when each worker's counts from another moment."""
    shifted = step(sent(100.7, 100.7, 100.8), begin_s=100.0, end_s=101.0)
    ours = ledgers(2, [0.0, -100.0])
    found = together(ours, [[step(sent(0.1, 0.2, 0.8))], [shifted]])[0][0]
    assert [record["wait_ms"] for record in found] == pytest.approx([500, 0])
    assert [record["start_s"] for record in found] == pytest.approx([0, 0])


def test_transfers_that_do_not_match_are_not_compared() -> None:
    """Nothing is said of waiting in a step in which workers sent another number of messages."""
    odd, even = step(sent(0.1, 0.2, 0.8)), step(sent(0.7, 0.7, 0.8), sent(0.8, 0.8, 0.9))
    ours = ledgers(2)
    found = together(ours, [[odd, even], [even, even]])[0]
    assert ["wait_ms" in record for record in found[0]] == [False, False]
    assert ["wait_ms" in record for record in found[1]] == [True, True]
    assert sum(late.steps for late in ours[0].late) == 0


def test_a_step_with_many_transfers_finds_room_the_next_time() -> None:
    """The room is agreed without a message of its own: what all told the last time is what all have."""
    many = step(*(sent(i / 1000, i / 1000, i / 1000) for i in range(100)))
    ours = ledgers(2)
    assert all("wait_ms" not in r for r in together(ours, [[many], [many]])[0][0])
    assert all("wait_ms" in r for r in together(ours, [[many], [many]])[0][0])


def test_few_transfers_make_a_small_message() -> None:
    """Ten steps of four workers then pass by the workers' common board, and wait for no server."""
    ten = [step(sent(0.1, 0.2, 0.8), sent(0.4, 0.5, 0.8), number=n) for n in range(10)]
    ours = ledgers(4)
    found = together(ours, [ten] * 4)[0]
    packed = ours[0].pack(ten, [one.record() for one in ten])
    assert packed.nbytes < MOST_BYTES
    assert together(ours, [ten] * 4)[0][0][0]["wait_ms"] == found[0][0]["wait_ms"]


def test_a_message_of_times_is_bounded() -> None:
    """By bytes: many workers with many transfers tell of fewer steps at once; the same number on all."""
    few, many = Ledger(0, 2), Ledger(0, 512)
    assert few.most_steps == 200
    assert 1 <= many.most_steps < 20
    assert many.pack([], []).numel() == 0
    large = [step(*(sent(0.1, 0.1, 0.1) for _ in range(1000)))]
    together(ours := ledgers(2), [large, large])
    assert ours[0].most_steps == ours[1].most_steps < 200


def test_a_ledger_goes_on_from_the_one_before() -> None:
    """After a rewind: the start of the run, and what lateness has cost so far."""
    first = ledgers(2)
    together(first, [[step(sent(0.1, 0.2, 0.8), begin_s=5.0)], [step(sent(0.7, 0.7, 0.8), begin_s=5.0)]])
    again = [Ledger(r, 2, before=first[r]) for r in range(2)]
    one = step(sent(9.1, 9.2, 9.8), begin_s=9.0)
    found = together(again, [[one], [one]])[0]
    assert found[0][0]["start_s"] == pytest.approx(4.0)
    assert again[0].late[1].cost_s == pytest.approx(0.5)


def test_a_worker_that_is_gone_has_no_record_and_no_blame() -> None:
    """A job that goes on without a worker: its rows are zeros."""
    ours = ledgers(3)
    packed = [
        ours[r].pack([s], [s.record()]) for r, s in ((0, step(sent(0.1, 0.1, 0.9))), (2, step(sent(0.5, 0.5, 0.9))))
    ]
    found = ours[0].unpack(packed[0] + packed[1])[0]
    assert [record["worker"] for record in found] == [0, 2]
    assert found[0]["wait_ms"] == pytest.approx(400)
    assert [late.cost_s for late in ours[0].late] == pytest.approx([0, 0, 0.4])


@given(
    st.lists(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_waiting_is_within_what_was_blocked_and_all_of_it_is_blamed(times: list[list[tuple[float, ...]]]) -> None:
    """For any moments: 0 <= waiting <= blocked, and what workers waited is what others are blamed for."""
    ours = ledgers(3)
    ordered = [[sorted(moments) for moments in row] for row in times]
    steps = [[step(*(sent(*row[rank]) for row in ordered))] for rank in range(3)]
    found = together(ours, steps)[0][0]
    blocked = [1e3 * sum(row[rank][2] - row[rank][1] for row in ordered) for rank in range(3)]
    for record, blocked_ms in zip(found, blocked, strict=True):
        assert 0 <= record["wait_ms"] <= blocked_ms + 1e-6
    assert sum(r["wait_ms"] for r in found) == pytest.approx(1e3 * sum(late.cost_s for late in ours[0].late), abs=1e-6)


# -- clocks -----------------------------------------------------------------------------------------------------------


@given(st.floats(-1e3, 1e3), st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=10))
def test_bounds_hold_the_true_offset(offset_s: float, rounds: list[tuple[float, ...]]) -> None:
    """Whatever the delays: nobody leaves a round before all have come to it."""
    came_0, left_0, came, left = [], [], [], []
    for a, b, delay_0, delay in rounds:
        came_0.append(a)
        came.append(b - offset_s)
        left_0.append(max(a, b) + delay_0)
        left.append(max(a, b) + delay - offset_s)
    found = bounds(came_0, left_0, came, left)
    assert abs(found.seconds - offset_s) <= found.error_s + 1e-9


def _offsets(comm: Any, apart_s: float) -> tuple[float, float]:
    """Each worker's clock set ahead by its rank times `apart_s`, on hosts that know nothing of each other."""
    from dtrain.measure import clock

    real = time.perf_counter
    clock._boot = lambda: comm.rank  # type: ignore[assignment]
    clock.time.perf_counter = lambda: real() + comm.rank * apart_s  # type: ignore[attr-defined]
    try:
        found = offset_to_first(comm)
    finally:
        clock.time.perf_counter = real  # type: ignore[attr-defined]
    return found.seconds, found.error_s


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
def test_offsets_between_hosts_are_found(backend: str) -> None:
    """Three clocks that are 100 s apart, within the error that is said."""
    found = everywhere(_offsets, 100.0, backend=backend, workers=3)
    for rank, (seconds, error_s) in enumerate(found):
        assert abs(seconds + 100.0 * rank) <= error_s + 1e-6
        assert error_s < 1.0


def _same_host(comm: Any) -> tuple[float, int]:
    before = comm.traffic.sent["metric"]
    return offset_to_first(comm).seconds, comm.traffic.sent["metric"] - before


def test_processes_of_one_host_have_one_clock() -> None:
    """And they find out with one message."""
    assert everywhere(_same_host, backend="ps", workers=2) == [(0.0, 16)] * 2


# -- delays that are put in come out in the right box -----------------------------------------------------------------

_DELAY_S = 0.4


def _delayed(comm: Any, phase: str, key: str) -> list[list[dict[str, float]]]:
    """Four steps, in which worker 1 is late by `_DELAY_S` in one phase; all records."""
    meter = metered(comm)
    watch = Stopwatch(meter, torch.device("cpu"))
    ledger = Ledger(comm.rank, comm.world_size, offset_to_first(comm))
    for number in range(4):
        collectives.barrier(comm)
        watch.begin()
        for name in ("data", "forward", "backward"):
            with watch.phase(name):
                if name == phase and comm.rank == 1:
                    time.sleep(_DELAY_S)
                if name == "backward":
                    meter.all_reduce(torch.ones(100_000), key).wait()
        watch.end(number)
    steps = watch.take()
    flat = ledger.pack(steps, [step.record() for step in steps])
    comm.all_reduce(flat, "metric/times").wait()
    found = ledger.unpack(flat)
    cost_s = [late.cost_s for late in ledger.late]
    return [*found, [{"cost_s": c} for c in cost_s]]


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
@pytest.mark.parametrize("phase", ["data", "forward", "backward"])
def test_a_delay_is_the_late_workers_phase_and_the_others_waiting(backend: str, phase: str) -> None:
    """Within 5 % of what was put in, in the typical step: of the phase for one, of waiting for the other.

    A busy machine oversleeps, for which no meter is to blame: the measure is the phase as the late worker had it.
    """
    *steps, costs = everywhere(_delayed, phase, "gradient/0", backend=backend)[0]
    misses = []
    for records in steps:
        late_ms = records[1][f"{phase}_ms"] + 1e3 * (records[1]["start_s"] - records[0]["start_s"])
        assert records[1][f"{phase}_ms"] >= 1e3 * _DELAY_S
        misses.append(abs(records[0]["wait_ms"] / late_ms - 1))
    assert sorted(misses)[1] < 0.05, misses
    waited_s = sum(records[0]["wait_ms"] for records in steps) / 1e3
    assert costs[1]["cost_s"] == pytest.approx(waited_s)
    assert costs[1]["cost_s"] > 20 * costs[0]["cost_s"]
