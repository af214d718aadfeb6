"""What a training run is told: frozen, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.errors import UsageError


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
    norm_batch: Literal["worker", "global"] | None = None
    """Samples that share batch-norm statistics: those of each worker, or of all workers. None: as the model has it."""
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
        for name, choices in (("amp", ("off", "bf16", "fp16")), ("norm_batch", ("worker", "global"))):
            if getattr(self, name) not in (*choices, *((None,) if name == "norm_batch" else ())):
                raise UsageError(f"{name} is {getattr(self, name)!r}: one of {', '.join(choices)}")
