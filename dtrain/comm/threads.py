"""n workers in one process, a thread each: the oracle for tests, and DataParallel over a list of devices.

Workers take turns: one runs until it must wait for the others. Random generators are handed over with the turn,
so that each worker draws its own numbers. A run is therefore repeatable to the bit, whatever the scheduling, and
equal to the run of the same workers in processes over the parameter server: both add in worker order.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from dtrain import generators
from dtrain.comm.base import Traffic, Work, check_flat
from dtrain.comm.ordered import total
from dtrain.errors import CommError, LayoutError, UsageError

T = TypeVar("T")


@dataclass
class _Meeting:
    """One transfer: what has come so far."""

    flats: dict[int, Tensor] = field(default_factory=dict)
    finished: bool = False


class Hub:
    """What the workers of one process share."""

    def __init__(self, world_size: int, timeout_s: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.turn = threading.Lock()
        self._changed = threading.Condition()
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._failure: str | None = None
        self._left: set[int] = set()

    def leave_job(self, rank: int) -> None:
        """This worker has finished; who waits for it waits in vain."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Wake everyone who waits, with this reason; the first one counts."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def join(self, at: tuple[str, int], rank: int, flat: Tensor, finish: Callable[[dict[int, Tensor]], None]) -> None:
        """Bring `flat` to the meeting `at`; the last one to come runs `finish` on what all brought."""
        with self._changed:
            meeting = self._meetings.setdefault(at, _Meeting())
            meeting.flats[rank] = flat
            if len(meeting.flats) < self.world_size:
                return
            try:
                _same_kind(at[0], meeting.flats)
                finish(meeting.flats)
            except LayoutError as error:
                self._failure = self._failure or str(error)
                raise
            else:
                meeting.finished = True
            finally:
                self._changed.notify_all()

    def wait(self, at: tuple[str, int]) -> None:
        """Let the others have their turn until the meeting `at` is over."""
        meeting = self._meetings[at]
        if not meeting.finished:
            state = generators.state()
            self.turn.release()
            try:
                self._block(at, meeting)
            finally:
                self.turn.acquire()
                generators.set_state(state)
        if self._failure and not meeting.finished:
            raise CommError(f"{at[0]}: {self._failure}")

    def leave(self, at: tuple[str, int], rank: int) -> None:
        """Forget the meeting when all have left."""
        with self._changed:
            meeting = self._meetings.get(at)
            if meeting is not None:
                meeting.flats.pop(rank, None)
                if not meeting.flats:
                    del self._meetings[at]

    def _block(self, at: tuple[str, int], meeting: _Meeting) -> None:
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while not (meeting.finished or self._failure):
                gone = sorted(self._left - set(meeting.flats))
                if gone:
                    self._failure = f"workers {gone} have left while others waited for them"
                    self._changed.notify_all()
                    break
                if not self._changed.wait(deadline - time.monotonic()):
                    missing = sorted(set(range(self.world_size)) - set(meeting.flats))
                    self._failure = self._failure or f"workers {missing} have not come within {self.timeout_s:g} s"
                    self._changed.notify_all()


class Threads:
    """A Backend whose workers are threads of one process. Also a PrimaryHost."""

    name = "threads"
    packs = False

    def __init__(self, hub: Hub, rank: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = hub.world_size
        self.device = device
        self.traffic = Traffic()
        self._hub = hub
        self._calls: Counter[str] = Counter()

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        def finish(flats: dict[int, Tensor]) -> None:
            total = _total(flats)
            for other in flats.values():
                other.copy_(total)

        # Worker 0's device adds: it receives from everyone else and sends to everyone else.
        peers = self.world_size - 1
        return self._meet(flat, key, finish, sent=peers if self.rank == 0 else 1, received=peers)

    def gather_sum(self, flat: Tensor, key: str) -> Work:
        def finish(flats: dict[int, Tensor]) -> None:
            flats[0].copy_(_total(flats))

        return self._meet(flat, key, finish, sent=int(self.rank > 0), received=self.world_size - 1, back=False)

    def send_first(self, flat: Tensor, key: str) -> Work:
        def finish(flats: dict[int, Tensor]) -> None:
            for rank in range(1, len(flats)):
                flats[rank].copy_(flats[0])

        peers = self.world_size - 1
        return self._meet(flat, key, finish, sent=peers if self.rank == 0 else 0, received=0)

    def close(self) -> None:
        return None

    def _meet(
        self,
        flat: Tensor,
        key: str,
        finish: Callable[[dict[int, Tensor]], None],
        *,
        sent: int,
        received: int,
        back: bool = True,
    ) -> Work:
        check_flat(flat, key)
        nbytes = flat.numel() * flat.element_size()
        others = nbytes if back and self.world_size > 1 else 0
        self.traffic.count(key, sent * nbytes, received * nbytes if self.rank == 0 else others)
        at = (key, self._calls[key])
        self._calls[key] += 1
        self._hub.join(at, self.rank, flat, finish)
        return _Wait(self._hub, at, self.rank)


@dataclass
class _Wait:
    hub: Hub
    at: tuple[str, int]
    rank: int

    def wait(self) -> None:
        if self.at[1] < 0:
            return
        self.hub.wait(self.at)
        self.hub.leave(self.at, self.rank)
        self.at = (self.at[0], -1)


def run_threads(
    fn: Callable[[Threads], T],
    workers: int,
    *,
    devices: Sequence[torch.device | str] | None = None,
    timeout_s: float = 60.0,
    cores: int | None = None,
) -> list[T]:
    """Run `fn(comm)` as `workers` threads and return what each returned, in worker order.

    Args:
        devices: where each worker's replica belongs, by rank; `comm.device` tells it. None: the processor.
        timeout_s: longest wait of one worker for another.
        cores: processor threads of each worker inside torch's operations, which may round differently for another
            number; None: as it is set.

    Raises:
        Exception: what the first worker to fail raised.
        UsageError: another number of devices than of workers.
    """
    if devices is not None and len(devices) != workers:
        raise UsageError(f"{len(devices)} devices for {workers} workers: give each worker one")
    hub = Hub(workers, timeout_s)
    results: dict[int, T] = {}
    failures: list[tuple[int, BaseException]] = []
    state = generators.state()
    cores_before = torch.get_num_threads()
    torch.set_num_threads(cores or cores_before)

    def work(rank: int) -> None:
        device = torch.device(devices[rank]) if devices else None
        with hub.turn:
            generators.set_state(state)
            try:
                results[rank] = fn(Threads(hub, rank, device))
                hub.leave_job(rank)
            except BaseException as error:
                failures.append((rank, error))
                hub.fail(f"worker {rank} failed with {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"worker-{rank}", daemon=True) for rank in range(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C, say
        hub.fail(f"stopped by {type(error).__name__}")
        raise
    finally:
        torch.set_num_threads(cores_before)
        generators.set_state(state)
    if failures:
        raise failures[0][1]
    return [results[rank] for rank in range(workers)]


def _total(flats: dict[int, Tensor]) -> Tensor:
    device = flats[0].device
    return total([flats[rank].to(device) for rank in range(len(flats))])


def _same_kind(key: str, flats: dict[int, Tensor]) -> None:
    kinds = {rank: f"{f.numel()} x {f.dtype}" for rank, f in sorted(flats.items())}
    if len(set(kinds.values())) > 1:
        held = "; ".join(f"worker {rank} has {kind}" for rank, kind in kinds.items())
        raise LayoutError(f"{key}: workers brought different tensors: {held}")
