"""Pictures of what scripts measured, from the rows of their records: for `--picture FILE`, and for the page of all
results (`page.py`).

    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    pictures.save("meter", rows, arguments.picture)

All are as wide as a phone and have text that is read there. Drawn for the page, colours are the page's, in the light
and in the dark; in a file they are those of the light page. To import this module brings no matplotlib: workers of a
benchmark import their script, and should not grow by it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

Ink = Callable[[str], str]
"""The colour of that name: `ink`, `muted`, `line`, `surface`, `rest`, `run0`, `run1`, ..."""

HELP = "draw the figures, .png or .svg; needs matplotlib"
SERIES = ("run0", "run1", "run2", "run4")
MARKERS = ("o", "s", "^", "D")
_WRAP = 21
"""Letters of a label in a line."""
_TEXT = 9.5


@dataclass(frozen=True)
class Kind:
    """What is drawn for a script."""

    title: str
    draw: Callable[[Sequence[Row], Ink], Figure]
    caption: str = ""


def target(text: str) -> Path:
    """A file for a picture, as a type of argparse: says at once what would fail minutes later."""
    file = Path(text)
    if file.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: give a file that ends with .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("pictures need matplotlib: pip install 'dtrain[report]'")
    return file


def save(kind: str, rows: Sequence[Row], file: Path | None) -> None:
    """The picture of a script's rows, in a file; nothing without one."""
    save_drawn(KINDS[kind].draw, rows, file)


def save_drawn(draw: Callable[[Sequence[Row], Ink], Figure], rows: Sequence[Row], file: Path | None) -> None:
    """What `draw` makes of rows, in a file; nothing without one."""
    if file is None:
        return
    with _on_paper() as ink:
        drawn = draw(rows, ink)
        drawn.savefig(file, dpi=200, facecolor=ink("surface"), bbox_inches="tight", pad_inches=0.1)


def embed(kind: str, rows: Sequence[Row], key: str) -> Markup:
    """The same as an element of a page with the style of `dtrain report`; `key` makes its ids its own."""
    from dtrain.measure.report import svg

    with svg.style():
        return svg.embed(KINDS[kind].draw(rows, svg.ink), key, KINDS[kind].title)


@contextmanager
def _on_paper() -> Iterator[Ink]:
    """The page's style with its light colours, where there is no page to define them."""
    import matplotlib

    from dtrain.measure.report import svg

    matplotlib.use("Agg")
    sheet = Path(svg.__file__).with_name("templates") / "style.css"
    light = sheet.read_text(encoding="utf-8").partition("@media")[0]
    colours = {name: colour for name, colour in re.findall(r"--(\w+): (#\w{6})", light) if name != "page"}
    stand_in = {svg.ink(name): colour for name, colour in colours.items()}
    with svg.style():
        for setting, value in list(matplotlib.rcParams.items()):
            if isinstance(value, str) and value in stand_in:
                matplotlib.rcParams[setting] = stand_in[value]
        yield colours.__getitem__


# -- parts of pictures ------------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    from dtrain.measure.report import svg

    return svg.figure(height)


def _label(text: str) -> str:
    """In two lines where it is long."""
    lines = textwrap.wrap(text, _WRAP)
    return "\n".join(lines if len(lines) < 3 else [lines[0], textwrap.shorten(" ".join(lines[1:]), _WRAP)])


def _lying(axes: Axes, ink: Ink, labels: Sequence[str], unit: str, highest: float) -> None:
    """Axes whose rows have names, the first on top, from zero on."""
    from dtrain.measure.report.axes import lying

    axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
    lying(axes, unit)
    axes.tick_params(axis="y", labelcolor=ink("ink"))
    axes.set_xlim(0, 1.18 * highest)
    axes.set_ylim(len(labels) - 0.45, -0.55)


def _upright(axes: Axes, at: float, ink: Ink) -> None:
    """A line to compare with."""
    axes.axvline(at, color=ink("muted"), linewidth=1.2, zorder=0.9)


def _beside(axes: Axes, ink: Ink, text: str, x: float, y: float) -> None:
    """Words at the end of a bar, over whatever line runs there."""
    box = {"facecolor": ink("surface"), "linewidth": 0, "pad": 1.0}
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=_TEXT, bbox=box)


def _key(drawn: Figure, axes: Axes, ink: Ink) -> None:
    """What the colours are, above the picture."""
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels) if sum(map(len, labels)) < 36 else 2,
        frameon=False,
        fontsize=_TEXT,
        labelcolor=ink("muted"),
        handlelength=1.0,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0.0,
        borderaxespad=0.6,
    )


def _dots(rows: Sequence[tuple[str, str, float]], ink: Ink, unit: str) -> Figure:
    """(row, series, value) each, with a line at 1."""
    labels, series = (list(dict.fromkeys(column)) for column in list(zip(*rows, strict=True))[:2])
    drawn = _figure(66 + 24 * len(labels))
    axes = drawn.subplots()
    for place, name in enumerate(series):
        own = [(value, labels.index(label)) for label, other, value in rows if other == name]
        axes.plot(
            *zip(*own, strict=True),
            MARKERS[place % len(MARKERS)],
            color=ink(SERIES[place % len(SERIES)]),
            markersize=5,
            alpha=0.8,
            markeredgewidth=0,
            label=name,
        )
    _upright(axes, 1.0, ink)
    _lying(axes, ink, labels, unit, max(1.0, *(value for *_, value in rows)) * 0.93)
    if len(series) > 1:
        _key(drawn, axes, ink)
    return drawn


# -- pictures ---------------------------------------------------------------------------------------------------------


def ratios(rows: Sequence[Row], ink: Ink) -> Figure:
    """A bar a ratio, with the interval of its median; rows of one case beside each other."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    one = len({row["contender"] for row in rows}) == 1
    series = list(dict.fromkeys(f"against {row['baseline']}" if one else row["contender"] for row in rows))
    tall = 0.8 / len(series)
    other = rows[0]["baseline"] if len({row["baseline"] for row in rows}) == 1 else "the other"
    what = textwrap.fill(f"time of {rows[0]['contender'] if one else 'each'} / of {other}", 40)
    around = 42 + 12 * what.count("\n") + 14 * math.ceil(len(series) / 2)
    drawn = _figure(around + max(26.0, 17.0 * len(series) + 5) * len(cases))
    axes = drawn.subplots()
    for place, name in enumerate(series):
        own = [row for row in rows if name in (f"against {row['baseline']}", row["contender"])]
        at = [cases.index(row["case"]) + (place - (len(series) - 1) / 2) * tall for row in own]
        colour = ink(("run5", "rest", "hidden", *SERIES)[place % 7])
        axes.barh(at, [row["ratio_median"] for row in own], 0.88 * tall, color=colour, label=name)
        for y, row in zip(at, own, strict=True):
            axes.plot(_range(row), [y, y], color=ink("ink"), linewidth=1.1)
            _beside(axes, ink, f"{row['ratio_median']:.2f}", max(_range(row)[1], row["ratio_median"]), y)
            if (goal := row.get("goal")) is not None:
                axes.plot([goal, goal], [y - tall / 2, y + tall / 2], color=ink("warn"), linewidth=2)
    _upright(axes, 1.0, ink)
    ends = [max(_range(row)[1], row["ratio_median"]) for row in rows]
    _lying(axes, ink, cases, what, max(1.0, *ends))
    if len(series) > 1:
        _key(drawn, axes, ink)
    return drawn


def _range(row: Row) -> tuple[float, float]:
    """The interval of the median; in records before there was one, all rounds."""
    return row.get("ratio_low", row["ratio_min"]), row.get("ratio_high", row["ratio_max"])


def kinds(rows: Sequence[Row], ink: Ink) -> Figure:
    """Ratios of many cases: a dot a case."""
    return _dots([(row["contender"], "a shape", row["ratio_median"]) for row in rows], ink, "time / nn.BatchNorm2d's")


def sums(rows: Sequence[Row], ink: Ink) -> Figure:
    """Times to sum a gradient, or of a step, a bar a contender; a panel for each number of workers, size and rate. A
    mark where the bound is, where there is one."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        more = [row["rate"]] if "rate" in row else []
        more += [f"computing {_digits(row['compute_ms'])} ms"] if "compute_ms" in row else []
        name = ", ".join([f"{row['workers']} workers", _size(row["bytes"]), *more])
        panels.setdefault(name, []).append(row)
    heights = [44 + 19 * len(own) for own in panels.values()]
    drawn = _figure(14 + sum(heights))
    for (axes,), (name, own) in zip(
        drawn.subplots(len(panels), 1, height_ratios=heights, squeeze=False), panels.items(), strict=True
    ):
        for place, row in enumerate(own):
            axes.barh(
                place, row["median_ms"], 0.68, color=ink("rest" if row["contender"] in ("gloo", "DDP") else "run5")
            )
            bound = f", {row['of_bound']:.0%} of bound" if "of_bound" in row else ""
            _beside(axes, ink, f"{_digits(row['median_ms'])}{bound}", row["median_ms"], place)
            if "bound_ms" in row:
                axes.plot([row["bound_ms"]] * 2, [place - 0.4, place + 0.4], color=ink("warn"), linewidth=2)
        room = 1.5 if "of_bound" in own[0] else 1.05
        _lying(axes, ink, [row["contender"] for row in own], "ms, median", room * max(row["median_ms"] for row in own))
        axes.set_title(name, loc="left", color=ink("muted"))
    return drawn


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.3g} kB"


def waits(rows: Sequence[Row], ink: Ink) -> Figure:
    """A bar a way, the median, and a dot a run; runs that never came so far have none."""
    drawn = _figure(50 + 27 * len(rows))
    axes = drawn.subplots()
    came = [[second for second in row["seconds"] if math.isfinite(second)] for row in rows]
    base = next((row["median_s"] for row in rows if row["way"] == "synchronous"), math.nan)
    highest = max(itertools.chain(*came), default=1.0)
    for place, (row, seconds) in enumerate(zip(rows, came, strict=True)):
        if not math.isfinite(row["median_s"]):
            _beside(
                axes, ink, f"not reached by {len(row['seconds']) - len(seconds)} of {len(row['seconds'])}", 0.0, place
            )
            continue
        axes.barh(place, row["median_s"], 0.62, color=ink("rest" if row["way"] == "synchronous" else "run5"))
        if len(seconds) > 1:
            axes.plot(seconds, [place] * len(seconds), "o", color=ink("ink"), markersize=3)
        ratio = f", × {row['median_s'] / base:.2f}" if math.isfinite(base) and row["way"] != "synchronous" else ""
        _beside(axes, ink, f"{row['median_s']:.1f} s{ratio}", max(seconds), place)
    _lying(axes, ink, [row["way"] for row in rows], "seconds to the loss (×: synchronous)", 1.25 * highest)
    return drawn


@dataclass(frozen=True)
class Point:
    """What was measured and what was predicted."""

    series: str
    measured: float
    predicted: float
    low: float | None = None
    high: float | None = None


def _against(axes: Axes, points: Sequence[Point], ink: Ink, *, near: float | None = None) -> None:
    """Predicted over measured, with the diagonal on which both are the same."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    from dtrain.measure.report.axes import tick

    values = [v for p in points for v in (p.measured, p.predicted, p.low, p.high) if v is not None]
    wide = max(values) > 6 * min(values)
    low, high = (min(values) / 1.3, max(values) * 1.3) if wide else (0.0, 1.08 * max(values))
    if not wide and min(values) > 0.5 * max(values):
        low = min(values) - 0.3 * (max(values) - min(values))
    ends = [low, high]
    if near:
        edges = [[end * (1 - near) for end in ends], [end * (1 + near) for end in ends]]
        axes.fill_between(ends, *edges, color=ink("line"), alpha=0.6, linewidth=0, zorder=0.5)
    axes.plot(ends, ends, color=ink("muted"), linewidth=1.2, zorder=0.9)
    for place, name in enumerate(dict.fromkeys(point.series for point in points)):
        own = [point for point in points if point.series == name]
        colour = ink(SERIES[place % len(SERIES)])
        for point in own:
            if point.low is not None and point.high is not None:
                axes.plot([point.measured] * 2, [point.low, point.high], "_-", color=colour, linewidth=1.2)
        axes.plot(
            [point.measured for point in own],
            [point.predicted for point in own],
            MARKERS[place % len(MARKERS)],
            color=colour,
            markersize=4,
            markeredgewidth=0,
            label=name,
        )
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if wide:
            getattr(axes, f"set_{name}scale")("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(tick))
    axes.grid(True, axis="x")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)


def foreseen(rows: Sequence[Row], ink: Ink) -> Figure:
    """Step times: predicted, with the interval, over measured."""
    points = [
        Point(
            "parameter servers" if row["backend"] == "ps" else "all-reduce",
            *(row[f"{name}_ms"] for name in ("measured", "predicted", "low", "high")),
        )
        for row in rows
    ]
    drawn = _figure(300)
    axes = drawn.subplots()
    _against(axes, points, ink)
    axes.set_xlabel("measured, ms a step")
    axes.set_ylabel("predicted, ms a step")
    _key(drawn, axes, ink)
    return drawn


def scaling(rows: Sequence[Row], ink: Ink) -> Figure:
    """Published figures: predicted over published; rates, and below them efficiencies."""
    rates = [row for row in rows if row["unit"] == "images/s"]
    parts = [part for part in (rates, [row for row in rows if row not in rates]) if part]
    heights = [280 if part is rates else 190 for part in parts]
    drawn = _figure(20 + sum(heights))
    panels = drawn.subplots(len(parts), 1, height_ratios=heights, squeeze=False)
    for (axes,), part in zip(panels, parts, strict=True):
        unit = "images/s" if part is rates else "efficiency"
        points = [Point(_setting(row["what"]), row["published"], row["predicted"]) for row in part]
        _against(axes, points, ink, near=0.10)
        axes.set_xlabel(f"published, {unit}")
        axes.set_ylabel(f"predicted, {unit}")
        axes.legend(frameon=False, fontsize=_TEXT, labelcolor=ink("muted"), loc="upper left", handletextpad=0.2)
    return drawn


def _setting(what: str) -> str:
    """GPU and system of a published figure, from its name."""
    gpu = re.search(r"[KPV]\d+0", what)
    system = next((name for name in ("Horovod", "parameter servers", "all-reduce") if name in what), "")
    return ", ".join([*([gpu.group()] if gpu else []), system])


def footprints(rows: Sequence[Row], ink: Ink) -> Figure:
    """Memory that a step took over what was predicted."""
    series = {"malloc as it is": "ratio", "malloc that hands back": "ratio_handed_back"}
    dots = [(row["case"], name, row[key]) for row in rows for name, key in series.items()]
    return _dots(dots, ink, "memory / prediction")


def carried(rows: Sequence[Row], ink: Ink) -> Figure:
    """What emulated links carried of their rate."""
    return _dots([(row["case"], row["rate"], row["of_rate"]) for row in rows], ink, "bytes that arrived / the rate")


KINDS = {
    "step": Kind(
        "Time of a step over the other's; below 1 it is shorter",
        ratios,
        "Bar: median of the rounds; thin line: where it lies 95 times in 100, in older records all rounds.",
    ),
    "meter": Kind(
        "Time of a step with the meter over one without",
        ratios,
        "Bar: median of the rounds; thin line: where it lies 95 times in 100, in older records all rounds; "
        "orange: the largest aimed at.",
    ),
    "norm": Kind("Forward and backward over plain batch norm's, a dot a shape", kinds),
    "sync": Kind("Time to sum a gradient on one host", sums, "Grey: gloo, the baseline."),
    "links_step": Kind(
        "Time of a training step over links", sums, "Orange: the longer of computing and sending; grey: DDP."
    ),
    "links": Kind("Time to sum a gradient over links", sums, "Orange: the bound of the bytes; grey: gloo."),
    "stragglers": Kind("Time to a fixed loss with one slow worker", waits, "Bar: median of the runs; dots: each run."),
    "predict": Kind(
        "Step times that were foreseen, and those that came",
        foreseen,
        "On the diagonal both are the same; a line from a dot is the predicted interval.",
    ),
    "published": Kind(
        "Scaling that others published, and what the model says",
        scaling,
        "On the diagonal both are the same; grey: within 10 % of it.",
    ),
    "memory": Kind("Memory that a step took over what was predicted", footprints),
    "hosts": Kind("What emulated links carried of their rate", carried),
}
"""By script."""
