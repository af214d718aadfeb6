"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of clothes, 28x28 pixels, ten classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain.data import Batch
from dtrain.errors import DataError
from dtrain.recipes.base import Recipe
from dtrain.recipes.data import TensorData
from dtrain.recipes.idx import read_idx
from dtrain.recipes.resnet import ResNet
from dtrain.recipes.tasks import class_loss, class_score, seeded, warmup_cosine

_DEBIAN = "/usr/share/datasets/fashion-mnist"
_CLASSES = 10


def fashion(*, seed: int, dtype: torch.dtype, data: str | None = None, width: int = 16, stem: str = "half") -> Recipe:
    """60,000 images to learn from, 10,000 to test on; a residual network of 18 layers.

    `data` is a directory with the four idx files, packed (.gz) or not; files of MNIST itself will do as well.
    `width` is the number of channels of the first stage, `stem` as in `ResNet`: `small` is slower and better.
    DataError when a file is missing or damaged.
    """
    folder = Path(_DEBIAN if data is None else data)
    train_images, train_labels = _read(folder, "train")
    test_images, test_labels = _read(folder, "t10k")
    mean, deviation = _moments(train_images)
    normalised = partial(_normalised, mean=mean, deviation=deviation, dtype=dtype)
    return Recipe(
        name="fashion",
        model=seeded(
            lambda: ResNet(18, width=width, classes=_CLASSES, stem=stem, in_channels=1, calm=True),
            seed=seed,
            dtype=dtype,
        ),
        train=TensorData(train_images, train_labels, transform=normalised),
        test=TensorData(test_images, test_labels, transform=normalised),
        loss=class_loss,
        score=class_score,
        optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=warmup_cosine,
        global_batch=128,
        epochs=5,
        headline="accuracy",
    )


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [samples, 28, 28] as bytes, labels [samples] as int64."""
    image_file, label_file = (_find(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{image_file}: images of {images.shape[1:]} pixels: must be (28, 28)")
    if len(images) != len(labels):
        raise DataError(f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file.name}")
    if labels.max() >= _CLASSES:
        raise DataError(f"{label_file}: label {labels.max()}: must be in 0..{_CLASSES - 1}")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(
        f"{folder / name}: not found, packed (.gz) or not. On Debian and Ubuntu, apt-get install"
        f" dataset-fashion-mnist puts the files in {_DEBIAN}; elsewhere, put train-images-idx3-ubyte,"
        " train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or the same with .gz)"
        " in a directory and give it with --data"
    )


def _normalised(batch: Batch, *, mean: float, deviation: float, dtype: torch.dtype) -> Batch:
    """Bytes [n, 28, 28] -> floats [n, 1, 28, 28] of mean 0 and deviation 1 over the training images."""
    images, labels = batch
    return (images.unsqueeze(1).to(dtype) - mean) / deviation, labels


def _moments(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of bytes, from their histogram, so the same to the last bit everywhere."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return mean.item(), max(variance.item() ** 0.5, 1.0)
