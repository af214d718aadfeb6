"""Pieces of batch norm's backward that several kinds are made of, each by one of torch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Over the values of each channel: the sum of dy times the normalised input, and of dy; one pass over both.

    Args:
        dy, x: (N, C, ...) of one type, that of the statistics. N may be 0.
        mean, inverse: (C,), what x is normalised by.

    Returns:
        (C,) each.
    """
    if x.numel() == 0:  # torch's kernel divides by the number of samples, and the process dies
        return torch.zeros_like(mean), torch.zeros_like(mean)
    kernel = torch.ops.aten.native_batch_norm_backward
    needed = [False, True, True]
    _, dy_x, only_dy = kernel(dy, x, torch.ones_like(mean), None, None, mean, inverse, True, 0.0, needed)
    return dy_x, only_dy


def linear(x: Tensor, slope: Tensor, shift: Tensor, dy: Tensor, scale: Tensor) -> Tensor:
    """x * slope + shift + dy * scale, (N, C, ...), with factors (C,): two passes, where broadcasting takes three."""
    zero = torch.zeros_like(slope)
    y = F.batch_norm(x, zero, torch.ones_like(zero), slope, shift, False, 0.0, 0.0)
    return y.addcmul_(dy, scale.view([1, -1] + [1] * (x.dim() - 2)))


def composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    sizes: Sequence[int],
    eps: float,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight and bias as a graph of their own, for a double backward: by torch's formulas.

    Args:
        sizes: samples of each group that is normalised by itself.
        needed: which gradients are wanted.
    """
    with torch.enable_grad():
        y = torch.cat([F.batch_norm(p, None, None, weight, bias, True, 0.0, eps) for p in x.split(list(sizes))])
        wanted = [t if need else None for t, need in zip((x, weight, bias), needed, strict=True)]
        found = iter(torch.autograd.grad(y, [t for t in wanted if t is not None], dy, create_graph=True))
    return [None if t is None else next(found) for t in wanted]
