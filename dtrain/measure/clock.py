"""How far the clocks of workers are apart: `time.perf_counter` counts from another moment on each host.

What one worker does cannot be known by another before it was done. A sum over workers ends nowhere before the last
worker has come to it; so each one bounds the difference of two clocks from one side, and several, to which the workers
come last in turn, close in on it from both (after Cristian 1989, "Probabilistic Clock Synchronization").
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.comm import collectives
from dtrain.comm.base import Backend

_ROUNDS = 5
_LATE_S = 0.001
"""How much later than the others the last worker of a round comes, so that it surely is the last."""


@dataclass(frozen=True)
class Offset:
    """What to add to this worker's `time.perf_counter()` to have worker 0's."""

    seconds: float = 0.0
    error_s: float = 0.0
    """It is not wrong by more than this, as long as the clocks run alike."""


def offset_to_first(comm: Backend) -> Offset:
    """Compare this worker's clock with worker 0's. All workers call it; nothing is sent back and forth on one host."""
    if comm.world_size == 1:
        return Offset()
    hosts = collectives.gather_numbers(comm, [_boot()], "metric/clock")
    if all(row == hosts[0] for row in hosts):
        return Offset()
    collectives.barrier(comm, "metric/clock")
    seen = torch.stack([_round(comm, last) for _ in range(_ROUNDS) for last in range(comm.world_size)])
    # (rounds, workers): when each came to a round, and when it left; -> (came or left, rounds, workers)
    flat = torch.zeros(comm.world_size, seen.numel(), dtype=torch.float64)
    flat[comm.rank] = seen.view(-1)
    comm.all_reduce(flat.view(-1), "metric/clock").wait()
    came, left = flat.view(comm.world_size, -1, 2).unbind(-1)
    return bounds(came[0].tolist(), left[0].tolist(), came[comm.rank].tolist(), left[comm.rank].tolist())


def bounds(came_0: list[float], left_0: list[float], came: list[float], left: list[float]) -> Offset:
    """The offset from a worker's clock to worker 0's, when each came to and left each round, on its own clock.

    Worker 0 left after this one came, and this one left after worker 0 came:
    came_0 - left <= offset <= left_0 - came, in every round.
    """
    low = max(a - b for a, b in zip(came_0, left, strict=True))
    high = min(a - b for a, b in zip(left_0, came, strict=True))
    return Offset((low + high) / 2, max(0.0, (high - low) / 2))


def _round(comm: Backend, last: int) -> torch.Tensor:
    if comm.rank == last:
        time.sleep(_LATE_S)
    came_s = time.perf_counter()
    collectives.barrier(comm, "metric/clock")
    return torch.tensor([came_s, time.perf_counter()], dtype=torch.float64)


def _boot() -> int:
    """A number that processes share whose clocks count from the same moment."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux: processes that share it are taken for ones that do not
        text = secrets.token_hex(16)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
