"""What processors and links of emulated hosts did while something ran: which of them was the bottleneck."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.05
"""Time between two looks."""


@dataclass(frozen=True)
class Sample:
    at_s: float
    busy_s: float  # of all processors
    stolen_s: float  # by other virtual machines
    all_s: float
    sent: list[int]  # bytes that each host has sent
    received: list[int]


def processors_s() -> dict[str, float]:
    """Seconds of all processors so far: there were, busy with whatever, and stolen by other virtual machines."""
    times = {name: s for name, s in psutil.cpu_times()._asdict().items() if "guest" not in name}  # parts of others
    all_s = sum(times.values())
    idle_s = times["idle"] + times.get("iowait", 0.0)
    return {"all": all_s, "busy": all_s - idle_s, "stolen": times.get("steal", 0.0)}


def look(pids: Sequence[int]) -> Sample:
    spent = processors_s()
    links = [_link(pid) for pid in pids]
    return Sample(
        at_s=time.perf_counter(),
        busy_s=spent["busy"],
        stolen_s=spent["stolen"],
        all_s=spent["all"],
        sent=[sent for sent, _ in links],
        received=[received for _, received in links],
    )


def _link(pid: int) -> tuple[int, int]:
    """Bytes that a host has sent and received. Packets that travel uncut count one header: payload, to half a percent
    in large transfers."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            if line.strip().startswith("eth0:"):
                numbers = line.partition(":")[2].split()
                return int(numbers[8]), int(numbers[0])
    return 0, 0


@dataclass
class Use:
    """Processors and links while something ran. Shares are of 1; `active` are the samples, of 50 ms, in which some link
    carried 1 % of its rate or more, which leaves out starting Python and reading data."""

    rate_bytes_per_s: float
    seconds: float = 0.0
    active_s: float = 0.0
    busy: float = 0.0
    """Share of the processors' time that was used while active, by whomever."""
    stolen: float = 0.0
    """Share that the machine below gave to others."""
    link: float = 0.0
    """Share of the rate that the busiest direction of the busiest link carried while active."""
    saturated: float = 0.0
    """Share of the active samples in which some direction of some link carried 90 % of its rate or more."""
    busy_while_saturated: float = 0.0
    """Processor use in those: near 1, the links may have had to wait for the processors."""
    sent_bytes: list[int] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)

    def fill(self, samples: Sequence[Sample]) -> None:
        first, last = samples[0], samples[-1]
        self.seconds = last.at_s - first.at_s
        self.sent_bytes = [b - a for a, b in zip(first.sent, last.sent, strict=True)]
        self.received_bytes = [b - a for a, b in zip(first.received, last.received, strict=True)]
        spans = list(itertools.pairwise(samples))
        shares = [[moved / (self.rate_bytes_per_s * (b.at_s - a.at_s)) for moved in _moved(a, b)] for a, b in spans]
        active = [k for k, share in enumerate(shares) if max(share, default=0.0) >= 0.01]
        full = [k for k in active if max(shares[k]) >= 0.9]
        if not active:
            return
        self.active_s = sum(spans[k][1].at_s - spans[k][0].at_s for k in active)
        self.busy = _share([spans[k] for k in active], "busy_s")
        self.stolen = _share([spans[k] for k in active], "stolen_s")
        directions = zip(*(_moved(*spans[k]) for k in active), strict=True)
        self.link = max(sum(moved) for moved in directions) / (self.rate_bytes_per_s * self.active_s)
        self.saturated = len(full) / len(active)
        self.busy_while_saturated = _share([spans[k] for k in full], "busy_s")

    def figures(self) -> dict[str, Any]:
        """For a record."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"link {self.link:.0%} of {self.rate_bytes_per_s * 8e-6:g} Mbit/s, full in {self.saturated:.0%} of the "
            f"time; processors {self.busy:.0%}, {self.busy_while_saturated:.0%} while a link was full; "
            f"{self.stolen:.0%} stolen"
        )


def _moved(a: Sample, b: Sample) -> list[int]:
    """Bytes by host and direction between two samples."""
    return [y - x for x, y in zip([*a.sent, *a.received], [*b.sent, *b.received], strict=True)]


def _share(spans: Sequence[tuple[Sample, Sample]], name: str) -> float:
    whole = sum(b.all_s - a.all_s for a, b in spans)
    return sum(getattr(b, name) - getattr(a, name) for a, b in spans) / whole if whole else 0.0
