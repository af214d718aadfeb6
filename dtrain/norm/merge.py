"""Running statistics of the workers' own batch norm, merged: for evaluation and for checkpoints; and how far apart.

Each worker's running averages have seen only its own samples. Taking worker 0's, as is often done, throws the others'
away; here they are merged as moments are: the variance within, plus that between the means.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.norm.domains import Domain, DomainBatchNorm
from dtrain.norm.moments import merge
from dtrain.norm.sync import SyncBatchNorm
from dtrain.tables import table

Pair = tuple[Tensor, Tensor]
"""running_mean and running_var of a layer, (C,) each."""


def merge_statistics(model: nn.Module, comm: Backend, *, samples: float = 1.0) -> dict[str, Tensor]:
    """Merged running statistics of the batch-norm layers, by buffer name; the same on every worker.

    Synchronised layers hold the same on every worker already and are left out.

    Args:
        samples: how many this worker's statistics stand for; against the others' it is its weight. A worker of 0 does
            not count; where all have 0, workers count alike. Neither does one that no batch has come to yet, layer by
            layer, and domain by domain.

    Raises:
        UsageError: `samples` is negative or no number.
    """
    own = _own(model)
    merged: dict[str, Tensor] = {}
    pairs = merge_pairs([o.pair for o in own], comm, samples=samples, seen=[o.seen for o in own])
    for (path, _, held, _), (mean, variance) in zip(own, pairs, strict=True):
        prefix = f"{path}." if path else ""
        merged[f"{prefix}running_mean"] = mean.to(held[0])
        merged[f"{prefix}running_var"] = variance.to(held[1])
    return merged


@contextlib.contextmanager
def merged_statistics(model: nn.Module, comm: Backend, *, samples: float = 1.0) -> Iterator[None]:
    """Within, batch-norm layers have the running statistics of all workers together; after, their own again.

    Args:
        samples: as in `merge_statistics`.
    """
    buffers = dict(model.named_buffers())
    merged = merge_statistics(model, comm, samples=samples)
    own = {name: buffers[name].clone() for name in merged}
    _set(buffers, merged)
    try:
        yield
    finally:
        _set(buffers, own)


@dataclass(frozen=True)
class LayerDrift:
    """How far apart the workers' running statistics of one layer are; the worst channel and the worst two workers."""

    means: float
    """Distance of two workers' means, in standard deviations of all workers together."""
    variances: float
    """Ratio of two workers' variances, 1 or more."""


@dataclass(frozen=True)
class Drift:
    """How far the workers have drifted apart, by the path of a layer. `str` gives a table."""

    layers: dict[str, LayerDrift]

    def __str__(self) -> str:
        rows = [[path, f"{d.means:.3f}", f"{d.variances:.3f}"] for path, d in self.layers.items()]
        return table(["layer", "means apart (std)", "variances apart (ratio)"], rows)


@torch.no_grad()
def drift(model: nn.Module, comm: Backend) -> Drift:
    """How far apart the running statistics of the workers are; the same figures on every worker.

    Variances have the layer's eps added, as where they are used. Synchronised layers are left out.
    """
    own = _own(model)
    found: dict[str, LayerDrift] = {}
    rows = _gather_pairs([o.pair for o in own], comm, 1.0, [o.seen for o in own])
    for (path, eps, *_), (means, variances, counts) in zip(own, rows, strict=True):
        seen = counts > 0 if bool(counts.any()) else torch.ones_like(counts, dtype=torch.bool)
        means, variances, counts = means[seen], variances[seen], torch.ones_like(counts[seen])
        _, m2, total = merge(means, variances, counts)
        spread = (means.amax(0) - means.amin(0)) / (m2 / total + eps).sqrt()
        ratio = (variances.amax(0) + eps) / (variances.amin(0) + eps)
        found[path or "batch_norm"] = LayerDrift(float(spread.max()), float(ratio.max()))
    return Drift(found)


@torch.no_grad()
def merge_pairs(
    pairs: Sequence[Pair], comm: Backend, *, samples: float = 1.0, seen: Sequence[Tensor] | None = None
) -> list[Pair]:
    """Statistics of several layers, each merged over workers, float64.

    Args:
        samples: as in `merge_statistics`.
        seen: for each layer, (), 0 where nothing has come to it on this worker; None: all have.
    """
    if not (samples >= 0 and math.isfinite(samples)):
        raise UsageError(f"samples is {samples}: how many samples this worker has seen, 0 or more")
    merged: list[Pair] = []
    for means, variances, counts in _gather_pairs(pairs, comm, samples, seen):
        counts = counts if bool(counts.any()) else torch.ones_like(counts)
        some = counts > 0
        weights = counts[some] / counts.max()
        mean, m2, total = merge(means[some], variances[some] * weights.unsqueeze(1), weights)
        merged.append((mean, m2 / total))
    return merged


def gather_rows(row: Tensor, comm: Backend, key: str) -> Tensor:
    """Every worker's row, (workers, numel) in worker order, float64: the same bits on every worker."""
    rows = row.new_zeros(comm.world_size, row.numel(), dtype=torch.float64)
    rows[comm.rank] = row
    comm.all_reduce(rows.view(-1), key).wait()
    return rows


def _gather_pairs(
    pairs: Sequence[Pair], comm: Backend, samples: float, seen: Sequence[Tensor] | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer: means (workers, C), variances (workers, C), counts (workers,). Nothing is sent for no layer."""
    if not pairs:
        return []
    device = pairs[0][0].device
    flat = torch.cat([t.to(device, torch.float64) for pair in pairs for t in pair])
    weights = flat.new_full((len(pairs),), samples)
    if seen is not None:
        weights *= torch.stack([s.to(device, torch.float64) for s in seen]) > 0
    rows = gather_rows(torch.cat([flat, weights, flat.new_tensor([samples, 1.0])]), comm, "norm/merge")
    rows = rows[rows[:, -1] > 0]  # not those that the job goes on without
    *parts, counts, whole, _ = rows.split([*(2 * len(mean) for mean, _ in pairs), len(pairs), 1, 1], dim=1)
    counts = torch.where(counts.any(0), counts, whole)  # where nothing has come to any of them, as if it had
    return [(*part.chunk(2, dim=1), counts[:, i]) for i, part in enumerate(parts)]


@torch.no_grad()
def _set(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        buffers[name].copy_(value)


def kept(layer: _BatchNorm, path: str) -> dict[str, _BatchNorm | Domain]:
    """Where a layer keeps running statistics, by path: itself, or each of its domains. Nowhere, where it has none."""
    if layer.running_mean is None:
        return {}
    if not isinstance(layer, DomainBatchNorm):
        return {path: layer}
    return {f"{path}.domains.{name}".lstrip("."): cast("Domain", domain) for name, domain in layer.domains.items()}


def pair(place: _BatchNorm | Domain) -> Pair:
    """Running mean and variance that are kept in a place of `kept`."""
    return cast("Pair", (place.running_mean, place.running_var))


class _Own(NamedTuple):
    """Statistics that are a worker's own."""

    path: str
    eps: float
    pair: Pair
    seen: Tensor
    """How many batches, (); 1 where that is not counted."""


def _own(model: nn.Module) -> list[_Own]:
    return [
        _Own(place, layer.eps, pair(holder), _seen(holder))
        for path, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
        for place, holder in kept(layer, path).items()
    ]


def _seen(place: _BatchNorm | Domain) -> Tensor:
    tracked = place.num_batches_tracked
    return torch.ones(()) if tracked is None else tracked
