"""What a run leaves of its steps' times: a line for each step and worker, and a trace of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtrain.comm import collectives
from dtrain.hooks import Hook, LineLog, State
from dtrain.measure.trace import document

_ALL = 1000
"""Steps of which every one is written. Of later ones a tenth is, of those after ten times as many a hundredth, ..."""


class StepLog(LineLog):
    """A line for each step and worker; long runs are thinned. See `LineLog`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._before_s = 0.0

    def on_step(self, state: State) -> None:
        everything = [record for everyone in state.fresh for record in everyone]
        kept = [record for record in everything if int(record["step"]) % _every(int(record["step"])) == 0]
        if kept:
            self._write(_short(record, self._before_s) for record in kept)

    def on_end(self, state: State) -> None:
        self.on_step(state)
        super().on_end(state)

    def _go_on_after(self, last: dict[str, Any]) -> None:
        """Its time began at another moment."""
        self._before_s = last.get("start_s", 0.0) + last.get("step_ms", 0.0) / 1e3


class Trace(Hook):
    """A Chrome trace of a few typical steps and the slowest one, of all workers on one clock, at the end of the run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, state: State) -> None:
        if state.first:
            self._path.unlink(missing_ok=True)  # of another run

    def on_end(self, state: State) -> None:
        mine, notable = state.events()
        everyone = collectives.gather_bytes(state.comm, json.dumps(mine).encode(), "metric/trace")
        if state.first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            events = [json.loads(data) for data in everyone if data]
            part = self._path.with_suffix(".part")
            part.write_text(document(events, notable), encoding="utf-8")
            part.replace(self._path)


def _every(step: int) -> int:
    """Of which so many steps one is written."""
    every = 1
    while step > _ALL * every:
        every *= 10
    return every


def _short(record: dict[str, float], before_s: float) -> dict[str, float]:
    """Times to the microsecond, on the clock of the whole run; whole numbers without a point."""
    record = {**record, "start_s": record["start_s"] + before_s}
    return {k: int(v) if float(v).is_integer() else round(v, 6 if k.endswith("_s") else 4) for k, v in record.items()}
