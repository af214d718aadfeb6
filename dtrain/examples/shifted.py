"""A classifier meets images that are brighter and paler than those it learnt from; nobody labels them.

It is trained on digits, then shown digits of less contrast, brightened. Batch norm's running statistics are those of
the digits it knew: `adapt` replaces them by those of some new images, without labels and without training (Li et al.
2016, AdaBN).

Expect: most of the accuracy that was lost comes back. With inverted digits none does: to the convolutions their strokes
are other patterns, not the same ones with another mean and scale, and statistics cannot turn them round.

python -m dtrain.examples.shifted [--seed 0] [--epochs 5]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dtrain import norm
from dtrain.examples import Data, accuracy, classifier, digits, fit, parsed, shuffled


def brightened(images: Tensor) -> Tensor:
    """The background (-1) at 0; what would be too bright is cut off at 1, as in a camera."""
    return (0.6 * images + 0.6).clamp(max=1.0)


def inverted(images: Tensor) -> Tensor:
    return -images


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"brightened": brightened, "inverted": inverted}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracies in percent: `clean`, and of each shift `before` and `after`."""
    flags = parsed(__doc__ or "", argv, epochs=5)
    train, test = digits()
    model = classifier(flags.seed)
    generator = torch.Generator().manual_seed(flags.seed)
    fit(model, flags.epochs, partial(shuffled, train, 64, generator), lr=0.05)
    found = {"clean": accuracy(model, test)}
    print(f"digits like those it learnt from: {found['clean']:.1f} % right")
    for name, shift in SHIFTS.items():
        shifted: Data = (shift(test[0]), test[1])
        found[f"{name} before"] = accuracy(model, shifted)
        adapted = copy.deepcopy(model)
        norm.adapt(adapted, shift(train[0]).split(256))  # new images, no labels
        found[f"{name} after"] = accuracy(adapted, shifted)
        print(f"{name}: {found[f'{name} before']:.1f} % right before, {found[f'{name} after']:.1f} % after adapt")
    return found


if __name__ == "__main__":
    main()
