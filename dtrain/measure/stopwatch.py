"""The phases of a step: data, forward, backward, optimizer, and apart from them the communication that blocked."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from dtrain.measure.meter import Meter

PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Times one worker's steps. What a phase spent blocked on the backend counts as communication, not as the phase."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        """
        Args:
            device: where the model computes; on CUDA only steps begun with `precise` have phases.
        """
        self._meter = meter
        self._cuda = device if device.type == "cuda" else None
        self.begin()

    def begin(self, *, precise: bool = False) -> None:
        """A step begins. On CUDA, `precise` stops the device at each phase, which costs time of its own."""
        self._precise = precise
        self._meter.precise = precise
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._blocked_at_start = self._meter.blocked_s
        self._traffic_at_start = _bytes(self._meter)
        self._start_s = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within: this phase of the step. A phase may come several times."""
        blocked_s = self._meter.blocked_s
        start_s = self._now()
        yield
        self._seconds[name] += self._now() - start_s - (self._meter.blocked_s - blocked_s)

    def end(self) -> dict[str, float]:
        """The step is over: milliseconds by phase, and bytes."""
        sent, received = (now - then for now, then in zip(_bytes(self._meter), self._traffic_at_start, strict=True))
        record = {
            "step_ms": (self._now() - self._start_s) * 1e3,
            "bytes_sent": float(sent),
            "bytes_received": float(received),
        }
        if self._cuda is None or self._precise:
            record["exposed_comm_ms"] = (self._meter.blocked_s - self._blocked_at_start) * 1e3
            record |= {f"{name}_ms": seconds * 1e3 for name, seconds in self._seconds.items()}
        self._meter.precise = False
        return record

    def _now(self) -> float:
        if self._cuda is not None and self._precise:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


def summarise(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """A typical step: the median of each figure over the steps that have it, the first ones (warm-up) left out.

    Adds `compute_ms` (forward, backward and optimizer), `ratio` (compute to exposed communication; absent where nothing
    is sent) and `*_per_step` for the bytes, which are means.
    """
    kept = list(records[min(3, len(records) // 2) :])
    if not kept:
        return {}
    names = sorted({name for record in kept for name in record if name.endswith("_ms")})
    summary = {name: statistics.median(r[name] for r in kept if name in r) for name in names}
    for name in ("bytes_sent", "bytes_received"):
        summary[f"{name}_per_step"] = statistics.fmean(r[name] for r in kept)
    if all(f"{name}_ms" in summary for name in PHASES):
        summary["compute_ms"] = sum(summary[f"{name}_ms"] for name in ("forward", "backward", "optimizer"))
        if summary["exposed_comm_ms"] > 0 and summary["bytes_sent_per_step"] > 0:
            summary["ratio"] = summary["compute_ms"] / summary["exposed_comm_ms"]
    return summary


def _bytes(meter: Meter) -> tuple[int, int]:
    return sum(meter.traffic.sent.values()), sum(meter.traffic.received.values())
