"""Data sets that answer for many samples at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dtrain.data import Batch, BatchedData
from dtrain.errors import UsageError

_SPREAD = 0x9E3779B1  # odd, so that multiplying by it modulo 2^k visits every residue once


class TensorData(BatchedData):
    """Samples held in memory: tensors [samples, ...], index i being one sample of each.

    `transform` maps a batch to the batch that the model sees. It must treat samples alike and apart, whatever
    else is in the batch; use it to keep bytes in memory and hand out floats.

    Raises UsageError when the tensors disagree on the number of samples.
    """

    def __init__(self, *tensors: Tensor, transform: Callable[[Batch], Batch] | None = None) -> None:
        if not tensors or any(len(tensor) != len(tensors[0]) for tensor in tensors):
            raise UsageError(
                f"TensorData: tensors of {[len(t) for t in tensors]} samples: give at least one, and all of one length"
            )
        self.tensors = tensors
        self.transform = transform

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Tensor) -> Batch:
        gathered = tuple(tensor.index_select(0, indices) for tensor in self.tensors)
        return gathered if self.transform is None else self.transform(gathered)


class WindowData(BatchedData):
    """Samples that are windows of a 1-D bank: sample i is `bank[start(i) : start(i) + width]`.

    With `stride`, start(i) = i * stride, as for the pieces of a text. Without, start(i) scatters i over all
    windows, no two samples alike up to the largest power of two of windows; beyond that they repeat. Memory
    is that of the bank, however many samples there are.

    `split` maps the gathered windows [n, width] and the indices [n] to the batch.

    Raises UsageError when the bank is too short for the samples.
    """

    def __init__(
        self,
        bank: Tensor,
        *,
        samples: int,
        width: int,
        split: Callable[[Tensor, Tensor], Batch],
        stride: int | None = None,
    ) -> None:
        last = width if stride is None else (samples - 1) * stride + width
        if samples < 1 or len(bank) < last:
            raise UsageError(f"WindowData: samples={samples} of width={width} need {last} elements, not {len(bank)}")
        self._windows = bank.unfold(0, width, 1)  # [windows, width], a view
        self._samples = samples
        self._stride = stride
        self._split = split
        self._scatter = 1 << (len(self._windows).bit_length() - 1)

    def __len__(self) -> int:
        return self._samples

    def batch(self, indices: Tensor) -> Batch:
        starts = indices * _SPREAD % self._scatter if self._stride is None else indices * self._stride
        return self._split(self._windows[starts], indices)


def next_token(windows: Tensor, _: Tensor) -> Batch:
    """Windows [n, T + 1] of tokens -> inputs [n, T] and targets [n, T], the targets being one token ahead."""
    return windows[:, :-1], windows[:, 1:]
