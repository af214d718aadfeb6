"""What a recipe is: a model, its data and its loss under one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from dtrain.data import Batch
from dtrain.errors import UsageError

Samples: TypeAlias = "Dataset[Batch]"
"""A map-style data set: `len()`, and `[int]` for a tuple of tensors that lack the sample dimension."""

Parameters: TypeAlias = "Iterable[nn.Parameter] | list[dict[str, Any]]"
"""What torch's optimizers take: parameters, or groups of them."""


def unchanged(scores: dict[str, float]) -> dict[str, float]:
    """The scores as they are: the `finish` of a recipe whose means need no further reckoning."""
    return scores


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A task that can be trained: everything except how many workers do it and how they talk.

    Raises UsageError when `global_batch` or `epochs` is not positive.
    """

    name: str
    """The word it is asked for by."""

    model: nn.Module
    """Freshly initialised from the seed, on the CPU. Draws no random numbers in forward."""

    train: Samples
    """What is learned from."""

    test: Samples | None
    """What is never learned from; None where the samples are noise."""

    loss: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> scalar: the mean over the samples of the batch.

    For a batch of no samples it is NaN, with gradients of zero.
    """

    score: Callable[[nn.Module, Batch], dict[str, Tensor]]
    """(model, batch) -> sums over the samples of the batch, in float64.

    Evaluation adds them up and divides by the number of samples.
    """

    optimizer: Callable[[Parameters], Optimizer]
    """Makes the optimizer, its learning rate tuned for `global_batch`."""

    schedule: Callable[[Optimizer, int], LRScheduler] | None
    """(optimizer, total optimizer steps) -> a scheduler to step once after each optimizer step."""

    global_batch: int
    """Samples in one optimizer step, over all workers."""

    epochs: int
    """Passes over `train` that reach the recipe's result."""

    headline: str
    """The reported metric that people look at: `accuracy` or `perplexity`."""

    notes: dict[str, float] = field(default_factory=dict)
    """Numbers to print beside the result, such as a baseline."""

    finish: Callable[[dict[str, float]], dict[str, float]] = unchanged
    """Mean scores -> metrics to report, such as a perplexity, which is no mean over samples."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"recipe {self.name!r}: {name}={value}: must be at least 1")
