"""Points in time that cost nothing to set: the host's clock, or events on a CUDA stream that are read later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Mark = Any
"""What `Marks.now` gives: seconds on the host's clock, or an event."""


class Marks(Protocol):
    """Sets marks, and says later when they were."""

    def now(self) -> Mark:
        """The present point of the computation."""

    def seconds(self, mark: Mark) -> float:
        """When that was, on the clock of `time.perf_counter`. On CUDA, only after `anchor`."""

    def anchor(self) -> None:
        """All that was asked for has been computed: marks can be read. On CUDA this waits for the device."""


class HostMarks:
    """Marks of a computation on the processor: it is where the program is."""

    now = staticmethod(time.perf_counter)

    def seconds(self, mark: Mark) -> float:
        return float(mark)

    def anchor(self) -> None:
        return None


class CudaMarks:
    """Marks on the current stream of a device, which runs behind the program: events, read when they have come.

    The device's clock is tied to the host's each time that the device is idle, so that they do not drift apart.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            event, synchronize: sets an event on the device's current stream; waits for the device. Of torch.cuda, but
                for tests.
        """
        self._device = device
        self._event = event or self._set_event
        self._synchronize = synchronize or (lambda: torch.cuda.synchronize(device))
        self.anchor()

    def now(self) -> Mark:
        return self._event()

    def seconds(self, mark: Mark) -> float:
        return self._anchor_s - float(mark.elapsed_time(self._anchor)) / 1e3

    def anchor(self) -> None:
        self._synchronize()
        self._anchor = self.now()
        self._anchor_s = time.perf_counter()
        self._synchronize()

    def _set_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def marks_on(device: torch.device) -> Marks:
    """The marks of what is computed on a device."""
    return CudaMarks(device) if device.type == "cuda" else HostMarks()
