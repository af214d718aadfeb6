"""Frozen batch norm: fixed statistics, in training too (as in fine-tuning, and at the end of training:
Wu & Johnson 2021, section 3).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError
from dtrain.norm.layer import NormLayer, layers, swap

Layer = TypeVar("Layer", bound="FrozenBatchNorm")


class FrozenBatchNorm(NormLayer):
    """Batch norm by the running statistics, which stay as they are, in whatever mode.

    Gradients go to the input, and to weight and bias where they are learnt.
    """

    own = ("learnt",)
    learnt: tuple[bool, bool] | None = None
    """Whether weight and bias were learnt before `freeze` stopped them; None: they were left alone."""

    @classmethod
    def from_plain(cls: type[Layer], layer: _BatchNorm, where: str, **own: Any) -> Layer:
        """As in the base.

        Raises:
            UsageError: the layer has no running statistics; or as in the base.
        """
        if layer.running_mean is None or layer.running_var is None:
            raise UsageError(f"{where} keeps no running statistics (track_running_stats=False): nothing to freeze")
        return super().from_plain(layer, where, **own)

    def to_plain(self) -> _BatchNorm:
        """As in the base; weight and bias are learnt again if they were."""
        if self.learnt is not None and self.affine:
            for parameter, learnt in zip((self.weight, self.bias), self.learnt, strict=True):
                if parameter is not None:
                    parameter.requires_grad_(learnt)
        return super().to_plain()

    def update_running(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        """Nothing is taken in."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def freeze(model: nn.Module, *, start: str | None = None, affine: bool = False) -> nn.Module:
    """Batch-norm layers normalise by their running statistics from now on, also after `.train()`; in place.

    `revert` makes them plain again. Freeze before optimizer and Trainer are made, where `affine` is wanted.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        start: path of the first layer to be frozen, or of the module that it is in, in order of registration; None:
            all are.
        affine: weight and bias stop learning too, and lose the gradient they have.

    Returns:
        The model.

    Raises:
        UsageError: no layer at `start`; a layer without running statistics; a lazy or foreign class.
    """
    found = layers(model)
    matching = [path for path in found if start is None or path == start or path.startswith(f"{start}.")]
    if start is not None and not matching:
        raise UsageError(f"no batch-norm layer has the path {start!r}, or is in it: {', '.join(found) or 'none'}")
    chosen = list(found.values())[list(found).index(matching[0]) if matching else 0 :]
    frozen = [layer for layer in chosen if isinstance(layer, FrozenBatchNorm)]

    def make(layer: _BatchNorm, path: str) -> nn.Module:
        if isinstance(layer, FrozenBatchNorm) or all(layer is not other for other in chosen):
            return layer
        frozen.append(FrozenBatchNorm.from_plain(layer, path, learnt=None))
        return frozen[-1]

    model = swap(model, make)
    for layer in frozen if affine else ():
        if layer.learnt is None:
            _stop(layer)
    return model


def _stop(layer: FrozenBatchNorm) -> None:
    parameters = (layer.weight, layer.bias) if layer.affine else (None, None)
    layer.learnt = (_learns(parameters[0]), _learns(parameters[1]))
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_(False)
            parameter.grad = None


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad
