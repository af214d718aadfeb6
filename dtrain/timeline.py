"""What a run leaves of its steps' times: a line for each step and worker, and a trace of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from dtrain.comm import collectives
from dtrain.hooks import Hook, State, finite, lines_to_step
from dtrain.measure.trace import document

_ALL = 1000
"""Steps of which every one is written. Of later ones a tenth is, of those after ten times as many a hundredth, ..."""


class StepLog(Hook):
    """One JSON object a line for each step and worker, on worker 0; long runs are thinned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._before_s = 0.0

    def on_start(self, state: State) -> None:
        if state.first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = lines_to_step(self._path, state.step)
            self._path.write_text("".join(kept), encoding="utf-8")
            if self._file is None and kept:  # another process wrote them, whose time began at another moment
                last = json.loads(kept[-1])
                self._before_s = last.get("start_s", 0.0) + last.get("step_ms", 0.0) / 1e3
            self._file = self._path.open("a", encoding="utf-8")

    def on_step(self, state: State) -> None:
        if self._file is None or not state.fresh:
            return
        for everyone in state.fresh:
            for record in everyone:
                if int(record["step"]) % _every(int(record["step"])) == 0:
                    self._file.write(json.dumps(finite(_short(record, self._before_s)), allow_nan=False) + "\n")
        self._file.flush()

    def on_end(self, state: State) -> None:
        self.on_step(state)
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_rewind(self, state: State) -> None:
        if self._file is not None:
            self._file.close()
        self.on_start(state)


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
