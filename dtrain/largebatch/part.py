"""What a worker looks at of a data set that is measured on: its part, the same on every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dtrain.comm.base import Backend
from dtrain.data import BatchedData, cut, map_tensors, to_device
from dtrain.errors import UsageError


def count_samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    if not found or not found[0].dim():
        raise UsageError("a batch without a tensor has no samples to count: give samples=, a function of a batch")
    return len(found[0])


class Part:
    """A worker's part of a data set, in batches, as often as wanted: each sample is some worker's, and only one's."""

    def __init__(
        self, dataset: Dataset[Any], comm: Backend, *, batch_size: int = 256, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            dataset: map-style; a `dtrain.data.BatchedData` is asked for whole batches.
            batch_size: samples of one forward: what fits. It does not change the results, but for rounding.
            device: where the model is.

        Raises:
            UsageError: a batch of no samples.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: give 1 or more")
        count = len(dataset)  # type: ignore[arg-type]
        mine = range(count)[cut(count, comm.rank, comm.world_size)]
        self._dataset, self._device = dataset, torch.device(device)
        self._batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for indices in self._batches:
            if isinstance(self._dataset, BatchedData):
                batch = self._dataset.batch(torch.tensor(indices))
            else:
                batch = default_collate([self._dataset[i] for i in indices])
            yield to_device(batch, self._device)
