"""From the global batch, which decides what is learned, to what a worker does: micro-batches, accumulation, shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.data import accumulation, share
from dtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is computed. `str` of it is the line to print at the start of a run."""

    global_batch: int
    """Samples in one optimizer step, over all workers and micro-batches."""
    workers: int
    accumulate: int
    """Forward and backward passes of each worker in a step."""
    micro_batch: int
    """Most samples of one of them."""
    shares: tuple[int, ...]
    """Samples of each worker in a step; they differ where the batch cannot be divided evenly."""

    @property
    def even(self) -> bool:
        """Whether every forward of every worker has as many samples."""
        return self.global_batch == self.workers * self.accumulate * self.micro_batch

    def __str__(self) -> str:
        parts = [f"{self.workers} worker{'s' if self.workers > 1 else ''}"]
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} micro-batches")
        parts.append(f"{'' if self.even else 'up to '}{self.micro_batch} samples")
        return f"global batch {self.global_batch} = " + " x ".join(parts)


def plan(global_batch: int, workers: int = 1, micro_batch: int | None = None) -> BatchPlan:
    """The plan that a `dtrain.Loader` with these arguments follows.

    >>> print(plan(4096, workers=4, micro_batch=128))
    global batch 4096 = 4 workers x 8 micro-batches x 128 samples

    Args:
        global_batch: samples in one optimizer step, whoever computes them.
        micro_batch: most samples that one forward of a worker may have; None: as many as there are.

    Raises:
        UsageError: no worker, or a batch of no samples.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}: give 1 or more")
    accumulate = accumulation(global_batch, micro_batch, workers)
    shares = [share(global_batch, accumulate=accumulate, rank=r, world_size=workers) for r in range(workers)]
    return BatchPlan(
        global_batch=global_batch,
        workers=workers,
        accumulate=accumulate,
        micro_batch=math.ceil(global_batch / (accumulate * workers)),
        shares=tuple(sum(map(len, mine)) for mine in shares),
    )
