"""The later sections of a run: batch norm, memory, the prediction, and every figure and setting in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtrain.measure.report import bars, curves, figures, findings, words
from dtrain.measure.report.blocks import Cell, Picture, Section, Table
from dtrain.measure.report.prediction import predictions
from dtrain.measure.runfiles import Record, Run, numbers

MOST_WORKERS = 32
"""Workers that are shown each by itself."""
_MOST_LAYERS = 200
_APART = frozenset(("per_worker", "late", "staleness", "memory", "placement", "decisions", "noise_scale"))
"""Of the summary: what has a place of its own, or is no single figure."""
_NOISE = {
    "noise_scale": ("noise scale", "wait", "-"),
    "noise_low": ("at least", "wait", ":"),
    "noise_high": ("at most", "wait", ":"),
    "global_batch": ("global batch", "backward", "-"),
}
"""Of the records: label, colour and dash."""


def box_table(workers: Sequence[dict[str, float]], names: Sequence[str]) -> Table:
    """The boxes of each worker (or run) in ms: the key to the bars, too."""
    kept = list(dict.fromkeys(part.box for boxes in workers for part in figures.parts(boxes)))
    rows = [_box_row(box, f"{box}_ms" if box != "exposed" else "exposed_comm_ms", workers) for box in kept]
    step = [Cell("step", strong=True), *(Cell(words.fixed(b.get("step_ms")), strong=True) for b in workers)]
    beside = [_box_row("hidden", "hidden_comm_ms", workers)] if any("hidden_comm_ms" in b for b in workers) else []
    head = ["ms", *names]
    return Table(head=head, rows=[*rows, step, *beside])


def _box_row(box: str, field: str, workers: Sequence[dict[str, float]]) -> list[Cell]:
    return [Cell(findings.NAMES[box], chip=box), *(Cell(words.fixed(boxes.get(field))) for boxes in workers)]


def batch_norm(run: Run, key: str) -> Section | None:
    """What `dtrain.norm.diagnose` found, where the run has stored it as diagnosis.json."""
    layers = run.diagnosis.get("layers")
    rows = _records(layers)
    if not rows:
        return None
    suspicious = [row for row in rows if row.get("findings")]
    shift = numbers(run.diagnosis).get("output_shift")
    notes = [f"From batch to running statistics, the model's outputs change by {words.percent(shift)} of their rms."]
    notes += [f"{row.get('path')}: {why}." for row in suspicious for why in _values(row.get("findings"))]
    title = "Nothing suspicious"
    if suspicious:
        title = f"{len(suspicious)} of {words.plural(len(rows), 'layer')} suspicious"
    shown = sorted(rows, key=lambda row: -numbers(row).get("mean_shift", 0.0))[:12]
    offs = [
        (
            str(row.get("path")),
            numbers(row).get("mean_shift", 0.0),
            words.digits(numbers(row).get("mean_shift")),
            "warn" if row.get("findings") else "plain",
        )
        for row in shown
    ]
    svg = bars.bars(f"{key}-norm", title, offs, "running mean off, standard deviations")
    return Section(
        title="Batch norm",
        notes=notes if shift is not None else notes[1:],
        pictures=[Picture(title=title, svg=svg)],
        tables=[_norm_table(rows[:_MOST_LAYERS])],
    )


def _norm_table(rows: Sequence[Record]) -> Table:
    fields = ("samples", "mean_shift", "variance_ratio", "mean_noise", "variance_noise")
    head = ["layer", "samples", "mean off", "variance ×", "mean noise", "variance noise", "findings"]
    cells = [
        [
            Cell(str(row.get("path"))),
            *(Cell(words.digits(numbers(row).get(name))) for name in fields),
            Cell(", ".join(_keys(row.get("findings"))) or words.NONE),
        ]
        for row in rows
    ]
    return Table(head=head, rows=cells, caption="Means in standard deviations of the data, variances relative to its.")


def _records(value: Any) -> list[Record]:
    """The rows of a list in a file, which may hold anything."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _values(findings_of: Any) -> list[str]:
    return [str(why) for why in findings_of.values()] if isinstance(findings_of, dict) else []


def _keys(findings_of: Any) -> list[str]:
    return [str(word) for word in findings_of] if isinstance(findings_of, dict | list) else []


def batch(run: Run, key: str) -> Section | None:
    """The gradient noise scale as it was measured, and a global batch that followed it, or a schedule."""
    found = {name: [(x, y) for x, y in figures.curve(run.records, name) if y > 0] for name in _NOISE}
    sizes = found["global_batch"]
    moves = len({size for _, size in sizes}) > 1
    if not (moves or found["noise_scale"]):
        return None
    lines = [
        curves.Line(label, figures.thin(found[name]), colour, dash, stairs=name == "global_batch")
        for name, (label, colour, dash) in _NOISE.items()
        if found[name]
    ]
    if moves:
        title = f"The global batch went from {sizes[0][1]:g} to {sizes[-1][1]:g} samples"
    else:
        title = f"The noise scale came to {words.digits(found['noise_scale'][-1][1])} samples"
    svg = curves.curves(f"{key}-batch", title, lines, x="samples seen", y="samples", doublings=True)
    caption = "Dotted: the interval of the gradient noise scale." if found["noise_low"] else ""
    decisions = _records(run.summary.get("decisions"))
    body = [[Cell(words.plain(row.get(name))) for name in ("step", "batch", "reason")] for row in decisions]
    return Section(
        title="Batch and noise",
        pictures=[Picture(title=title, svg=svg, caption=caption)],
        tables=[Table(head=["step", "batch", "why"], rows=body, words=True)] if body else [],
    )


def memory(run: Run, key: str) -> Section | None:
    """Bytes by what they are for."""
    found, peak = figures.memory(run)
    if not found:
        return None
    title = findings.what_fills_memory(found, peak)
    rows = [(words.named(name), size / 1e6, words.nbytes(size), "plain") for name, size in list(found.items())[:12]]
    svg = bars.bars(f"{key}-memory", title, rows, "MB, worker 0")
    caption = "Each part at its largest: they are not all there at the same moment."
    return Section(title="Memory", pictures=[Picture(title=title, svg=svg, caption=caption)])


def prediction(run: Run, key: str, plan: Record | None) -> Section | None:
    """What was predicted for the run, and what came."""
    found = predictions(run, plan) if plan else None
    if found is None:
        return None
    rows = [(one.label, one.low_ms, one.step_ms, one.high_ms, one.measured_ms) for one in found.steps]
    svg = bars.interval(f"{key}-plan", found.title, rows)
    caption = "Grey: the interval of the prediction, with a stroke at its middle; the dot is what was measured."
    return Section(
        title="Predicted and measured",
        notes=found.notes,
        pictures=[Picture(title=found.title, svg=svg, caption=caption)],
        tables=[found.table],
    )


def all_figures(run: Run) -> Section | None:
    """Every figure of the summary."""
    if not run.summary:
        return None
    scalars = [(name, value) for name, value in run.summary.items() if name not in _APART]
    rows = [[Cell(words.named(name)), Cell(words.plain(value))] for name, value in scalars]
    tables = [Table(head=["figure", "value"], rows=rows)]
    given = run.summary.get("per_worker")
    workers = [numbers(row) for row in given] if isinstance(given, list) else []
    if any(workers):
        names = list(dict.fromkeys(name for row in workers for name in row))
        body = [[Cell(words.named(name)), *(Cell(_six(row.get(name))) for row in workers)] for name in names]
        tables.append(Table(head=["each worker", *(str(rank) for rank in range(len(workers)))], rows=body))
    return Section(title="All figures", tables=tables)


def _six(value: float | None) -> str:
    return words.NONE if value is None else words.plain(value)


def configuration(run: Run) -> Section | None:
    """What was asked for, and with which versions."""
    flat = {name: value for name, value in figures.flatten(run.config).items() if name != "buffers"}
    if not flat:
        return None
    settings = [(name, value) for name, value in flat.items() if not name.startswith("versions.")]
    versions = [(name.partition(".")[2], value) for name, value in flat.items() if name.startswith("versions.")]
    tables = [
        Table(head=[head, ""], rows=[[Cell(name), Cell(words.plain(value))] for name, value in rows], words=True)
        for head, rows in (("setting", settings), ("version", versions))
        if rows
    ]
    return Section(title="Configuration and versions", tables=tables)
