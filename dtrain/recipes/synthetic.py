"""Models of realistic size on random samples, to measure throughput. Nothing can be learned here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain.data import Batch
from dtrain.errors import UsageError
from dtrain.recipes.base import Recipe
from dtrain.recipes.data import WindowData, next_token
from dtrain.recipes.options import checked, choose
from dtrain.recipes.resnet import ResNet
from dtrain.recipes.sequence import LSTM, Transformer
from dtrain.recipes.tasks import (
    class_loss,
    class_score,
    generator,
    seeded,
    token_loss,
    token_score,
    with_perplexity,
)

_WINDOWS = 1 << 18  # different samples before they repeat


def synthetic(
    *,
    seed: int,
    dtype: torch.dtype,
    model: str = "mlp",
    samples: int = 65536,
    classes: int = 1000,
    **sizes: object,
) -> Recipe:
    """Random samples, each a pure function of (seed, index), for a model of the kind `model`.

    mlp takes `hidden` and `layers`; resnet `depth` (18 or 50) and `image`, the side in pixels; lstm and
    transformer `hidden`, `layers` and `length`, the transformer also `heads`, with `classes` as their
    vocabulary. Samples are windows of one random bank: memory does not grow with `samples`, and beyond
    262,144 they repeat.

    Raises UsageError for a model or size that does not exist.
    """
    make = choose(_KINDS, model, what="recipe 'synthetic': model")
    keywords = checked(make, sizes, where=f"recipe 'synthetic' with model {model}", beside=synthetic)
    kind = make(classes, **keywords)
    tokens = kind.length > 0
    draw = generator(seed)
    return Recipe(
        name="synthetic",
        model=seeded(kind.model, seed=seed, dtype=dtype),
        train=_tokens(kind, draw, samples, classes) if tokens else _floats(kind, draw, samples, classes, dtype),
        test=None,
        loss=token_loss if tokens else class_loss,
        score=token_score if tokens else class_score,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        schedule=None,
        global_batch=64,
        epochs=1,
        headline="perplexity" if tokens else "accuracy",
        finish=with_perplexity,
    )


class Kind(NamedTuple):
    """What to measure: how the model is made, and what a sample is: floats with a label, or tokens."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()  # of the floats
    length: int = 0  # number of tokens


def _mlp(classes: int, *, hidden: int = 2048, layers: int = 4) -> Kind:
    """`layers` linear layers of `hidden` units on `hidden` inputs, and the head; 18.8 million parameters."""

    def model() -> nn.Module:
        wide = [module for _ in range(layers) for module in (nn.Linear(hidden, hidden), nn.ReLU())]
        return nn.Sequential(*wide, nn.Linear(hidden, classes))

    return Kind(model, (hidden,))


def _resnet(classes: int, *, depth: int = 18, image: int = 64) -> Kind:
    """The network of the ImageNet paper; 11.7 million parameters for 18 layers, 25.6 for 50."""
    if image < 32:
        raise UsageError(f"recipe 'synthetic': image={image}: must be at least 32 pixels, the network's total stride")
    return Kind(partial(ResNet, depth, classes=classes), (3, image, image))


def _lstm(classes: int, *, hidden: int = 1024, layers: int = 2, length: int = 32) -> Kind:
    """18.8 million parameters."""
    return Kind(partial(LSTM, classes, hidden=hidden, layers=layers), length=length)


def _transformer(classes: int, *, hidden: int = 512, layers: int = 6, heads: int = 8, length: int = 64) -> Kind:
    """20.0 million parameters."""
    model = partial(Transformer, classes, hidden=hidden, layers=layers, heads=heads, length=length)
    return Kind(model, length=length)


_KINDS: Mapping[str, Callable[..., Kind]] = {
    "mlp": _mlp,
    "resnet": _resnet,
    "lstm": _lstm,
    "transformer": _transformer,
}


def _floats(kind: Kind, draw: torch.Generator, samples: int, classes: int, dtype: torch.dtype) -> WindowData:
    """Normal floats of the kind's shape, and a label in 0..classes-1."""
    width = prod(kind.shape)
    bank = torch.randn(_WINDOWS + width - 1, generator=draw).to(dtype)
    labels = torch.randint(classes, (_WINDOWS,), generator=draw)
    split = partial(_labelled, shape=kind.shape, labels=labels)
    return WindowData(bank, samples=samples, width=width, split=split)


def _labelled(windows: Tensor, indices: Tensor, *, shape: tuple[int, ...], labels: Tensor) -> Batch:
    """Windows [n, width] -> floats [n, *shape] and labels [n]."""
    return windows.unflatten(1, shape), labels[indices % len(labels)]


def _tokens(kind: Kind, draw: torch.Generator, samples: int, classes: int) -> WindowData:
    """Uniform tokens in 0..classes-1, and the same one ahead."""
    bank = torch.randint(classes, (_WINDOWS + kind.length,), generator=draw)
    return WindowData(bank, samples=samples, width=kind.length + 1, split=next_token)
