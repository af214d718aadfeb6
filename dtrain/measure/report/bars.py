"""Pictures of bars: what a step is made of, timelines, bytes, lateness, staleness, memory, predictions."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dtrain.comm.base import LANES
from dtrain.measure.report import words
from dtrain.measure.report.axes import lying, standing
from dtrain.measure.report.figures import COMPUTE, Late, Part, parts
from dtrain.measure.report.svg import embed, figure, ink, style
from dtrain.measure.report.timelines import Span, Track

_ROW = 22.0


def step_parts(key: str, about: str, workers: Sequence[dict[str, float]], names: Sequence[str]) -> Markup:
    """A bar a worker: the parts of its step one after the other, and beneath it what communication was hidden."""
    with style():
        drawn = figure(46 + 1.5 * _ROW * len(workers))
        axes = drawn.subplots()
        for place, boxes in enumerate(workers):
            _stack(axes, place, parts(boxes))
            axes.barh(place + 0.46, boxes.get("hidden_comm_ms", 0.0), 0.18, color=ink("hidden"))
        axes.set_yticks(range(len(workers)), [words.short(name) for name in names])
        lying(axes, "ms")
        return embed(drawn, key, about)


def _stack(axes: Axes, place: float, found: Sequence[Part]) -> None:
    left = 0.0
    for part in found:
        axes.barh(place, part.ms, 0.62, left=left, color=ink(part.box), edgecolor=ink("surface"), linewidth=0.6)
        left += part.ms
    axes.annotate(words.ms(left), (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)


def bars(key: str, about: str, rows: Sequence[tuple[str, float, str, str]], unit: str) -> Markup:
    """Bars with their figures: (label, value, text, colour) each."""
    with style():
        drawn = figure(44 + _ROW * max(2, len(rows)))
        axes = drawn.subplots()
        for place, (_, value, text, colour) in enumerate(rows):
            axes.barh(place, value, 0.66, color=ink(colour))
            axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
        axes.set_yticks(range(len(rows)), [words.short(label) for label, *_ in rows])
        lying(axes, unit)
        axes.margins(x=0.3)
        axes.set_xlim(0, 1.35 * max([value for _, value, *_ in rows if value > 0], default=1.0))
        return embed(drawn, key, about)


def late(key: str, about: str, workers: Sequence[Late]) -> Markup:
    """Seconds that each worker cost the others; the worst stands out."""
    worst = max(workers, key=lambda one: one.cost_s).worker
    rows = [
        (
            f"worker {one.worker}",
            one.cost_s,
            f"{words.seconds(one.cost_s)}, last in {words.plural(one.steps, 'step')}",
            "wait" if one.worker == worst else "rest",
        )
        for one in workers
    ]
    return bars(key, about, rows, "seconds that it cost the others")


def lanes(key: str, about: str, by_lane: dict[str, tuple[float, float]], unit_bytes: float, unit: str) -> Markup:
    """Bytes sent and received a step, by lane."""
    rows = [
        (f"{lane}, {way}", value / unit_bytes, words.nbytes(value), lane)
        for lane in LANES
        if lane in by_lane
        for way, value in zip(("sent", "received"), by_lane[lane], strict=True)
    ]
    return bars(key, about, rows, f"{unit} a step, worker 0")


def timeline(key: str, about: str, tracks: Sequence[Track], width: float) -> Markup:
    """The rows of each worker during a step: what it computed, and what travelled meanwhile."""
    heights = [14.0 if track.name == "compute" else 11.0 if not track.row else 5.0 for track in tracks]
    gaps = [7.0 if track.name == "compute" else 0.0 for track in tracks]
    tops = [sum(heights[:place]) + sum(gaps[1 : place + 1]) for place in range(len(tracks))]
    with style():
        drawn = figure(tops[-1] + heights[-1] + 38, width)
        axes = drawn.subplots()
        for track, top, height in zip(tracks, tops, heights, strict=True):
            margin = 0.0 if track.name == "compute" else 0.75
            for colour, spans in _by_colour(track).items():
                axes.broken_barh(
                    spans,
                    (top + margin, height - 2 * margin),
                    facecolor=ink(colour),
                    edgecolor=ink("surface"),
                    linewidth=0.3,
                )
        middles = [(track, top + height / 2) for track, top, height in zip(tracks, tops, heights, strict=True)]
        labelled = [(track, middle) for track, middle in middles if not track.row]
        labels = [t.owner if t.name == "compute" else t.name for t, _ in labelled]
        axes.set_yticks([place for _, place in labelled], labels)
        lying(axes, "ms since the step began")
        axes.set_xlim(0, 1.01 * max(span.start_ms + span.ms for track in tracks for span in track.spans))
        axes.set_ylim(tops[-1] + heights[-1] + 2, -2)
        for label, (track, _) in zip(axes.get_yticklabels(), labelled, strict=True):
            label.set_color(ink("ink" if track.name == "compute" else "muted"))
        return embed(drawn, key, about)


def _by_colour(track: Track) -> dict[str, list[tuple[float, float]]]:
    """Colour -> (start, length) of each span; those of being blocked last, for they lie over the others."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*COMPUTE, "rest", *LANES, "blocked")}
    for span in track.spans:
        found[_colour(track, span)].append((span.start_ms, span.ms))
    return {colour: spans for colour, spans in found.items() if spans}


def _colour(track: Track, span: Span) -> str:
    """A server's spans are `wait, KEY` for gradients that are still to come, and KEY when it adds them."""
    if track.name != "compute":
        return track.name if track.name in LANES else "rest"
    if span.name in COMPUTE:
        return span.name
    if span.name == "blocked" or span.name.startswith("wait"):
        return "blocked"
    lane = span.name.partition("/")[0]
    return lane if lane in LANES else "rest"


def histogram(key: str, about: str, workers: Sequence[dict[int, int]]) -> Markup:
    """How often a gradient was so many steps stale, all workers together."""
    total: dict[int, int] = {}
    for row in workers:
        for stale, count in row.items():
            total[stale] = total.get(stale, 0) + count
    with style():
        drawn = figure(170)
        axes = drawn.subplots()
        axes.bar(list(total), list(total.values()), 0.8, color=ink("plain"))
        standing(axes, "steps behind", "gradients")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return embed(drawn, key, about)


def interval(key: str, about: str, rows: Sequence[tuple[str, float, float, float, float | None]]) -> Markup:
    """Predictions with their intervals against what was measured: (label, low, predicted, high, measured)."""
    with style():
        drawn = figure(56 + 1.3 * _ROW * len(rows))
        axes = drawn.subplots()
        for place, (_, low, predicted, high, measured) in enumerate(rows):
            axes.plot([low, high], [place, place], color=ink("rest"), linewidth=7, solid_capstyle="butt")
            axes.plot([predicted], [place], "|", color=ink("ink"), markersize=11, markeredgewidth=2)
            if measured is not None:
                axes.plot([measured], [place], "o", color=ink("run1"), markersize=6)
        axes.set_yticks(range(len(rows)), [words.short(label) for label, *_ in rows])
        highest = max(max(high, measured or 0.0) for _, _, _, high, measured in rows)
        lying(axes, "ms")
        axes.set_xlim(0, 1.1 * highest)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        return embed(drawn, key, about)
