"""A backend that keeps the time which a worker spends blocked on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.comm.base import Backend, PrimaryHost, Traffic, Work
from dtrain.comm.hosts import Hosted, HostedBucket, ParameterHost, ServerUpdate, StepReport


class Meter:
    """A Backend around another one; `blocked_s` grows by the time spent in its calls, `wait` above all: exposed
    communication.

    On CUDA, transfers are only queued by `wait`. While `precise` is set, the device is brought to a stop before and
    after, and the time between is counted; else nothing is.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.packs = inner.packs
        self.blocked_s = 0.0
        self.precise = False

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

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Count the time inside."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - start_s

    def _timed(self, start: Callable[[Tensor, str], Work], flat: Tensor, key: str) -> Work:
        start_s = time.perf_counter()
        work = start(flat, key)
        if flat.device.type != "cuda":
            self.blocked_s += time.perf_counter() - start_s
        return _Timed(self, work, flat.device)


class PrimaryMeter(Meter):
    """The same around a PrimaryHost."""

    def __init__(self, inner: PrimaryHost) -> None:
        super().__init__(inner)
        self._primary = inner

    def gather_sum(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._primary.gather_sum, flat, key)

    def send_first(self, flat: Tensor, key: str) -> Work:
        return self._timed(self._primary.send_first, flat, key)


class HostMeter(Meter):
    """The same around a ParameterHost."""

    def __init__(self, inner: ParameterHost) -> None:
        super().__init__(inner)
        self._host = inner

    def host(
        self, buckets: Sequence[HostedBucket], model: Sequence[tuple[str, Parameter]], update: ServerUpdate
    ) -> Hosted:
        return _TimedHosted(self, self._host.host(buckets, model, update))


def metered(comm: Backend) -> Meter:
    """A meter around a backend, with the same abilities."""
    if isinstance(comm, Meter):
        return comm
    if isinstance(comm, ParameterHost):
        return HostMeter(comm)
    return PrimaryMeter(comm) if isinstance(comm, PrimaryHost) else Meter(comm)


class _TimedHosted:
    """Parameters that servers keep, and the time that a worker spends blocked on them."""

    def __init__(self, meter: Meter, inner: Hosted) -> None:
        self._meter = meter
        self._inner = inner
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
        with self._meter.blocked():
            self._inner.push(bucket, present)

    def finish(self) -> None:
        with self._meter.blocked():
            self._inner.finish()

    def pull(self) -> StepReport:
        with self._meter.blocked():
            return self._inner.pull()


class _Timed:
    def __init__(self, meter: Meter, work: Work, device: torch.device) -> None:
        self._meter = meter
        self._work = work
        self._device = device

    def wait(self) -> None:
        stop = self._device.type == "cuda" and self._meter.precise
        if stop:
            torch.cuda.synchronize(self._device)
        start_s = time.perf_counter()
        self._work.wait()
        if stop:
            torch.cuda.synchronize(self._device)
        if stop or self._device.type != "cuda":
            self._meter.blocked_s += time.perf_counter() - start_s
