"""Every worker's steps side by side: who waited for whom.

A collective makes all workers equally late, so that a worker's own times do not show who was late. Here workers tell
each other, between steps, when they were ready for each transfer: what one waited before the last one was ready is
waiting, and the rest is the transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dtrain.comm.base import LANES
from dtrain.measure.clock import Offset
from dtrain.measure.stopwatch import PHASES, StepTimes

BOXES = (
    *("step_ms", *(f"{name}_ms" for name in PHASES)),
    *("rest_ms", "exposed_comm_ms", "codec_ms", "hidden_comm_ms", "bytes_sent", "bytes_received"),
    *(f"sent_{lane}" for lane in LANES),
    *(f"received_{lane}" for lane in LANES),
)
"""What a worker tells of a step, in this order."""

_FIRST = 2  # columns before the boxes: whether there is such a step, and when it began
_COUNT = _FIRST + len(BOXES)  # then the number of transfers, and of each: called, wait, done
_HEAD = _COUNT + 1
_MOST_STEPS, _MOST_BYTES = 200, 4 * 2**20
_AT_FIRST, _AT_LEAST, _AT_MOST = 32, 4, 2048
"""Transfers of a step that there is room for: before any step was seen, and later. A small message passes sooner."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass
class Late:
    """What one worker's lateness cost, over the steps that were compared."""

    cost_s: float = 0.0
    """Seconds that the others waited for it, all of them together."""
    steps: int = 0
    """Steps in which most of the waiting was for it."""


class Ledger:
    """Puts workers' steps together: `pack` on each, sum over workers, `unpack` on all."""

    def __init__(
        self, rank: int, world_size: int, offset: Offset | None = None, *, before: Ledger | None = None
    ) -> None:
        """
        Args:
            before: the ledger of the run up to here, which this one goes on from.
        """
        self._rank = rank
        self._world_size = world_size
        self._offset_s = (offset or Offset()).seconds
        self._room, self._most = _AT_FIRST, 0  # transfers of a step: room for them, and seen; the same on all workers
        self._start_s: float | None = None if before is None else before._start_s
        known = [] if before is None else before.late
        self.late: list[Late] = known if len(known) == world_size else [Late() for _ in range(world_size)]
        """By worker."""

    @property
    def most_steps(self) -> int:
        """Steps that may wait to be told; the same on all workers. More would be too large a message."""
        row_bytes = 8 * (_HEAD + 3 * self._room) * self._world_size
        return max(1, min(_MOST_STEPS, _MOST_BYTES // row_bytes))

    def pack(self, steps: Sequence[StepTimes], records: Sequence[dict[str, float]]) -> torch.Tensor:
        """This worker's rows of a table (workers, steps, columns), flat, that all workers' sum to."""
        table = torch.zeros(self._world_size, len(steps), _HEAD + 3 * self._room, dtype=torch.float64)
        mine: Array = table[self._rank].numpy()
        for row, step, record in zip(mine, steps, records, strict=True):
            row[0], row[1] = 1.0, step.begin_s + self._offset_s
            row[_FIRST:_COUNT] = [record[name] for name in BOXES]
            row[_COUNT] = len(step.sent)
            kept = step.sent[: self._room]
            row[_HEAD : _HEAD + 3 * len(kept)] = [
                moment - step.begin_s for t in kept for moment in (t.called_s, t.wait_s, t.done_s)
            ]
        return table.view(-1)

    def unpack(self, flat: torch.Tensor) -> list[list[dict[str, float]]]:
        """From the sum over workers: for each step, each worker's record, with what it waited for.

        A record has `worker`, `start_s` (on worker 0's clock, from the first step of all), the boxes, and where the
        transfers of all workers can be told apart `wait_ms` and `transfer_ms`, which with `codec_ms` make up the
        exposed communication. A worker that the job goes on without has none.
        """
        table: Array = flat.numpy().reshape(self._world_size, -1, _HEAD + 3 * self._room)
        here = table[:, :, 0] > 0
        if self._start_s is None and here.any():
            self._start_s = float(table[:, :, 1][here].min())
        waits = self._waits(table, here)
        found = [
            [self._record(table, waits, rank, step) for rank in range(self._world_size) if here[rank, step]]
            for step in range(table.shape[1])
        ]
        self._most = max(self._most, int(table[:, :, _COUNT].max(initial=0)))
        if found:
            self._room = min(_AT_MOST, max(_AT_LEAST, self._most))
        return found

    def _record(self, table: Array, waits: Array, rank: int, step: int) -> dict[str, float]:
        row = table[rank, step]
        record = {
            "worker": rank,
            "start_s": float(row[1]) - (self._start_s or 0.0),
            **dict(zip(BOXES, row[_FIRST:_COUNT].tolist(), strict=True)),
        }
        wait_ms = float(waits[rank, step]) * 1e3
        if wait_ms >= 0:
            record["wait_ms"] = wait_ms
            record["transfer_ms"] = max(0.0, record["exposed_comm_ms"] - record["codec_ms"] - wait_ms)
        return record

    def _waits(self, table: Array, here: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Array:
        """Seconds that each worker waited in each step for one that was not ready; -1 where that cannot be told."""
        counts = np.where(here, table[:, :, _COUNT], -1)
        most = counts.max(axis=0, initial=-1)
        comparable = (most <= self._room) & ((counts == most) | ~here).all(axis=0)
        used = min(self._room, max(0, int(most.max(initial=0))))
        moments = table[:, :, _HEAD : _HEAD + 3 * used].reshape(*table.shape[:2], used, 3) + table[:, :, 1, None, None]
        called, wait, done = moments[..., 0], moments[..., 1], moments[..., 2]
        exists = np.arange(used) < counts[:, :, None]
        called = np.where(exists, called, -np.inf)
        last, by = called.max(axis=0), called.argmax(axis=0)
        waited = np.where(exists, np.maximum(np.minimum(done, last) - wait, 0.0), 0.0)
        self._blame(waited, by, comparable)
        return np.where(comparable, waited.sum(axis=2), -1.0)

    def _blame(self, waited: Array, by: np.ndarray[tuple[int, ...], np.dtype[np.intp]], comparable: Array) -> None:
        cost = waited.sum(axis=0)  # (steps, transfers): what all together waited for the last one
        ranks = np.arange(self._world_size)[:, None, None]
        per_step = np.where(by == ranks, cost, 0.0).sum(axis=2)[:, comparable]
        worst = per_step.argmax(axis=0)[per_step.max(axis=0, initial=0.0) > 0].tolist()
        for rank, seconds in enumerate(per_step.sum(axis=1).tolist()):
            self.late[rank].steps += worst.count(rank)
            self.late[rank].cost_s += seconds
