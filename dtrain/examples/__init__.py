"""Short programs that show what a part of dtrain is good for. Each runs by itself and in seconds:

python -m dtrain.examples.NAME [--seed 0]

What is here is what several of them need: the digits of scikit-learn, and a plain training loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import recipes

Data = tuple[Tensor, Tensor]
"""Images [samples, 1, 8, 8] in -1..1, and labels [samples]."""


def parsed(doc: str, argv: Sequence[str] | None, **numbers: int) -> argparse.Namespace:
    """The flags of an example: `--seed`, and whole numbers with their defaults."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seed": 0, **numbers}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    return flags.parse_args(argv)


def digits() -> tuple[Data, Data]:
    """Images to learn from and images to test on."""
    recipe = recipes.build("digits")
    parts = [data.tensors for data in (recipe.train, recipe.test) if isinstance(data, recipes.TensorData)]
    (train, train_labels), (test, test_labels) = parts
    return (train, train_labels), (test, test_labels)


def classifier(seed: int) -> nn.Module:
    """[n, 1, 8, 8] -> [n, 10]; three convolutions, each with batch norm."""
    return recipes.build("digits", seed=seed, width=8).model


def shuffled(data: Data, size: int, generator: torch.Generator) -> Iterator[Data]:
    """The batches of an epoch; what does not fill one is left out."""
    images, labels = data
    for rows in torch.randperm(len(images), generator=generator).split(size):
        if len(rows) == size:
            yield images[rows], labels[rows]


def fit(model: nn.Module, epochs: int, batches: Callable[[], Iterator[Data]], *, lr: float) -> None:
    """SGD with momentum; the learning rate falls to 0 in a straight line."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)
        for images, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In evaluation mode; in percent."""
    training = model.training
    model.eval()
    images, labels = data
    right: Tensor = (model(images).argmax(1) == labels).double().mean()
    model.train(training)
    return 100 * float(right)
