"""What all kinds of batch norm here share: a plain layer becomes one of them and plain again, and nobody notices.

Parameters and buffers stay the same objects under the same names, so that state dicts, optimizers and hooks go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError

PLAIN: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Forward = Callable[[nn.Module, Any], Any]
"""(model, batch): one forward."""

Layer = TypeVar("Layer", bound="NormLayer")


class NormLayer(_BatchNorm):
    """Base of the kinds. Inputs are (N, C, ...): a kind does not care how many dimensions follow."""

    original: type[_BatchNorm] = _BatchNorm
    """The class that it was made from."""
    own: ClassVar[tuple[str, ...]] = ()
    """Attributes that a plain layer does not have, given to `from_plain`."""
    holds_more: ClassVar[bool] = False
    """Whether it has learnt what another kind would lose."""

    @classmethod
    def from_plain(cls: type[Layer], layer: _BatchNorm, where: str, **own: Any) -> Layer:
        """A layer of this kind with the parameters and buffers of `layer`.

        Args:
            layer: plain, or of another kind here, which it replaces.
            where: its path in the model, for messages.
            own: what `cls.own` names.

        Raises:
            UsageError: another class, lazy or foreign: what it would mean there is not known.
        """
        if isinstance(layer, NormLayer) and layer.holds_more:
            raise UsageError(
                f"{where} is a {type(layer).__name__}, and what it has learnt would be lost: if it may, call "
                "dtrain.norm.revert(model) first"
            )
        plain = layer.to_plain() if isinstance(layer, NormLayer) else layer
        if plain.__class__ not in PLAIN:
            names = ", ".join(c.__name__ for c in PLAIN)
            raise UsageError(f"{where} is a {type(layer).__name__}: only {names} are converted")
        new = cls.__new__(cls)
        new.__dict__.update(plain.__dict__)
        new.__dict__.update(own, original=type(plain))
        return new

    def to_plain(self) -> _BatchNorm:
        """The layer that `from_plain` was given, again with the same parameters and buffers."""
        plain: _BatchNorm = self.original.__new__(self.original)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("original", *self.own)})
        return plain

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm takes (N, C, ...), got {tuple(x.shape)}")

    @torch.no_grad()
    def update_running(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        """Take statistics into the running averages as torch does: the variance with Bessel's correction.

        Args:
            mean: (C,).
            variance: (C,), biased.
            count: values a channel.
        """
        if self.running_mean is None or self.running_var is None or not self.track_running_stats or recomputing():
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
        less = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
        unbiased = variance * (count / less)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def on_first(model: nn.Module, batch: Any) -> Any:
    """The usual forward: the model of a batch, or of its first item if it is a tuple or list."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def recomputing() -> bool:
    """Whether a backward is under way: under gradient checkpointing, which computes forwards again."""
    return bool(torch._C._current_graph_task_id() != -1)


def places(model: nn.Module) -> list[tuple[nn.Module | None, str, _BatchNorm, str]]:
    """(parent, attribute, layer, path) of every place where a batch-norm layer stands; a shared layer has several."""
    if isinstance(model, _BatchNorm):
        return [(None, "", model, "batch_norm")]
    return [
        (parent, name, child, f"{path}.{name}".lstrip("."))
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()  # named_children leaves out the second place of a shared layer
        if isinstance(child, _BatchNorm)
    ]


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch-norm layer of a model once, in order of registration, by the path of its first place."""
    return {path or "batch_norm": m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}


def swap(model: nn.Module, make: Callable[[_BatchNorm, str], nn.Module]) -> nn.Module:
    """Put `make(layer, path)` in the place of every batch-norm layer; one that stands in two places stays one.

    All are made before the first is put in: where `make` raises, the model is as it was.

    Returns:
        The model, or what replaces it if it is a batch-norm layer itself.
    """
    found = places(model)
    made: dict[int, nn.Module] = {}
    for _, _, layer, path in found:
        if id(layer) not in made:
            made[id(layer)] = make(layer, path)
    for parent, name, layer, _ in found:
        if parent is None:
            return made[id(layer)]
        setattr(parent, name, made[id(layer)])
    return model


def revert(model: nn.Module) -> nn.Module:
    """Plain torch layers again, with what they have learnt, whatever kinds there were. Returns the model."""
    return swap(model, lambda layer, _: layer.to_plain() if isinstance(layer, NormLayer) else layer)
