"""A prediction of `dtrain plan --json` beside what came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtrain.measure.report import findings, words
from dtrain.measure.report.blocks import Cell, Table
from dtrain.measure.report.figures import COMMUNICATION, COMPUTE
from dtrain.measure.runfiles import Record, Run, number, numbers

_MOST = 8
_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A predicted step with its interval, and the measured one."""

    label: str
    low_ms: float
    step_ms: float
    high_ms: float
    measured_ms: float | None

    @property
    def inside(self) -> bool:
        """Whether the measured step lies in the interval."""
        return self.measured_ms is not None and self.low_ms <= self.measured_ms <= self.high_ms


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What there is to show of them."""

    title: str
    steps: Sequence[Predicted]
    table: Table
    notes: Sequence[str]
    """What the plan says that they rest on."""


def predictions(run: Run, plan: Record) -> Predictions | None:
    """What a plan says of a run of this backend, workers, servers and batch; None where it says nothing."""
    found: list[Record] = []
    for record in _records(plan):
        if _fits(record, run) and record not in found and len(found) < _MOST:
            found.append(record)
    if not found:
        return None
    measured = number(run.summary.get("step_ms"))
    steps = [_predicted(numbers(record), _label(record, alone=len(found) == 1), measured) for record in found]
    return Predictions(title=_title(steps), steps=steps, table=_table(run, found, steps), notes=_notes(plan))


def _notes(plan: Record) -> list[str]:
    about, interval = plan.get("about"), plan.get("interval")
    lines = [*(about if isinstance(about, list) else []), interval]
    return [line for line in lines if isinstance(line, str)]


def _records(value: object, depth: int = 0) -> Iterator[Record]:
    """Every prediction in a plan, wherever it stands."""
    if depth > _DEPTH:
        return
    if isinstance(value, dict):
        if {"step_ms", "backend", "workers"} <= value.keys() and number(value["step_ms"]) is not None:
            yield value
        else:
            for item in value.values():
                yield from _records(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _records(item, depth + 1)


def _fits(record: Record, run: Run) -> bool:
    """Whether a prediction is for what the run was."""
    if record["backend"] != run.of("backend") or number(record["workers"]) != run.workers:
        return False
    batch, servers = number(record.get("batch")), number(record.get("servers"))
    whole = number(run.config.get("global_batch"))
    if batch is not None and whole is not None and abs(batch * run.workers - whole) > 0.01 * whole:
        return False
    had = number(run.of("servers"))
    return servers is None or had is None or servers == had


def _predicted(found: dict[str, float], label: str, measured_ms: float | None) -> Predicted:
    step_ms = found["step_ms"]
    low_ms, high_ms = (found.get(f"step_ms_{end}", step_ms) for end in ("low", "high"))
    return Predicted(label=label, low_ms=low_ms, step_ms=step_ms, high_ms=high_ms, measured_ms=measured_ms)


def _label(record: Record, *, alone: bool) -> str:
    facts = [] if alone else [f"{name} {words.plain(record[name])}" for name in ("servers", "place") if name in record]
    return ", ".join(facts) or "step"


def _table(run: Run, records: Sequence[Record], steps: Sequence[Predicted]) -> Table:
    """The boxes, predicted and measured."""
    names = [*(f"{name}_ms" for name in (*COMPUTE, *COMMUNICATION)), "exposed_comm_ms", "hidden_comm_ms", "step_ms"]
    more = ("samples_per_s", "ratio", "efficiency")
    found = [numbers(record) for record in records]
    measured = numbers(run.summary)
    shown = [name for name in (*names, *more) if any(name in one for one in found)]
    rows = [
        [
            Cell(findings.NAMES.get(name.removesuffix("_ms").removesuffix("_comm"), words.named(name))),
            *(Cell(words.fixed(one.get(name))) for one in found),
            Cell(words.fixed(measured.get(name)), strong=True),
        ]
        for name in shown
    ]
    heads = ["predicted"] if len(steps) == 1 else [one.label for one in steps]
    return Table(head=["ms, unless said", *heads, "measured"], rows=rows)


def _title(steps: Sequence[Predicted]) -> str:
    if len(steps) > 1:
        inside = sum(one.inside for one in steps)
        return f"The measured step lies in the intervals of {inside} of {len(steps)} predictions"
    one = steps[0]
    text = f"Predicted {words.ms(one.step_ms)} ({words.digits(one.low_ms)} to {words.digits(one.high_ms)})"
    if one.measured_ms is None:
        return text
    return f"{text}; measured {words.ms(one.measured_ms)}, {'inside' if one.inside else 'outside'} the interval"
