"""Laws of the loop: n workers train as one does, and hooks see each step once, in order."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import dtrain
from dtrain import checkpoint, norm, runs
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.data import Loader
from dtrain.errors import DataError, UsageError
from dtrain.evaluate import evaluate
from dtrain.hooks import Checkpoint, Evaluate, Hook, JsonLog, Progress, State, TensorBoard
from dtrain.spec import RunSpec
from dtrain.trainer import norm_sharing
from tests.conftest import everywhere
from tests.small import (
    Job,
    Points,
    PointStream,
    differences,
    distance,
    fit,
    make_model,
    mean_square,
    square_sums,
    trainer_of,
)

ROUNDING = 1e-12


def solo(job: Job, *hooks: Hook, **more: Any) -> tuple[Any, State]:
    """Train alone, in this thread."""
    trainer = trainer_of(Solo(), job, hooks, **more)
    return trainer, trainer.fit()


def threads(fn: Callable[..., Any], *args: Any, workers: int = 2) -> list[Any]:
    return dtrain.run(fn, *args, workers=workers, backend="threads", timeout_s=30.0)


def parameters(result: dict[str, Any]) -> dict[str, Tensor]:
    return result["parameters"]


class Watcher(Hook):
    """Writes down what it is called with."""

    def __init__(self, name: str = "", log: list[Any] | None = None) -> None:
        self.name = name
        self.log: list[Any] = [] if log is None else log

    def _note(self, what: str, state: State) -> None:
        self.log.append((self.name + what, state.step, state.epoch, state.samples))

    def on_start(self, state: State) -> None:
        self._note("start", state)

    def on_step(self, state: State) -> None:
        self._note("step", state)

    def on_epoch(self, state: State) -> None:
        self._note("epoch", state)

    def on_end(self, state: State) -> None:
        self._note("end", state)


# -- how long ---------------------------------------------------------------------------------------------------------


def test_by_epochs_all_samples_are_seen_each_time() -> None:
    """23 samples in batches of 8 are 3 steps an epoch, the last of 7 samples."""
    watcher = Watcher()
    _, state = solo(Job().with_config(steps=None, epochs=2), watcher)
    assert watcher.log == [
        ("start", 0, 0, 0),
        *[("step", 1, 0, 8), ("step", 2, 0, 16), ("step", 3, 0, 23), ("epoch", 3, 1, 23)],
        *[("step", 4, 1, 31), ("step", 5, 1, 39), ("step", 6, 1, 46), ("epoch", 6, 2, 46)],
        ("end", 6, 2, 46),
    ]
    assert (state.steps, state.first) == (6, True)


def test_by_steps_the_run_ends_in_the_middle_of_an_epoch() -> None:
    """Exactly so many optimizer steps."""
    watcher = Watcher()
    _, state = solo(Job().with_config(steps=4), watcher)
    assert watcher.log[-3:] == [("epoch", 3, 1, 23), ("step", 4, 1, 31), ("end", 4, 1, 31)]
    assert (state.steps, state.step) == (4, 4)


def test_steps_that_make_whole_epochs_are_the_same_as_epochs() -> None:
    """The last epoch is complete, and counts; the weights have the same bits."""
    by_steps, by_epochs = Watcher(), Watcher()
    a, _ = solo(Job().with_config(steps=6), by_steps)
    b, _ = solo(Job().with_config(steps=None, epochs=2), by_epochs)
    assert by_steps.log == by_epochs.log
    assert not differences(a.model.state_dict(), b.model.state_dict())


def test_hooks_are_called_in_the_order_given() -> None:
    """At each point, one after the other."""
    log: list[Any] = []
    solo(Job().with_config(steps=1), Watcher("a.", log), Watcher("b.", log))
    assert [name for name, *_ in log] == ["a.start", "b.start", "a.step", "b.step", "a.end", "b.end"]


def _watched(comm: Any, job: Job) -> list[Any]:
    watcher = Watcher()
    trainer_of(comm, job, (watcher,)).fit()
    return watcher.log


def test_hooks_are_called_at_the_same_points_on_every_worker() -> None:
    """Counters are those of all workers together, and the same as for one."""
    job = Job(global_batch=5, micro_batch=1)
    alone = _watched(Solo(), job)
    assert threads(_watched, job, workers=3) == [alone] * 3


# -- n workers are one ------------------------------------------------------------------------------------------------

NORMS = Job("norm", count=21, global_batch=8, micro_batch=2).with_config(
    norm_batch="global", clip_grad_norm=0.5, steps=9
)


@pytest.mark.parametrize(("backend", "workers"), [("threads", 2), ("threads", 3), ("ps", 3), ("allreduce", 3)])
def test_n_workers_are_one_worker(backend: str, workers: int) -> None:
    """float64, batch norm over all workers, clipping, accumulation, unequal shares, batches smaller than the job.

    21 samples in batches of 8 leave 5, cut into micro-batches of 1 or 2 samples for 3 workers.
    """
    found = everywhere(fit, NORMS, backend=backend, workers=workers)
    alone = fit(Solo(), NORMS.but(micro_batch=2 * workers))
    for result in found:
        assert distance(result["parameters"], alone["parameters"]) <= ROUNDING
        assert distance(result["buffers"], alone["buffers"]) <= ROUNDING
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-10)
        assert result["position"] == alone["position"] == (9, 3, 63)
    assert not differences([r["parameters"] for r in found], [found[0]["parameters"]] * workers)


def test_accumulation_is_one_large_batch() -> None:
    """Micro-batches of any size, unequal ones too, give the gradient of the mean over the global batch."""
    whole = fit(Solo(), Job())
    for micro_batch in (1, 2, 3, 5, 7):
        assert distance(fit(Solo(), Job(micro_batch=micro_batch))["parameters"], whole["parameters"]) <= ROUNDING
    for result in threads(fit, Job(micro_batch=1), workers=3):
        assert distance(result["parameters"], whole["parameters"]) <= ROUNDING


def test_more_workers_than_samples() -> None:
    """Workers without a sample take part with weight zero."""
    job = Job(count=2, global_batch=4)
    alone = fit(Solo(), job)
    found = threads(fit, job, workers=5)
    assert all(distance(r["parameters"], alone["parameters"]) <= ROUNDING for r in found)
    assert found[4]["loss"] == pytest.approx(alone["loss"])


def test_the_gradient_is_clipped_after_the_sum() -> None:
    """The norm that is clipped is the global gradient's; workers' own norms differ, and do not matter."""
    job = Job().with_config(clip_grad_norm=1e-3, steps=3)
    alone = fit(Solo(), job)
    assert distance(alone["parameters"], fit(Solo(), job.with_config(clip_grad_norm=None))["parameters"]) > 1e-4
    for result in threads(fit, job, workers=3):
        assert distance(result["parameters"], alone["parameters"]) <= ROUNDING


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_schedule_counts_optimizer_steps(micro_batch: int | None) -> None:
    """Not micro-batches, and not the steps of workers: 6 steps halve the rate 3 times."""
    job = Job(micro_batch=micro_batch, halve_every=2)
    assert fit(Solo(), job)["lr"] == 0.05 / 8
    assert [r["lr"] for r in threads(fit, job, workers=3)] == [0.05 / 8] * 3


def test_update_on_the_first_worker_trains_the_same() -> None:
    """As DataParallel does it: one optimizer, and the others are given its parameters, bit by bit."""
    job = Job("norm", halve_every=2)
    found = threads(fit, job.but(update="first"), workers=3)
    everyone = threads(fit, job, workers=3)
    assert not differences([r["parameters"] for r in found], [r["parameters"] for r in everyone])
    assert [bool(r["optimizer"]) for r in found] == [True, False, False]


def test_a_loader_of_another_worker_is_refused() -> None:
    """Forgotten rank and world_size would give every worker the whole batch, and n times the gradient."""

    def wrong(comm: Any) -> None:
        model = make_model("plain", torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = Loader(Points(9), global_batch=4)
        dtrain.Trainer(model, mean_square, optimizer, loader, comm=comm, config=dtrain.TrainConfig(epochs=1))

    with pytest.raises(UsageError, match=r"worker 0 of 1, and this is worker \d of 2: give it rank=comm.rank"):
        threads(wrong)


# -- other data -------------------------------------------------------------------------------------------------------


def test_a_stream_is_trained_on_like_a_list() -> None:
    """In its own order, epoch after epoch, over one worker and over several."""
    job = Job(stream=True).with_config(steps=None, epochs=2)
    alone = fit(Solo(), job)
    assert alone["position"] == (6, 2, 46)
    assert not math.isnan(alone["loss"])
    for result in threads(fit, job, workers=3):
        assert distance(result["parameters"], alone["parameters"]) <= ROUNDING
        assert result["position"] == (6, 2, 46)
        assert result["loss"] == pytest.approx(alone["loss"])


def test_a_stream_that_is_exhausted_is_begun_again() -> None:
    """By steps, for as many epochs as it takes."""
    assert fit(Solo(), Job(stream=True).with_config(steps=8))["position"] == (8, 2, 23 + 23 + 16)


@pytest.mark.parametrize("how", [{"steps": 3}, {"epochs": 1, "steps": None}])
def test_a_stream_without_samples_is_an_error(how: dict[str, Any]) -> None:
    """Not an endless loop."""

    class Nothing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(DataError, match="the data set yields nothing"):
        solo(Job().with_config(**how), data=Nothing())


def test_a_seed_of_any_size() -> None:
    """Up to the largest that recipes take."""
    assert fit(Solo(), Job(seed=2**63 - 1, stream=True))["position"][0] == 6
    assert fit(Solo(), Job(seed=2**63 - 1))["position"][0] == 6


# -- what the loss is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"steps": 3}, {"epochs": 1, "steps": None}])
@pytest.mark.parametrize("stream", [True, False])
def test_the_loss_is_the_mean_over_samples_since_the_last_record(how: dict[str, Any], stream: bool) -> None:
    """Weighted by samples, over workers and micro-batches; there at the end, however few steps there were."""
    losses: list[tuple[float, int]] = []

    def noting(model: nn.Module, batch: Any) -> Tensor:
        loss = mean_square(model, batch)
        losses.append((loss.item(), len(batch[0])))
        return loss

    _, state = solo(Job(stream=stream, micro_batch=3).with_config(**how), loss=noting)
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert state.loss == pytest.approx(mean, rel=1e-12)
    assert sum(n for _, n in losses) == 23
    for result in threads(fit, Job(stream=stream).with_config(**how), workers=2):
        assert result["loss"] == pytest.approx(mean, rel=1e-10)


class Records(Hook):
    def __init__(self) -> None:
        self.found: list[tuple[int, dict[str, float]]] = []

    def on_step(self, state: State) -> None:
        if state.record is not None:
            self.found.append((state.step, state.record))


def test_a_record_every_few_steps_and_at_the_end() -> None:
    """With loss, learning rate and times; None in between."""
    for how in ({"steps": 8}, {"steps": None, "epochs": 8}):
        records = Records()
        solo(Job(count=8).with_config(log_every=3, **how), records)
        assert [step for step, _ in records.found] == [3, 6, 8]
        for _, record in records.found:
            assert record.keys() >= {"loss", "lr", "step_ms", "data_ms", "forward_ms", "backward_ms", "optimizer_ms"}
            assert record.keys() >= {"exposed_comm_ms", "bytes_sent", "bytes_received"}
            assert record["lr"] == 0.05


def test_a_loss_that_is_no_number_is_reported_as_it_is(tmp_path: Path) -> None:
    """NaN in the state, null in the log, which stays JSON; and the next loss is a number again if it can be."""
    points = Points(23)
    points.y[3] = math.nan
    records = Records()
    log = tmp_path / "m.jsonl"
    _, state = solo(Job().with_config(steps=3, log_every=1), records, JsonLog(log), data=points)
    losses = [record["loss"] for _, record in records.found]
    assert any(math.isnan(loss) for loss in losses)
    assert math.isnan(state.loss)  # the weights are gone too
    written = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in log.read_text().splitlines()]
    assert written == [None if math.isnan(loss) else loss for loss in losses]


# -- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("norm_batch", ["worker", "global"])
def test_mixed_precision_trains_as_well(amp: str, norm_batch: str) -> None:
    """The loss falls about as in float32, and all workers keep the same weights, which stay float32."""
    job = Job("norm", count=64, global_batch=16, dtype=torch.float32)
    job = job.with_config(steps=60, amp=amp, norm_batch=norm_batch, log_every=20)
    found = threads(fit, job, workers=2)
    full = threads(fit, job.with_config(amp="off"), workers=2)
    first = threads(fit, job.with_config(amp="off", steps=1), workers=2)
    assert found[0]["loss"] < 0.5 * first[0]["loss"]
    assert found[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.5)
    assert not differences(found[0]["parameters"], found[1]["parameters"])
    assert {p.dtype for p in found[0]["parameters"].values()} == {torch.float32}
    assert bool(found[0]["scale"]) == (amp == "fp16")


def test_what_is_clipped_is_not_scaled() -> None:
    """A limit far above the gradient's norm changes no bit, though the scaled gradient is far above the limit."""
    job = Job(dtype=torch.float32).with_config(amp="fp16", steps=12)
    found, limited = (fit(Solo(), job.with_config(clip_grad_norm=limit)) for limit in (None, 1e3))
    assert not differences(found["parameters"], limited["parameters"])
    assert differences(found["parameters"], fit(Solo(), job.with_config(steps=1))["parameters"])


def _overflowing(comm: Any, job: Job) -> list[Any]:
    """Weights, rate and scale after each step; one sample of each epoch is infinite, and some worker has it."""
    points = Points(24, torch.float32)
    points.x[7] = math.inf
    seen: list[Any] = []
    trainer: Any = None

    class Note(Hook):
        def on_step(self, state: State) -> None:
            weights = {n: p.detach().clone() for n, p in state.model.named_parameters()}
            seen.append((weights, trainer.optimizer.param_groups[0]["lr"], trainer._scaler.get_scale()))

    trainer = trainer_of(comm, job, (Note(),), data=points)
    trainer.fit()
    return seen


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("update", ["worker", "first"])
def test_a_step_that_overflows_is_left_out_on_every_worker(update: str, clip: float | None) -> None:
    """Nobody's weights move, everyone's scale is halved, and the schedule does not count the step.

    Also where worker 0 alone updates, and so alone sees the overflow: the others' next losses are scaled as its are.
    """
    job = Job(dtype=torch.float32, halve_every=1, update=update)
    job = job.with_config(amp="fp16", steps=18, clip_grad_norm=clip)
    found = threads(_overflowing, job, workers=2)
    assert not differences([s[0] for s in found[0]], [s[0] for s in found[1]])
    assert [s[2] for s in found[0]] == [s[2] for s in found[1]]
    moves = []
    for (before, rate_before, scale_before), (after, rate, scale) in itertools.pairwise(found[0]):
        moved = bool(differences(before, after))
        assert (rate, scale) == ((rate_before / 2, scale_before) if moved else (rate_before, scale_before / 2))
        assert all(t.isfinite().all() for t in after.values())
        moves.append(moved)
    assert moves.count(False) >= 5  # once in each of 6 epochs, but the very first step has none before it
    assert moves.count(True) >= 6


# -- evaluation -------------------------------------------------------------------------------------------------------


def _evaluated(comm: Any, count: int, kind: str) -> dict[str, float]:
    model = make_model(kind, torch.float64)
    found = evaluate(model, Points(count, seed=1), square_sums, comm, batch_size=4)
    assert model.training
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 10, 13])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_evaluation_counts_every_sample_once(count: int, workers: int) -> None:
    """The mean over the data set, on every worker the same; also with more workers than samples."""
    model, points = make_model("norm", torch.float64).eval(), Points(count, seed=1)
    with torch.no_grad():
        mean = (model(points.x) - points.y).square().mean().item()
    for found in threads(_evaluated, count, "norm", workers=workers):
        assert found == pytest.approx({"loss": mean, "count": 1.0}, rel=1e-12)


@pytest.mark.parametrize(("how", "at"), [({"steps": 4}, [3, 4]), ({"steps": 6}, [3, 6]), ({"epochs": 2}, [3, 6])])
def test_evaluation_after_each_epoch_and_at_the_end(how: dict[str, int], at: list[int]) -> None:
    """But not twice at one step; what `finish` makes of the means is what is reported."""
    watcher, looked = Watcher(), []

    def score(model: nn.Module, batch: Any) -> Any:
        assert not model.training
        assert not torch.is_grad_enabled()
        looked.append(watcher.log[-1][1])  # the step that was made last
        return square_sums(model, batch)

    hook = Evaluate(Points(7, seed=1), score, finish=lambda means: {**means, "root": means["loss"] ** 0.5})
    trainer, state = solo(Job().with_config(**({"steps": None} | how)), watcher, hook)
    assert looked == at
    assert trainer.model.training
    assert state.metrics["root"] == pytest.approx(state.metrics["loss"] ** 0.5)


def _trained_and_evaluated(comm: Any, job: Job) -> dict[str, float]:
    return trainer_of(comm, job, (Evaluate(Points(5, seed=1), square_sums),)).fit().metrics


def test_evaluation_in_a_run_does_not_depend_on_the_number_of_workers() -> None:
    """With batch norm over all workers, to rounding; and all workers report the same."""
    job = Job("norm").with_config(norm_batch="global")
    alone = _trained_and_evaluated(Solo(), job)
    for found in threads(_trained_and_evaluated, job, workers=6):
        assert found == pytest.approx(alone, rel=1e-10)


def test_evaluation_changes_nothing() -> None:
    """Neither weights nor running statistics nor random numbers: with it and without, the run has the same bits."""

    def trained(comm: Any, look: bool) -> Any:
        hooks = (Evaluate(Points(5, seed=1), square_sums),) if look else ()
        trainer = trainer_of(comm, Job("dropout"), hooks)
        trainer.fit()
        return trainer.model.state_dict(), torch.rand(3)

    for workers in (1, 2):
        assert not differences(threads(trained, True, workers=workers), threads(trained, False, workers=workers))


# -- hooks ------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_log_has_records_and_metrics(tmp_path: Path) -> None:
    """One object a line; the metrics of the end too, where no epoch ends there; steps never fall."""
    path = tmp_path / "new" / "metrics.jsonl"
    hooks = (Evaluate(Points(5, seed=1), square_sums), JsonLog(path))
    solo(Job().with_config(steps=5, log_every=2), *hooks)
    found = lines(path)
    assert [(line["step"], "metrics" in line) for line in found] == [
        *[(2, False), (3, True), (4, False), (5, False), (5, True)],
    ]
    assert [line["samples"] for line in found] == [16, 23, 31, 39, 39]
    assert found[1]["metrics"].keys() == {"loss", "count"}


def test_json_log_is_worker_0s(tmp_path: Path) -> None:
    """The others write nothing, and a log without evaluation has records only."""

    def work(comm: Any) -> None:
        log = JsonLog(tmp_path / f"{comm.rank}.jsonl")
        trainer_of(comm, Job().with_config(log_every=1), (log,)).fit()

    threads(work)
    assert [p.name for p in tmp_path.iterdir()] == ["0.jsonl"]
    assert [line["step"] for line in lines(tmp_path / "0.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_json_log_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """A run that was killed after step 5 and is resumed at step 2 writes steps 3 to 5 anew; a torn line goes."""
    log, root = tmp_path / "m.jsonl", tmp_path / "c"
    job = Job(root=str(root), every_steps=2).with_config(log_every=1)
    solo(job.with_config(steps=2), JsonLog(log))
    kept = log.read_text()
    log.write_text(kept + '{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    trainer = trainer_of(Solo(), job, (JsonLog(log),))
    trainer.resume(root)
    trainer.fit()
    assert log.read_text().startswith(kept)
    assert [line["step"] for line in lines(log)] == [1, 2, 3, 4, 5, 6]
    solo(job.but(root=None), JsonLog(log))  # a new run in the old place
    assert [line["step"] for line in lines(log)] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    """An event file, with records under `train` and metrics under `test`."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    solo(Job().with_config(steps=4, log_every=2), Evaluate(Points(5), square_sums), TensorBoard(tmp_path / "tb"))
    (file,) = (tmp_path / "tb").iterdir()
    assert file.name.startswith("events.out.tfevents")
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4]
    assert [e.step for e in events.Scalars("test/loss")] == [3, 4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_a_terminal() -> None:
    """A bar with the steps and the loss there; not a byte elsewhere, unless it is asked for."""
    for stream, always, shown in (
        (Terminal(), False, True),
        (io.StringIO(), False, False),
        (io.StringIO(), True, True),
    ):
        solo(Job().with_config(log_every=1), Progress("digits", stream=stream, always=always))
        text = stream.getvalue()
        assert bool(text) == shown
        assert shown == ("digits" in text) == ("6/6" in text) == ("loss=" in text)


def test_progress_is_worker_0s() -> None:
    """Others print nothing."""
    streams = [Terminal(), Terminal()]

    def work(comm: Any) -> None:
        trainer_of(comm, Job(), (Progress("x", stream=streams[comm.rank]),)).fit()

    threads(work)
    assert [bool(s.getvalue()) for s in streams] == [True, False]


@pytest.mark.parametrize(
    ("every_steps", "how", "saved"),
    [
        (None, {"epochs": 2}, [3, 6]),
        (None, {"steps": 5}, [3, 5]),
        (2, {"steps": 5}, [2, 4, 5]),
        (3, {"epochs": 2}, [3, 6]),
        (100, {"steps": 5}, [5]),
    ],
)
def test_checkpoints_are_saved_when_asked(
    every_steps: int | None, how: dict[str, int], saved: list[int], tmp_path: Path
) -> None:
    """Every so many steps, or after each epoch; at the end anyway; never twice for one step."""
    saves: list[int] = []
    watch = Watcher()
    job = Job().with_config(**({"steps": None} | how))
    solo(job, Checkpoint(tmp_path, every_steps=every_steps, keep=10), watch)
    saves = checkpoint.steps(tmp_path)
    assert saves == saved
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"step-{s}" for s in saved)  # none a second time


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """As many as asked for."""
    solo(Job(), Checkpoint(tmp_path, every_steps=1, keep=2))
    assert checkpoint.steps(tmp_path) == [5, 6]
    with pytest.raises(UsageError, match="every_steps is 0"):
        Checkpoint(tmp_path, every_steps=0)


def test_worker_0_saves_for_all(tmp_path: Path) -> None:
    """One checkpoint, with a part for each worker."""
    threads(fit, Job("norm", root=str(tmp_path)), workers=3)
    groups = checkpoint.load(tmp_path).groups
    assert {name for name in groups if name.startswith("worker-")} == {"worker-0", "worker-1", "worker-2"}


# -- the stream of data -----------------------------------------------------------------------------------------------


def test_the_loader_may_fetch_in_other_processes() -> None:
    """The same weights to the bit, with samples fetched ahead, one by one."""

    def by(num_workers: int) -> Any:
        model = make_model("plain", torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = Loader(Points(23), global_batch=8, num_workers=num_workers)
        trainer = dtrain.Trainer(model, mean_square, optimizer, loader, config=dtrain.TrainConfig(steps=5))
        trainer.fit()
        return model.state_dict()

    assert not differences(by(0), by(2))


def test_a_stream_may_be_read_in_another_process() -> None:
    """By one."""
    model = make_model("plain", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = Loader(PointStream(Points(23)), global_batch=8, num_workers=1)
    trainer = dtrain.Trainer(model, mean_square, optimizer, loader, config=dtrain.TrainConfig(epochs=2))
    assert trainer.fit().samples == 46


def test_a_converted_model_stays_converted() -> None:
    """Unless the configuration says what is to be shared, batch norm is as the model has it."""

    def body(comm: Backend) -> None:
        points = Points(12)
        model = dtrain.norm.convert(make_model("norm", torch.float64), comm=comm)
        loader = dtrain.Loader(points, global_batch=6, rank=comm.rank, world_size=comm.world_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dtrain.Trainer(model, mean_square, optimizer, loader, comm=comm, config=dtrain.TrainConfig(steps=2)).fit()
        assert isinstance(model[1], dtrain.norm.SyncBatchNorm)

    dtrain.run(body, workers=2)


def test_two_trainers_one_after_the_other() -> None:
    """The second takes the model over: n workers equal one, as with a trainer each of a model of its own."""

    def body(comm: Backend) -> list[torch.Tensor]:
        model = make_model("plain", torch.float64)
        for _ in range(2):
            loader = dtrain.Loader(Points(20), global_batch=8, rank=comm.rank, world_size=comm.world_size)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            dtrain.Trainer(model, mean_square, optimizer, loader, comm=comm, config=dtrain.TrainConfig(epochs=1)).fit()
        return [p.detach() for p in model.parameters()]

    alone = dtrain.run(body, workers=1, backend="solo")[0]
    for got in dtrain.run(body, workers=2):
        for here, there in zip(got, alone, strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_evaluation_leaves_modes_as_they_were() -> None:
    """A layer that was frozen by eval() stays so."""
    model = make_model("norm", torch.float64)
    model.train()
    model[1].eval()
    dtrain.evaluate(model, Points(8), lambda m, b: {"n": m(b[0]).sum()}, Solo())
    assert not model[1].training
    assert model[4].training


# -- steps that servers make ------------------------------------------------------------------------------------------

SERVED = Job("plain", count=42, global_batch=8, micro_batch=2, halve_every=4, update="server")
ASYNCHRONOUS: dict[str, Job] = {
    "staleness 2": SERVED.with_config(staleness=2),
    "no bound": SERVED.with_config(staleness=None, damping=True, delay_compensation=0.1),
    "no bound, by steps": SERVED.with_config(staleness=None, steps=8, epochs=None, clip_grad_norm=0.5),
    "backup": SERVED.with_config(backup_workers=1),
    "backup, a stream": SERVED.but(stream=True).with_config(backup_workers=1, steps=9, epochs=None),
}


class Together(Hook):
    """Whether all workers have the same parameters, wherever somebody may look at them; worker 1 comes late."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, Any]] = []

    def _look(self, where: str, state: State) -> None:
        named = list(state.model.named_parameters())
        self.found.append((where, state.step, collectives.first_difference(state.comm, named)))

    def on_step(self, state: State) -> None:
        time.sleep(0.01 * (state.comm.rank == 1))

    def on_epoch(self, state: State) -> None:
        self._look("epoch", state)

    def on_end(self, state: State) -> None:
        self._look("end", state)


def served(comm: Backend, folder: Path) -> dict[str, Any]:
    """All that the tests below look at, of one worker."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"norms": fit(comm, NORMS.but(update="server"))}
    amp = Job("norm", dtype=torch.float32, halve_every=2).with_config(amp="bf16", norm_batch="global")
    found["amp"] = [fit(comm, amp.but(update=update))["parameters"] for update in ("server", "worker")]
    found["accumulated"] = fit(comm, Job(micro_batch=1, halve_every=2, update="server"))
    for name, job in ASYNCHRONOUS.items():
        together = Together()
        hooks = (together, Evaluate(Points(5, seed=1), square_sums), Checkpoint(folder / name, every_steps=4))
        job = job.but(config={"steps": None, "epochs": 2} | job.config)
        trainer = trainer_of(comm, job, hooks)
        state = trainer.fit()
        trainer.replica.check()
        position = state.step, state.epoch, state.samples
        found[name] = position, together.found, state.metrics, state.loss, trainer.replica.pushes.staleness
    for backup in (0, 1):
        spec = RunSpec(recipe="synthetic", update="server", steps=4, backup_workers=backup, progress=False)
        found["summary", backup] = runs.train(comm, spec)
    return found


@pytest.fixture(scope="module")
def by_servers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("served")
    return dtrain.run(served, folder, workers=3, backend="ps", servers=2, timeout_s=30.0)


def test_servers_train_as_one_worker_does(by_servers: list[dict[str, Any]]) -> None:
    """float64, batch norm over all workers, clipping, accumulation, unequal shares, a schedule."""
    alone = fit(Solo(), NORMS.but(micro_batch=6))
    for worker in by_servers:
        assert distance(worker["norms"]["parameters"], alone["parameters"]) <= ROUNDING
        assert distance(worker["norms"]["buffers"], alone["buffers"]) <= ROUNDING
        assert worker["norms"]["loss"] == pytest.approx(alone["loss"], rel=1e-10)
        assert worker["norms"]["position"] == alone["position"]
        assert worker["norms"]["optimizer"] == {}
        assert worker["norms"]["pushes"] == ({0: 9}, 0)
        assert not differences(worker["norms"]["parameters"], by_servers[0]["norms"]["parameters"])
    alone = fit(Solo(), Job(halve_every=2))
    for worker in by_servers:
        assert distance(worker["accumulated"]["parameters"], alone["parameters"]) <= ROUNDING
        assert worker["accumulated"]["lr"] == alone["lr"]


def test_servers_train_in_mixed_precision(by_servers: list[dict[str, Any]]) -> None:
    """As workers that step do, to rounding."""
    for worker in by_servers:
        assert distance(*worker["amp"]) <= 1e-5


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_everyone_has_the_same_where_somebody_looks(name: str, by_servers: list[dict[str, Any]]) -> None:
    """After epochs and at the end, also where workers do not wait for each other; scores are the same, too."""
    job = ASYNCHRONOUS[name]
    epochs, last = (2, 12) if job.config.get("steps") is None else (1, job.config["steps"])
    for worker in by_servers:
        (step, epoch, samples), looked, metrics, loss, staleness = worker[name]
        assert (step, epoch) == (last, epochs)
        assert job.stream or samples == by_servers[0][name][0][2]
        assert looked == [*(("epoch", 6 * (e + 1), None) for e in range(epochs)), ("end", last, None)]
        assert metrics == by_servers[0][name][2]
        assert math.isfinite(loss)
        assert sum(staleness.values()) <= last
        assert job.stream or samples == 42 * epochs + 8 * (last - 6 * epochs)
        assert job.config.get("backup_workers") or sum(staleness.values()) == last


def test_the_summary_counts_what_servers_keep(by_servers: list[dict[str, Any]]) -> None:
    """One copy of the optimizer's state instead of one a worker; what was stale, and what was dropped."""
    first = by_servers[0]["summary", 0]
    assert first["optimizer_bytes"] > 0
    assert first["optimizer_bytes_saved"] == 2 * first["optimizer_bytes"]
    assert first["staleness"] == [{"0": 4}] * 3
    assert first["dropped_gradients"] == [0] * 3
    backup = by_servers[0]["summary", 1]
    assert sum(sum(row.values()) for row in backup["staleness"]) == 8  # two of three make each of 4 steps
    assert backup["steps"] == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"amp": "fp16"}, "does not scale losses"),
        ({"norm_batch": 0, "update": "worker"}, "norm_batch is 0: a number of samples"),
        ({"norm_batch": "global", "staleness": 1}, "do not wait for each other"),
        ({"norm_batch": "global", "staleness": None}, "do not wait for each other"),
        ({"norm_batch": "global", "backup_workers": 1}, "do not wait for each other"),
        ({"nonfinite": "skip"}, "nonfinite is 'skip'"),
        ({"update": "worker", "staleness": 1}, "needs update=server"),
        ({"update": "first", "backup_workers": 1}, "needs update=server"),
        ({"update": "worker", "damping": True}, "needs update=server"),
        ({"update": "worker", "delay_compensation": 0.1}, "needs update=server"),
        ({"update": "elsewhere"}, "update is 'elsewhere': one of worker, first, server"),
    ],
)
def test_configurations_that_servers_cannot_meet(config: dict[str, Any], said: str) -> None:
    """Are refused when they are written down."""
    with pytest.raises(UsageError, match=re.escape(said)):
        dtrain.TrainConfig(**({"steps": 1, "update": "server"} | config))


@pytest.mark.parametrize(
    ("norm_batch", "more", "said"),
    [
        (8, {"update": "server", "staleness": 1}, "norm_batch is 8, which 2 workers share, and they do not wait"),
        (64, {}, "only 16 samples on all workers together"),
        ("host", {}, "norm_batch is 'host': worker, global, or a number"),
    ],
)
def test_norm_batches_that_cannot_be_had(norm_batch: int | str, more: dict[str, Any], said: str) -> None:
    data = Loader(range(64), global_batch=32, micro_batch=4, world_size=4)
    with pytest.raises(UsageError, match=re.escape(said)):
        norm_sharing(dtrain.TrainConfig(steps=1, norm_batch=norm_batch, **more), data)


def test_a_norm_batch_of_several_workers_needs_micro_batches_of_one_size() -> None:
    data = Loader(range(64), global_batch=15, micro_batch=4, world_size=4)
    with pytest.raises(UsageError, match="not all of one size"):
        norm_sharing(dtrain.TrainConfig(steps=1, norm_batch=8), data)
    assert norm_sharing(dtrain.TrainConfig(steps=1, norm_batch=2), data) == norm.Sharing(ghost=2)
    assert norm_sharing(dtrain.TrainConfig(steps=1), data) is None


@pytest.mark.parametrize(
    ("rules", "said"),
    [({"staleness": -1}, "staleness is -1"), ({"backup_workers": 1, "staleness": 2}, "backup_workers is 1")],
)
def test_rules_that_servers_cannot_meet(rules: dict[str, Any], said: str) -> None:
    """Are refused before the model is tied."""
    with pytest.raises(UsageError, match=said):
        solo(Job(update="server").with_config(**rules))
    with pytest.raises(UsageError, match="solo has none"):
        solo(Job(update="server"))
