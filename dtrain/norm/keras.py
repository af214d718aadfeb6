"""Batch norm as Keras and TensorFlow spell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError
from dtrain.norm.layer import PLAIN

Initializer = str | Callable[[Tensor], Any]
"""A word of Keras, or a function that fills the tensor it is given, as those of `torch.nn.init` do."""

_WORDS: dict[str, Callable[[Tensor], Any]] = {"zeros": Tensor.zero_, "ones": nn.init.ones_}


def momentum(*, keras: float) -> float:
    """Torch's momentum for Keras's or TensorFlow's: theirs is the weight of what was, torch's that of what comes.

    Keras's default of 0.99 is 0.01 here; torch's default of 0.1 is 0.9 there.

    Raises:
        UsageError: outside [0, 1).
    """
    if not 0.0 <= keras < 1.0:
        raise UsageError(f"a momentum of Keras is {keras}: at least 0 and below 1, 0.99 if nothing was said there")
    return 1.0 - keras


_torch_momentum = momentum  # an argument below has its name


def keras_batch_norm(
    num_features: int,
    *,
    dim: int,
    axis: int = 1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Initializer = "zeros",
    gamma_initializer: Initializer = "ones",
    moving_mean_initializer: Initializer = "zeros",
    moving_variance_initializer: Initializer = "ones",
) -> _BatchNorm:
    """A layer of torch with the arguments, and the defaults, of Keras's `BatchNormalization`.

    What torch does otherwise stays: `running_var` takes in variances with Bessel's correction.

    Args:
        num_features: C.
        dim: dimensions of a sample beside its channels: 1 for (N, C) and (N, C, L), 2 for images, 3 for volumes.
        axis: where the channels are; torch has them at 1.
        momentum: Keras's, the weight of what was.
        center: False: beta (torch's `bias`) is 0 and not learnt.
        scale: False: gamma (torch's `weight`) is 1 and not learnt.

    Raises:
        UsageError: another axis, dimension, initializer, or a momentum outside [0, 1).
    """
    if axis != 1:
        raise UsageError(
            f"axis is {axis}: torch has channels at axis 1. Bring them there, x.movedim({axis}, 1), and leave axis out"
        )
    if dim not in (1, 2, 3):
        raise UsageError(f"dim is {dim}: 1 for (N, C) and (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W)")
    layer = PLAIN[dim - 1](num_features, eps=epsilon, momentum=_torch_momentum(keras=momentum))
    layer.weight.requires_grad_(scale)
    layer.bias.requires_grad_(center)
    _fill(layer.weight, gamma_initializer if scale else "ones")
    _fill(layer.bias, beta_initializer if center else "zeros")
    _fill(layer.running_mean, moving_mean_initializer)
    _fill(layer.running_var, moving_variance_initializer)
    return layer


@torch.no_grad()
def _fill(tensor: Tensor | None, initializer: Initializer) -> None:
    if isinstance(initializer, str) and initializer not in _WORDS:
        words = " or ".join(map(repr, _WORDS))
        raise UsageError(f"initializer {initializer!r}: {words}, or a function such as torch.nn.init.normal_")
    if tensor is not None:
        (_WORDS[initializer] if isinstance(initializer, str) else initializer)(tensor)
