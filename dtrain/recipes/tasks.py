"""Losses, scores and schedules that several recipes share, and how a model is drawn from a seed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dtrain.data import Batch

Module = TypeVar("Module", bound=nn.Module)

_DRAWING = threading.Lock()  # torch's modules draw from the one global generator


def seeded(make: Callable[[], Module], *, seed: int, dtype: torch.dtype) -> Module:
    """The module that `make` initialises from `seed`, then cast to `dtype`.

    Torch's global random state is as before afterwards; threads that build models wait for each other. The
    numbers are drawn in torch's default dtype, so that a seed's float32 and float64 models start alike.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators as well
        return make().to(dtype=dtype)


def generator(seed: int) -> torch.Generator:
    """A random generator of one's own."""
    return torch.Generator().manual_seed(seed)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy in nats; inputs [n, ...] -> logits [n, classes], labels [n]."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def class_score(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Sums over n samples: cross entropy in nats, and the number classified right."""
    inputs, labels = batch
    logits = model(inputs).double()
    return {
        "loss": F.cross_entropy(logits, labels, reduction="sum"),
        "accuracy": (logits.argmax(1) == labels).sum().double(),
    }


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy in nats per token; tokens [n, T] -> logits [n, T, vocabulary], targets [n, T].

    Every sample has the same T, so this mean over tokens is also the mean over samples.
    """
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def token_score(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Sums over n samples of each one's mean over its T tokens: cross entropy in nats, and share right."""
    tokens, targets = batch
    logits = model(tokens).flatten(0, 1).double()
    length = targets.shape[1]
    return {
        "loss": F.cross_entropy(logits, targets.flatten(), reduction="sum") / length,
        "accuracy": (logits.argmax(1) == targets.flatten()).sum().double() / length,
    }


def with_perplexity(scores: dict[str, float]) -> dict[str, float]:
    """Adds `perplexity` = exp(loss), infinite where that overflows."""
    try:
        perplexity = math.exp(scores["loss"])
    except OverflowError:
        perplexity = math.inf
    return {**scores, "perplexity": perplexity}


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1) -> LambdaLR:
    """A learning rate that rises linearly for the share `warmup` of the steps, then falls as a cosine to 0.

    A function of progress alone (SGDR, Loshchilov and Hutter 2017, equation 5, with one cycle).
    """

    def factor(step: int) -> float:
        where = min((step + 1) / (total_steps + 1), 1.0)
        if where < warmup:
            return where / warmup
        return 0.5 * (1 + math.cos(math.pi * (where - warmup) / (1 - warmup)))

    return LambdaLR(optimizer, factor)
