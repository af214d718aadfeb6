"""Where a step's time goes: each second is counted once, and waiting for others is not computing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain.comm.base import Backend, PrimaryHost, Traffic, Work
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.measure import Meter, PrimaryMeter, Sent, StepTimes, Stopwatch, metered, summarise
from dtrain.measure.marks import CudaMarks, HostMarks, marks_on
from tests.conftest import everywhere
from tests.small import Job, trainer_of

CPU = torch.device("cpu")

# A busy machine oversleeps, and never undersleeps: figures are compared with the clock, not with what was asked for.


class Slow(Solo):
    """A backend whose transfers block for a while when they are waited for."""

    name = "slow"

    def __init__(self, wait_s: float = 0.03) -> None:
        super().__init__()
        self.wait_s = wait_s

    def all_reduce(self, flat: torch.Tensor, key: str) -> Work:
        self.traffic.count(key, flat.numel(), 2 * flat.numel())
        return Sleep(self.wait_s)


class Sleep:
    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s

    def wait(self) -> None:
        time.sleep(self.wait_s)


# -- a step -----------------------------------------------------------------------------------------------------------


def test_waiting_is_not_computing() -> None:
    """30 ms of waiting within backward are exposed communication; the 20 ms beside them are backward's."""
    meter = metered(Slow(0.03))
    watch = Stopwatch(meter, CPU)
    watch.begin()
    with watch.phase("data"):
        time.sleep(0.01)
    start_s = time.perf_counter()
    with watch.phase("backward"):
        time.sleep(0.01)
        meter.all_reduce(torch.ones(4), "gradient/0").wait()
    with watch.phase("backward"):  # a phase may come twice
        time.sleep(0.01)
    around_ms = (time.perf_counter() - start_s) * 1e3
    watch.end()
    (record,) = [step.record() for step in watch.take()]
    assert record["data_ms"] >= 10
    assert record["backward_ms"] >= 20
    assert record["exposed_comm_ms"] >= 30
    assert record["backward_ms"] + record["exposed_comm_ms"] <= around_ms
    assert record["data_ms"] + around_ms <= record["step_ms"]
    assert (record["forward_ms"], record["optimizer_ms"]) == (0.0, 0.0)


def test_a_transfer_that_travels_meanwhile_costs_nothing() -> None:
    """Only what `wait` blocks is exposed."""
    meter = metered(Slow(0.0))
    watch = Stopwatch(meter, CPU)
    watch.begin()
    with watch.phase("backward"):
        work = meter.all_reduce(torch.ones(4), "gradient/0")
        time.sleep(0.02)
        work.wait()
    watch.end()
    record = watch.take()[0].record()
    assert record["backward_ms"] >= 20
    assert record["exposed_comm_ms"] <= record["step_ms"] - record["backward_ms"]
    assert record["hidden_comm_ms"] >= 20


def test_each_step_begins_at_zero() -> None:
    """What was sent and waited for between two steps belongs to neither."""
    meter = metered(Slow(0.01))
    watch = Stopwatch(meter, CPU)
    for _ in range(3):
        meter.all_reduce(torch.ones(100), "metric/evaluation").wait()
        watch.begin()
        with watch.phase("forward"):
            meter.all_reduce(torch.ones(4), "norm/layer").wait()
        watch.end()
        record = watch.take()[0].record()
        assert 10 <= record["exposed_comm_ms"] <= record["step_ms"] - record["forward_ms"]
        assert (record["bytes_sent"], record["bytes_received"]) == (4.0, 8.0)


def test_the_parts_add_up() -> None:
    """Data to rest, and exposed communication, are the step; what is sent belongs to its lane."""
    meter = metered(Slow(0.003))
    watch = Stopwatch(meter, CPU)
    for number in range(3):
        watch.begin()
        with watch.phase("data"):
            time.sleep(0.001)
        meter.all_reduce(torch.ones(2), "metric/between").wait()  # outside of any phase
        with watch.phase("forward"):
            meter.all_reduce(torch.ones(3), "norm/layer").wait()
        time.sleep(0.002)
        with watch.phase("backward"):
            works = [meter.all_reduce(torch.ones(4), f"gradient/{i}") for i in range(3)]
            time.sleep(0.004)
            for work in works:
                work.wait()
        watch.end(number)
    steps = watch.take()
    assert [step.number for step in steps] == [0, 1, 2]
    assert not len(watch)
    for record in (step.record() for step in steps):
        names = ("data", "forward", "backward", "optimizer", "rest", "exposed_comm")
        assert sum(record[f"{name}_ms"] for name in names) == pytest.approx(record["step_ms"], abs=1e-6)
        assert record["exposed_comm_ms"] >= 5 * 3
        assert 0 <= record["codec_ms"] < record["exposed_comm_ms"]
        assert record["rest_ms"] >= 2
        assert (record["sent_gradient"], record["sent_norm"], record["sent_metric"]) == (12, 3, 2)
        assert (record["bytes_sent"], record["bytes_received"]) == (17, 34)


def step_of(spans: list[tuple[str, float, float]], *sent: Sent) -> StepTimes:
    return StepTimes(1, 0.0, 1.0, tuple(spans), sent, {})


def test_boxes_of_a_step_by_hand() -> None:
    """Two transfers overlap; one was blocked on, partly after its phase; what arrived before is hidden."""
    first = Sent("gradient/0", 8, called_s=0.1, started_s=0.12, wait_s=0.5, done_s=0.5, arrived_s=0.3)
    second = Sent("gradient/1", 8, called_s=0.2, started_s=0.21, wait_s=0.5, done_s=0.7, arrived_s=0.7)
    record = step_of([("forward", 0.0, 0.1), ("backward", 0.1, 0.6), ("optimizer", 0.8, 0.9)], first, second).record()
    assert record["exposed_comm_ms"] == pytest.approx(20 + 10 + 200)
    assert record["codec_ms"] == pytest.approx(30)
    assert record["hidden_comm_ms"] == pytest.approx(600 - 230)  # under way from 0.1 to 0.7
    assert record["backward_ms"] == pytest.approx(500 - 130)
    assert record["rest_ms"] == pytest.approx(100 + 200 - 100)  # outside of phases, but for 0.1 blocked there
    parts = [record[f"{n}_ms"] for n in ("data", "forward", "backward", "optimizer", "rest", "exposed_comm")]
    assert sum(parts) == pytest.approx(1000)


class FakeDevice:
    """A CUDA stream that runs behind the program: an event has its time when the stream has come to it."""

    def __init__(self) -> None:
        self.now_ms = 500.0  # the device's own clock
        self.synchronized = 0

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.synchronized += 1


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.at_ms = device.now_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_marks_of_a_device_are_read_on_the_clock_of_the_host() -> None:
    """Events lie as far before the anchor as the device says, and nothing is waited for but in `anchor`."""
    device = FakeDevice()
    marks = CudaMarks(torch.device("cuda"), event=device.event, synchronize=device.synchronize)
    begun = device.synchronized
    found = []
    for ahead_ms in (0.0, 3.0, 9.0):
        device.now_ms = 500.0 + ahead_ms
        found.append(marks.now())
    assert device.synchronized == begun
    device.now_ms = 520.0
    before_s = time.perf_counter()
    marks.anchor()
    seconds = [marks.seconds(mark) for mark in found]
    assert seconds[1] - seconds[0] == pytest.approx(0.003)
    assert seconds[2] - seconds[1] == pytest.approx(0.006)
    assert before_s - 0.02 <= seconds[0] <= time.perf_counter() - 0.02
    assert isinstance(marks_on(torch.device("cpu")), HostMarks)


# -- a typical step ---------------------------------------------------------------------------------------------------


def record(forward: float = 2.0, comm: float = 1.0, sent: float = 10.0, **more: float) -> dict[str, float]:
    phases = {"data_ms": 1.0, "forward_ms": forward, "backward_ms": 3.0, "optimizer_ms": 0.5}
    bytes_ = {"bytes_sent": sent, "bytes_received": sent / 2}
    return {"step_ms": 10.0, "exposed_comm_ms": comm, **phases, **bytes_, **more}


def test_a_typical_step_is_the_mean_of_the_middle_half_after_warm_up() -> None:
    """The first three steps do not count, nor the quickest and the slowest quarter; bytes are means of all others."""
    warm_up = [record(forward=1000.0, comm=1000.0, sent=0.0)] * 3
    rest = [record(forward=f, comm=f / 2, sent=s, step_ms=10 * f) for f, s in [(8, 10), (1, 20), (4, 30), (90, 60)]]
    found = summarise([*warm_up, *rest])
    assert found["forward_ms"] == 6
    assert found["step_ms"] == 60
    assert found["exposed_comm_ms"] == 3
    assert found["bytes_sent_per_step"] == 30
    assert found["bytes_received_per_step"] == 15
    assert found["compute_ms"] == 6 + 3 + 0.5
    assert found["ratio"] == (6 + 3 + 0.5) / 3
    assert found["efficiency"] == 1 - 3 / 60


@pytest.mark.parametrize(("steps", "dropped"), [(1, 0), (2, 1), (3, 1), (5, 2), (6, 3), (100, 3)])
def test_warm_up_is_never_all_there_is(steps: int, dropped: int) -> None:
    """Of a short run, at most half is left out."""
    records = [record(step_ms=float(i + 1)) for i in range(steps)]
    assert summarise(records)["step_ms"] == statistics.fmean(range(dropped + 1, steps + 1))


def test_the_ratio_is_absent_where_nothing_is_sent() -> None:
    """One worker talks to nobody: there is nothing to divide by."""
    assert "ratio" not in summarise([record(sent=0.0, comm=0.001)] * 4)
    assert "ratio" not in summarise([record(comm=0.0)] * 4)
    assert summarise([record(sent=0.0)] * 4)["compute_ms"] == 5.5
    assert summarise([]) == {}


# -- the meter is a backend -------------------------------------------------------------------------------------------


def test_a_meter_has_the_abilities_of_what_it_measures() -> None:
    """No more and no less; and is not put around a meter."""

    def look(comm: Any) -> bool:
        meter = metered(comm)
        assert isinstance(meter, PrimaryMeter)
        assert isinstance(meter, PrimaryHost)
        assert metered(meter) is meter
        return (meter.name, meter.rank, meter.world_size) == (comm.name, comm.rank, comm.world_size)

    assert dtrain.run(look, workers=2, backend="threads") == [True, True]
    alone = metered(Solo())
    assert isinstance(alone, Backend)
    assert not isinstance(alone, PrimaryHost)
    assert type(alone) is Meter


def test_a_meter_changes_no_result() -> None:
    """The same sums, the same bytes, the same errors; `wait` may be called twice."""

    def look(comm: Any) -> Any:
        meter = metered(comm)
        flat = meter.empty(5, torch.float64, "gradient/0").fill_(comm.rank + 1.0)
        work = meter.all_reduce(flat, "gradient/0")
        work.wait()
        work.wait()
        gathered = torch.full((3,), comm.rank + 1.0)
        meter.gather_sum(gathered, "gradient/1").wait()
        sent = torch.full((3,), comm.rank + 1.0)
        meter.send_first(sent, "gradient/2").wait()
        assert meter.traffic is comm.traffic
        meter.traffic = Traffic()
        assert not comm.traffic.sent
        with pytest.raises(UsageError, match="names no lane"):
            meter.all_reduce(flat, "nonsense")
        assert meter.blocked_s >= 0
        meter.close()
        return flat.tolist(), gathered.tolist(), sent.tolist()

    found = dtrain.run(look, workers=3, backend="threads")
    assert [f[0] for f in found] == [[6.0] * 5] * 3
    assert found[0][1] == [6.0] * 3
    assert [f[2] for f in found] == [[1.0] * 3] * 3


def _late(comm: Any) -> float:
    meter = metered(comm)
    meter.all_reduce(torch.ones(1), "metric/start").wait()
    meter.blocked_s = 0.0
    if comm.rank == 1:
        time.sleep(0.5)
    meter.all_reduce(torch.ones(1), "metric/end").wait()
    return meter.blocked_s


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
def test_a_late_worker_is_what_the_other_one_waits_for(backend: str) -> None:
    """A worker that comes half a second late costs the other about that, and itself less."""
    blocked_s = everywhere(_late, backend=backend)
    assert blocked_s[0] > 0.2
    assert blocked_s[1] < blocked_s[0]


_ENDS = """
import sys, time, torch, torch.distributed as dist
from dtrain.comm.allreduce import AllReduce
from dtrain.measure import metered
rank = int(sys.argv[1])
meter = metered(AllReduce(rank, 2, store=dist.FileStore(sys.argv[2], 2), timeout_s=20))
meter.all_reduce(torch.ones(1), "metric/start").wait()
if rank == 1:
    time.sleep(0.25)  # by then worker 0 is at its end
works = [meter.all_reduce(torch.ones(1000), f"gradient/{i}") for i in range(4)]
if rank == 0:
    time.sleep(0.2)
    raise ValueError("a bug in the loss")
time.sleep(1.0)
"""


def test_a_program_that_ends_amid_transfers_ends_by_its_own_error(tmp_path: Path) -> None:
    """A transfer that is over while the interpreter goes down calls nobody: that would abort the process."""
    command = [sys.executable, "-c", _ENDS]
    first, second = (
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    said = first.communicate(timeout=60)[1]
    second.communicate(timeout=60)
    assert first.returncode == 1, said
    assert "ValueError: a bug in the loss" in said


# -- bytes ------------------------------------------------------------------------------------------------------------


def _bytes_by_lane(comm: Any) -> dict[str, tuple[int, int]]:
    comm.traffic = Traffic()
    comm.all_reduce(torch.ones(600, dtype=torch.float64), "gradient/0").wait()
    comm.all_reduce(torch.ones(30, dtype=torch.float32), "norm/layer").wait()
    return {lane: (comm.traffic.sent[lane], comm.traffic.received[lane]) for lane in ("gradient", "norm", "metric")}


@pytest.mark.parametrize(("backend", "workers"), [("allreduce", 2), ("allreduce", 3), ("ps", 3), ("solo", 1)])
def test_bytes_per_lane(backend: str, workers: int) -> None:
    """Of b bytes: a ring moves 2(n-1)/n b each way, a worker of a parameter server b each way, one worker none."""
    share = {"allreduce": 2 * (workers - 1) / workers, "ps": 1, "solo": 0}[backend]
    each = {"gradient": (4800 * share,) * 2, "norm": (120 * share,) * 2, "metric": (0, 0)}
    assert everywhere(_bytes_by_lane, backend=backend, workers=workers) == [each] * workers


def _records(comm: Any, job: Job) -> list[dict[str, float]]:
    trainer = trainer_of(comm, job)
    trainer.fit()
    return trainer.records


def test_bytes_of_a_training_step() -> None:
    """The gradient with one counter a parameter and the share, and batch norm's messages; the same in every step."""
    numel = sum((5 * 8 + 8, 2 * 8, 8 * 8 + 8, 2 * 8, 8 + 1))
    gradient = 8 * (numel + 10 + 1)
    job = Job("norm", count=24).with_config(norm_batch="global", log_every=1)
    for records in dtrain.run(_records, job, workers=2, backend="threads"):
        # Two layers: mean, M2, count and name of two workers forward, two sums of each channel backward, in float64.
        norm = 2 * 8 * (2 * (2 * 8 + 2) + 2 * 8)
        assert [r["bytes_sent"] for r in records] == [gradient + norm] * 6
        assert [r["bytes_received"] for r in records] == [gradient + norm] * 6
    assert {r["bytes_sent"] for r in _records(Solo(), job)} == {0.0}
