"""One run, told: headline figures, then a section for each question, those left out that its files do not answer."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.comm.base import LANES
from dtrain.measure.report import bars, curves, details, figures, findings, svg, timelines, words
from dtrain.measure.report.blocks import Cell, Picture, Section, Story, Table, Tile
from dtrain.measure.report.prediction import predictions
from dtrain.measure.runfiles import Record, Run, number, numbers
from dtrain.tables import EFFICIENCY, RATIO


def tell(run: Run, key: str, label: str, place: int, plan: Record | None) -> Story:
    """The story of one run.

    Args:
        key: unlike those of the page's other runs.
        label: its letter, among several.
        place: its position among them, which decides its colour.
        plan: what was predicted for it, as `dtrain plan --json` writes it.
    """
    sections = [
        _learning(run, key),
        _where_time_goes(run, key),
        _timelines(run, key),
        _traffic(run, key),
        _late(run, key),
        _staleness(run, key),
        details.batch(run, key),
        details.batch_norm(run, key),
        details.memory(run, key),
        details.prediction(run, key, plan),
        details.all_figures(run),
        details.configuration(run),
    ]
    return Story(
        key=key,
        label=label,
        colour=f"run{place % 8}",
        title=heading(run),
        subtitle=_subtitle(run),
        sentences=[*findings.in_short(run), *_late_sentence(run)],
        tiles=tiles(run),
        sections=[section for section in sections if section is not None],
        left_out=[*left_out(run), *_without_plan(run, plan)],
    )


def heading(run: Run) -> str:
    recipe, backend = (words.plain(run.of(name) or "a run") for name in ("recipe", "backend"))
    return f"{recipe}, {backend}, {words.plural(run.workers, 'worker')}"


def _subtitle(run: Run) -> str:
    batch, steps = number(run.config.get("global_batch")), number(run.summary.get("steps"))
    versions = run.config.get("versions")
    found = versions if isinstance(versions, dict) else {}
    facts = [
        run.folder.name or str(run.folder),
        f"global batch {batch:g}" if batch else "",
        words.plural(int(steps), "step") if steps is not None else "",
        words.seconds(number(run.summary.get("seconds"))) if "seconds" in run.summary else "",
        *(f"{name} {words.plain(found[name])}" for name in ("dtrain", "torch") if name in found),
    ]
    return " · ".join(fact for fact in facts if fact)


def tiles(run: Run) -> list[Tile]:
    """The headline figures that the run has."""
    found = numbers(run.summary)
    sent, received = figures.bytes_per_step(run)
    made = [
        ("samples_per_s", "samples/s", words.digits(found.get("samples_per_s")), "over all steps, slow first ones too"),
        ("step_ms", "step", words.ms(found.get("step_ms")), "worker 0's typical step: the mean of the middle half"),
        ("ratio", "ratio", words.digits(found.get("ratio")), _definition(RATIO)),
        ("efficiency", "efficiency", words.percent(found.get("efficiency")), _definition(EFFICIENCY)),
        (
            "bytes_sent_per_step",
            "sent a step",
            words.nbytes(sent),
            f"by worker 0, which receives {words.nbytes(received)}",
        ),
        ("loss", "loss", words.digits(found.get("loss"), 4), "at the end"),
        ("accuracy", "accuracy", words.score("accuracy", found.get("accuracy")), "at the end, on the test data"),
        ("perplexity", "perplexity", words.digits(found.get("perplexity"), 4), "at the end, on the test data"),
    ]
    shown = [Tile(label=label, value=value, note=note) for name, label, value, note in made if name in found]
    if "loss" in run.summary and "loss" not in found:
        shown.append(Tile(label="loss", value="not a number", note="the training diverged"))
    waited = figures.late(run)
    if waited:
        worst = max(waited, key=lambda one: one.cost_s)
        value = f"worker {worst.worker}" if worst.cost_s else "none"
        shown.append(Tile(label="late", value=value, note=f"cost the others {words.seconds(worst.cost_s)}"))
    return shown


def _definition(text: str) -> str:
    """What stands behind `name =`."""
    return text.partition(" = ")[2] or text


def _late_sentence(run: Run) -> list[str]:
    waited = figures.late(run)
    return [findings.who_is_late(waited) + "."] if waited else []


def _learning(run: Run, key: str) -> Section | None:
    drawn = []
    rows = figures.score_rows(run)
    for name, records, tests in [("loss", run.records, rows), *((n, rows, []) for n in figures.score_names([run]))]:
        for axis in ("samples", "time"):
            picture = _curve(run, f"{key}-{name}-{axis}", name, axis, records, tests)
            drawn += [picture] if picture else []
    return Section(title="What it learnt", pictures=drawn) if drawn else None


def _curve(
    run: Run, key: str, name: str, axis: str, records: Sequence[Record], tests: Sequence[Record]
) -> Picture | None:
    """A figure over samples or over time; the same of the test data with it, where that is given."""
    lines = []
    for label, rows, dash in (("training" if tests else "", records, "-"), ("test", tests, "--")):
        points = along(run, rows, name, axis)
        if points:
            colour = "backward" if dash == "-" else "wait"
            lines.append(curves.Line(label, points, colour, dash, dots=len(points) < 30 and rows is not run.records))
    if not lines:
        return None
    title = findings.learning(name, lines[0].points)
    x = "samples" if axis == "samples" else "seconds since the first step"
    svg = curves.curves(key_of(key), title, lines, x=x, y=words.named(name), percent=name == "accuracy")
    return Picture(title=title if axis == "samples" else f"{words.named(name).capitalize()} over time", svg=svg)


def along(run: Run, rows: Sequence[Record], name: str, axis: str) -> figures.Points:
    """A curve over samples or over time, thinned."""
    if axis == "samples":
        return figures.thin(figures.curve(rows, name))
    return figures.thin(figures.over_time(run, figures.curve(rows, name, "step")))


def key_of(text: str) -> str:
    """Letters, digits and dashes alone, as ids want."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)


def _where_time_goes(run: Run, key: str) -> Section | None:
    workers = figures.per_worker(run)
    drawn, tables = [], []
    if any(figures.parts(boxes) for boxes in workers):
        shown = workers[: details.MOST_WORKERS]
        title = findings.where_time_goes(workers)
        names = [f"worker {rank}" for rank in range(len(shown))]
        svg = bars.step_parts(f"{key}-parts", title, shown, names)
        caption = "The thin bar beneath is communication hidden behind computing: it adds nothing to the step."
        hides = any(boxes.get("hidden_comm_ms") for boxes in shown)
        drawn.append(Picture(title=title, svg=svg, caption=caption if hides else ""))
        tables.append(details.box_table(shown, names))
    points = figures.step_times(run)
    if len(points) > 1:
        typical, slowest = timelines.marked_steps(run)
        marks = [(step, word) for step, word in ((typical, ""), (slowest, "slowest")) if step is not None]
        title = findings.steadiness(points)
        y = "ms of a step, its slowest worker" if run.steps else "ms of a step, worker 0"
        kept = dict(figures.thin(points)) | {x: y for x, y in points if x in dict(marks)}
        svg = curves.steps(f"{key}-steps", title, sorted(kept.items()), marks, y)
        drawn.append(Picture(title=title, svg=svg))
    if not drawn:
        return None
    note = findings.hidden(workers[0])
    return Section(title="Where a step's time goes", notes=[note] if note else [], pictures=drawn, tables=tables)


def _timelines(run: Run, key: str) -> Section | None:
    typical, slowest = timelines.marked_steps(run)
    drawn = []
    for step, word in ((typical, "typical"), (slowest, "slow")):
        tracks = timelines.timeline(run, step) if step is not None else []
        if step is None or not tracks:
            continue
        if word == "typical":
            title = findings.typical_step(step, tracks)
        else:
            title = findings.slow_step(step, tracks, timelines.slower(run, step))
        wide, narrow = (
            bars.timeline(f"{key}-{word}-{int(width)}", title, tracks, width) for width in (svg.WIDE, svg.WIDTH)
        )
        drawn.append(Picture(title=title, svg=wide, narrow=narrow))
    if not drawn:
        return None
    names = (*figures.COMPUTE, "blocked", *LANES)
    key_row = Table(head=[], rows=[[Cell(name, chip=name) for name in names]], words=True)
    return Section(title="Step by step", pictures=drawn, tables=[key_row])


def _traffic(run: Run, key: str) -> Section | None:
    by_lane = figures.bytes_by_lane(run)
    if not by_lane:
        return None
    most = max(value for both in by_lane.values() for value in both)
    size, unit = next(((s, u) for s, u in ((1e6, "MB"), (1e3, "kB")) if most >= s), (1.0, "bytes"))
    title = findings.traffic(by_lane)
    svg = bars.lanes(f"{key}-lanes", title, by_lane, size, unit)
    return Section(title="What is sent", pictures=[Picture(title=title, svg=svg)])


def _late(run: Run, key: str) -> Section | None:
    waited = figures.late(run)
    if len(waited) < 2:
        return None
    title = findings.who_is_late(waited)
    svg = bars.late(f"{key}-late", title, waited[: details.MOST_WORKERS])
    caption = "Seconds that the others waited for it, all of them together, over the whole run."
    return Section(title="Who is late", pictures=[Picture(title=title, svg=svg, caption=caption)])


def _staleness(run: Run, key: str) -> Section | None:
    workers = figures.staleness(run)
    if not workers:
        return None
    title = findings.how_stale(workers)
    svg = bars.histogram(f"{key}-stale", title, workers)
    return Section(title="How stale gradients were", pictures=[Picture(title=title, svg=svg)])


def _without_plan(run: Run, plan: Record | None) -> list[str]:
    if plan is None or predictions(run, plan) is not None:
        return []
    return [f"The prediction is left out: the plan has none for {heading(run)} and this batch."]


def left_out(run: Run) -> list[str]:
    """What the page does not show of a run, and why."""
    said = [f"{why[:1].upper()}{why[1:]}." for why in run.missing.values()]
    if not figures.clock(run):
        said.append("Curves over time are left out: neither steps.jsonl nor metrics.jsonl says when a step was.")
    if "trace.json" not in run.missing and not any(
        step is not None and timelines.timeline(run, step) for step in timelines.marked_steps(run)
    ):
        said.append("The timeline is left out: trace.json has no events of the steps that it names.")
    return said
