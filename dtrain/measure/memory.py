"""The memory of a worker's training step, by what it is for: how it grows with the micro-batch, and as it is.

What a worker keeps does not depend on the batch: parameters, gradients, the optimizer's state, messages. What forward
saves for backward grows with the samples along a line, and so does all that lives at any moment of the step; the
largest of those lines at some batch is the peak there. `dtrain.measure.footprint` finds the lines.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.errors import UsageError
from dtrain.tables import table

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`24GiB`, `512 MiB`, `8GB` in bytes.

    Raises:
        UsageError: something else, or nothing above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    nbytes = round(float(match[1]) * factor) if match and factor else 0
    if nbytes < 1:
        raise UsageError(f"memory is {text!r}: give a size such as 24GiB, 512MiB (powers of 1024) or 8GB (of 1000)")
    return nbytes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one worker in a training step, in bytes: each part at its largest."""

    parameters_bytes: int
    """Weights; a shared one once."""
    buffers_bytes: int
    """What the model keeps beside them, such as running statistics."""
    gradients_bytes: int
    """Of those parameters that get one, in messages or outside; none where servers step."""
    optimizer_bytes: int
    """Its state; none where servers keep it."""
    buckets_bytes: int
    """Messages, beyond the gradients that lie in them; all of them where servers step."""
    batch_bytes: int
    """Inputs and targets of a micro-batch."""
    activations_bytes: int
    """What forward saves for backward."""
    workspace_bytes: int
    """Everything else that operations make: gradients of activations, temporary tensors."""
    peak_bytes: int
    """The most of all together at any moment. Less than their sum: activations go while gradients come."""

    def table(self) -> str:
        """One line a part, and the peak."""
        rows = [[name.removesuffix("_bytes"), show(nbytes)] for name, nbytes in asdict(self).items()]
        rows[-1][0] = "most at one moment"
        return table(["memory of a worker", "at most"], rows)


@dataclass(frozen=True)
class Line:
    """Bytes by number of samples: fixed + each * samples."""

    fixed: float
    each: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Line:
        """Of two numbers of samples and their bytes."""
        each = (large[1] - small[1]) / (large[0] - small[0])
        return cls(small[1] - each * small[0], each)

    def at(self, samples: int) -> float:
        return self.fixed + self.each * samples


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """How the memory of a worker grows with its micro-batch. Made by `dtrain.measure.footprint.footprint`."""

    parameters_bytes: int
    buffers_bytes: int
    gradients_bytes: int
    direct_bytes: int
    """Of the gradients, those outside of buckets: they come anew with each step."""
    optimizer_bytes: int
    buckets_bytes: int
    batch: Line
    activations: Line
    workspace: tuple[Line, ...]
    """By moment."""
    live: tuple[tuple[Line, int], ...]
    """By moment: activations and workspace, and the gradients outside of buckets that are there already."""

    @property
    def kept_bytes(self) -> int:
        """What stays from step to step."""
        in_buckets = self.gradients_bytes - self.direct_bytes
        return self.parameters_bytes + self.buffers_bytes + self.optimizer_bytes + self.buckets_bytes + in_buckets

    def at(self, micro_batch: int, *, accumulate: bool = False) -> Memory:
        """Memory with micro-batches of so many samples.

        Args:
            accumulate: whether a step has several micro-batches: all gradients are then there from the second on.
        """
        return Memory(
            parameters_bytes=self.parameters_bytes,
            buffers_bytes=self.buffers_bytes,
            gradients_bytes=self.gradients_bytes,
            optimizer_bytes=self.optimizer_bytes,
            buckets_bytes=self.buckets_bytes,
            batch_bytes=round(self.batch.at(micro_batch)),
            activations_bytes=round(self.activations.at(micro_batch)),
            workspace_bytes=round(max(line.at(micro_batch) for line in self.workspace)),
            peak_bytes=round(max(line.at(micro_batch) for line in self._moments(accumulate))),
        )

    def largest_micro_batch(self, memory_bytes: int, *, accumulate: bool = False) -> int:
        """The most samples of a micro-batch that fit; 0 where not even one does."""
        rooms = [
            (memory_bytes - line.fixed) / line.each if line.each > 0 else math.inf if line.fixed <= memory_bytes else 0
            for line in self._moments(accumulate)
        ]
        room = min(rooms)
        return sys.maxsize if room == math.inf else max(0, math.floor(room + 1e-9))

    def _moments(self, accumulate: bool) -> Iterator[Line]:
        """All that lives, by moment."""
        for line, gradients in self.live:
            more = self.direct_bytes if accumulate else gradients
            yield Line(self.kept_bytes + self.batch.fixed + line.fixed + more, self.batch.each + line.each)


def largest_micro_batch(
    footprint: Footprint, memory_bytes: int, *, overhead_bytes: int = 0, accumulate: bool = False
) -> int:
    """The most samples of a micro-batch with which a worker's memory is enough.

    Args:
        memory_bytes: of the device, or of this worker's part of the host.
        overhead_bytes: what the process takes beside the step: `process_bytes`; on CUDA the context.

    Raises:
        UsageError: not even one sample fits; says what it needs.
    """
    found = footprint.largest_micro_batch(memory_bytes - overhead_bytes, accumulate=accumulate)
    if found < 1:
        needed = footprint.at(1, accumulate=accumulate).peak_bytes + overhead_bytes
        raise UsageError(
            f"memory is {show(memory_bytes)}, and a micro-batch of one sample needs {show(needed)}: a smaller model, "
            "an optimizer with less state, or update=server, which keeps it elsewhere"
        )
    return found


class Replicated(Protocol):
    """What `measured` asks of a `dtrain.Replica`."""

    def message_buffers(self) -> Sequence[Tensor]: ...


def measured(model: nn.Module, optimizer: Optimizer, replica: Replicated | None = None) -> dict[str, int]:
    """Bytes of what a worker holds now, counted tensor by tensor, and the most that there has been.

    `peak_bytes` is, on CUDA, the most that torch had allocated on the model's device since the start or the last
    `torch.cuda.reset_peak_memory_stats`; else the most physical memory that this process has had, Python, torch and the
    data set with it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    messages = [] if replica is None else list(replica.message_buffers())
    inside = [g for g in gradients if any(_within(g, message) for message in messages)]
    return {
        "parameters_bytes": _sum(model.parameters()),
        "buffers_bytes": _sum(model.buffers()),
        "gradients_bytes": _sum(gradients),
        "optimizer_bytes": _sum(tensors(list(optimizer.state.values()))),
        "buckets_bytes": _sum(messages) - _sum(inside),
        "peak_bytes": peak_bytes(next((p.device for p in model.parameters()), torch.device("cpu"))),
    }


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from tensors(one)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: see `measured`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or process_bytes()


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` begin anew; False where the system does not let us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def process_bytes() -> int:
    """Physical memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def show(nbytes: float) -> str:
    """`1.50 GiB`, `12 bytes`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def _sum(some: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in some)


def _within(tensor: Tensor, flat: Tensor) -> bool:
    return flat.device == tensor.device and flat.data_ptr() <= tensor.data_ptr() < flat.data_ptr() + flat.nbytes


def _status(name: str) -> int:
    """A figure of this process that the kernel gives in kB; 0 where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
