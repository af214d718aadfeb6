"""One training run of a recipe: from what was asked for to the files that a run leaves.

A run directory holds `config.json` (what was asked for, and versions), `metrics.jsonl` (a record every few steps and
the scores after each epoch), `summary.json` (the figures at the end), `model.safetensors` (the final weights) and
`checkpoints/`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dtrain import checkpoint, env, live, norm
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.config import TrainConfig
from dtrain.data import Loader, to_device
from dtrain.errors import UsageError
from dtrain.hooks import Checkpoint, Evaluate, Hook, JsonLog, Precise, Prometheus, TensorBoard
from dtrain.learning import curvature, curvature_words, describe, make_optimizer, make_schedule
from dtrain.outcome import asked_for, summarise_run, write_record
from dtrain.recipes import Recipe
from dtrain.resuming import (
    check_place,
    check_same,
    ended_at,
    ended_before,
    has_ended,
    nothing_to_train,
    resume,
    resumes,
    started_again,
)
from dtrain.spec import RunSpec, every_steps, loader_of, named_device
from dtrain.timeline import StepLog, Trace
from dtrain.trainer import Trainer, norm_sharing


def train(comm: Backend, spec: RunSpec) -> dict[str, Any]:
    """Train a recipe as one worker of a job; the summary, the same on every worker.

    Raises:
        UsageError: what cannot be meant, a run directory that holds another run's checkpoints among it.
        DataError: data or checkpoints that cannot be read.
    """
    device = _device(comm, spec)
    comes_back = getattr(comm, "epoch", 0) > 0  # to a run that has begun: `fit` then loads what all others load
    again = comes_back or started_again(comm)
    check_place(spec, again=again)
    folder = None if spec.run_dir is None else Path(spec.run_dir)
    recipe = spec.build()
    trainer = _trainer(comm, spec, recipe, device, folder)
    resumed_step = 0
    if folder is not None and not comes_back and resumes(comm, spec, folder, again=again):
        resumed_step = resume(trainer, spec, recipe, folder)
        if (trainer.over or trainer.state.step == trainer.state.steps) and has_ended(trainer, folder):
            if spec.resume:
                raise nothing_to_train(resumed_step)
            return ended_before(comm, spec, folder)
    if comm.rank == 0 and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # of an earlier, shorter run
        write_record(folder / "config.json", asked_for(spec, trainer, recipe, device))
    samples_before = trainer.state.samples
    if spec.checkpoint_every != "never" and folder is not None:
        stop_at_signals()
        _stoppable.add(trainer)
    started_s = time.perf_counter()
    try:
        state = trainer.fit()
    finally:
        _stoppable.discard(trainer)
    seconds = time.perf_counter() - started_s
    if not trainer.records and not state.rewinds and not resumed_step:
        raise nothing_to_train(resumed_step)
    if trainer.config.joint or trainer.config.update == "server":
        trainer.replica.check()
    summary = summarise_run(trainer, recipe, spec, seconds, state.samples - samples_before)
    writes = summary["written_by"] == comm.rank
    if spec.diagnose_batches and folder is not None:
        batches = _some_batches(trainer.data, state.epoch, spec.diagnose_batches, device)
        diagnosis = norm.diagnose(trainer.model, batches, comm=trainer.comm, forward=recipe.loss)
        if writes:
            write_record(folder / "diagnosis.json", dataclasses.asdict(diagnosis))
    if writes and folder is not None:
        checkpoint.save_tensors(folder / "model.safetensors", state.model.state_dict())
        write_record(folder / "summary.json", summary)
    if spec.curvature_samples is not None:  # which may fail, where training has diverged
        progress = spec.progress and sys.stderr.isatty()
        summary["curvature"] = curvature(trainer, recipe, spec.curvature_samples, progress=progress)
        if writes and folder is not None:
            write_record(folder / "summary.json", summary)
        if writes and spec.progress:
            print(f"dtrain: {curvature_words(summary['curvature'])}", file=sys.stderr, flush=True)
    collectives.barrier(comm)
    return summary


_stoppable: weakref.WeakSet[Trainer] = weakref.WeakSet()
"""The trainers of this process that save their state when they are asked to stop."""


def stop_at_signals() -> None:
    """Let runs of this process save their state and end with 75 when it is asked to stop.

    A second Ctrl-C ends it at once, and so does any signal where there is nothing to save yet. Signals come to the main
    thread: where workers are threads, it is to call this.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, _: object) -> None:
        trainers = list(_stoppable)
        for trainer in trainers:
            trainer.stop()
        if number == signal.SIGINT or not trainers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if not trainers:
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)


def check(spec: RunSpec, workers: int) -> None:
    """Refuse what can be known to fail before processes are started, so that it is said once.

    Raises:
        UsageError: what cannot be meant.
        DataError: data or checkpoints that cannot be read.
    """
    check_place(spec)
    named_device(spec)
    if spec.live and sys.stderr.isatty():
        live.check_rich()
    if spec.checkpoint_every != "never":
        every_steps(spec.checkpoint_every)
    recipe = spec.build()
    config = spec.train_config(recipe)
    if config.backup_workers >= workers:
        raise UsageError(f"backup_workers is {config.backup_workers} of {workers} workers: leave one at least")
    loader = loader_of(spec, recipe, 0, workers)
    norm_sharing(config, loader)
    optimizer = make_optimizer(spec, recipe, recipe.model)
    make_schedule(spec, recipe, optimizer, config, loader, _steps(config, loader))
    describe(spec, recipe, optimizer, loader)
    total = _steps(config, loader)
    if spec.run_dir is not None and (spec.resume or spec.auto_resume):
        check_same(spec, recipe, Path(spec.run_dir))
        root = Path(spec.run_dir) / "checkpoints"
        ended = spec.resume and ended_at(Path(spec.run_dir)) is not None
        if ended and 0 < total <= checkpoint.steps(root)[-1] and (step := checkpoint.load(root).step) >= total:
            raise nothing_to_train(step)


def _steps(config: TrainConfig, loader: Loader) -> int:
    """Optimizer steps in all; 0 where the data do not say."""
    return config.steps or (loader.steps_per_epoch or 0) * (config.epochs or 0)


def _trainer(comm: Backend, spec: RunSpec, recipe: Recipe, device: torch.device, folder: Path | None) -> Trainer:
    model = recipe.model.to(device)
    first = "first" if getattr(comm, "device", None) is not None else None
    config = spec.train_config(recipe, update=first)
    optimizer = make_optimizer(spec, recipe, model)
    loader = loader_of(spec, recipe, comm.rank, comm.world_size)
    scheduler, steering = make_schedule(spec, recipe, optimizer, config, loader, _steps(config, loader))
    text = describe(spec, recipe, optimizer, loader)
    if comm.rank == 0 and spec.progress:
        print(f"dtrain: {text}", file=sys.stderr, flush=True)
    return Trainer(
        model,
        recipe.loss,
        optimizer,
        loader,
        comm=comm,
        config=config,
        scheduler=scheduler,
        hooks=[*steering, *_precise(spec, recipe, loader, device), *_hooks(spec, recipe, comm, device, folder)],
    )


def _precise(spec: RunSpec, recipe: Recipe, loader: Loader, device: torch.device) -> list[Hook]:
    for name in ("precise_batches", "diagnose_batches"):
        if getattr(spec, name) < 0:
            raise UsageError(f"{name} is {getattr(spec, name)}: give 0 or more")

    def batches(epoch: int) -> Iterator[Any]:
        return _some_batches(loader, epoch, spec.precise_batches, device)

    return [Precise(batches, forward=recipe.loss)] if spec.precise_batches else []


def _some_batches(loader: Loader, epoch: int, count: int, device: torch.device) -> Iterator[Any]:
    """This worker's first micro-batches of an epoch."""
    for batch, _ in itertools.islice(loader.batches(epoch), count):
        yield to_device(batch, device)


def _hooks(spec: RunSpec, recipe: Recipe, comm: Backend, device: torch.device, folder: Path | None) -> list[Hook]:
    hooks: list[Hook] = []
    if recipe.test is not None:
        hooks.append(Evaluate(recipe.test, recipe.score, finish=recipe.finish, device=device))
    label = f"{spec.recipe} {comm.name} x{comm.world_size}"
    hooks += live.view(label, live=spec.live, progress=spec.progress)
    if spec.metrics_port is not None:
        hooks.append(Prometheus(spec.metrics_port))
    if folder is not None:
        hooks += [JsonLog(folder / "metrics.jsonl"), StepLog(folder / "steps.jsonl")]
        if spec.tensorboard:
            hooks.append(TensorBoard(folder / "tensorboard"))
        if spec.checkpoint_every != "never":
            hooks.append(Checkpoint(folder / "checkpoints", every_steps=every_steps(spec.checkpoint_every)))
        hooks.append(Trace(folder / "trace.json"))  # after what matters more
    elif spec.tensorboard:
        raise UsageError("--tensorboard needs --run-dir, where its files go")
    return hooks


def _device(comm: Backend, spec: RunSpec) -> torch.device:
    given = getattr(comm, "device", None)
    if given is not None:
        return torch.device(given)
    device = named_device(spec)
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", env.resolve().local_rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
