"""The phases of a step: data, forward, backward, optimizer, and apart from them the communication that blocked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dtrain.comm.base import LANES
from dtrain.measure.intervals import Interval, length, merged, overlaps
from dtrain.measure.marks import Mark, Marks, marks_on
from dtrain.measure.meter import Meter, Transfer

PHASES = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Sent:
    """One transfer of a step, in seconds of perf_counter. A part that never was is an interval without length."""

    key: str
    nbytes: int
    called_s: float
    """The worker was ready to send."""
    started_s: float
    """It had packed and handed over what it sends."""
    wait_s: float
    done_s: float
    """It was blocked from `wait_s` to `done_s`."""
    arrived_s: float
    """The result was there, as far as is known: at the latest when the worker went on."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a worker did in one step, in seconds of perf_counter."""

    number: int
    """Which step."""
    begin_s: float
    end_s: float
    spans: tuple[tuple[str, float, float], ...]
    """(phase, from, to), in order; a phase may come several times."""
    sent: tuple[Sent, ...]
    traffic: dict[str, float]
    """Payload bytes: bytes_sent, bytes_received, and of each lane sent_LANE, received_LANE."""

    def record(self) -> dict[str, float]:
        """Milliseconds by what they went to, and bytes.

        `step_ms` is the sum of `data_ms`, `forward_ms`, `backward_ms`, `optimizer_ms`, `exposed_comm_ms` (blocked on
        the backend, wherever that was) and `rest_ms`. Of the exposed communication `codec_ms` went to starting
        transfers. `hidden_comm_ms`: something was under way, and the worker was not blocked.
        """
        blocked = self._blocked()
        exposed_s = length(blocked)
        phases = dict.fromkeys(PHASES, 0.0)
        inside_s, outside_s = 0.0, exposed_s
        within = overlaps(blocked, [(since, to) for _, since, to in self.spans])
        for (name, since, to), within_s in zip(self.spans, within, strict=True):
            phases[name] += to - since - within_s
            inside_s += to - since
            outside_s -= within_s
        flight = merged((t.called_s, t.arrived_s) for t in self.sent)
        hidden_s = length(flight) - sum(overlaps(blocked, flight))
        return {
            "step_ms": (self.end_s - self.begin_s) * 1e3,
            **{f"{name}_ms": seconds * 1e3 for name, seconds in phases.items()},
            "rest_ms": max(0.0, self.end_s - self.begin_s - inside_s - outside_s) * 1e3,
            "exposed_comm_ms": exposed_s * 1e3,
            "codec_ms": sum(t.started_s - t.called_s for t in self.sent) * 1e3,
            "hidden_comm_ms": max(0.0, hidden_s) * 1e3,
            **self.traffic,
        }

    def _blocked(self) -> list[Interval]:
        """When the program was in the backend's calls; one worker is in one at a time."""
        starts = [(t.called_s, t.started_s) for t in self.sent if t.started_s > t.called_s]
        return sorted([*starts, *((t.wait_s, t.done_s) for t in self.sent if t.done_s > t.wait_s)])


class Stopwatch:
    """Times one worker's steps: `begin`, phases, `end`, and `take` for what was found.

    On CUDA it sets events, and waits for the device in `take` alone.
    """

    def __init__(self, meter: Meter, device: torch.device) -> None:
        """
        Args:
            device: where the model computes.
        """
        self._meter = meter
        self._marks: Marks = marks_on(device)
        meter.marks = self._marks
        self._steps: list[_Step] = []
        self.begin()

    def __len__(self) -> int:
        """Steps that wait to be taken."""
        return len(self._steps)

    def begin(self) -> None:
        """A step begins. What was sent since the last one belongs to neither."""
        self._meter.take()
        self._traffic = _bytes(self._meter)
        self._step = _Step(self._marks.now())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within: this phase of the step. A phase may come several times."""
        since = self._marks.now()
        yield
        self._step.spans.append((name, since, self._marks.now()))

    def end(self, number: int = 0) -> None:
        """The step is over; it was that one."""
        step = self._step
        step.number = number
        step.end = self._marks.now()
        step.transfers = self._meter.take()
        step.traffic = _between(self._traffic, _bytes(self._meter))
        self._steps.append(step)

    def take(self) -> list[StepTimes]:
        """The steps since the last call. On CUDA this waits for what was asked of the device."""
        taken, self._steps = self._steps, []
        if taken:
            self._marks.anchor()
        return [step.read(self._marks) for step in taken]


@dataclass(slots=True)
class _Step:
    begin: Mark
    end: Mark = None
    number: int = 0
    spans: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    traffic: dict[str, float] = field(default_factory=dict)

    def read(self, marks: Marks) -> StepTimes:
        spans = tuple((name, marks.seconds(since), marks.seconds(to)) for name, since, to in self.spans)
        begin_s = marks.seconds(self.begin)
        sent = tuple(_read(transfer, marks, begin_s) for transfer in self.transfers)
        return StepTimes(self.number, begin_s, marks.seconds(self.end), spans, sent, self.traffic)


def _read(transfer: Transfer, marks: Marks, begin_s: float) -> Sent:
    """What a step had of a transfer, which may have begun in the step before."""
    called_s = max(begin_s, marks.seconds(transfer.called))
    started_s = called_s if transfer.started is None else max(called_s, marks.seconds(transfer.started))
    done_s = started_s if transfer.done is None else marks.seconds(transfer.done)
    wait_s = done_s if transfer.wait is None else marks.seconds(transfer.wait)
    arrived_s = done_s if math.isnan(transfer.arrived_s) else min(transfer.arrived_s, done_s)
    return Sent(transfer.key, transfer.nbytes, called_s, started_s, wait_s, done_s, max(arrived_s, started_s))


_Counts = tuple[dict[str, int], dict[str, int]]
"""Bytes sent and received so far, by lane."""


def _bytes(meter: Meter) -> _Counts:
    return dict(meter.traffic.sent), dict(meter.traffic.received)


def _between(before: _Counts, after: _Counts) -> dict[str, float]:
    """What has been sent and received meanwhile, as a record has it."""
    found = {}
    for name, earlier, later in zip(("sent", "received"), before, after, strict=True):
        found[f"bytes_{name}"] = float(sum(later.values()) - sum(earlier.values()))
        for lane in LANES:
            found[f"{name}_{lane}"] = float(later.get(lane, 0) - earlier.get(lane, 0))
    return found
