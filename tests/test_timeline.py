"""What a run leaves of its steps' times: lines for each step and worker, a trace, figures for Prometheus."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain.comm.solo import Solo
from dtrain.hooks import Evaluate, Hook, Prometheus, State
from dtrain.measure.stopwatch import Sent, StepTimes
from dtrain.measure.trace import Chosen, document, events_of
from dtrain.timeline import StepLog, Trace, _every
from tests.small import Job, Points, square_sums, trainer_of

PARTS = ("data_ms", "forward_ms", "backward_ms", "optimizer_ms", "rest_ms", "exposed_comm_ms")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Sleepy(Hook):
    """Worker 1 dawdles in the forward of each step, by a hook on the model."""

    def on_start(self, state: State) -> None:
        if state.comm.rank == 1:
            state.model.register_forward_pre_hook(lambda *_: time.sleep(0.02) if state.model.training else None)


def _train(comm: Any, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    hooks = (Sleepy(), StepLog(folder / "steps.jsonl"), Trace(folder / "trace.json"))
    trainer = trainer_of(comm, Job(count=24).with_config(**{"steps": 12, "log_every": 5} | how), hooks)
    state = trainer.fit()
    return {
        "late": [(late.cost_s, late.steps) for late in state.late],
        "records": trainer.records,
        "bytes": dict(comm.traffic.sent),
    }


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
def test_each_step_of_each_worker_has_a_line(backend: str, tmp_path: Path) -> None:
    """Parts add up to the step, and exposed communication to its own; the worker that dawdles is found."""
    found = dtrain.run(_train, tmp_path, {}, workers=2, backend=backend, timeout_s=60)
    steps = lines(tmp_path / "steps.jsonl")
    assert [(line["step"], line["worker"]) for line in steps] == [(s, w) for s in range(1, 13) for w in range(2)]
    for line in steps:
        assert sum(line[part] for part in PARTS) == pytest.approx(line["step_ms"], abs=0.01)
        assert line["wait_ms"] + line["transfer_ms"] + line["codec_ms"] == pytest.approx(
            line["exposed_comm_ms"], abs=0.01
        )
    for worker in range(2):
        starts = [line["start_s"] for line in steps if line["worker"] == worker]
        assert starts == sorted(starts)
        assert starts[0] >= 0
    assert all(line["forward_ms"] >= 20 for line in steps if line["worker"] == 1)
    late = found[0]["late"]
    assert late == found[1]["late"]  # everyone knows
    assert late[1][0] > 0.1
    assert late[1][1] >= 8
    assert late[1][0] > late[0][0]
    assert [record["step"] for record in found[1]["records"]] == list(range(1, 13))


def test_workers_that_do_not_wait_know_nothing_of_waiting(tmp_path: Path) -> None:
    """Asynchronous steps: each its own times, without waiting; worker 0 writes what is its own."""
    how = {"update": "server", "staleness": None}
    found = dtrain.run(_train, tmp_path, how, workers=2, backend="ps", timeout_s=60)
    steps = lines(tmp_path / "steps.jsonl")
    assert {line["worker"] for line in steps} == {0}
    assert not any("wait_ms" in line for line in steps)
    assert {record["worker"] for record in found[1]["records"]} == {1}
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {event["pid"] for event in trace["traceEvents"]} == {0, 1}  # nobody meets at the server


def test_a_trace_has_all_workers_on_one_clock(tmp_path: Path) -> None:
    """Phases in row 0, transfers in the rows of their lanes; the typical and the slowest step are among the steps."""
    dtrain.run(_train, tmp_path, {}, workers=2, backend="ps", timeout_s=60)
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}  # so small a gradient goes from worker to worker, by no server
    assert min(event["ts"] for event in spans) == 0
    assert {"data", "forward", "backward", "optimizer"} <= {e["name"] for e in spans if e["tid"] == 0}
    assert {e["name"].partition("/")[0] for e in spans if e["tid"] % 10 == 1} == {"gradient"}
    kept = {event["args"]["step"] for event in spans}
    assert len(kept) == 6  # five after warm-up, and the slowest of the others
    assert {trace["otherData"][name] for name in ("typical_step", "slowest_step")} <= kept
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names[1, 0] == "compute"
    assert names[0, 1] == "gradient"
    # A sum ends for all within moments, whoever was late: so clocks agree.
    ends = {(e["pid"], e["args"]["step"]): e["ts"] + e["dur"] for e in spans if e["name"] == "gradient/0"}
    apart_us = sorted(abs(ends[0, step] - ends[1, step]) for step in kept)
    assert apart_us[len(apart_us) // 2] < 15_000


def step_of(number: int, *sent: Sent) -> StepTimes:
    return StepTimes(number, 0.0, 1.0, (("forward", 0.1, 0.4),), sent, {})


def test_transfers_that_overlap_go_to_rows_of_their_own() -> None:
    """Viewers draw one thing at a time in a row."""
    sent = [Sent(f"gradient/{i}", 8, 0.1 * i, 0.1 * i, 0.6, 0.6, until) for i, until in ((1, 0.25), (2, 0.5), (3, 0.5))]
    events = events_of(step_of(7, *sent, Sent("norm/a", 8, 0.2, 0.2, 0.2, 0.3, 0.3)), 1)
    rows = {event["name"]: event["tid"] for event in events}
    assert rows == {"forward": 0, "blocked": 0, "gradient/1": 1, "gradient/2": 11, "gradient/3": 1, "norm/a": 2}
    assert all(event["args"]["step"] == 7 for event in events)
    trace = json.loads(document([events, []], {"typical_step": 7}))
    labels = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert labels == {"compute", "gradient", "gradient 2", "norm"}


def test_the_steps_that_are_kept_are_few() -> None:
    """Five after warm-up, and the slowest of the rest, whatever comes."""
    chosen = Chosen()
    for number in range(1, 1001):
        chosen.see(step_of(number), longest_ms=float(number % 97))
    assert chosen.notable == {"typical_step": 6, "slowest_step": 96}
    assert {e["args"]["step"] for e in chosen.events(0, 0.0)} == {4, 5, 6, 7, 8, 96}
    assert Chosen().notable == {}


def test_long_runs_are_thinned() -> None:
    """All of the first thousand steps, of the next nine thousand a tenth, and so on."""
    assert [_every(step) for step in (1, 1000, 1001, 10_000, 10_001, 100_001)] == [1, 1, 10, 10, 100, 1000]


def test_a_log_of_steps_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """A run that is resumed at step 2 writes what came after anew."""
    job = Job(root=str(tmp_path / "c"), every_steps=2).with_config(log_every=1)
    log = tmp_path / "steps.jsonl"
    trainer_of(Solo(), job.with_config(steps=4), (StepLog(log),)).fit()
    trainer = trainer_of(Solo(), job, (StepLog(log),))
    trainer.resume(Path(job.root or ""), 2)
    trainer.fit()
    assert [line["step"] for line in lines(log)] == [1, 2, 3, 4, 5, 6]
    starts = [line["start_s"] for line in lines(log)]
    assert starts == sorted(starts)  # one time, over both processes


def test_many_buckets_without_waiting() -> None:
    """More transfers than there was room for at first, where workers do not wait for each other."""
    found = dtrain.run(_many_buckets, workers=2, backend="ps", timeout_s=60)
    assert [len(records) for records in found] == [3, 3]


def _many_buckets(comm: Any) -> list[dict[str, float]]:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(40)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = dtrain.Loader(Points(24), global_batch=8, rank=comm.rank, world_size=comm.world_size)
    config = dtrain.TrainConfig(steps=3, log_every=1, update="server", staleness=2, bucket_mb=0.0002)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(torch.ones(len(batch[0]), 8)).square().mean()

    trainer = dtrain.Trainer(model, loss, optimizer, loader, comm=comm, config=config)
    trainer.fit()
    assert trainer._ledger._room > 32
    return trainer.records


def port_in(text: str) -> int:
    return int(re.findall(r"http://127.0.0.1:(\d+)/metrics", text)[0])


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


class Ask(Hook):
    """Asks for the figures after the third step."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        self.told = ""

    def on_step(self, state: State) -> None:
        if state.step == 3:
            self.told = ask(port_in(self.caplog.text))


def test_worker_0_tells_prometheus(caplog: pytest.LogCaptureFixture) -> None:
    """While it trains; and nobody answers afterwards."""
    pytest.importorskip("prometheus_client", reason="the extra dtrain[metrics] is not installed")
    asks = Ask(caplog)
    with caplog.at_level(logging.WARNING):
        job = Job().with_config(steps=6, log_every=1)
        trainer_of(Solo(), job, (Evaluate(Points(5), square_sums), Prometheus(0), asks)).fit()
    for line in ('dtrain_step_total{worker="0"} 3.0', 'dtrain_epoch_total{worker="0"}', 'dtrain_loss{worker="0"}'):
        assert line in asks.told
    assert re.search(r'dtrain_step_ms\{worker="0"\} [0-9.]+', asks.told)
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(port_in(caplog.text))
