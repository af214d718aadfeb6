"""One knob: how many samples share batch-norm statistics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.norm.frozen import FrozenBatchNorm
from dtrain.norm.ghost import GhostBatchNorm
from dtrain.norm.layer import NormLayer, revert, swap
from dtrain.norm.sync import SyncBatchNorm

NormBatch = int | str
"""Samples that share statistics; `worker`: a worker's micro-batch by itself, as in DDP; `global`: all workers'."""

WORDS = ("worker", "global")


@dataclass(frozen=True)
class Sharing:
    """How a norm batch is had: ghost groups within a micro-batch, or groups of workers."""

    ghost: int | None = None
    """Samples of a group within a worker's micro-batch."""
    workers: int = 1
    """Workers that share statistics."""

    def __str__(self) -> str:
        if self.ghost is not None:
            return f"groups of {self.ghost} samples within each worker's micro-batch (ghost batch norm)"
        return "each worker's own" if self.workers == 1 else f"synchronised over groups of {self.workers} workers"


def sharing(norm_batch: NormBatch, *, world_size: int, micro_batch: int | None = None) -> Sharing:
    """How that many samples come to share statistics, whatever is accumulated.

    Args:
        norm_batch: samples, or one of `WORDS`.
        micro_batch: samples of one forward of one worker; needed where `norm_batch` is a number.

    Raises:
        UsageError: it cannot be had exactly, and what can.
    """
    if norm_batch == "worker":
        return Sharing()
    if norm_batch == "global":
        return Sharing(workers=world_size)
    if not isinstance(norm_batch, int) or isinstance(norm_batch, bool) or norm_batch < 1:
        raise UsageError(f"norm_batch is {norm_batch!r}: {', '.join(WORDS)}, or a number of samples")
    if micro_batch is None or micro_batch < 1:
        raise UsageError(
            f"norm_batch is {norm_batch} and micro_batch {micro_batch}: say how many samples a worker's forward has"
        )
    if norm_batch < micro_batch:
        return Sharing(ghost=norm_batch)
    group, rest = divmod(norm_batch, micro_batch)
    if rest == 0 and group <= world_size and world_size % group == 0:
        return Sharing(workers=group)
    raise UsageError(_refusal(norm_batch, micro_batch, world_size))


def _refusal(norm_batch: int, micro_batch: int, world_size: int) -> str:
    possible = [micro_batch * k for k in range(1, world_size + 1) if world_size % k == 0]
    whole = micro_batch * world_size
    text = f"norm_batch is {norm_batch}, with micro-batches of {micro_batch} on {world_size} worker(s): "
    if norm_batch > whole:
        text += (
            f"one forward has only {whole} samples on all workers together, and accumulated micro-batches are computed "
            "one after the other, each without knowing the next: use larger micro-batches, or more workers. "
        )
    else:
        text += "groups of whole workers, all of one size, do not give that. "
    return f"{text}Possible here: less than {micro_batch} (ghost groups), {', '.join(map(str, possible))}, or 'global'"


def convert(
    model: nn.Module,
    *,
    norm_batch: NormBatch = "global",
    comm: Backend | None = None,
    micro_batch: int | None = None,
) -> nn.Module:
    """Let the batch-norm layers of a model share statistics among `norm_batch` samples; in place.

    Below a worker's micro-batch: ghost groups within it. Equal: plain layers. Above: synchronised over groups of
    workers. Parameters and buffers stay the same objects under the same names: state dicts and optimizers go on. Frozen
    layers stay frozen; `revert` first, if they are not to.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        norm_batch: samples, or one of `WORDS`.
        comm: the backend that carries the statistics; None: alone.
        micro_batch: samples of one forward of one worker; needed where `norm_batch` is a number.

    Returns:
        The model.

    Raises:
        UsageError: a `norm_batch` that cannot be had exactly; a lazy or foreign batch-norm class, or a layer that keeps
            statistics for each domain.
    """
    comm = comm or Solo()
    shared = sharing(norm_batch, world_size=comm.world_size, micro_batch=micro_batch)

    def make(layer: _BatchNorm, path: str) -> nn.Module:
        if isinstance(layer, FrozenBatchNorm):
            return layer
        if shared.ghost is not None:
            return GhostBatchNorm.from_plain(layer, path, norm_batch=shared.ghost)
        if shared.workers > 1 or norm_batch == "global":
            size = None if shared.workers == comm.world_size else shared.workers
            return SyncBatchNorm.from_plain(layer, path, comm=comm, key=path, group_size=size)
        return layer.to_plain() if isinstance(layer, NormLayer) else layer

    return swap(model, make)


__all__ = ["WORDS", "NormBatch", "Sharing", "convert", "revert", "sharing"]
