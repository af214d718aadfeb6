"""Several runs side by side: a table of them, what is different in their configuration, curves over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtrain.measure.report import bars, curves, figures, findings, words
from dtrain.measure.report.blocks import Cell, Picture, Section, Table
from dtrain.measure.report.details import box_table
from dtrain.measure.report.story import along, key_of
from dtrain.measure.runfiles import Record, Run, number, numbers

_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str], int], ...] = (
    ("samples_per_s", "samples/\N{WORD JOINER}s", words.digits, 1),
    ("step_ms", "step ms", words.digits, -1),
    ("compute_ms", "compute ms", words.digits, 0),
    ("exposed_comm_ms", "exposed ms", words.digits, -1),
    ("ratio", "ratio", words.digits, 1),
    ("efficiency", "efficiency", words.percent, 1),
    ("bytes_sent_per_step", "sent a step", words.nbytes, -1),
    ("loss", "loss", lambda value: words.digits(value, 4), -1),
    ("accuracy", "accuracy", lambda value: words.score("accuracy", value), 1),
    ("perplexity", "perplexity", lambda value: words.digits(value, 4), -1),
)
"""Field, head, how it is written, and whether much (1) or little (-1) is good."""
_MOST_FIELDS = 200


def labels(count: int) -> list[str]:
    """A, B, ... Z, A2, B2, ..."""
    return [chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else "") for i in range(count)]


def table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """A row a run; the best figure of each column stands out."""
    rows = [numbers(run.summary) for run in runs]
    shown = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    best = {name: _best([row.get(name) for row in rows], sign, write) for name, _, write, sign in shown}
    facts = _unlike(runs)
    head = ["run", *facts, *(head for _, head, _, _ in shown)]
    body = []
    for place, (run, row) in enumerate(zip(runs, rows, strict=True)):
        first = Cell(f"{names[place]} {run.folder.name}", chip=f"run{place % 8}", link=f"run-{names[place]}")
        body.append(
            [
                first,
                *(Cell(values[place]) for values in facts.values()),
                *(Cell(write(row.get(name)), strong=place in best[name]) for name, _, write, _ in shown),
            ]
        )
    return Table(head=head, rows=body, caption="Bold: the best of its column.")


def _facts(run: Run) -> dict[str, str]:
    """What a run was, in few words."""
    batch = number(run.config.get("global_batch"))
    return {
        **{name: words.plain(run.of(name)) for name in ("recipe", "backend")},
        "workers": str(run.workers),
        "global batch": words.NONE if batch is None else f"{batch:g}",
    }


def _unlike(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Facts that are not the same of all runs -> their values."""
    each = [_facts(run) for run in runs]
    rows = {name: [facts[name] for facts in each] for name in each[0]}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def alike(runs: Sequence[Run]) -> str:
    """The other facts, which are the same of all, as a line."""
    unlike = _unlike(runs)
    return " · ".join(f"{name} {value}" for name, value in _facts(runs[0]).items() if name not in unlike)


def _best(values: Sequence[float | None], sign: int, write: Callable[[float | None], str]) -> set[int]:
    """Positions of the best values, as they are written; none where all read alike or nothing is better."""
    known = [value for value in values if value is not None]
    if not sign or len({write(value) for value in known}) < 2:
        return set()
    target = write(max(known) if sign > 0 else min(known))
    return {place for place, value in enumerate(values) if value is not None and write(value) == target}


def differences(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    """Settings that are not the same in all runs; what differs from the first run stands out."""
    found = figures.differences([run.config for run in runs])
    if not found:
        return None
    rows = [
        [Cell(name), *(Cell(words.plain(value), strong=value != values[0]) for value in values)]
        for name, values in list(found.items())[:_MOST_FIELDS]
    ]
    caption = "Bold: unlike the first run. All other settings are the same."
    return Table(head=["setting", *names], rows=rows, caption=caption, words=True)


def learning(runs: Sequence[Run], names: Sequence[str]) -> Section | None:
    """Loss and scores of all runs over each other."""
    drawn = []
    for name in ("loss", *figures.score_names(runs)):
        for axis in ("samples", "time"):
            picture = _curves(runs, names, name, axis)
            drawn += [picture] if picture else []
    return Section(title="What they learnt", pictures=drawn) if drawn else None


def _curves(runs: Sequence[Run], names: Sequence[str], name: str, axis: str) -> Picture | None:
    lines, ends = [], []
    for place, run in enumerate(runs):
        rows: Sequence[Record] = run.records if name == "loss" else figures.score_rows(run)
        if points := along(run, rows, name, axis):
            lines.append(curves.run_line(place, names[place], points))
            ends.append((names[place], points[-1][1]))
    if len(lines) < 2:
        return None
    what = "training loss" if name == "loss" else words.named(name)
    title = findings.best(what if name == "loss" else name, ends, lowest=name != "accuracy")
    x = "samples" if axis == "samples" else "seconds since the first step"
    svg = curves.curves(key_of(f"all-{name}-{axis}"), title, lines, x=x, y=what, percent=name == "accuracy")
    return Picture(title=title if axis == "samples" else f"{what.capitalize()} over time", svg=svg)


def paying(runs: Sequence[Run], names: Sequence[str]) -> Section | None:
    """How the ratio depends on the batch, and on workers, where these are not all alike."""
    points = figures.ratios(runs)
    drawn = []
    for by in ("global_batch", "workers"):
        if len({getattr(point, by) for point in points}) > 1:
            title = findings.what_pays(points, by)
            svg = curves.ratios(key_of(f"all-ratio-{by}"), title, points, names, by)
            other = "workers" if by == "global_batch" else "batch size"
            drawn.append(Picture(title=title, svg=svg, caption=f"Lines join runs of equal {other}."))
    return Section(title="Does it pay?", pictures=drawn) if drawn else None


def step(runs: Sequence[Run], names: Sequence[str]) -> Section | None:
    """Where worker 0's step goes in each run."""
    boxes = [figures.per_worker(run)[0] for run in runs]
    kept = [(name, one) for name, one in zip(names, boxes, strict=True) if figures.parts(one)]
    if len(kept) < 2:
        return None
    shown, found = [name for name, _ in kept], [one for _, one in kept]
    title = findings.shortest([(name, one["step_ms"]) for name, one in kept if "step_ms" in one])
    svg = bars.step_parts("all-parts", title, found, shown)
    return Section(
        title="Where a step's time goes",
        pictures=[Picture(title=title, svg=svg, caption="Worker 0 of each run.")],
        tables=[box_table(found, shown)],
    )
