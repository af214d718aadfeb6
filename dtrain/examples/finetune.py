"""Fine-tuning with small batches: statistics of a few samples, or those that were learnt before.

A fully connected network learns digits with batches of 64. It is then fine-tuned on 200 digits turned upside down, with
batches of 2 and of 8. Batch norm has one value per sample and channel here: of two values, normalising leaves nothing
but which is the larger. With `freeze` it normalises by what it learnt before.

Expect: with batches of 2, unfrozen is little better than not fine-tuning at all, and frozen is far above. With
batches of 8 the two are much alike. In a convolutional network, where each sample brings many values a channel, frozen
was no better even with batches of 2.

python -m dtrain.examples.finetune [--seed 0] [--epochs 3]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from dtrain import norm
from dtrain.examples import Data, accuracy, digits, fit, parsed, shuffled

SAMPLES, BATCHES = 200, (2, 8)


def network(seed: int) -> nn.Module:
    """[n, 1, 8, 8] -> [n, 10]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip


def turned(data: Data, samples: int | None = None) -> Data:
    """The first images, upside down."""
    return data[0][:samples].flip(2, 3), data[1][:samples]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracies in percent on the new task: `before`, and `unfrozen` and `frozen` for each size of batch."""
    flags = parsed(__doc__ or "", argv, epochs=3)
    train, test = digits()
    generator = torch.Generator().manual_seed(flags.seed)
    model = network(flags.seed)
    fit(model, 4, partial(shuffled, train, 64, generator), lr=0.05)
    few, new_test = turned(train, SAMPLES), turned(test)
    found = {"before": accuracy(model, new_test)}
    print(f"upside-down digits, before: {found['before']:.1f} % right")
    for size in BATCHES:
        for name in ("unfrozen", "frozen"):
            tuned = copy.deepcopy(model)
            if name == "frozen":
                norm.freeze(tuned)
            order = torch.Generator().manual_seed(flags.seed)
            fit(tuned, flags.epochs, partial(shuffled, few, size, order), lr=0.005)
            found[f"{name} {size}"] = accuracy(tuned, new_test)
        print(f"batches of {size}: {found[f'unfrozen {size}']:.1f} % unfrozen, {found[f'frozen {size}']:.1f} % frozen")
    return found


if __name__ == "__main__":
    main()
