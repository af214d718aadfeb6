"""Synchronised batch norm over every backend and 2 to 4 workers, with unequal and empty shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dtrain import norm
from dtrain.comm.base import Backend
from tests.conftest import everywhere
from tests.norm.test_sync import SHAPES, close, data, plain_layer, run

SHARES: dict[int, list[tuple[int, ...]]] = {
    2: [(5, 6), (0, 11)],
    3: [(1, 8, 2), (0, 11, 0)],
    4: [(3, 2, 5, 1), (0, 7, 0, 4)],
}

Found = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]


def normalised(comm: Backend) -> list[Found]:
    """Of each case, this worker's share."""
    found = []
    for (make, shape), shares in cases_of(comm.world_size):
        layer = norm.convert(plain_layer(make), comm=comm)
        y, dx = run(layer, *(t.split(shares)[comm.rank] for t in (data(shape), data(shape, 9))))
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        found.append((y, dx, gradients, [b.clone() for b in layer.buffers()]))
    return found


def cases_of(workers: int) -> list[tuple[tuple[type[nn.Module], tuple[int, ...]], tuple[int, ...]]]:
    return [(kind, shares) for kind in SHAPES.values() for shares in SHARES[workers]]


@pytest.mark.parametrize("workers", SHARES)
@pytest.mark.parametrize("backend", ["threads", "ps", "allreduce"])
def test_equals_batch_norm_on_the_whole_batch(backend: str, workers: int) -> None:
    """Output, gradients of input and parameters, and running statistics; float64, to 1e-10."""
    results = everywhere(normalised, backend=backend, workers=workers, timeout_s=30.0)
    for number, ((make, shape), _) in enumerate(cases_of(workers)):
        reference = plain_layer(make)
        y, dx = run(reference, data(shape), data(shape, 9))
        mine = [worker[number] for worker in results]
        close(torch.cat([m[0] for m in mine]), y)
        close(torch.cat([m[1] for m in mine]), dx)
        for gradients, parameter in zip(zip(*(m[2] for m in mine), strict=True), reference.parameters(), strict=True):
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None
            close(torch.stack(gradients).sum(0), parameter.grad)
        for found in mine:
            assert all(torch.equal(a, b) for a, b in zip(found[3], mine[0][3], strict=True))
            for a, b in zip(found[3], reference.buffers(), strict=True):
                close(a.double(), b.double())
