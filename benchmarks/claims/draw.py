"""Parts of the claims' pictures: slides of one message each, in the colours of the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from claim import Ink, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 560.0, 315.0
"""Of a slide, in units of an SVG: 16 to 9."""
_TITLE = 14.0
_NOTE = 10.0


def slide(ink: Ink, title: str, note: str = "", *, panels: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a message for a title, and below it what was trained; its axes, side by side."""
    from dtrain.measure.report import svg

    drawn = svg.figure(HEIGHT, WIDTH)
    drawn.suptitle(_balanced(title, 58), x=0.015, ha="left", fontsize=_TITLE, fontweight="bold")
    axes = drawn.subplots(1, panels, squeeze=False, **more)[0].tolist()
    if note:
        drawn.supxlabel(textwrap.fill(note, 112), x=0.015, ha="left", fontsize=_NOTE - 1, color=ink("muted"))
    return drawn, axes


def _balanced(text: str, width: int) -> str:
    """In lines of about one length, none longer than that."""
    lines = len(textwrap.wrap(text, width))
    while len(textwrap.wrap(text, width - 1)) == lines and width > 20:
        width -= 1
    return textwrap.fill(text, width)


def name(axes: Axes, x: str, y: str) -> None:
    """Names of the axes, with units."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=_NOTE, color=axes.xaxis.label.get_color())


def points(axes: Axes, at: Sequence[float], found: Sequence[Interval], colour: str, label: str = "") -> None:
    """Means with their intervals, joined; the label stands at the last one."""
    halves = [0.0 if i.half != i.half else i.half for i in found]
    means = [i.mean for i in found]
    axes.errorbar(at, means, yerr=halves, color=colour, marker="o", markersize=5, capsize=3, linewidth=1.6)
    if label:
        beside(axes, label, at[-1], means[-1], colour)


def dots(
    axes: Axes, ink: Ink, labels: Sequence[str], found: Sequence[Interval], colours: Sequence[str], spec: str
) -> None:
    """A row a case, the first on top: a dot for the mean, a line for the interval, and the number."""
    for place, (one, colour) in enumerate(zip(found, colours, strict=True)):
        half = 0.0 if one.half != one.half else one.half
        axes.errorbar([one.mean], [place], xerr=[half], fmt="o", color=colour, markersize=7, capsize=4, linewidth=2)
        beside(axes, format(one, spec), one.mean + half, place, ink("ink"))
    axes.set_yticks(range(len(labels)), list(labels), color=ink("ink"))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.22)


def paper(axes: Axes, at: Sequence[float], found: Sequence[float], colour: str, label: str = "") -> None:
    """The paper's values, faint."""
    axes.plot(at, found, color=colour, alpha=0.35, linewidth=1.2, linestyle="--", zorder=0.8)
    if label:
        beside(axes, label, at[-1], found[-1], colour)


def beside(axes: Axes, text: str, x: float, y: float, colour: str, *, left: bool = False) -> None:
    """Words to the right of a point, or to its left."""
    aside: dict[str, Any] = {"xytext": (-9, 0), "ha": "right"} if left else {"xytext": (7, 0)}
    axes.annotate(text, (x, y), **aside, textcoords="offset points", va="center", color=colour, fontsize=_NOTE)


def powers(axes: Axes, at: Sequence[int]) -> None:
    """A logarithmic axis whose marks are the batches that were measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(at), [str(value) for value in at])
    axes.minorticks_off()


def logarithmic(axes: Axes, which: str = "y") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    from dtrain.measure.report.axes import tick

    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(tick))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
