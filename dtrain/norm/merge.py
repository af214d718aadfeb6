"""Running statistics of plain batch norm, merged over workers: for evaluation and for checkpoints.

Each worker's running averages have seen only its own samples. Taking worker 0's, as is often done, throws the others'
away; here they are merged as moments are: the variance within, plus that between the means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.norm.moments import merge
from dtrain.norm.sync import SyncBatchNorm


@torch.no_grad()
def merge_statistics(model: nn.Module, comm: Backend) -> dict[str, Tensor]:
    """Merged running statistics of the plain batch-norm layers, by buffer name; the same on every worker.

    Workers count alike. Synchronised layers hold the same on every worker already and are left out.
    """
    layers = _layers(model)
    if not layers:
        return {}
    mine = torch.cat([torch.cat([mean, var]).double() for _, mean, var in layers])
    table = mine.new_zeros(comm.world_size, mine.numel())
    table[comm.rank] = mine
    comm.all_reduce(table.view(-1), "norm/merge").wait()
    counts = mine.new_ones(comm.world_size)
    merged: dict[str, Tensor] = {}
    for (name, mean, var), rows in zip(layers, table.split([2 * m.numel() for _, m, _ in layers], dim=1), strict=True):
        means, variances = rows.chunk(2, dim=1)
        average, m2, total = merge(means, variances, counts)
        merged[f"{name}running_mean"] = average.to(mean.dtype)
        merged[f"{name}running_var"] = (m2 / total).to(var.dtype)
    return merged


@contextlib.contextmanager
def merged_statistics(model: nn.Module, comm: Backend) -> Iterator[None]:
    """Within, plain batch-norm layers have the running statistics of all workers together; after, their own again."""
    buffers = dict(model.named_buffers())
    merged = merge_statistics(model, comm)
    own = {name: buffers[name].clone() for name in merged}
    _set(buffers, merged)
    try:
        yield
    finally:
        _set(buffers, own)


@torch.no_grad()
def _set(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        buffers[name].copy_(value)


def _layers(model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(prefix, running_mean, running_var) of each plain batch-norm layer that tracks them."""
    return [
        (f"{path}." if path else "", layer.running_mean, layer.running_var)
        for path, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
        if layer.running_mean is not None and layer.running_var is not None
    ]
