"""First and second derivatives of a loss by tensors that it was computed from (the leaves), flat.

A product with the Hessian is the gradient of the scalar gradient·v (Pearlmutter 1994, "Fast exact multiplication by the
Hessian", section 2): two backwards and no matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def flat(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    """All parts one after the other, on the device of `like`."""
    return torch.cat([part.reshape(-1).to(like.device) for part in parts])


def gradient(mean: Tensor, leaves: list[Tensor]) -> Tensor:
    """Flat (P,), zeros where a parameter is not used."""
    return flat(torch.autograd.grad(mean, leaves, materialize_grads=True), mean)


def _slopes(mean: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradient, of which there will be gradients; zeros where a parameter is not used."""
    return torch.autograd.grad(mean, leaves, create_graph=True, materialize_grads=True)


def product(mean: Tensor, leaves: list[Tensor], parts: list[Tensor]) -> Tensor:
    """The Hessian times the vector that the parts make up, shaped like the leaves: flat (P,)."""
    pairs = [(g, v.to(g)) for g, v in zip(_slopes(mean, leaves), parts, strict=True) if g.requires_grad]
    if not pairs:  # the loss is linear in every parameter
        return mean.new_zeros(sum(leaf.numel() for leaf in leaves))
    slopes, directions = zip(*pairs, strict=True)
    return flat(torch.autograd.grad(slopes, leaves, directions, materialize_grads=True), mean)


def rows(mean: Tensor, leaves: list[Tensor], at_once: int) -> Tensor:
    """The Hessian (P * P,), row by row."""
    slope = flat(_slopes(mean, leaves), mean)
    size = len(slope)
    matrix = mean.new_zeros(size, size)
    if not slope.requires_grad:
        return matrix.view(-1)
    for first in range(0, size, at_once):
        ones = torch.eye(min(at_once, size - first), size, dtype=slope.dtype, device=slope.device).roll(first, 1)
        one = ones if at_once > 1 else ones[0]
        found = torch.autograd.grad(
            slope, leaves, one, retain_graph=True, allow_unused=True, is_grads_batched=at_once > 1
        )
        parts = [
            matrix.new_zeros(len(ones), leaf.numel()) if row is None else row.reshape(len(ones), -1).to(matrix)
            for row, leaf in zip(found, leaves, strict=True)
        ]
        matrix[first : first + at_once] = torch.cat(parts, dim=1)
    return matrix.view(-1)
