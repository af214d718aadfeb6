"""A backend that keeps when each transfer was ready, started, waited for and there."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.comm.base import Announces, Backend, PrimaryHost, Scatters, Traffic, Work
from dtrain.comm.hosts import Hosted, HostedBucket, ParameterHost, ServerUpdate, StepReport
from dtrain.measure.marks import HostMarks, Mark, Marks

Result = TypeVar("Result")

_MOST_KEPT = 10_000
"""Transfers that are kept when nobody takes them."""


@dataclass(slots=True)
class Transfer:
    """One message of a worker. Marks are read by `Marks.seconds`; on a processor they are seconds of perf_counter."""

    key: str
    nbytes: int
    """Of the flat tensor; what travels depends on the backend."""
    called: Mark
    """The worker was ready to send."""
    started: Mark = None
    """The call that starts the transfer had returned: what lies between is the codec's (packing, checksums, copies)."""
    wait: Mark = None
    """The worker began to wait for it; None where it never did."""
    done: Mark = None
    """It could go on."""
    arrived_s: float = math.nan
    """The result was there at the latest, in seconds of perf_counter, where the backend tells."""


class Meter:
    """A Backend around another one that records each transfer; `take` hands the records over.

    `blocked_s` grows by the time which the program spends in its calls, `wait` above all: exposed communication. On
    CUDA a call only queues; there marks on the stream tell, and `blocked_s` does not grow.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.packs = inner.packs
        self.blocked_s = 0.0
        self.marks: Marks = HostMarks()
        """How points in time are marked; a Stopwatch sets it to those of the device that computes."""
        self._transfers: deque[Transfer] = deque(maxlen=_MOST_KEPT)

    @property
    def traffic(self) -> Traffic:
        return self.inner.traffic

    @traffic.setter
    def traffic(self, value: Traffic) -> None:
        self.inner.traffic = value

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return self.inner.empty(numel, dtype, key, device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        return self._timed(self.inner.all_reduce, flat, key)

    def close(self) -> None:
        self.inner.close()

    def take(self) -> list[Transfer]:
        """What was recorded since the last call and is over, in the order of the calls; the rest, the next time."""
        taken = [transfer for transfer in self._transfers if transfer.done is not None]
        under_way = [transfer for transfer in self._transfers if transfer.done is None]
        self._transfers.clear()
        self._transfers += under_way
        return taken

    def begin(self, key: str, nbytes: int) -> Transfer:
        """Record a transfer that is called now."""
        transfer = Transfer(key, nbytes, self.marks.now())
        self._transfers.append(transfer)
        return transfer

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Count the time inside."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - start_s

    def _timed(self, start: Callable[[Tensor, str], Work], flat: Tensor, key: str) -> Work:
        transfer = self.begin(key, flat.nbytes)
        start_s = time.perf_counter()
        work = start(flat, key)
        on_device = flat.device.type == "cuda"
        if not on_device:
            self.blocked_s += time.perf_counter() - start_s
            if _announces(type(work)):
                cast("Announces", work).when_done(lambda: _arrive(transfer))
        transfer.started = self.marks.now()
        return _Timed(self, work, transfer, on_device)


class PrimaryMeter(Meter):
    """The same around a PrimaryHost."""

    def __init__(self, inner: PrimaryHost) -> None:
        super().__init__(inner)
        self._primary = inner

    def gather_sum(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._primary.gather_sum, flat, key)

    def send_first(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._primary.send_first, flat, key)


class ScatterMeter(Meter):
    """The same around a backend that Scatters."""

    def __init__(self, inner: Scatters) -> None:
        super().__init__(inner)
        self._scatters = inner

    def reduce_scatter(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._scatters.reduce_scatter, flat, key)

    def all_gather(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._scatters.all_gather, flat, key)


class HostMeter(Meter):
    """The same around a ParameterHost."""

    def __init__(self, inner: ParameterHost) -> None:
        super().__init__(inner)
        self._host = inner

    def host(
        self, buckets: Sequence[HostedBucket], model: Sequence[tuple[str, Parameter]], update: ServerUpdate
    ) -> Hosted:
        return _TimedHosted(self, self._host.host(buckets, model, update), [b.gradient.nbytes for b in buckets])


def metered(comm: Backend) -> Meter:
    """A meter around a backend, with the same abilities."""
    if isinstance(comm, Meter):
        return comm
    if isinstance(comm, ParameterHost):
        return HostMeter(comm)
    if isinstance(comm, Scatters):
        return ScatterMeter(comm)
    return PrimaryMeter(comm) if isinstance(comm, PrimaryHost) else Meter(comm)


class _TimedHosted:
    """Parameters that servers keep, and when each bucket was pushed and the parameters were there.

    Nobody waits for a push: the one wait of a step, in `pull`, is recorded as a transfer of its own, `gradient/pull`,
    which the worker is ready for when it has pushed everything. Where it waits for buckets one by one, it is ready for
    that when the step is concluded, and each `arrive` is one more.
    """

    def __init__(self, meter: Meter, inner: Hosted, nbytes: Sequence[int]) -> None:
        self._meter = meter
        self._inner = inner
        self._nbytes = nbytes
        self._pushed: list[Transfer] = []
        self._finished: Mark = None
        self._pull: Transfer | None = None  # that of a step that was concluded
        self.begin = inner.begin
        self.refresh = inner.refresh
        self.optimizer_state = inner.optimizer_state
        self.restore = inner.restore
        self.state_bytes = inner.state_bytes
        self.table = inner.table

    @property
    def steps(self) -> int:
        return self._inner.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._inner.steps = value

    def push(self, bucket: int, present: Sequence[bool]) -> None:
        transfer = self._meter.begin(f"gradient/{bucket}", self._nbytes[bucket])
        self._pushed.append(transfer)
        with self._meter.blocked():
            self._inner.push(bucket, present)
        transfer.started = self._meter.marks.now()

    def finish(self) -> None:
        with self._meter.blocked():
            self._inner.finish()
        self._finished = self._meter.marks.now()

    def conclude(self) -> None:
        since = self._meter.begin("gradient/step", 0)
        self._wait(since, self._inner.conclude)
        self._pull = self._meter.begin("gradient/pull", 0)
        self._pull.started = self._pull.called

    def arrive(self, bucket: int) -> None:
        self._wait(self._meter.begin(f"gradient/values{bucket}", 0), lambda: self._inner.arrive(bucket))

    def pull(self) -> StepReport:
        transfer, self._pull = self._pull, None
        if transfer is None:
            transfer = self._meter.begin("gradient/pull", 0)
            transfer.called = transfer.started = transfer.called if self._finished is None else self._finished
        return self._wait(transfer, self._inner.pull)

    def _wait(self, transfer: Transfer, wait: Callable[[], Result]) -> Result:
        """Record that the worker waits for something, as part of a transfer that is over then, as all pushes are."""
        transfer.wait = self._meter.marks.now()
        transfer.started = transfer.started or transfer.wait
        with self._meter.blocked():
            result = wait()
        done = self._meter.marks.now()
        for one in (*self._pushed, transfer):
            one.done = done
        self._pushed.clear()
        return result


class _Timed:
    def __init__(self, meter: Meter, work: Work, transfer: Transfer, on_device: bool) -> None:
        self._meter = meter
        self._work = work
        self._transfer = transfer
        self._on_device = on_device

    def wait(self) -> None:
        transfer, now = self._transfer, self._meter.marks.now
        start_s = time.perf_counter()
        since = now()
        self._work.wait()
        if transfer.wait is None:
            transfer.wait, transfer.done = since, now()
        if not self._on_device:
            self._meter.blocked_s += time.perf_counter() - start_s


@functools.cache
def _announces(kind: type) -> bool:
    """Whether such work tells when it is done. To ask the protocol takes longer than all else here."""
    return issubclass(kind, Announces)


def _arrive(transfer: Transfer) -> None:
    transfer.arrived_s = time.perf_counter()
