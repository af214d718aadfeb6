"""A backend that keeps the time which a worker spends blocked on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.comm.base import Backend, PrimaryHost, Traffic, Work


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


def metered(comm: Backend) -> Meter:
    """A meter around a backend, with the same abilities."""
    if isinstance(comm, Meter):
        return comm
    return PrimaryMeter(comm) if isinstance(comm, PrimaryHost) else Meter(comm)


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
