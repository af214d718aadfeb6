"""A worker's buffers in shared memory: made once, told to the servers, found again by their address."""

from __future__ import annotations

import bisect
import itertools
import logging
import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.ps import lanes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in shared memory."""

    segment: int
    offset: int  # bytes


class Common:
    """A flat tensor that all workers read and servers write; what a worker writes there, only it sees."""

    def __init__(self, number: int, segment: lanes.Segment, flat: Tensor) -> None:
        """
        Args:
            segment: private, see `lanes.Segment.open`.
            flat: lies at its beginning.
        """
        self.flat = flat
        self._place = Place(number, 0)
        self._segment = segment
        self._address = flat.data_ptr()

    @property
    def place(self) -> Place | None:
        """Where it lies; None if its memory was moved, as `share_memory_` does."""
        return self._place if self.flat.data_ptr() == self._address else None

    def show_theirs(self) -> None:
        """Forget what was written here, and show what servers have written."""
        if self.place is not None:
            self._segment.show_theirs()


@dataclass
class _Entry:
    number: int
    address: int
    nbytes: int


class Buffers:
    """The segments of one worker, each a single buffer; one goes when its last tensor does."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._entries: list[_Entry] = []  # by address
        self._dead: deque[int] = deque()  # whose tensors are gone; filled by the collector, at any moment
        self._untold: list[int] = []
        self._warned = False

    def make(self, nbytes: int) -> tuple[int, lanes.Segment, Tensor] | None:
        """A new segment: its number, itself (to be unlinked when the servers have it) and its bytes. None: no room."""
        try:
            segment = lanes.Segment.create(nbytes)
        except lanes.NoRoom as error:
            if not self._warned:
                log.warning("%s", error)
            self._warned = True
            return None
        data = segment.bytes
        number = self.number(segment)
        bisect.insort(self._entries, _Entry(number, data.data_ptr(), nbytes), key=lambda e: e.address)
        return number, segment, data

    def number(self, segment: lanes.Segment) -> int:
        """A number for a segment, which is told among the unused ones when its last tensor goes."""
        number = next(self._numbers)
        weakref.finalize(segment.mapping(), self._dead.append, number).atexit = False
        return number

    def find(self, flat: Tensor) -> Place | None:
        """Where a flat tensor lies, if it is in one of these."""
        self._bury()
        if not self._entries:
            return None
        address = flat.data_ptr()
        index = bisect.bisect_right(self._entries, address, key=lambda e: e.address) - 1
        if index < 0:
            return None
        entry = self._entries[index]
        if address + flat.nbytes > entry.address + entry.nbytes:
            return None
        return Place(entry.number, address - entry.address)

    def unused(self) -> list[int]:
        """Numbers of segments that no tensor uses any more; each is told once."""
        self._bury()
        numbers, self._untold = self._untold, []
        return numbers

    def _bury(self) -> None:
        """Forget where dead segments lay: other memory may lie there now, which no server sees."""
        dead = []
        while self._dead:
            dead.append(self._dead.popleft())
        if dead:
            self._entries = [e for e in self._entries if e.number not in dead]
            self._untold += dead

    def forget(self) -> None:
        """The servers know none of them any more."""
        self._entries.clear()


class Staging:
    """Shared buffers for tensors that lie elsewhere: copied in and out, and used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, nbytes: int) -> Tensor | None:
        """A free buffer of at least that size, if there is one."""
        free = self._free.get(size_class(nbytes))
        return free.pop() if free else None

    def give_back(self, data: Tensor) -> None:
        """It may be used again."""
        self._free.setdefault(data.nbytes, []).append(data)

    def forget(self) -> None:
        self._free.clear()


def size_class(nbytes: int) -> int:
    """Sizes in which staging buffers come: whole pages, an eighth of slack at most."""
    step = max(mmap.PAGESIZE, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


def bytes_as(data: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    """The beginning of a buffer, as numbers."""
    return data[: numel * dtype.itemsize].view(dtype)
