"""The sum of half-precision tensors over a process group, added in float32 and rounded once.

A library's all-reduce of halves rounds after every addition, hop by hop. Here each worker gets one part of the tensor
from all others, adds the parts in worker order in float32, and hands the rounded sum to all: the bytes of a ring, and
the bits of the other backends.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.ordered import total


class HalfSum:
    """Such a sum under way, in place of `torch.distributed.Work`.

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
        self._world = world
        part = -(-flat.numel() // world)
        sent = flat
        if part * world != flat.numel():
            sent = torch.zeros(part * world, dtype=flat.dtype, device=flat.device)
            sent[: flat.numel()] = flat
        self._sent = sent  # lives until it has left
        self._came = torch.empty_like(sent)
        self._work = dist.all_to_all_single(self._came, sent, group=first, async_op=True)
        self._over = False

    def is_completed(self) -> bool:
        return self._over

    def wait(self) -> None:
        if self._over:
            return
        if self._before is not None:
            self._before.wait()
            self._before = None
        self._work.wait()
        mine = total(self._came.view(self._world, -1).unbind()).contiguous()
        whole = self._flat if self._sent is self._flat else self._sent
        dist.all_gather(list(whole.view(self._world, -1).unbind()), mine, group=self._second)
        if whole is not self._flat:
            self._flat.copy_(whole[: self._flat.numel()])
        self._sent = self._came = self._flat[:0]
        self._over = True
