"""What the axes of all pictures have in common."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dtrain.measure.report import words
from dtrain.measure.report.svg import ink

_ROUND = [1, 2, 2.5, 5, 10]


def standing(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_title(words.short(y, 48), loc="left", color=ink("muted"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def tick(value: float, _: object) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if abs(value) >= 1e4 else f"{value:g}"


def lying(axes: Axes, unit: str) -> None:
    """Axes of bars that lie: the first on top, a grid to read their length by."""
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)
    axes.margins(x=0.16, y=0.04)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.tick_params(axis="y", labelcolor=ink("ink"))
