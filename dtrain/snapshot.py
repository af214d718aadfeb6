"""What a worker has to itself, random generators and batch-norm averages: gathered for a checkpoint, given back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtrain import generators, trees
from dtrain.comm import collectives
from dtrain.comm.base import Backend


def gather_own(model: nn.Module, comm: Backend) -> list[dict[str, Any]]:
    """Random state and buffers of all workers that are here, in order; on the first of them, else an empty list."""
    own = {"random": generators.state(), "buffers": dict(model.named_buffers())}
    everyone = collectives.gather_bytes(comm, trees.dumps(own), "metric/snapshot")
    if any(everyone[: comm.rank]):
        return []
    return [trees.loads(data, f"worker {rank}") for rank, data in enumerate(everyone) if data]


@torch.no_grad()
def restore_own(own: dict[str, Any], model: nn.Module) -> None:
    """Give one worker back what `gather_own` took."""
    generators.set_state(own["random"])
    buffers = dict(model.named_buffers())
    for name, value in own["buffers"].items():
        buffers[name].copy_(value)
