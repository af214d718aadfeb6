"""Sums over a process group that are made part by part: each worker adds one part of a tensor, in worker order.

Each worker gets its part from all others, and adds. That is the first half of an all-reduce (a reduce-scatter), by the
same bytes as a ring's, and to the bits of the other backends, which also add in worker order. Halves are added in
float32 and rounded once, where a library's all-reduce rounds after every addition, hop by hop.

gloo has a reduce-scatter of its own; on one host it takes seven times as long as its all-reduce (torch 2.13).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.ordered import total


class PartSum:
    """Under way: this worker's part of a tensor becomes the sum; the other parts stay. As `torch.distributed.Work`."""

    def __init__(self, flat: Tensor, group: dist.ProcessGroup) -> None:
        """
        Args:
            flat: as many elements for each worker.
        """
        world = dist.get_world_size(group)
        self._parts = flat.view(world, -1)
        self._rank = dist.get_rank(group)
        self._came = torch.empty_like(self._parts)
        self._work = dist.all_to_all_single(self._came.view(-1), flat, group=group, async_op=True)
        self._over = False

    def is_completed(self) -> bool:
        return self._over

    def wait(self) -> None:
        if self._over:
            return
        self._work.wait()
        self._parts[self._rank].copy_(total(self._came.unbind()))
        self._came = self._came.new_empty(0)
        self._over = True


def gather(flat: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to replace each worker's part of a tensor by what that worker has there."""
    parts = list(flat.view(dist.get_world_size(group), -1).unbind())
    work: dist.Work = dist.all_gather(parts, parts[dist.get_rank(group)].clone(), group=group, async_op=True)
    return work


class HalfSum:
    """The sum of a tensor of halves under way, in place of an all-reduce.

    The second message leaves when this is waited for, after those of the sums begun before. Other sums may begin in
    between, not at the same place on all workers; so the two messages take groups of their own.
    """

    def __init__(
        self, flat: Tensor, first: dist.ProcessGroup, second: dist.ProcessGroup, before: HalfSum | None
    ) -> None:
        world = dist.get_world_size(first)
        self._flat = flat
        self._second = second
        self._before = before
        part = -(-flat.numel() // world)
        self._whole = flat
        if part * world != flat.numel():
            self._whole = torch.zeros(part * world, dtype=flat.dtype, device=flat.device)
            self._whole[: flat.numel()] = flat
        self._part = PartSum(self._whole, first)
        self._work: dist.Work | None = None
        self._over = False

    def is_completed(self) -> bool:
        return self._over

    def wait(self) -> None:
        if self._over:
            return
        if self._before is not None:
            self._before.wait()
            self._before = None
        self._part.wait()
        self._work = gather(self._whole, self._second)  # held here, see AllReduce._at_exit
        self._work.wait()
        self._work = None
        if self._whole is not self._flat:
            self._flat.copy_(self._whole[: self._flat.numel()])
            self._whole = self._flat
        self._over = True
