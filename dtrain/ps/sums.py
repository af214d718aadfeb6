"""Sums over workers where the tensors lie, in the order of `dtrain.comm.ordered` and so with its bits.

A tensor is summed in pieces that fit a core's own cache, and a piece's sum is copied out while its inputs are still
there: each byte crosses the memory bus once in and once out. Threads take pieces as they come. Types that numpy knows
are added by numpy, whose calls hold the interpreter's lock for a fraction of the time that torch's do; it is that
lock, not arithmetic, that keeps two threads from being twice as fast as one. (Of two NaNs that meet, numpy may keep the
other one's bits; all outputs still agree.) Large sums into all of their inputs are made in one pass, see `fused`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.comm.base import DTYPES, dtype_name
from dtrain.comm.ordered import HALVES
from dtrain.comm.ordered import total as in_order
from dtrain.errors import UsageError
from dtrain.ps import fused
from dtrain.ps.tasks import Pool, Task

_CACHE_BYTES = 2**20
"""What the inputs of one piece take together: they stay in the second-level cache of a present-day server core."""

_FUSED_BYTES = 2**20
"""Of each input, where a piece is summed in one pass: that needs no cache, but helpers want their share."""

_ALONE_BYTES = 2**20
"""Inputs up to this size are summed by the caller: another thread would wake up when the work is done."""


class Reduction(Task):
    """One sum under way: see `Task` for how it is worked on."""

    def __init__(self, parts: Sequence[Tensor], outputs: Sequence[Tensor], *, pool: Pool | None = None) -> None:
        """
        Args:
            parts: a flat tensor from each worker, in the order of workers.
            outputs: flat tensors that all receive the sum. Each may be one of the parts; else they do not overlap.
            pool: who helps.
        """
        _check(parts, outputs)
        first = parts[0]
        self._add = _add_halves if first.dtype in HALVES else _add_arrays
        arrays = {id(t): _array(t) for t in (*parts, *outputs)}
        self._parts = [arrays[id(t)] for t in parts]
        self._outputs = [arrays[id(t)] for t in outputs]
        self._target = _target(parts, outputs)
        large = first.nbytes * len(parts) > _ALONE_BYTES
        into_all = sorted(t.data_ptr() for t in parts) == sorted(t.data_ptr() for t in outputs)
        dtype = dtype_name(first.dtype)
        kernel = fused.kernel(dtype, len(parts)) if large and into_all else None
        nbytes = _piece_bytes(len(parts)) if kernel is None else _FUSED_BYTES
        self._piece = nbytes // max(4, first.element_size())  # halves are widened to 4 bytes
        do = self._sum if kernel is None else functools.partial(self._sum_fused, kernel)
        super().__init__(-(-first.numel() // self._piece), do, pool=pool if large else None)

    def _sum(self, number: int) -> None:
        piece = slice(number * self._piece, (number + 1) * self._piece)
        place = None if self._target is None else self._outputs[self._target][piece]
        total = self._add([p[piece] for p in self._parts], place)
        for i, output in enumerate(self._outputs):
            if i != self._target or total is not place:
                output[piece] = total

    def _sum_fused(self, kernel: fused.Kernel, number: int) -> None:
        piece = slice(number * self._piece, (number + 1) * self._piece)
        kernel(tuple(p[piece] for p in self._parts))


def _piece_bytes(parts: int) -> int:
    """Size of a piece of each part: whole pages."""
    return max(2**16, _CACHE_BYTES // max(2, parts) & -4096)


def _array(flat: Tensor) -> Any:
    """The same memory as numpy sees it, where numpy knows the type; else as it is. Both are used alike."""
    return flat if flat.dtype in HALVES else flat.numpy()


def _target(parts: Sequence[Tensor], outputs: Sequence[Tensor]) -> int | None:
    """The first output that a sum may grow in: one that is no part whose turn comes after the first addition."""
    later = {p.data_ptr() for p in parts[2:]}
    return next((i for i, output in enumerate(outputs) if output.data_ptr() not in later), None)


def _add_arrays(parts: list[Any], place: Any) -> Any:
    """The sum, in `place` if there is one."""
    if len(parts) == 1:
        if place is None:
            return parts[0].copy()
        np.copyto(place, parts[0])
        return place
    with np.errstate(all="ignore"):  # an infinite gradient is the trainer's business, and torch does not warn either
        total = np.add(parts[0], parts[1], out=place)
        for part in parts[2:]:
            np.add(total, part, out=total)
    return total


def _add_halves(parts: list[Any], place: Any) -> Any:
    """The same in float32, rounded once."""
    total = in_order(parts)
    if place is not None:
        return place.copy_(total)
    return total.clone() if len(parts) == 1 else total


def _check(parts: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    if not parts:
        raise UsageError("a sum of no parts: give a tensor from each worker")
    dtype, numel = parts[0].dtype, parts[0].numel()
    for tensor in (*parts, *outputs):
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.dtype not in DTYPES:
            shape = tuple(tensor.shape)
            raise UsageError(f"a sum over {tensor.dtype} of shape {shape}: give flat contiguous tensors of one type")
        if tensor.dtype != dtype or tensor.numel() != numel:
            raise UsageError(f"a sum of {numel} x {dtype} and {tensor.numel()} x {tensor.dtype}: give all alike")
