"""Tensors of a device on their way to a server: copied to pinned memory and back, beside the device's own work."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCopy:
    """One tensor's way out and back. Copies run on a stream of their own; nothing here waits for the device."""

    def __init__(self, flat: Tensor, host: Tensor) -> None:
        """Start the copy to the host.

        Args:
            host: of the same size and type, pinned; not used for another tensor before this one is back.
        """
        self._flat = flat
        self._host = host
        self._stream = _side_stream(flat.device)
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
            flat.record_stream(self._stream)
            self._copied = self._stream.record_event()

    def arrived(self) -> bool:
        """Whether the host has it."""
        return bool(self._copied.query())

    def bring_back(self) -> None:
        """Copy what the host has now to the device; later work on the current stream finds it there."""
        with torch.cuda.stream(self._stream):
            self._flat.copy_(self._host, non_blocking=True)
        torch.cuda.current_stream(self._flat.device).wait_stream(self._stream)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def pinned(host: Tensor) -> Tensor:
    """The same tensor, its memory registered with the driver where it was not: copies then run beside everything else.

    Where the driver refuses, copies are slower, and right all the same.
    """
    if host.numel() and not host.is_pinned():
        torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    return host
