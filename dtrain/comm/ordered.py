"""Sums in worker order, whatever the order of arrival.

Floating-point addition is not associative: a server that adds what comes first gives another result each time. Here
worker 0's tensor comes first, then worker 1's, and so on; one that arrives early is kept until its turn. The result is
the same bits for any timing, and for any cut of the tensor into parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class OrderedSum:
    """Sum of one tensor over workers. Half precision is added in float32 and rounded once, at the end."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._next = 0
        self._early: dict[int, Tensor] = {}
        self._total: Tensor | None = None
        self._first: Tensor | None = None

    def add(self, rank: int, tensor: Tensor) -> None:
        """Count worker `rank`'s tensor in. It is read now or at its turn, and must not change before `complete`.

        The caller sees to it that no rank is added twice and that sizes and types agree.
        """
        self._early[rank] = tensor
        while self._next in self._early:
            self._add_next(self._early.pop(self._next))
            self._next += 1

    @property
    def missing(self) -> list[int]:
        """Ranks that have not been added."""
        return [r for r in range(self._next, self._world_size) if r not in self._early]

    @property
    def complete(self) -> bool:
        return self._next == self._world_size

    def result(self) -> Tensor:
        """The sum, in the type of the tensors; only when `complete`. May share memory with a sole tensor."""
        if self._total is not None:
            return self._total if self._first is None else self._total.to(self._first.dtype)
        if self._first is None:
            raise RuntimeError("OrderedSum.result before anything was added")
        return self._first

    def _add_next(self, tensor: Tensor) -> None:
        if self._first is None:
            self._first = tensor
        elif self._total is None:
            if self._first.dtype in _HALF:
                self._total = self._first.float().add_(tensor)
            else:
                self._total = torch.add(self._first, tensor)
        else:
            self._total.add_(tensor)
