"""What waits to be sent to one server, so that little is under way at a time over a network.

A transfer's parts could all be handed to the kernel at once. Then each connection goes as fast as TCP lets it, which
over one port is very uneven, and a server can answer a part only when it has it from the slowest worker: results would
travel after the gradients instead of beside them. So a worker sends some parts, and the next ones when those are
answered: nobody gets ahead of the slowest by more than a window, and queues in switches stay short.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dtrain.comm import collectives, parts
from dtrain.comm.base import Backend
from dtrain.ps import wire
from dtrain.ps.link import Link

_LONG_ENOUGH_S = 0.040
"""Links of clouds let some tens of milliseconds' worth pass at once before they keep to their rate."""
_MOST_TRIED_BYTES = 2**20
"""Of a short job, trials would else send more than its gradients. So on fast links they take less than that time."""
_TRIALS = 4
_PATIENCE_S = 0.3
"""After which no other trial begins."""


def learn_part_bytes(comm: Backend, servers: int) -> int:
    """In parts of what size tensors are best sent to each of so many servers, by trying sums; all find the same.

    A sum of one part from each worker goes up and then down; while others follow it, twice as much passes in that
    time. It takes some tenths of a second: a job that has just begun is often late, and a host that is busy then is no
    slow link, so the quickest trial counts.
    """
    nbytes = parts.LEAST_BYTES * servers
    while (quickest_s := _typical_s(comm, nbytes)) < _LONG_ENOUGH_S and 4 * nbytes <= _MOST_TRIED_BYTES:
        nbytes *= 4
    spent_s = 0.0
    for _ in range(_TRIALS):
        if spent_s > _PATIENCE_S:
            break
        spent_s += (taken_s := _typical_s(comm, nbytes))
        quickest_s = min(quickest_s, taken_s)
    return min(wire.PART_BYTES, parts.part_bytes(2 * nbytes / quickest_s))


def _typical_s(comm: Backend, nbytes: int) -> float:
    """How long most workers wait for a sum of so many bytes, for which they wait for the slowest one's share."""
    flat = torch.zeros(nbytes, dtype=torch.uint8)
    start_s = time.perf_counter()
    comm.all_reduce(flat, "metric/rate").wait()
    taken_us = int((time.perf_counter() - start_s) * 1e6)
    everyones_us = [row[0] for row in collectives.gather_numbers(comm, [taken_us], "metric/rate")]
    return 1e-6 * max(1, statistics.median_low(everyones_us))


def window_bytes(nbytes: int) -> int:
    """What may be unanswered of a server over a network, of messages of that size."""
    return parts.UNDER_WAY * max(parts.LEAST_BYTES, nbytes)


@dataclass(frozen=True)
class _Parcel:
    nbytes: int
    window_bytes: int
    send: Callable[[], None]
    haste: int


class Outbox:
    """Sends to one server in the order of `put`, as far as its window and its credit allow."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: deque[_Parcel] = deque()
        self._before = 0  # how many requests were made before the last `hurry`

    def put(self, nbytes: int, window_bytes: int, send: Callable[[], None], *, haste: int = 0) -> None:
        """Call `send`, which sends that many bytes, when the server has answered enough of what it was sent.

        Args:
            window_bytes: that may be unanswered then, with these; one message always may. 0: any number, and these need
                not wait for what has one.
            haste: see `hurry`.
        """
        if not window_bytes and self._link.has_credit:
            send()
        else:
            self._waiting.append(_Parcel(nbytes, window_bytes, send, haste))

    def hurry(self) -> None:
        """From now on what waits goes by its haste, the most first, whatever is under way.

        A server answers when it has something from all workers, so they must not wait for answers to different things:
        all have sent the first of what there was to be sent, some more of it than others, and now all go on from the
        other end, each with a whole window, in which nothing counts of what it had sent before.
        """
        self._waiting = deque(sorted(self._waiting, key=lambda parcel: -parcel.haste))
        self._before = self._link.made
        self.feed()

    def feed(self, most: int = sys.maxsize) -> int:
        """Send what may be sent now, of so many `put` at most; of how many it was."""
        found = 0
        while found < most and self._waiting and self._link.has_credit:
            parcel = self._waiting[0]
            under_way = self._link.unanswered_bytes - self._link.unanswered_of(self._before)
            if parcel.window_bytes and under_way and under_way + parcel.nbytes > parcel.window_bytes:
                break
            self._waiting.popleft()
            parcel.send()
            found += 1
        return found
