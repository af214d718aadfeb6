"""From a matplotlib figure to an SVG that lives inside a page: its colours are the page's, its text is text.

A colour of the page is given to matplotlib as a hexadecimal stand-in (`ink("backward")`), and the SVG gets the CSS
variable of that name, so that one drawing suits light, dark and paper.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any, cast

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 340.0
"""Units of a picture's width: about as many pixels as a phone has, so that text of 10 units is read there too."""
WIDE = 760.0
"""Of a wide one, where there is room."""
FONT = 10.0

RUNS = 8
"""Colours there are for runs."""
_COLOURS = (
    *("ink", "muted", "line", "surface"),
    *("data", "forward", "backward", "optimizer", "rest"),
    *("exposed", "wait", "transfer", "codec", "hidden", "blocked"),
    *("gradient", "norm", "metric", "sent", "received", "plain", "warn"),
    *(f"run{i}" for i in range(RUNS)),
)
_STAND_IN = {name: f"#fe01{place:02x}" for place, name in enumerate(_COLOURS)}
_NAMED = {colour: name for name, colour in _STAND_IN.items()}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "dtrain",  # the same figure gives the same bytes
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_IN["line"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-4, 6),
    "grid.color": _STAND_IN["line"],
    "grid.linewidth": 0.6,
    "text.color": _STAND_IN["ink"],
    "xtick.color": _STAND_IN["line"],
    "ytick.color": _STAND_IN["line"],
    "xtick.labelcolor": _STAND_IN["muted"],
    "ytick.labelcolor": _STAND_IN["muted"],
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "path.simplify": True,
}


def ink(name: str) -> str:
    """What stands for a colour of the page, for matplotlib."""
    return _STAND_IN[name]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within: figures are drawn in the page's style."""
    with matplotlib.rc_context(cast(Any, _STYLE)):
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of that size in units of an SVG."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def lay_out(drawn: Figure, right: float = 0.0) -> None:
    """Find the places of axes and labels, once; left to `savefig`, everything would be drawn twice for it.

    Args:
        right: units to leave free at the right.
    """
    engine = drawn.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0.0, 0.0, 1.0 - right / (72 * drawn.get_figwidth()), 1.0))
        engine.execute(drawn)
        drawn.set_layout_engine("none")


def embed(drawn: Figure, key: str, label: str) -> Markup:
    """The SVG element of a figure.

    Args:
        key: makes its ids unlike those of the page's other pictures.
        label: what it shows, for those who cannot see it.
    """
    lay_out(drawn)
    out = io.StringIO()
    drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.S)
    head, end, body = text.partition(">")
    box = re.search(r'viewBox="([0-9. -]+)"', head)
    shape = box.group(1) if box else f"0 0 {WIDTH} {WIDTH}"
    body = re.sub(r"#fe01[0-9a-f]{2}", lambda found: f"var(--{_NAMED[found.group()]})", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", body)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|font-family: [^;]*; ", "", body, flags=re.S)  # the page's own
    body = re.sub(r"\n\s*", "\n", body)
    width = shape.split()[2]
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{shape}" width="{width}" role="img" '
        f'aria-label="{escape(label)}"'
    )
    return Markup(opening + end + body)  # noqa: S704  matplotlib escapes what it writes, and the label is escaped
