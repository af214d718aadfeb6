"""A run as it happens, in the terminal: loss, speed, where a step's time goes, who is late, and what time is left.

Needs the extra `dtrain[live]` (rich). Off a terminal there is nothing to draw on: the progress bar is used instead.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from dtrain.errors import UsageError
from dtrain.hooks import Hook, Progress, State

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live as Screen
    from rich.text import Text

_REDRAW_S = 0.2
_KEPT = 400
_SPARKS = "▁▂▃▄▅▆▇█"
_WIDE = 72
_BOXES = {
    **{"data": "#8ab9d6", "forward": "#5fa8d6", "backward": "#2f86c1", "optimizer": "#bcdff7"},
    **{"wait": "#d55e00", "transfer": "#eba211", "codec": "#a8741a", "exposed_comm": "#d55e00", "rest": "#7d868d"},
}
"""The parts of a step, in the order of its bar; blues compute, oranges communicate, as in a report."""


@dataclass(kw_only=True)
class Seen:
    """What has been seen of a run so far."""

    label: str
    steps: int | None = None
    """Optimizer steps in all, where that is known."""
    step: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    metrics: dict[str, float] = field(default_factory=dict)
    record: dict[str, float] = field(default_factory=dict)
    """The latest."""
    samples_per_s: float = math.nan
    """Since the record before."""
    step_s: float = math.nan
    """Seconds of a step, with all that is between steps, since the view began."""
    waits: bool = False
    """Whether workers wait for each other, as far as is known."""
    late: tuple[int, float, int] | None = None
    """The worker that cost the others most: its rank, the seconds, and in how many steps it came last."""


class Live(Hook):
    """The view, on worker 0."""

    def __init__(self, label: str, *, stream: TextIO | None = None) -> None:
        """
        Args:
            stream: a terminal; None: stderr.

        Raises:
            UsageError: rich is not installed.
        """
        check_rich()
        self._stream = stream
        self._seen = Seen(label=label)
        self._screen: Screen | None = None
        self._start_s = self._record_s = self._drawn_s = 0.0
        self._first_step = self._samples = 0

    def on_start(self, state: State) -> None:
        if not state.first:
            return
        self._began(state)
        if self._screen is None:
            from rich.console import Console
            from rich.live import Live as Screen

            console = Console(file=self._stream or sys.stderr)
            self._screen = Screen(console=console, auto_refresh=False)
            self._screen.start()
        self._draw()

    def on_step(self, state: State) -> None:
        if self._screen is None:
            return
        now_s = time.perf_counter()
        if state.record is not None:
            see(self._seen, state, now_s - self._record_s, state.samples - self._samples)
            self._record_s, self._samples = now_s, state.samples
        self._seen.steps, self._seen.step = state.steps, state.step
        self._seen.step_s = (now_s - self._start_s) / max(1, state.step - self._first_step)
        if now_s - self._drawn_s >= _REDRAW_S:
            self._draw()

    def on_epoch(self, state: State) -> None:
        self._seen.metrics = dict(state.metrics)

    def on_end(self, state: State) -> None:
        self.on_epoch(state)
        self._stop()

    def on_stop(self, state: State) -> None:
        self._stop()

    def on_rewind(self, state: State) -> None:
        self._began(state)

    def _began(self, state: State) -> None:
        self._seen.steps, self._seen.step = state.steps, state.step
        self._samples, self._first_step = state.samples, state.step
        self._start_s = self._record_s = time.perf_counter()

    def _draw(self) -> None:
        if self._screen is not None:
            self._drawn_s = time.perf_counter()
            self._screen.update(panel(self._seen, self._screen.console.width), refresh=True)

    def _stop(self) -> None:
        if self._screen is not None:
            self._draw()
            self._screen.stop()
            self._screen = None


def view(label: str, *, live: bool, progress: bool, stream: TextIO | None = None) -> list[Hook]:
    """What shows a run: the live view where it is asked for on a terminal, else the progress bar, if any."""
    if live and (stream or sys.stderr).isatty():
        return [Live(label, stream=stream)]
    return [Progress(label, stream=stream)] if progress else []


def check_rich() -> None:
    """Refuse what needs rich without it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise UsageError("live is True, and rich is not installed: pip install 'dtrain[live]'") from error


def see(seen: Seen, state: State, seconds: float, samples: int) -> None:
    """Take in a record.

    Args:
        seconds, samples: since the record before.
    """
    seen.record = dict(state.record or {})
    if math.isfinite(state.loss):
        seen.losses.append(state.loss)
    seen.samples_per_s = samples / seconds if seconds > 0 else math.nan
    seen.waits = bool(state.late)
    worst = max(range(len(state.late)), key=lambda rank: state.late[rank].cost_s, default=None)
    if worst is not None and state.late[worst].cost_s > 0:
        seen.late = (worst, state.late[worst].cost_s, state.late[worst].steps)


def sparkline(values: Sequence[float], width: int) -> str:
    """So many characters, as high as the means of as many stretches of the values."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def shares(record: dict[str, float], width: int) -> list[tuple[str, int]]:
    """(box, characters) of the bar of a step: whole characters in proportion, `width` in all."""
    split = any(f"{name}_ms" in record for name in ("wait", "transfer"))
    left_out = ("exposed_comm",) if split else ("wait", "transfer", "codec")
    parts = [(name, record.get(f"{name}_ms", 0.0)) for name in _BOXES if name not in left_out]
    whole = sum(ms for _, ms in parts)
    if whole <= 0:
        return []
    found, done_ms, drawn = [], 0.0, 0
    for name, ms in parts:
        done_ms += ms
        until = round(done_ms / whole * width)
        if until > drawn:
            found.append((name, until - drawn))
        drawn = until
    return found


def remaining(seen: Seen) -> str:
    """The time that the rest will take, as h:mm:ss; nothing where that is not known."""
    if seen.steps is None or math.isnan(seen.step_s) or seen.step >= seen.steps:
        return ""
    left_s = math.ceil((seen.steps - seen.step) * seen.step_s)
    minutes, seconds = divmod(left_s, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def panel(seen: Seen, width: int) -> Group:
    """The view, in at most so many columns."""
    from rich.console import Group

    width = max(20, min(_WIDE, width))
    lines = [_heading(seen, width), _learning(seen, width), _speed(seen), *_step(seen, width), *_late(seen)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines)


def _line(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _heading(seen: Seen, width: int) -> Text:
    of = f"/{seen.steps}" if seen.steps is not None else ""
    part = f"  {100 * seen.step / seen.steps:.0f} %" if seen.steps else ""
    left = remaining(seen)
    right = f"step {seen.step}{of}{part}" + (f"  {left} left" if left else "")
    return _line((seen.label, "bold"), (right.rjust(max(len(right) + 2, width - len(seen.label))), ""))


def _learning(seen: Seen, width: int) -> Text:
    scores = "".join(f"  {name} {value:.4f}" for name, value in seen.metrics.items() if name != "loss")
    loss = f"{seen.losses[-1]:.4f}" if seen.losses else "-"
    room = max(8, width - 18 - len(scores))
    return _line(("loss     ", "dim"), (f"{loss} ", ""), (sparkline(list(seen.losses), room), "#5fa8d6"), (scores, ""))


def _speed(seen: Seen) -> Text:
    record = seen.record
    step_ms, exposed_ms = record.get("step_ms", math.nan), record.get("exposed_comm_ms", 0.0)
    compute_ms = sum(record.get(f"{name}_ms", 0.0) for name in ("forward", "backward", "optimizer"))
    parts = [("speed    ", "dim"), (_number(seen.samples_per_s, "samples/s", 0), "bold")]
    parts.append((f"   step {_number(step_ms, 'ms', 2)}", ""))
    if exposed_ms > 0 and compute_ms > 0:
        parts.append((f"   ratio {compute_ms / exposed_ms:.1f}", ""))
    sent = record.get("bytes_sent", 0.0) / step_ms / 1e3 if step_ms > 0 else math.nan  # bytes/ms to MB/s
    parts.append((f"   sent {_number(sent, 'MB/s', 1)}", ""))
    return _line(*parts)


def _number(value: float, unit: str, places: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{places}f} {unit}"


def _step(seen: Seen, width: int) -> list[Text]:
    """The bar of the latest step, and what its colours are."""
    found = shares(seen.record, width - 9)
    bar = _line(("step     ", "dim"), *(("█" * count, _BOXES[name]) for name, count in found))
    key = _line(("         ", ""), *((f"{_short(name)} ", _BOXES[name]) for name, _ in found))
    return [bar, key] if found else []


def _short(name: str) -> str:
    return "blocked" if name == "exposed_comm" else name


def _late(seen: Seen) -> list[Text]:
    if not seen.waits:
        return []
    if seen.late is None:
        return [_line(("late     ", "dim"), ("nobody", ""))]
    rank, cost_s, steps = seen.late
    said = f" in {steps} steps, cost the others {cost_s:.2f} s"
    return [_line(("late     ", "dim"), (f"worker {rank}", "bold"), (said, ""))]
