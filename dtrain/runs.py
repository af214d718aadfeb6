"""One training run of a recipe: from what was asked for to the files that a run leaves.

A run directory holds `config.json` (what was asked for, and versions), `metrics.jsonl` (a record every few steps and
the scores after each epoch), `summary.json` (the figures at the end), `model.safetensors` (the final weights) and
`checkpoints/`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from dtrain import checkpoint, env, live, norm, recipes
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.config import TrainConfig
from dtrain.data import Loader, to_device
from dtrain.errors import DataError, UsageError
from dtrain.hooks import Checkpoint, Evaluate, Hook, JsonLog, Precise, Prometheus, TensorBoard, finite
from dtrain.learning import Learning, curvature, describe, make_optimizer, make_schedule
from dtrain.measure import summarise
from dtrain.measure.memory import peak_bytes, tensors
from dtrain.recipes import Recipe
from dtrain.steering import AdaptBatch, NoiseScale
from dtrain.timeline import StepLog, Trace
from dtrain.trainer import Trainer, norm_sharing

Name = Literal["digits", "fashion", "text", "synthetic"]

_Place = Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")]
_Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
_Amount = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how. Flags of the commands too: the text under each field is its help."""

    recipe: Positional[Name] = "digits"
    """What to train: digits (scikit-learn's, a small CNN), fashion (Fashion-MNIST, ResNet-18), text (a character
    language model), synthetic (random data, for throughput)."""
    options: Annotated[tuple[str, ...], arg(name="option", metavar="NAME=VALUE ...", help_behavior_hint="")] = ()
    """Options of the recipe: `width=8` for fashion; `model=transformer hidden=128` for text and synthetic."""
    data: _Place = None
    """Directory of the Fashion-MNIST files, or a UTF-8 text file."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Type of the parameters; float64 shows that backends agree to the last digits."""
    device: str = "auto"
    """auto (CUDA if there is any, worker by worker), cpu, cuda, cuda:N."""
    global_batch: _Count = None
    """Samples in one optimizer step, over all workers. Default: the recipe's."""
    micro_batch: _Count = None
    """Most samples of one forward of a worker; more are accumulated."""
    epochs: _Count = None
    """Passes over the data. Default: the recipe's."""
    steps: _Count = None
    """Optimizer steps, instead of epochs."""
    lr: _Amount = None
    """Learning rate. Default: the recipe's."""
    clip_grad_norm: _Amount = None
    """Largest norm of the global gradient."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision: forward and backward in half precision, weights in their own."""
    seed: int = 0
    """Decides initial weights and the order of the data."""
    bucket_mb: float = 8.0
    """Size at which gradients are sent, in MiB."""
    log_every: int = 10
    """Steps between two records in metrics.jsonl."""
    num_data_workers: int = 0
    """Processes that fetch data ahead, for each worker."""
    progress: bool = True
    """Show a progress bar (on a terminal)."""


@dataclass(frozen=True, kw_only=True)
class RunSpec(Learning, Task):
    """One run of a task."""

    norm_batch: str = "worker"
    """Samples that share batch-norm statistics: a number of them, or `worker`: each worker's micro-batch by itself, or
    `global`: all workers'. Below a micro-batch: ghost batch norm; above: synchronised over groups of workers."""
    precise_batches: int = 0
    """Before each evaluation and checkpoint, compute the running batch-norm statistics again over so many micro-batches
    of each worker, with the weights as they are. 0: leave them as training has averaged them."""
    diagnose_batches: int = 0
    """At the end, look at the batch-norm layers on so many micro-batches of each worker, and write diagnosis.json,
    which `dtrain report` shows. 0: do not."""
    run_dir: _Place = None
    """Where the run's files go. Default: runs/RECIPE-BACKEND-TIME."""
    checkpoint_every: str = "epoch"
    """epoch, never, or a number of steps."""
    update: Literal["worker", "server", "sharded"] = "worker"
    """Who steps the optimizer: every worker its own; the servers of ps, which keep one copy of its state; or each
    worker a part of the parameters, of which it keeps the state (ZeRO-1)."""
    send_as: Literal["same", "bf16", "fp16"] = "same"
    """Type that gradients travel as: half the bytes. They are added in float32."""
    staleness: str = "0"
    """With --update server: steps that the fastest worker may be ahead of the slowest. 0: synchronous, none: no
    bound."""
    backup_workers: int = 0
    """With --update server: make each step of the gradients that come first, without the last so many."""
    damping: bool = False
    """With staleness: divide the learning rate by the staleness of each gradient."""
    delay_compensation: float = 0.0
    """With staleness: lambda of DC-ASGD, which corrects a gradient for what others changed meanwhile."""
    nonfinite: Literal["allow", "skip", "abort"] = "allow"
    """What to do when a worker's gradient is NaN or infinite: nothing, leave the step out, or end the run."""
    on_worker_loss: Literal["fail", "wait", "drop"] = "fail"
    """When a process dies. fail: the job ends. wait (ps): it is started again, and all go back to the last checkpoint
    and on to the same bits. drop (ps, --update server): the job goes on without it."""
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir."""
    auto_resume: bool = False
    """Go on from the newest checkpoint in --run-dir, or begin where there is none: for jobs that are started again by
    Slurm, Kubernetes or an elastic torchrun."""
    live: bool = False
    """Show the run as it happens, on a terminal: loss, speed, where a step's time goes, and who is late."""
    tensorboard: bool = False
    """Write scalars for TensorBoard into the run directory."""
    metrics_port: Annotated[int | None, arg(metavar="PORT", help_behavior_hint="")] = None
    """Tell worker 0's figures to Prometheus at http://127.0.0.1:PORT/metrics (extra dtrain[metrics]); 0 takes a free
    port."""

    def build(self) -> Recipe:
        """The recipe, with its data.

        Raises:
            UsageError: an option that is not name=value, or that the recipe does not have.
        """
        pairs = [option.partition("=") for option in self.options]
        wrong = [name for name, sign, _ in pairs if not (name and sign)]
        if wrong:
            raise UsageError(f"--option {wrong[0]}: give name=value")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}; it is one of {', '.join(DTYPES)}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise UsageError(f"lr is {self.lr}: give 0 or more")
        options = {name: value for name, _, value in pairs}
        return recipes.build(self.recipe, seed=self.seed, dtype=DTYPES[self.dtype], data=self.data, **options)

    def check_loss(self, backend: str) -> None:
        """Refuse what does not go together when a process is lost.

        Raises:
            UsageError: a policy that this backend or this update has not.
        """
        if self.on_worker_loss != "fail" and backend != "ps":
            raise UsageError(f"on_worker_loss is {self.on_worker_loss!r} with backend {backend}: it needs backend ps")
        if self.on_worker_loss == "drop" and self.update != "server":
            raise UsageError(
                "on_worker_loss is 'drop': only servers that step know whose gradients count; --update server"
            )
        if self.on_worker_loss == "wait" and self.checkpoint_every == "never":
            raise UsageError(
                "on_worker_loss is 'wait', and checkpoint_every 'never': there would be nothing to go back to"
            )
        measures = "noise_scale" if self.noise_scale else "adapt_batch"
        if self.update != "worker" and getattr(self, measures):
            raise UsageError(f"{measures} with update={self.update}: workers do not get the mean gradient there")
        changes = "grow_batch" if self.grow_batch is not None else "adapt_batch"
        if getattr(self, changes) is not None and (_staleness(self.staleness) != 0 or self.backup_workers):
            raise UsageError(
                f"{changes} where workers do not wait for each other: give staleness=0 and no backup workers"
            )
        if self.curvature_samples is not None and self.dtype not in ("float32", "float64"):
            raise UsageError(f"curvature_samples with dtype {self.dtype}: it is measured in float32 or float64")
        if self.update == "server" and backend != "ps":
            raise UsageError(f"update is 'server' with backend {backend}, which has no server: give --backend ps")

    def train_config(self, recipe: Recipe, *, update: str | None = None) -> TrainConfig:
        """The trainer's part of it, with the recipe's defaults filled in."""
        neither = self.epochs is None and self.steps is None
        return TrainConfig(
            epochs=recipe.epochs if neither else self.epochs,
            steps=self.steps,
            clip_grad_norm=self.clip_grad_norm,
            amp=self.amp,
            send_as=self.send_as,
            norm_batch=int(self.norm_batch) if self.norm_batch.isdigit() else self.norm_batch,
            update=update or self.update,  # type: ignore[arg-type]
            staleness=_staleness(self.staleness),
            backup_workers=self.backup_workers,
            damping=self.damping,
            delay_compensation=self.delay_compensation,
            nonfinite=self.nonfinite,
            rewind_to=Path(self.run_dir) / "checkpoints" if self.on_worker_loss == "wait" and self.run_dir else None,
            seed=self.seed,
            bucket_mb=self.bucket_mb,
            log_every=self.log_every,
        )


def train(comm: Backend, spec: RunSpec) -> dict[str, Any]:
    """Train a recipe as one worker of a job; the summary, the same on every worker.

    Raises:
        UsageError: what cannot be meant, a run directory that holds another run's checkpoints among it.
        DataError: data or checkpoints that cannot be read.
    """
    device = _device(comm, spec)
    comes_back = getattr(comm, "epoch", 0) > 0  # to a run that has begun: `fit` then loads what all others load
    again = comes_back or _started_again(comm)
    check_place(spec, again=again)
    folder = None if spec.run_dir is None else Path(spec.run_dir)
    recipe = spec.build()
    trainer = _trainer(comm, spec, recipe, device, folder)
    resumed_step = 0
    if folder is not None and not comes_back and _resumes(comm, spec, folder, again=again):
        resumed_step = _resume(trainer, spec, recipe, folder)
        if (trainer.over or trainer.state.step == trainer.state.steps) and _has_ended(trainer, folder):
            if spec.resume:
                raise _nothing_to_train(resumed_step)
            return _ended_before(comm, spec, folder)
    if comm.rank == 0 and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # of an earlier, shorter run
        _write(folder / "config.json", _asked_for(spec, trainer, recipe, device))
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
        raise _nothing_to_train(resumed_step)
    if trainer.config.joint or trainer.config.update == "server":
        trainer.replica.check()
    summary = _summary(trainer, recipe, spec, seconds, state.samples - samples_before)
    if spec.diagnose_batches and folder is not None:
        batches = _some_batches(trainer.data, state.epoch, spec.diagnose_batches, device)
        diagnosis = norm.diagnose(trainer.model, batches, comm=trainer.comm, forward=recipe.loss)
        if comm.rank == 0:
            _write(folder / "diagnosis.json", dataclasses.asdict(diagnosis))
    if comm.rank == 0 and folder is not None:
        checkpoint.save_tensors(folder / "model.safetensors", state.model.state_dict())
        _write(folder / "summary.json", summary)
    if spec.curvature_samples is not None:  # which may fail, where training has diverged
        progress = spec.progress and sys.stderr.isatty()
        summary["curvature"] = curvature(trainer, recipe, spec.curvature_samples, progress=progress)
        if comm.rank == 0 and folder is not None:
            _write(folder / "summary.json", summary)
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


def _started_again(comm: Backend) -> bool:
    """Whether a launcher has started this job before. torchrun's agents do not all count alike: any one's word does."""
    return collectives.any_says(comm, env.resolve().restart > 0, "metric/again")


def _resumes(comm: Backend, spec: RunSpec, folder: Path, *, again: bool) -> bool:
    """Whether to go on from a checkpoint, the same for all workers."""
    if spec.resume:
        return True
    found = (spec.auto_resume or again) and bool(checkpoint.steps(folder / "checkpoints"))
    return collectives.any_says(comm, found, "metric/resume")


def _has_ended(trainer: Trainer, folder: Path) -> bool:
    """Whether a run that has made all of its steps has also left its files; worker 0 looks for all."""
    ended = trainer.comm.rank == 0 and _ended_at(folder) == trainer.state.step
    return collectives.any_says(trainer.comm, ended, "metric/ended")


def _ended_at(folder: Path) -> int | None:
    """The last step of a run that has ended."""
    try:
        steps: int | None = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError):
        return None
    return steps


def _ended_before(comm: Backend, spec: RunSpec, folder: Path) -> dict[str, Any]:
    """The summary of a run that had ended when it was started again."""
    if comm.rank == 0 and spec.progress:
        print(f"dtrain: the run in {folder} had ended; nothing is left to train", file=sys.stderr, flush=True)
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'summary.json'} cannot be read: {error}") from error
    collectives.barrier(comm)
    return summary


def check_place(spec: RunSpec, *, again: bool = False) -> None:
    """Refuse a run directory that does not fit what is asked for.

    Args:
        again: whether this job was started before, and so finds checkpoints of its own.

    Raises:
        UsageError: it has the checkpoints of another run, or none is given to resume.
        DataError: there is no checkpoint to resume from.
    """
    if spec.resume and spec.auto_resume:
        raise UsageError("--resume and --auto-resume: the one needs a checkpoint, the other does not; give one of them")
    if spec.run_dir is None:
        if spec.resume or spec.auto_resume:
            flag = "--resume" if spec.resume else "--auto-resume"
            raise UsageError(f"{flag} needs --run-dir: the directory of the run to go on with")
        return
    root = Path(spec.run_dir) / "checkpoints"
    found = checkpoint.steps(root)
    if found and not (spec.resume or spec.auto_resume or again):
        raise UsageError(f"{spec.run_dir} has the checkpoints of an earlier run: give --resume, or another --run-dir")
    if spec.resume and not found:
        checkpoint.load(root)  # says what is wrong


def check(spec: RunSpec, workers: int) -> None:
    """Refuse what can be known to fail before processes are started, so that it is said once.

    Raises:
        UsageError: what cannot be meant.
        DataError: data or checkpoints that cannot be read.
    """
    check_place(spec)
    _named_device(spec)
    if spec.live and sys.stderr.isatty():
        live.check_rich()
    if spec.checkpoint_every != "never":
        _every_steps(spec.checkpoint_every)
    recipe = spec.build()
    config = spec.train_config(recipe)
    if config.backup_workers >= workers:
        raise UsageError(f"backup_workers is {config.backup_workers} of {workers} workers: leave one at least")
    loader = _loader(spec, recipe, 0, workers)
    norm_sharing(config, loader)
    optimizer = make_optimizer(spec, recipe, recipe.model)
    make_schedule(spec, recipe, optimizer, config, loader, _steps(config, loader))
    describe(spec, recipe, optimizer, loader)
    total = _steps(config, loader)
    if spec.run_dir is not None and (spec.resume or spec.auto_resume):
        _check_same(spec, recipe, Path(spec.run_dir))
        root = Path(spec.run_dir) / "checkpoints"
        ended = spec.resume and _ended_at(Path(spec.run_dir)) is not None
        if ended and 0 < total <= checkpoint.steps(root)[-1] and (step := checkpoint.load(root).step) >= total:
            raise _nothing_to_train(step)


_SAME = (
    *("recipe", "options", "data", "dtype", "seed", "global_batch", "norm_batch", "precise_batches"),
    *("lr", "amp", "send_as", "clip_grad_norm"),
    *(field.name for field in dataclasses.fields(Learning) if field.name != "curvature_samples"),
)
"""What a resumed run must share with the run that it goes on with."""


def _resume(trainer: Trainer, spec: RunSpec, recipe: Recipe, folder: Path) -> int:
    """Go on from the newest checkpoint; the step that was reached."""
    planned = _check_same(spec, recipe, folder)
    step = trainer.resume(folder / "checkpoints")
    total = trainer.state.steps
    collectives.barrier(trainer.comm)  # all have read the old config.json
    if trainer.comm.rank == 0:
        if spec.progress:
            of = "" if total is None else f" of {total}"
            print(f"dtrain: resuming {folder} at step {step}{of}", file=sys.stderr, flush=True)
        now = _length(dataclasses.asdict(trainer.config))
        if planned not in (None, now):
            text = f"dtrain: this run is now {now}; up to step {step} its learning rate was planned for {planned}"
            print(text, file=sys.stderr, flush=True)
    return step


def _check_same(spec: RunSpec, recipe: Recipe, folder: Path) -> str | None:
    """Refuse to resume a run that was told otherwise; how long it was planned to be, where that is known."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} cannot be read: {error}; remove it to resume without it") from error
    given = {**dataclasses.asdict(spec), "lr": _rate(spec, recipe), "global_batch": _global_batch(spec, recipe)}
    for name in _SAME:
        if name not in saved:
            continue
        here, there = given[name], saved[name]
        if isinstance(here, tuple):
            here, there = sorted(here), sorted(there)
        if name == "lr" and there is None:  # as files of older versions say that it is the recipe's
            there = _rate(dataclasses.replace(spec, lr=None), recipe)
        if here != there:
            raise UsageError(
                f"{name} is {here!r}, and the run in {folder} has {there!r}: give the same, or another --run-dir"
            )
    return _length(saved)


def _length(config: dict[str, Any]) -> str:
    """Of `epochs` and `steps`, the one that is given, in words."""
    return f"{config['steps']} steps" if config.get("steps") is not None else f"{config.get('epochs')} epochs"


def _nothing_to_train(step: int) -> DataError:
    return DataError(f"nothing to train: the checkpoint is at step {step} already; raise --epochs or --steps")


def _rate(spec: RunSpec, recipe: Recipe) -> float:
    """The learning rate at the start."""
    if spec.lr is not None:
        return spec.lr
    return float(recipe.optimizer(recipe.model.parameters()).param_groups[0]["lr"])


def _global_batch(spec: RunSpec, recipe: Recipe) -> int:
    return recipe.global_batch if spec.global_batch is None else spec.global_batch


def _loader(spec: RunSpec, recipe: Recipe, rank: int, workers: int) -> Loader:
    return Loader(
        recipe.train,
        global_batch=_global_batch(spec, recipe),
        micro_batch=spec.micro_batch,
        rank=rank,
        world_size=workers,
        seed=spec.seed,
        num_workers=spec.num_data_workers,
    )


def _steps(config: TrainConfig, loader: Loader) -> int:
    """Optimizer steps in all; 0 where the data do not say."""
    return config.steps or (loader.steps_per_epoch or 0) * (config.epochs or 0)


def _trainer(comm: Backend, spec: RunSpec, recipe: Recipe, device: torch.device, folder: Path | None) -> Trainer:
    model = recipe.model.to(device)
    first = "first" if getattr(comm, "device", None) is not None else None
    config = spec.train_config(recipe, update=first)
    optimizer = make_optimizer(spec, recipe, model)
    loader = _loader(spec, recipe, comm.rank, comm.world_size)
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
            hooks.append(Checkpoint(folder / "checkpoints", every_steps=_every_steps(spec.checkpoint_every)))
        hooks.append(Trace(folder / "trace.json"))  # after what matters more
    elif spec.tensorboard:
        raise UsageError("--tensorboard needs --run-dir, where its files go")
    return hooks


def _staleness(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdigit():
        raise UsageError(f"staleness is {text!r}: a number of steps, or `none` for no bound")
    return int(text)


def _every_steps(text: str) -> int | None:
    if text == "epoch":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"checkpoint_every is {text!r}: `epoch`, `never`, or a number of steps")
    return int(text)


def _device(comm: Backend, spec: RunSpec) -> torch.device:
    given = getattr(comm, "device", None)
    if given is not None:
        return torch.device(given)
    device = _named_device(spec)
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", env.resolve().local_rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def one_device(spec: RunSpec) -> torch.device:
    """Where a model is looked at by itself: what was asked for, or CUDA if there is any.

    Raises:
        UsageError: a device that cannot be meant, or is not here.
    """
    return _named_device(spec) or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _named_device(spec: RunSpec) -> torch.device | None:
    """The device that was asked for; None where each worker finds its own."""
    if spec.device == "auto":
        return None
    try:
        device = torch.device(spec.device)
    except RuntimeError as error:
        raise UsageError(f"device is {spec.device!r}: give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device is {spec.device!r}, and this torch sees no CUDA device: see `dtrain doctor`")
    return device


def _asked_for(spec: RunSpec, trainer: Trainer, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What was asked for, with what the recipe filled in; names of buffers, which are no weights."""
    comm = trainer.comm
    return {
        **dataclasses.asdict(spec),
        **{k: v for k, v in dataclasses.asdict(trainer.config).items() if k != "rewind_to"},
        "global_batch": trainer.data.first_batch,
        "lr": _rate(spec, recipe),
        "buffers": [name for name, _ in trainer.model.named_buffers()],
        "backend": comm.name,
        "workers": comm.world_size,
        "servers": len(getattr(trainer.comm.inner, "addresses", ())),
        "device": str(device),
        "versions": {
            "dtrain": version("dtrain"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyzmq": version("pyzmq"),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _summary(trainer: Trainer, recipe: Recipe, spec: RunSpec, seconds: float, samples: int) -> dict[str, Any]:
    """The figures of a run: worker 0's typical step, everyone's beside it, and what the model has learnt."""
    state, comm = trainer.state, trainer.comm
    mine = json.dumps(summarise(trainer.records)).encode()
    workers = [json.loads(data) for data in collectives.gather_bytes(comm, mine, "metric/summary") if data]
    epochs = state.epoch if trainer.config.steps is None else round(state.samples / len(recipe.train), 3)  # type: ignore[arg-type]
    return {
        "recipe": spec.recipe,
        "backend": comm.name,
        "workers": comm.world_size,
        "dtype": spec.dtype,
        "epochs": epochs,
        "steps": state.step,
        "samples_per_s": samples / trainer.step_s if trainer.step_s else 0.0,  # where it came for the end only
        "seconds": seconds,
        **workers[0],
        "train_loss": state.loss,
        **({"loss": state.loss} | state.metrics),
        **recipe.notes,
        **_first_device(trainer, workers),
        **_servers(trainer),
        **_noise(trainer),
        "memory": {**trainer.memory, "peak_bytes": peak_bytes(trainer.device)},
        "late": [dataclasses.asdict(late) for late in state.late] if trainer.config.joint else [],
        "per_worker": workers,
    }


def _noise(trainer: Trainer) -> dict[str, Any]:
    """The gradient noise scale at the end, where it was measured, and what was decided by it."""
    found: dict[str, Any] = {}
    for hook in trainer.hooks:
        if isinstance(hook, NoiseScale) and hook.found is not None:
            found["noise_scale"] = dataclasses.asdict(hook.found.whole)
        if isinstance(hook, AdaptBatch):
            found["decisions"] = hook.decisions
    return found


def _servers(trainer: Trainer) -> dict[str, Any]:
    """With the update on the servers: memory of the optimizer, and what became of each worker's gradients."""
    pushes, comm = trainer.replica.pushes, trainer.comm
    found: dict[str, Any] = {"rewinds": trainer.state.rewinds} if trainer.config.rewind_to else {}
    if pushes is None:
        return found
    mine = json.dumps({"staleness": pushes.staleness, "dropped": pushes.dropped}).encode()
    rows = [json.loads(data) for data in collectives.gather_bytes(comm, mine, "metric/staleness") if data]
    nbytes = pushes.state_bytes()
    collectives.barrier(comm)
    return found | {
        "placement": pushes.table(),
        "optimizer_bytes": nbytes,
        "optimizer_bytes_saved": nbytes * (comm.world_size - 1),  # against a copy on each worker
        "staleness": [row["staleness"] for row in rows],
        "dropped_gradients": [row["dropped"] for row in rows],
    }


def _first_device(trainer: Trainer, workers: list[dict[str, float]]) -> dict[str, Any]:
    """With the update on worker 0: what its device carries more than each other one."""
    if getattr(trainer.comm.inner, "device", None) is None:
        return {}
    state_bytes = sum(t.nbytes for t in tensors(list(trainer.optimizer.state.values())))
    rows = collectives.gather_numbers(trainer.comm, [state_bytes], "metric/devices")
    sent, received = ([w[f"bytes_{way}_per_step"] for w in workers] for way in ("sent", "received"))
    return {
        "device0_extra_memory_bytes": _extra([row[0] for row in rows]),
        "device0_extra_bytes_sent_per_step": _extra(sent),
        "device0_extra_bytes_received_per_step": _extra(received),
    }


def _extra(values: Sequence[float]) -> float:
    """What the first has more than any other."""
    return values[0] - max(values[1:], default=0)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
