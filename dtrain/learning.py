"""What decides a run's learning rate, optimizer and batch: flags of the commands, and what is made of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Subset
from tyro.conf import arg

from dtrain import largebatch, norm
from dtrain.config import TrainConfig
from dtrain.data import Loader
from dtrain.errors import UsageError
from dtrain.hooks import Hook
from dtrain.largebatch import Schedule
from dtrain.recipes import Recipe
from dtrain.steering import AdaptBatch, NoiseScale, Steer
from dtrain.trainer import Trainer

_Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
_Amount = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "lars": largebatch.LARS,
    "lamb": largebatch.LAMB,
}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Flags of large batches. The text under each field is its help."""

    optimizer: Literal["recipe", "sgd", "adam", "adamw", "lars", "lamb"] = "recipe"
    """The recipe's, or another one, which needs --lr."""
    momentum: _Amount = None
    """Of SGD or LARS. Default: the recipe's, else 0.9."""
    weight_decay: _Amount = None
    """Of matrices and kernels; none of biases and norms. Default: the recipe's, else 0."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Multiply the learning rate by (global batch / base batch), or its root."""
    base_batch: _Count = None
    """The global batch that the learning rate is tuned for. Default: the recipe's."""
    schedule: Literal["recipe", "constant", "decay", "cosine", "polynomial"] = "recipe"
    """How the learning rate falls: as the recipe has it, or by the samples seen. polynomial is of power 2, as for
    LARS."""
    milestones: Annotated[tuple[float, ...], arg(metavar="EPOCH ...", help_behavior_hint="")] = ()
    """With --schedule decay: when the rate falls, in epochs."""
    decay_by: float = 0.1
    """With --schedule decay: what the rate is multiplied by at each milestone."""
    warmup_epochs: _Amount = None
    """With a --schedule: let the rate rise for so many epochs, from that of the base batch, or from 0."""
    grow_batch: _Count = None
    """With a --schedule: where the rate would fall by k, multiply the global batch by k instead, up to N samples; what
    is left falls to the rate."""
    noise_scale: bool = False
    """Measure the gradient noise scale, which tells how large a batch pays; in metrics.jsonl, and advice at the end."""
    adapt_batch: _Count = None
    """With a --schedule: let the global batch follow the gradient noise scale, up to N samples, and the rate by
    --lr-scaling; without that, by AdaScale's gain."""
    curvature_samples: _Count = None
    """At the end, measure the Hessian on N training samples: its largest eigenvalues and trace, and Keskar's sharpness;
    in summary.json. Ten to a hundred gradients over them."""

    def __post_init__(self) -> None:
        for name in ("base_batch", "grow_batch", "adapt_batch", "curvature_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}: a number of samples, 1 or more")
        for name, most in (("momentum", 1.0), ("weight_decay", math.inf), ("warmup_epochs", math.inf)):
            if (rate := getattr(self, name)) is not None and not 0 <= rate < most:
                raise UsageError(f"{name} is {rate}: 0 or more{', and below 1' if most == 1 else ''}")
        if self.base_batch is not None and self.lr_scaling == "none":
            raise UsageError(f"base_batch is {self.base_batch} without lr_scaling: give --lr-scaling linear or sqrt")
        if self.grow_batch is not None and self.adapt_batch is not None:
            raise UsageError("grow_batch and adapt_batch are both given: the batch follows the schedule, or the noise")
        if (self.schedule == "decay") != bool(self.milestones):
            raise UsageError(
                f"schedule is {self.schedule!r} and milestones are {list(self.milestones)}: --schedule decay needs "
                "--milestones, and no other schedule has them"
            )
        if self.schedule != "decay" and self.decay_by != 0.1:
            raise UsageError(f"decay_by is {self.decay_by} with schedule {self.schedule!r}: --schedule decay has it")
        if self.schedule == "constant" and self.grow_batch is not None:
            raise UsageError(f"grow_batch is {self.grow_batch} with a constant schedule: nothing falls; --adapt-batch?")
        for name in ("warmup_epochs", "grow_batch", "adapt_batch"):
            if self.schedule == "recipe" and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is {getattr(self, name)} with the recipe's schedule, which counts steps: give --schedule"
                )


def make_optimizer(spec: Any, recipe: Recipe, model: nn.Module) -> Optimizer:
    """The optimizer of a run, with the rate of its global batch.

    Args:
        spec: a `dtrain.spec.RunSpec`.

    Raises:
        UsageError: a setting that this optimizer has not, or another optimizer without a rate.
    """
    parameters: Any = model.parameters()
    if spec.weight_decay is not None:
        parameters = largebatch.parameter_groups(model, spec.weight_decay)
    if spec.optimizer == "recipe":
        made = recipe.optimizer(parameters)
    elif spec.lr is None:
        raise UsageError(f"optimizer is {spec.optimizer}: give its learning rate, --lr; the recipe's is for another")
    else:
        made = _OPTIMIZERS[spec.optimizer](parameters, lr=spec.lr)
    factor = rate_factor(spec, recipe)
    for group in made.param_groups:
        if spec.momentum is not None:
            if "momentum" not in group:
                raise UsageError(f"momentum is {spec.momentum}, which {type(made).__name__} has not: leave it out")
            group["momentum"] = spec.momentum
            if not spec.momentum and "nesterov" in group:  # which needs some
                group["nesterov"] = False
        group["lr"] = (group["lr"] if spec.lr is None else spec.lr) * factor
    return made


def rate_factor(spec: Any, recipe: Recipe) -> float:
    """What the learning rate is multiplied by for the global batch."""
    batch = spec.global_batch or recipe.global_batch
    return largebatch.scale(batch, spec.base_batch or recipe.global_batch, spec.lr_scaling)


def make_schedule(
    spec: Any, recipe: Recipe, optimizer: Optimizer, config: TrainConfig, loader: Loader, steps: int
) -> tuple[LRScheduler | None, list[Hook]]:
    """The scheduler of a recipe, or the hooks that set rate and batch by the samples seen.

    Args:
        steps: optimizer steps in all, for the recipe's schedule.
    """
    hooks: list[Hook] = []
    second = isinstance(optimizer, torch.optim.Adam)  # and so AdamW
    if spec.noise_scale and spec.adapt_batch is None:
        every = max(1, min(20, steps // 100)) if steps else 20  # a hundred samples, where a run is short
        hooks.append(NoiseScale(every=every, optimizer=optimizer if second else None))
    if spec.schedule == "recipe":
        return (recipe.schedule(optimizer, steps) if recipe.schedule else None), hooks
    if loader.num_samples is None:
        raise UsageError("a schedule counts epochs, and this data set is a stream of unknown length")
    schedule = _schedule(spec, recipe, config, loader)
    batch, samples = loader.global_batch, loader.num_samples
    whole = loader.world_size * loader.micro_batch if loader.even else 1
    if spec.adapt_batch is not None:
        rule = largebatch.Rule(smallest=batch, largest=spec.adapt_batch, multiple_of=whole)
        scaling = "adascale" if spec.lr_scaling == "none" else spec.lr_scaling
        hooks.append(
            AdaptBatch(optimizer, rule, samples=samples, schedule=schedule, lr_scaling=scaling, preconditioned=second)
        )
    else:
        course = largebatch.steady(schedule, batch)
        if spec.grow_batch is not None:
            course = largebatch.grow(
                schedule,
                batch=batch,
                max_batch=spec.grow_batch,
                after=spec.warmup_epochs or 0.0,
                multiple_of=whole,
                jump=1.0 if spec.schedule == "decay" else math.sqrt(2),
            )
        hooks.append(Steer(optimizer, course, samples=samples))
    return None, hooks


def _schedule(spec: Any, recipe: Recipe, config: TrainConfig, loader: Loader) -> Schedule:
    changes = "grow_batch" if spec.grow_batch is not None else "adapt_batch" if spec.adapt_batch is not None else ""
    if changes and config.epochs is None and spec.schedule in ("cosine", "polynomial"):
        raise UsageError(f"{changes} with --steps and schedule {spec.schedule}, which counts epochs: give --epochs")
    length = config.epochs or (config.steps or 0) * loader.global_batch / (loader.num_samples or 1)
    schedules: dict[str, Callable[[], Schedule]] = {
        "constant": largebatch.constant,
        "decay": lambda: largebatch.decay(spec.milestones, spec.decay_by),
        "cosine": lambda: largebatch.cosine(length),
        "polynomial": lambda: largebatch.polynomial(length),
    }
    made = schedules[spec.schedule]()
    if spec.warmup_epochs is None:
        return made
    return largebatch.warm_up(made, spec.warmup_epochs, start=_start(rate_factor(spec, recipe)))


def _start(factor: float) -> float:
    """Of a warm-up: the base batch's rate, where the batch is larger."""
    return 1 / factor if factor > 1 else 0.0


def describe(spec: Any, recipe: Recipe, optimizer: Optimizer, loader: Loader) -> str:
    """What a run learns with, in one line: effective batch, scale factor, warm-up."""
    batch = largebatch.plan(loader.global_batch, loader.world_size, spec.micro_batch)
    rate = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    factor = rate_factor(spec, recipe)
    text = f"{batch}; learning rate {rate:.4g}"
    if factor != 1:
        base = spec.base_batch or recipe.global_batch
        text += f" = {rate / factor:.4g} x {factor:.4g} ({spec.lr_scaling}, from batch {base})"
    if spec.warmup_epochs:
        text += f", after a warm-up of {spec.warmup_epochs:g} epochs from {rate * _start(factor):.4g}"
    if noise := _sgd_noise(optimizer, rate, loader):
        text += f"; SGD's noise scale {noise.scale:.4g}"
    if spec.grow_batch is not None:
        text += f"; the batch grows to {spec.grow_batch} where the rate would fall"
    if spec.adapt_batch is not None:
        text += f"; the batch follows the gradient noise scale, up to {spec.adapt_batch}"
    return text


def _sgd_noise(optimizer: Optimizer, rate: float, loader: Loader) -> largebatch.SGDNoise | None:
    """Where the optimizer is SGD, on a data set of known size."""
    if not isinstance(optimizer, torch.optim.SGD) or not rate > 0 or not loader.num_samples:
        return None
    batch, momentum = min(loader.global_batch, loader.num_samples), float(optimizer.param_groups[0]["momentum"])
    return largebatch.SGDNoise(lr=rate, batch=batch, num_samples=loader.num_samples, momentum=momentum)


def curvature(trainer: Trainer, recipe: Recipe, samples: int, *, progress: bool) -> dict[str, Any]:
    """The Hessian of the mean loss over training samples, spread evenly; the same on all workers, which all call it."""
    count = len(recipe.train)  # type: ignore[arg-type]
    some = Subset(recipe.train, [i * count // min(samples, count) for i in range(min(samples, count))])
    part = largebatch.Part(some, trainer.comm, batch_size=trainer.data.micro_batch, device=trainer.device)
    with norm.merged_statistics(trainer.model, trainer.comm, samples=trainer.data.share):
        surface = largebatch.LossSurface(trainer.model, recipe.loss, part, comm=trainer.comm)
        eigenvalues = largebatch.top_eigenvalues(surface, 3, progress=progress)
        trace = largebatch.trace(surface, probes=8, progress=progress)
        found = largebatch.sharpness(surface, progress=progress)
    return {
        "samples": len(some),
        "eigenvalues": list(eigenvalues.values),
        "residuals": list(eigenvalues.residuals),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "sharpness": found.value,
    }


def curvature_words(found: dict[str, Any]) -> str:
    """The same in one line."""
    values = ", ".join(f"{value:.4g}" for value in found["eigenvalues"])
    return (
        f"curvature on {found['samples']} samples: largest eigenvalues {values}; trace {found['trace']:.4g} ± "
        f"{found['trace_standard_error']:.2g}; sharpness {found['sharpness']:.4g}"
    )
