"""Losses whose curvature is known, and small models, for the tests of curvature, sharpness and evidence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from dtrain.comm.base import Backend
from dtrain.largebatch.curvature import LossSurface

SAMPLES, FEATURES, CLASSES = 23, 4, 3


class Point(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values.clone())


def quadratic(matrix: Tensor, at: Tensor | None = None, slope: Tensor | None = None) -> LossSurface:
    """½ wᵀAw + cᵀw, whatever the samples."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = 0.5 * model.w @ matrix.to(model.w) @ model.w
        return value if slope is None else value + slope @ model.w

    return LossSurface(Point(torch.zeros(len(matrix), dtype=matrix.dtype) if at is None else at), loss, [torch.ones(3)])


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(values.double()) @ q.T


def model_of(kind: str) -> nn.Module:
    """`mlp` or `norm`: batch norm with running statistics of its own, and dropout, which measuring leaves out."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers: list[nn.Module] = [nn.Linear(FEATURES, 5)]
        if kind == "norm":
            norm = nn.BatchNorm1d(5)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            layers += [norm, nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, CLASSES)).double()


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def cross_entropy(model: nn.Module, batch: Sequence[Any]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def shares(comm: Backend) -> list[tuple[Tensor, Tensor]]:
    """Ragged: 5 and 2 samples for worker 0, none for worker 1, 16 for worker 2; all in one batch for one alone."""
    x, y = points()
    cuts = {0: [range(0, 5), range(5, 7)], 2: [range(7, SAMPLES)]} if comm.world_size > 1 else {0: [range(SAMPLES)]}
    return [(x[list(cut)], y[list(cut)]) for cut in cuts.get(comm.rank, [])]


def explicit(model: nn.Module) -> Tensor:
    """The Hessian of the cross entropy of all points (P, P), by torch.func, in evaluation mode."""
    x, y = points()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(n).shape for n in names]
    model = copy.deepcopy(model).eval()  # functional_call leaves a shared module changed

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        swapped = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, swapped, (x,)), y)

    at = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
    return jacrev(jacrev(loss))(at)


def direction(size: int, seed: int = 9) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
