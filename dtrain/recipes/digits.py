"""Handwritten digits, 8x8 pixels: the data set that comes inside scikit-learn. Trains in seconds on one
core."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from dtrain.errors import DataError
from dtrain.recipes.base import Recipe
from dtrain.recipes.data import TensorData
from dtrain.recipes.tasks import class_loss, class_score, seeded, warmup_cosine

_TEST_SAMPLES = 360  # of 1797, a fifth


def digits(*, seed: int, dtype: torch.dtype, width: int = 16) -> Recipe:
    """1437 images to learn from and 360 to test on, the same whatever the seed; a CNN with batch norm.

    `width` is the number of channels of its first convolution. DataError when scikit-learn is missing.
    """
    train, test = _split(dtype)
    return Recipe(
        name="digits",
        model=seeded(lambda: _model(width), seed=seed, dtype=dtype),
        train=train,
        test=test,
        loss=class_loss,
        score=class_score,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=warmup_cosine,
        global_batch=64,
        epochs=12,
        headline="accuracy",
    )


def _split(dtype: torch.dtype) -> tuple[TensorData, TensorData]:
    """Images [samples, 1, 8, 8] in -1..1 with labels [samples], to train and to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("recipe 'digits' takes its images from scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    images = torch.from_numpy(pixels / 8 - 1).to(dtype).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    # RandomState's numbers are frozen for good (NEP 19): every version of numpy makes the same split
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))
    test, train = order[:_TEST_SAMPLES], order[_TEST_SAMPLES:]
    return TensorData(images[train], targets[train]), TensorData(images[test], targets[test])


def _model(width: int) -> nn.Module:
    """[n, 1, 8, 8] -> [n, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(1),
        nn.Linear(16 * width, 10),
    )
