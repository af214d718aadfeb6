"""Whether a run fits in a worker's memory, and the largest micro-batch that does: `dtrain plan --memory`."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.config import HALVES
from dtrain.data import Loader, to_device
from dtrain.measure.footprint import Loss, footprint
from dtrain.measure.memory import Footprint, largest_micro_batch, parse_bytes, process_bytes, show
from dtrain.spec import RunSpec, one_device
from dtrain.trainer import autocast

_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that a worker has, and what it needs."""

    memory_bytes: int
    """What it has."""
    process_bytes: int
    """What Python, torch and the data set take of it; 0 on CUDA, whose context is not known before."""
    footprint: Footprint
    """How the rest grows with the micro-batch."""

    def fits(self, samples: float) -> bool:
        """Whether a micro-batch of so many samples does, as one of several in a step."""
        peak_bytes = self.footprint.at(max(1, round(samples)), accumulate=True).peak_bytes
        return self.process_bytes + peak_bytes <= self.memory_bytes

    @functools.cached_property
    def largest(self) -> int:
        """The most samples of a micro-batch that fit, as one of several in a step.

        Raises:
            UsageError: not even one does.
        """
        return largest_micro_batch(
            self.footprint, self.memory_bytes, overhead_bytes=self.process_bytes, accumulate=True
        )

    def words(self, samples: int) -> str:
        """The answer, and whether micro-batches of so many samples fit."""
        own = f" ({show(self.process_bytes)} of it is the process itself)" if self.process_bytes else ""
        return (
            f"Memory: of {show(self.memory_bytes)} for each worker{own}, micro-batches of up to {self.largest} samples "
            "fit, counting tensors; what the allocator keeps of freed ones comes on top. Those of "
            f"{samples} {'fit' if self.fits(samples) else 'do not fit: give --micro-batch'}."
        )

    def record(self, samples: int) -> dict[str, Any]:
        """For `--json`."""
        return {
            "memory_bytes": self.memory_bytes,
            "process_bytes": self.process_bytes,
            "largest_micro_batch": self.largest,
            "micro_batch": samples,
            "parts": asdict(self.footprint.at(samples, accumulate=True)),
        }


def room(spec: RunSpec, memory: str, *, packs: bool, workers: int = 1) -> Room:
    """Look at a run's model on this worker's device; its layers as they are before `norm.convert`.

    Args:
        memory: what a worker has, such as `24GiB`.
        packs: whether the backend takes all gradients in buckets, as `ps` does.
        workers: who share the optimizer's state, with update=sharded.

    Raises:
        UsageError: a size, a recipe or an option that cannot be meant; not even one sample fits.
        DataError: data that cannot be read.
    """
    memory_bytes = parse_bytes(memory)
    recipe = spec.build()
    device = one_device(spec)
    model = recipe.model.to(device)
    weights_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    taken_bytes = 0 if device.type == "cuda" else process_bytes() - weights_bytes
    samples = min(_SAMPLES, len(recipe.train))  # type: ignore[arg-type]
    batch, _ = next(iter(Loader(recipe.train, global_batch=samples, seed=spec.seed).batches(0)))
    found = footprint(
        model,
        _with_amp(recipe.loss, spec.amp, device),
        to_device(batch, device),
        recipe.optimizer,
        update=spec.update,
        shards=workers,
        packs=packs,
        send_as=HALVES.get(spec.send_as),
        messages={"bucket_bytes": int(spec.bucket_mb * 2**20)},
    )
    made = Room(memory_bytes=memory_bytes, process_bytes=max(0, taken_bytes), footprint=found)
    _ = made.largest  # says so if there is none
    return made


def _with_amp(loss: Loss, amp: str, device: torch.device) -> Loss:
    """The loss as the trainer computes it."""

    def mixed(model: nn.Module, batch: Any) -> Tensor:
        with autocast(amp, device):
            return loss(model, batch)

    return mixed
