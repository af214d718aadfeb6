"""What the claims train: small models and data, and one function that trains them through `dtrain.Trainer`.

`images` are those of Fashion-MNIST as the recipe `fashion` finds them, pooled to 14x14 pixels: a run takes seconds.
Where its files are absent, digits of scikit-learn stand in, and rows say so.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import dtrain
from dtrain import largebatch, norm, recipes
from dtrain.data import Batch, BatchedData, cut
from dtrain.errors import DataError
from dtrain.recipes.data import TensorData
from dtrain.recipes.sequence import Attention
from dtrain.recipes.tasks import class_loss, class_score, seeded
from dtrain.steering import Steer

CLASSES = 10
PRECISE_SAMPLES = 2048


# -- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images [n, 1, H, W] of mean 0 and deviation 1, with labels [n]."""

    name: str
    """fashion or digits."""
    train: TensorData
    test: TensorData

    @property
    def pixels(self) -> int:
        return self.train.tensors[0][0].numel()


@functools.cache
def images(samples: int = 16384, test_samples: int = 10000) -> Images:
    """The first so many training images and test images; all there are, where there are fewer."""
    try:
        recipe = recipes.build("fashion")
    except DataError as error:
        print(f"digits stand in for Fashion-MNIST: {error}", file=sys.stderr)
        recipe = recipes.build("digits")
    train, test = (_held(data, n) for data, n in ((recipe.train, samples), (recipe.test, test_samples)))
    return Images(recipe.name, train, test)


def _held(data: Any, samples: int) -> TensorData:
    pixels, labels = data.batch(torch.arange(min(samples, len(data))))
    return TensorData(F.avg_pool2d(pixels, 2) if pixels.shape[-1] == 28 else pixels, labels)


class Ordered(BatchedData):
    """Samples in an order of one's own, in which one may come several times."""

    def __init__(self, data: BatchedData, order: Tensor) -> None:
        self._data = data
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, indices: Tensor) -> Batch:
        return self._data.batch(self._order[indices])


def cnn(seed: int, *, normalised: bool = True) -> nn.Module:
    """Three convolutions of stride 2, to 12, 24 and 48 channels, each with batch norm: [n, 1, H, W] -> [n, 10]."""

    def make() -> nn.Module:
        found: list[nn.Module] = []
        for inputs, outputs in ((1, 12), (12, 24), (24, 48)):
            found.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=not normalised))
            found += [nn.BatchNorm2d(outputs)] if normalised else []
            found.append(nn.ReLU())
        return nn.Sequential(*found, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(48, CLASSES))

    return seeded(make, seed=seed, dtype=torch.float32)


def mlp(seed: int, *widths: int) -> nn.Module:
    """Linear layers of these widths with ReLU between; images are flattened first."""

    def make() -> nn.Module:
        found: list[nn.Module] = [nn.Flatten(1)]
        for inputs, outputs in itertools.pairwise(widths):
            found += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*found[:-1])

    return seeded(make, seed=seed, dtype=torch.float32)


# -- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Pieces of Python's documentation: tokens [n, T], and those that follow."""

    train: BatchedData
    test: BatchedData
    vocabulary: int
    length: int


@functools.cache
def text(length: int = 48) -> Text:
    recipe = recipes.build("text", length=length, model="transformer", hidden=4, layers=1, heads=1)
    train: Any = recipe.train
    test: Any = recipe.test
    return Text(train, test, recipe.model.get_submodule("head").out_features, length)  # type: ignore[arg-type]


class PostLayer(nn.Module):
    """Attention and two linear layers, each added to its input and normalised after that (Vaswani et al. 2017)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.feed = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden))
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x))
        out: Tensor = self.norms[1](x + self.feed(x))
        return out


class PostTransformer(nn.Module):
    """A decoder of such layers, with learned positions: tokens [n, T] -> logits [n, T, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.position = nn.Parameter(0.02 * torch.randn(length, hidden))
        self.layers = nn.Sequential(*(PostLayer(hidden, 4) for _ in range(layers)))
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embedding(tokens) + self.position[: tokens.shape[1]]))
        return logits


def transformer(seed: int, vocabulary: int, length: int, *, hidden: int, layers: int) -> nn.Module:
    return seeded(lambda: PostTransformer(vocabulary, length, hidden, layers), seed=seed, dtype=torch.float32)


# -- training ---------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """The learning rate times `factor(steps made)`."""
    return LambdaLR(optimizer, factor)


def cosine(total_steps: int) -> Callable[[int], float]:
    """A factor that falls from 1 to 0 as a cosine."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))


class Losses(dtrain.Hook):
    """The loss of each record; `log_every=1` makes that each step's, over the samples of all workers."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, state: dtrain.State) -> None:
        if state.record:
            self.losses.append(state.loss)


class Walk(dtrain.Hook):
    """How far the weights are from where they began, after these steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.distances: dict[int, float] = {}
        self._steps = frozenset(steps)

    def on_start(self, state: dtrain.State) -> None:
        self._start = flat(state.model)

    def on_step(self, state: dtrain.State) -> None:
        if state.step in self._steps:
            self.distances[state.step] = float((flat(state.model) - self._start).norm())


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    comm: dtrain.Backend,
    model: nn.Module,
    data: Any,
    *,
    optimizer: Callable[[nn.Module], Optimizer],
    global_batch: int,
    seed: int,
    loss: Callable[[nn.Module, Batch], Tensor] = class_loss,
    factor: Callable[[int], float] | None = None,
    course: largebatch.Course | None = None,
    micro_batch: int | None = None,
    shuffle: bool = True,
    hooks: Sequence[dtrain.Hook] = (),
    **config: Any,
) -> dtrain.Trainer:
    """Train a model as one worker of a job; the trainer, at its end.

    Args:
        optimizer: makes it, of the model.
        factor: of the learning rate, by steps made.
        course: instead: factor and global batch, by epochs done; `global_batch` is its first.
        config: of `dtrain.TrainConfig`: epochs or steps, norm_batch, clip_grad_norm, log_every ...
    """
    made = optimizer(model)
    loader = dtrain.Loader(
        data,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=comm.rank,
        world_size=comm.world_size,
        seed=seed,
        shuffle=shuffle,
    )
    trainer = dtrain.Trainer(
        model,
        loss,
        made,
        loader,
        comm=comm,
        config=dtrain.TrainConfig(**{"log_every": 50, "seed": seed, **config}),
        scheduler=None if factor is None else scheduled(made, factor),
        hooks=[*hooks, *([] if course is None else [Steer(made, course, samples=len(data))])],
    )
    trainer.fit()
    trainer.replica.close()
    return trainer


def accuracy(model: nn.Module, data: TensorData, comm: dtrain.Backend) -> float:
    """Percent of the images that are told right, by the running statistics that the model has."""
    return 100 * dtrain.evaluate(model, data, class_score, comm, batch_size=500)["accuracy"]


def mean_loss(model: nn.Module, data: TensorData, comm: dtrain.Backend) -> float:
    """Cross entropy in nats, of the model in evaluation mode."""
    return dtrain.evaluate(model, data, class_score, comm, batch_size=500)["loss"]


def precisely(model: nn.Module, data: TensorData, comm: dtrain.Backend, *, batch: int = 256) -> None:
    """Running statistics of the first 2048 samples, in place: each worker looks at its part of them."""
    mine = torch.arange(min(PRECISE_SAMPLES, len(data)))[cut(PRECISE_SAMPLES, comm.rank, comm.world_size)]
    norm.precise(model, (data.batch(indices)[0] for indices in mine.split(batch)), comm=comm)
