"""Recipes: model, data and loss by name.

    recipe = build("text", seed=1, model="transformer")

The same name, seed, dtype and options give the same model and the same data in every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dtrain.data import Batch, BatchedData
from dtrain.errors import UsageError
from dtrain.recipes.base import Recipe
from dtrain.recipes.data import TensorData
from dtrain.recipes.digits import digits
from dtrain.recipes.fashion import fashion
from dtrain.recipes.options import checked, choose
from dtrain.recipes.synthetic import synthetic
from dtrain.recipes.text import text

__all__ = ["Batch", "BatchedData", "Recipe", "TensorData", "build", "names"]

_RECIPES: dict[str, Callable[..., Recipe]] = {
    "digits": digits,
    "fashion": fashion,
    "text": text,
    "synthetic": synthetic,
}
_READ_A_FILE = ("fashion", "text")


def names() -> tuple[str, ...]:
    """The recipes there are, the default one first."""
    return tuple(_RECIPES)


def build(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    data: str | None = None,
    **options: object,
) -> Recipe:
    """The recipe of that name.

    `seed` decides the initial weights, and the samples of `synthetic`; torch's global random state is not
    touched. `dtype` is that of the parameters and of floating-point inputs. `data` says where the data lie,
    for the recipes that read files. `options` are the recipe's own; numbers may come as text.

    Raises UsageError for a name, an option or a value that cannot be meant, DataError for data that cannot be
    read.
    """
    make = choose(_RECIPES, name, what="recipe")
    if not dtype.is_floating_point:
        raise UsageError(f"recipe {name!r}: dtype={dtype}: must be a floating-point type such as torch.float32")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"recipe {name!r}: seed={seed}: must be in 0..2^63-1")
    keywords = checked(make, options, where=f"recipe {name!r}")
    if name in _READ_A_FILE:
        keywords["data"] = data
    elif data is not None:
        raise UsageError(f"recipe {name!r}: data={data!r}: it reads no files; only {' and '.join(_READ_A_FILE)} do")
    return make(seed=seed, dtype=dtype, **keywords)
