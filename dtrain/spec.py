"""What a run is told: the recipe, how it is trained, and where. The flags of `dtrain train`, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from dtrain import recipes
from dtrain.config import TrainConfig
from dtrain.data import Loader
from dtrain.errors import UsageError
from dtrain.learning import Learning
from dtrain.recipes import Recipe

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
    early_forward: bool = False
    """With --update server or sharded: the next forward begins before all parameters are there; each layer waits for
    its own. The numbers are the same."""
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
            early_forward=self.early_forward,
            nonfinite=self.nonfinite,
            rewind_to=Path(self.run_dir) / "checkpoints" if self.on_worker_loss == "wait" and self.run_dir else None,
            seed=self.seed,
            bucket_mb=self.bucket_mb,
            log_every=self.log_every,
        )


def first_rate(spec: RunSpec, recipe: Recipe) -> float:
    """The learning rate at the start."""
    if spec.lr is not None:
        return spec.lr
    return float(recipe.optimizer(recipe.model.parameters()).param_groups[0]["lr"])


def batch_of(spec: RunSpec, recipe: Recipe) -> int:
    """The global batch at the start."""
    return recipe.global_batch if spec.global_batch is None else spec.global_batch


def loader_of(spec: RunSpec, recipe: Recipe, rank: int, workers: int) -> Loader:
    """The training data as one of the workers gets them."""
    return Loader(
        recipe.train,
        global_batch=batch_of(spec, recipe),
        micro_batch=spec.micro_batch,
        rank=rank,
        world_size=workers,
        seed=spec.seed,
        num_workers=spec.num_data_workers,
    )


def _staleness(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdigit():
        raise UsageError(f"staleness is {text!r}: a number of steps, or `none` for no bound")
    return int(text)


def every_steps(text: str) -> int | None:
    """Steps between two checkpoints, of `checkpoint_every`; None: one an epoch."""
    if text == "epoch":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"checkpoint_every is {text!r}: `epoch`, `never`, or a number of steps")
    return int(text)


def one_device(spec: RunSpec) -> torch.device:
    """Where a model is looked at by itself: what was asked for, or CUDA if there is any.

    Raises:
        UsageError: a device that cannot be meant, or is not here.
    """
    return named_device(spec) or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_device(spec: RunSpec) -> torch.device | None:
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
