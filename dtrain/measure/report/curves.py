"""Pictures of curves and dots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from dtrain.measure.report import words
from dtrain.measure.report.axes import standing, tick
from dtrain.measure.report.figures import Points, RatioPoint, spread
from dtrain.measure.report.svg import FONT, RUNS, embed, figure, ink, lay_out, style

_GAP = 12.0
_MOST_LABELS = 12
"""Lines that get a label of their own."""
_MOST_TICKS = 8
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """A curve and what stands at its end."""

    label: str
    points: Points
    colour: str
    dash: str = "-"
    dots: bool = False
    stairs: bool = False
    """Whether a value holds until the next one."""


def run_line(place: int, label: str, points: Points) -> Line:
    """The curve of a run among others: colours come again after so many, with other dashes."""
    return Line(label, points, f"run{place % RUNS}", _DASHES[place // RUNS % len(_DASHES)])


def curves(
    key: str,
    about: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    percent: bool = False,
    floor: float | None = None,
    doublings: bool = False,
) -> Markup:
    """Curves over each other, each labelled at its end.

    Args:
        x, y: what is on the axes, with units.
        percent: values are parts of one.
        floor: lowest value of the y axis.
        doublings: whether the y axis is logarithmic; values are above 0 then.
    """
    with style():
        drawn = figure(190)
        axes = drawn.subplots()
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            marker, style_ = "o" if line.dots else "", "steps-post" if line.stairs else "default"
            axes.plot(xs, ys, line.dash, color=ink(line.colour), marker=marker, markersize=3, drawstyle=style_)
        standing(axes, x, y)
        axes.margins(x=0.01)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        if doublings:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_locator(LogLocator(2, numticks=6))
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:.4g}" if value < 1 else f"{value:.0f}")
            )
            axes.yaxis.set_minor_locator(NullLocator())
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.percent(value)))
        if len(lines) > 1:
            _label_ends(drawn, axes, lines)
        return embed(drawn, key, about)


def _label_ends(drawn: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    """The name of each line at its end, in its colour, moved apart."""
    shown = lines[:_MOST_LABELS]
    longest = max(len(line.label) for line in shown)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    lay_out(drawn, right=8 + 0.62 * FONT * longest)
    ends = [line.points[-1] for line in shown]
    places = [float(axes.transData.transform(end)[1]) for end in ends]
    box = axes.get_window_extent()
    scale = drawn.dpi / 72
    moved = spread(places, _GAP * scale, box.y0 + 2, box.y1 - 2)
    for line, (_, end), was, now in zip(shown, ends, places, moved, strict=True):
        axes.annotate(
            line.label,
            (right, end),
            xytext=(4, (now - was) / scale),
            textcoords="offset points",
            va="center",
            color=ink(line.colour),
            annotation_clip=False,
        )


def steps(key: str, about: str, points: Points, marked: Sequence[tuple[int, str]], y: str) -> Markup:
    """How long each step took, some of them marked with a word."""
    with style():
        drawn = figure(190)
        axes = drawn.subplots()
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=ink("plain"), linewidth=1)
        took = dict(points)
        for step, word in marked:
            if step in took:
                axes.plot([step], [took[step]], "o", color=ink("warn"), markersize=4)
                axes.annotate(
                    word, (step, took[step]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9.5
                )
        standing(axes, "step", y)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        return embed(drawn, key, about)


def ratios(key: str, about: str, points: Sequence[RatioPoint], labels: Sequence[str], by: str) -> Markup:
    """The ratio of each run against its batch size or its workers; equal in the other are joined."""
    with style():
        drawn = figure(190)
        axes = drawn.subplots()
        groups: dict[float, list[RatioPoint]] = {}
        for point in points:
            groups.setdefault(point.workers if by == "global_batch" else point.global_batch, []).append(point)
        for group in groups.values():
            group = sorted(group, key=lambda point: _place(point, by))
            axes.plot([_place(p, by) for p in group], [p.ratio for p in group], color=ink("line"), linewidth=1)
        for point in points:
            axes.plot([_place(point, by)], [point.ratio], "o", color=ink(f"run{point.run % RUNS}"), markersize=5)
        standing(axes, "samples in a global batch" if by == "global_batch" else "workers", "ratio")
        axes.margins(x=0.1, y=0.18)
        axes.set_ylim(bottom=0)
        places = sorted({_place(point, by) for point in points})
        if places[-1] >= 4 * places[0] > 0:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
        if len(places) <= _MOST_TICKS:
            axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        lay_out(drawn)
        for place in places:
            _label_dots(axes, place, [point for point in points if _place(point, by) == place], labels)
        return embed(drawn, key, about)


def _label_dots(axes: Axes, place: float, points: Sequence[RatioPoint], labels: Sequence[str]) -> None:
    """The names of runs beside their dots, moved apart where dots lie above each other."""
    shown = points[:_MOST_LABELS]
    scale = axes.figure.dpi / 72
    box = axes.get_window_extent()
    were = [float(axes.transData.transform((place, point.ratio))[1]) for point in shown]
    moved = spread(were, _GAP * scale, box.y0, box.y1)
    for point, was, now in zip(shown, were, moved, strict=True):
        axes.annotate(
            labels[point.run],
            (place, point.ratio),
            xytext=(6, (now - was) / scale),
            textcoords="offset points",
            va="center",
            color=ink(f"run{point.run % RUNS}"),
        )


def _place(point: RatioPoint, by: str) -> float:
    return point.global_batch if by == "global_batch" else point.workers
