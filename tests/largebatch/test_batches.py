"""The plan of a batch is what a Loader does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from dtrain.data import Loader
from dtrain.errors import UsageError
from dtrain.largebatch import plan


@given(batch=st.integers(1, 200), workers=st.integers(1, 5), micro_batch=st.none() | st.integers(1, 40))
def test_a_loader_follows_it(batch: int, workers: int, micro_batch: int | None) -> None:
    """Forwards, their largest number of samples, and each worker's share."""
    found = plan(batch, workers, micro_batch)
    data = TensorDataset(torch.arange(200.0))
    for rank, share in enumerate(found.shares):
        loader = Loader(data, global_batch=batch, micro_batch=micro_batch, rank=rank, world_size=workers)
        step = next(loader.epoch(0))
        samples = [micro.samples for micro in step.micro_batches]
        assert (len(samples), sum(samples)) == (min(found.accumulate, batch), share)
        assert (loader.micro_batch, loader.share, loader.even) == (found.micro_batch, share, found.even)
        assert max(samples) <= found.micro_batch <= (micro_batch or batch)
    assert sum(found.shares) == batch


def test_what_is_printed() -> None:
    """The product is the global batch, unless it cannot be."""
    assert str(plan(4096, 4, 128)) == "global batch 4096 = 4 workers x 8 micro-batches x 128 samples"
    assert str(plan(64)) == "global batch 64 = 1 worker x 64 samples"
    assert str(plan(100, 3)) == "global batch 100 = 3 workers x up to 34 samples"


@pytest.mark.parametrize("wrong", [(0, 1, None), (8, 0, None), (8, 1, 0)])
def test_what_cannot_be_meant(wrong: tuple[int, int, int | None]) -> None:
    with pytest.raises(UsageError, match=r"(is|micro_batch) 0"):
        plan(*wrong)
