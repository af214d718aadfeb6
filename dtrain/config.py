"""What a training run is told: frozen, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dtrain.errors import UsageError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types by the names that `amp` and `send_as` give them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained, whatever the model and the backend."""

    epochs: int | None = None
    """Passes over the data. Give this or `steps`."""
    steps: int | None = None
    """Optimizer steps in all."""
    clip_grad_norm: float | None = None
    """Largest norm of the global gradient; clipped after it has been summed over workers."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision: the type that autocast computes in. fp16 scales the loss."""
    send_as: Literal["same", "bf16", "fp16"] = "same"
    """Type that gradients travel as; weights stay in their own. Their sum is made in float32. fp16 scales the loss."""
    norm_batch: int | str | None = None
    """Samples that share batch-norm statistics: a number of them; `worker`: each worker's micro-batch; `global`: all
    workers'. See `dtrain.norm.convert`. None: as the model has it."""
    update: Literal["worker", "first", "server", "sharded"] = "worker"
    """Who steps the optimizer: every worker its own; worker 0 for all (DataParallel's way); the servers of ps, which
    keep the parameters and one copy of the optimizer's state; or each worker a part of the parameters, the only one
    that it keeps the state of (ZeRO-1, on any backend)."""
    staleness: int | None = 0
    """With update=server: steps that the fastest worker may be ahead of the slowest; 0: synchronous, None: no bound."""
    backup_workers: int = 0
    """With update=server: make each step of the gradients that come first, without the last so many."""
    damping: bool = False
    """With staleness: divide the learning rate by the staleness of each gradient."""
    delay_compensation: float = 0.0
    """With staleness: lambda of DC-ASGD, which corrects a gradient for what others changed meanwhile."""
    early_forward: bool = False
    """With update=server or sharded: the next forward begins before all parameters are there; each layer waits for its
    own, and the numbers are the same. A loss that reads parameters before it calls the model is not seen."""
    nonfinite: Literal["allow", "skip", "abort"] = "allow"
    """What to do when a gradient of any worker is NaN or infinite: nothing; leave the step out; end the run. The last
    two name the worker and the parameter, and cost a look at the gradients and one message a step."""
    rewind_to: Path | None = None
    """Directory of checkpoints to go back to when a process of the job was lost and replaced (servers started with
    on_loss=wait): the run goes on from there to the same bits. None: such a loss ends the run."""
    seed: int = 0
    """Decides the random numbers of each worker; the order of the data is the Loader's."""
    bucket_mb: float = 8.0
    """Size at which gradients are sent, in MiB."""
    log_every: int = 10
    """Steps between two records of loss and times."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(f"epochs is {self.epochs}, steps {self.steps}: give one of them")
        for name in ("epochs", "steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: give 1 or more")
        for name in ("clip_grad_norm", "bucket_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}: give more than 0")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: give 0 or more")
        servers_only = {"staleness": 0, "backup_workers": 0, "damping": False, "delay_compensation": 0.0}
        for name, default in servers_only.items():
            if self.update != "server" and getattr(self, name) != default:
                raise UsageError(f"{name} is {getattr(self, name)} with update={self.update}: it needs update=server")
        elsewhere = self.update in ("server", "sharded")
        if self.early_forward and not (elsewhere and self.joint):
            raise UsageError(
                f"early_forward with update={self.update}, staleness={self.staleness}, "
                f"backup_workers={self.backup_workers}: it needs update=server or sharded, and steps of all workers"
            )
        if elsewhere and self.send_as != "same":
            raise UsageError(f"send_as is {self.send_as} with update={self.update}, which takes gradients as they are")
        if elsewhere and self.amp == "fp16":
            raise UsageError(f"amp is fp16 with update={self.update}: it does not scale losses; use bf16")
        if self.nonfinite != "allow" and "fp16" in (self.amp, self.send_as):
            raise UsageError(
                f"nonfinite is {self.nonfinite!r} with fp16, where a gradient that overflows is how the loss scale is "
                "found, and leaves its step out: leave nonfinite away"
            )
        if self.norm_batch == "global" and not self.joint:
            raise UsageError(
                "norm_batch is global, where workers do not wait for each other: give norm_batch=worker, or "
                "staleness=0 and no backup workers"
            )
        if isinstance(self.norm_batch, int) and self.norm_batch < 1:
            raise UsageError(f"norm_batch is {self.norm_batch}: a number of samples, at least 1")
        if elsewhere and self.nonfinite != "allow":
            raise UsageError(f"nonfinite is {self.nonfinite!r} with update={self.update}: give update=worker or first")
        choices_of = {
            "amp": ("off", "bf16", "fp16"),
            "send_as": ("same", "bf16", "fp16"),
            "update": ("worker", "first", "server", "sharded"),
            "nonfinite": ("allow", "skip", "abort"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)!r}: one of {', '.join(choices)}")

    @property
    def joint(self) -> bool:
        """Whether every step is made of all workers' gradients: they all wait for each other."""
        return self.staleness == 0 and not self.backup_workers
