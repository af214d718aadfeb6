"""Reading a run directory: what is there, tolerant of what is not.

A run that was killed has a torn last line and no summary; an older one has no steps.jsonl and no trace.json. What is
there is read, and for each file that is not, `missing` says why. Values are not trusted: a number is asked for by
`number`, which gives None for anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.errors import DataError

Record = dict[str, Any]

_WITHOUT = {
    "config.json": "what was asked for is not known",
    "summary.json": "the run has not ended, or was killed",
    "metrics.jsonl": "there are no curves",
    "steps.jsonl": "it is written by runs from this version on; there is nothing step by step",
    "trace.json": "it is written by runs from this version on; there is no timeline",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds."""

    folder: Path
    config: Record = field(default_factory=dict)
    """What was asked for; empty where that is not there."""
    summary: Record = field(default_factory=dict)
    """The figures at the end."""
    records: list[Record] = field(default_factory=list)
    """Every few steps: loss, learning rate, and worker 0's boxes."""
    scores: list[Record] = field(default_factory=list)
    """After each epoch: `step`, `samples` and the scores in `metrics`."""
    steps: list[Record] = field(default_factory=list)
    """For each step and worker: `step`, `worker`, `start_s`, boxes and bytes; by step, then by worker."""
    trace: Record = field(default_factory=dict)
    """Chrome trace events of a few steps."""
    diagnosis: Record = field(default_factory=dict)
    """Of batch norm, where the run has stored one."""
    missing: dict[str, str] = field(default_factory=dict)
    """Of each file that is not there, or cannot be read: why, and what that means."""

    @property
    def workers(self) -> int:
        """How many there were, as far as that can be told."""
        for source in (self.summary, self.config):
            if (count := number(source.get("workers"))) is not None:
                return max(1, int(count))
        return 1 + max((row["worker"] for row in self.steps), default=0)

    def of(self, name: str) -> Any:
        """A fact of the run: as measured, else as asked for."""
        return self.summary.get(name, self.config.get(name))


def read(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: it is none: no directory, or without any file of a run.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no directory: give the --run-dir of a run")
    if not any((folder / name).exists() for name in ("config.json", "summary.json", "metrics.jsonl")):
        raise DataError(
            f"{folder} is no run directory: it has no config.json, summary.json or metrics.jsonl; give a --run-dir"
        )
    missing: dict[str, str] = {}
    lines = [row for row in _lines(folder, "metrics.jsonl", missing) if number(row.get("step")) is not None]
    return Run(
        folder=folder,
        config=_object(folder, "config.json", missing),
        summary=_object(folder, "summary.json", missing),
        records=[row for row in lines if "metrics" not in row],
        scores=[row for row in lines if isinstance(row.get("metrics"), dict)],
        steps=_by_step(_lines(folder, "steps.jsonl", missing)),
        trace=_object(folder, "trace.json", missing),
        diagnosis=_object(folder, "diagnosis.json", {}),
        missing=missing,
    )


def number(value: object) -> float | None:
    """A finite number as such; None for anything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int beyond the range of a float
        return None


def numbers(record: object) -> dict[str, float]:
    """What of a record are numbers; nothing, where it is no record."""
    if not isinstance(record, dict):
        return {}
    return {str(name): found for name, value in record.items() if (found := number(value)) is not None}


def _by_step(rows: Sequence[Record]) -> list[Record]:
    """Rows that say which step and worker they are of; of two for one, the later, which a resumed run has written."""
    kept: dict[tuple[int, int], Record] = {}
    for row in rows:
        step, worker = row.get("step"), row.get("worker")
        if type(step) is int and type(worker) is int and worker >= 0:
            kept[step, worker] = row
    return [kept[key] for key in sorted(kept)]


def _object(folder: Path, name: str, missing: dict[str, str]) -> Record:
    """A JSON object; empty where it is not there or no such thing."""
    text = _text(folder, name, missing)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        missing[name] = f"{name} cannot be read: {error}"
        return {}
    if not isinstance(found, dict):
        missing[name] = f"{name} is no JSON object"
        return {}
    return found


def _lines(folder: Path, name: str, missing: dict[str, str]) -> list[Record]:
    """The JSON objects of a file that has one a line. A torn last line is left out silently, others are told of."""
    text = _text(folder, name, missing)
    if text is None:
        return []
    found, torn = [], []
    lines = text.split("\n")
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            torn.append(place)
    torn = [place for place in torn if place != len(lines)]
    if torn:
        missing[name] = f"{name}: {len(torn)} of {len(lines)} lines cannot be read, line {torn[0]} first"
    return found


def _text(folder: Path, name: str, missing: dict[str, str]) -> str | None:
    try:
        return (folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing[name] = f"there is no {name}: {_WITHOUT.get(name, '')}"
    except OSError as error:
        missing[name] = f"{name} cannot be read: {error.strerror}"
    return None
