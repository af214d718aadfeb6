"""Group norm in the place of batch norm (Wu & He 2018): no statistics over samples, none kept.

For small batches, for correlated ones, and where training and evaluation are to compute the same.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError
from dtrain.norm.layer import NormLayer, swap

WORDS = ("layer", "instance")


def replace_with_group_norm(model: nn.Module, groups: int | str = 32) -> nn.Module:
    """Put `nn.GroupNorm` in the place of every batch-norm layer, plain or of a kind; in place.

    Weight and bias are the same Parameter objects, so that optimizers go on; a shared layer stays shared. Running
    statistics are given up, with their state-dict keys; so are hooks on the layers. `revert` does not undo this. What
    a network has learnt with batch norm does not carry over: train it again.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        groups: that the channels of a layer are divided into, or one of `WORDS`: "layer" is 1 group, "instance" one a
            channel. Where the number does not divide the channels, the largest smaller one that does is taken: 24
            groups for 48 channels and groups=32.

    Returns:
        The model.

    Raises:
        UsageError: another word, less than 1 group, a lazy layer, or a `BatchNorm1d` that a number of groups leaves
            with one channel a group: on (N, C) inputs that is one value, and the output the bias whatever the input.
            ("instance" is taken at its word: there, use it on (N, C, L) only.)
    """
    if groups not in WORDS and (not isinstance(groups, int) or groups < 1):
        raise UsageError(f"groups is {groups!r}: {', '.join(WORDS)}, or a number of at least 1")

    def make(layer: _BatchNorm, path: str) -> nn.GroupNorm:
        if layer.num_features < 1:
            raise UsageError(f"{path} is lazy, and has no channels yet: run the model once before this")
        count = _groups(layer.num_features, groups)
        flat = isinstance(layer, nn.BatchNorm1d) or getattr(layer, "original", None) is nn.BatchNorm1d
        if flat and count == layer.num_features and groups not in WORDS:
            raise UsageError(
                f"{path} is a BatchNorm1d of {count} channels, and groups={groups} would give each a group of its own: "
                "on (N, C) inputs nothing but the bias is left. Use fewer groups, or 'layer'; 'instance' if it is meant"
            )
        if isinstance(layer, NormLayer):
            layer = NormLayer.from_plain(layer, path)  # what was frozen learns again
        new = nn.GroupNorm(count, layer.num_features, eps=layer.eps, affine=False)
        new.affine, new.weight, new.bias = layer.affine, layer.weight, layer.bias
        return new.train(layer.training)

    return swap(model, make)


def _groups(channels: int, groups: int | str) -> int:
    """The largest divisor of `channels` that is not above `groups`."""
    if isinstance(groups, str):
        return 1 if groups == "layer" else channels
    return next(count for count in range(min(groups, channels), 0, -1) if channels % count == 0)


__all__ = ["replace_with_group_norm"]
