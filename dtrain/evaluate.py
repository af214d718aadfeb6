"""Evaluation over workers: every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.data import BatchedData, cut, to_device
from dtrain.norm import merged_statistics

Score = Callable[[nn.Module, Any], Mapping[str, Tensor | float]]
"""(model, batch) -> sums over the samples of the batch, by name."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    score: Score,
    comm: Backend,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    statistics_of: float = 1.0,
) -> dict[str, float]:
    """Means of the scores over a data set, each worker taking a part of it; the same numbers on every worker.

    Plain batch-norm layers use the running statistics of all workers together. The model is in evaluation mode within.

    Args:
        dataset: map-style; a `BatchedData` is asked for whole batches.
        score: sums over the samples of a batch, with the same names for each.
        batch_size: samples of one forward.
        statistics_of: how many samples this worker's running statistics stand for, against those of the others.
    """
    count = len(dataset)  # type: ignore[arg-type]
    mine = range(count)[cut(count, comm.rank, comm.world_size)]
    sums: dict[str, float] = {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with merged_statistics(model, comm, samples=statistics_of):
            for start in range(0, len(mine), batch_size):
                batch = to_device(_batch(dataset, mine[start : start + batch_size]), torch.device(device))
                for name, value in score(model, batch).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
    finally:
        for module, training in modes:
            module.training = training
    return _means(sums, len(mine), comm)


def _means(sums: dict[str, float], count: int, comm: Backend) -> dict[str, float]:
    """A worker without samples does not know the names: it learns them from the others."""
    everyone = collectives.gather_bytes(comm, "\n".join(sorted(sums)).encode(), "metric/evaluate")
    names = sorted({name for data in everyone for name in data.decode().splitlines()})
    *totals, samples = collectives.sum_numbers(comm, [*(sums.get(n, 0.0) for n in names), count], "metric/evaluate")
    return {name: total / samples for name, total in zip(names, totals, strict=True)} if samples else {}


def _batch(dataset: Dataset[Any], indices: range) -> Any:
    if isinstance(dataset, BatchedData):
        return dataset.batch(torch.tensor(indices))
    return default_collate([dataset[i] for i in indices])
