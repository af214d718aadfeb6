"""Small sums between workers of one host, without a server in between: each worker's numbers lie open to all.

A batch-norm message is a kilobyte, and what it costs is waiting: a server's answer takes four changes of process. Here
each worker writes its numbers and then their sequence number into shared memory; each reads all workers' and adds them
in worker order, so that all have the same bits, and the bits that a server would have given.

A store that is written after another is seen after it: so it is on x86, and only there is there a board.
"""

from __future__ import annotations

import platform
import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtrain.comm.base import DTYPES, LANES, dtype_name, lane_of
from dtrain.comm.ordered import HALVES, total
from dtrain.errors import LayoutError

MOST_BYTES = 16 * 2**10
"""Largest tensor on a board."""

_SLOTS = 8  # messages of one lane and worker that others may not have read yet
_LINE = 64  # bytes that a processor moves at once
_SLOT_BYTES = _LINE + MOST_BYTES
_WORKER_BYTES = _LINE + _SLOTS * _SLOT_BYTES


def possible() -> bool:
    """Whether this machine keeps the order of stores."""
    return platform.machine() in ("x86_64", "AMD64")


def nbytes(world_size: int) -> int:
    """Size of a board."""
    return len(LANES) * world_size * _WORKER_BYTES


@dataclass
class Post:
    """One tensor on the board."""

    key: str
    flat: Tensor
    number: int  # of the lane's messages
    done: bool = False


class Board:
    """A board in memory that all workers see, full of zeros at the start."""

    def __init__(self, memory: Tensor, rank: int, world_size: int) -> None:
        """
        Args:
            memory: bytes, `nbytes(world_size)` of them.
        """
        self._rank = rank
        self._world_size = world_size
        shape = (len(LANES), world_size, _WORKER_BYTES)
        workers = memory.numpy().reshape(shape)
        self._read = workers[:, :, :8].view(np.int64)[..., 0]  # messages that each worker has done with
        slots = workers[:, :, _LINE:].reshape(len(LANES), world_size, _SLOTS, _SLOT_BYTES)
        self._heads = slots[..., :_LINE].view(np.int64)  # sequence number, crc32 of the key, type, elements
        self._data = slots[..., _LINE:]
        self._posted = [0] * len(LANES)
        self._open: list[deque[Post]] = [deque() for _ in LANES]

    def has_room(self, key: str) -> bool:
        """Whether all have read what the lane's next message will lie upon.

        Raises:
            LayoutError: as `advance`.
        """
        lane = LANES.index(lane_of(key))
        if self._open[lane] and self._posted[lane] - self._read[lane, self._rank] >= _SLOTS:
            self.advance(self._open[lane][-1])  # else all who post without waiting would wait for each other
        return bool(self._posted[lane] - self._read[lane].min() < _SLOTS)

    def post(self, flat: Tensor, key: str) -> Post:
        """Show a tensor to the others; there must be room."""
        lane = LANES.index(lane_of(key))
        number = self._posted[lane]
        slot = number % _SLOTS
        array = flat.view(torch.uint8).numpy()
        self._data[lane, self._rank, slot, : array.size] = array
        head = self._heads[lane, self._rank, slot]
        head[1:4] = (zlib.crc32(key.encode()), DTYPES.index(flat.dtype), flat.numel())
        head[0] = number + 1  # last: from now on the others read it
        self._posted[lane] = number + 1
        post = Post(key, flat, number)
        self._open[lane].append(post)
        return post

    def missing(self, post: Post) -> list[int]:
        """Workers that have not shown theirs."""
        lane, slot = LANES.index(lane_of(post.key)), post.number % _SLOTS
        return [int(r) for r in np.flatnonzero(self._heads[lane, :, slot, 0] <= post.number)]

    def advance(self, post: Post) -> bool:
        """Sum what all have shown, in order, up to this; whether it is done.

        Raises:
            LayoutError: workers show different tensors; on all of them.
        """
        lane = LANES.index(lane_of(post.key))
        line = self._open[lane]
        while not post.done:
            first = line[0]
            slot = first.number % _SLOTS
            heads = self._heads[lane, :, slot]
            if (heads[:, 0] <= first.number).any():
                return False
            self._check(first, heads)
            self._sum(first, self._data[lane, :, slot, : first.flat.nbytes])
            line.popleft()
            first.done = True
            self._read[lane, self._rank] = first.number + 1
        return True

    def _check(self, post: Post, heads: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
        if (heads[:, 1:4] == heads[0, 1:4]).all():
            return
        shown = []
        for rank, (_, key, kind, numel) in enumerate(heads[:, :4].tolist()):
            name = post.key if key == zlib.crc32(post.key.encode()) else "something else"
            dtype = dtype_name(DTYPES[kind])
            shown.append(f"worker {rank} sent {numel} x {dtype} as {name}")
        raise LayoutError(f"{post.key}, round {post.number}: {'; '.join(shown)}")

    def _sum(self, post: Post, data: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
        if post.flat.dtype in HALVES:
            post.flat.copy_(total([torch.from_numpy(row).view(post.flat.dtype) for row in data]))
            return
        array = post.flat.numpy()
        parts = data.view(array.dtype)
        with np.errstate(all="ignore"):
            np.copyto(array, parts[0])
            for part in parts[1:]:
                np.add(array, part, out=array)
