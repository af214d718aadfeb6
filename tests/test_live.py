"""The live view: what it shows, that it gives the terminal back, and what happens where it cannot be drawn."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain import live
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.hooks import Progress, State
from dtrain.live import Live, Seen, panel, remaining, see, shares, sparkline
from dtrain.measure.ledger import Late

RECORD = {
    **{"loss": 0.5, "lr": 0.1, "step_ms": 20.0, "data_ms": 1.0, "forward_ms": 4.0, "backward_ms": 8.0},
    **{
        "optimizer_ms": 1.0,
        "rest_ms": 1.0,
        "exposed_comm_ms": 5.0,
        "wait_ms": 3.0,
        "transfer_ms": 1.5,
        "codec_ms": 0.5,
    },
    **{"bytes_sent": 200_000.0, "bytes_received": 200_000.0},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(**fields) -> State:
    return State(
        look=lambda: torch.nn.Linear(1, 1),
        comm=Solo(),
        snapshot=dict,
        observe=print,
        resize=print,
        **{"steps": 100, **fields},
    )


def shown(seen: Seen, width: int = 72) -> list[str]:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(panel(seen, width))
    return out.getvalue().splitlines()


def test_the_view_shows_a_run():
    seen = Seen(label="digits ps x2", steps=100, step=25, step_s=0.02)
    for loss in (2.0, 1.5, 1.0, 0.5):
        see(seen, state(record=RECORD, loss=loss, late=[Late(0.1, 2), Late(1.31, 20)]), seconds=0.5, samples=640)
    seen.metrics = {"loss": 0.6, "accuracy": 0.91}
    lines = shown(seen)
    assert lines[0].startswith("digits ps x2 ")
    assert lines[0].endswith("step 25/100  25 %  0:02 left")
    assert "0.5000" in lines[1]
    assert "█▆▃▁" in lines[1]
    assert "accuracy 0.9100" in lines[1]
    assert "1,280 samples/s   step 20.00 ms   ratio 2.6   sent 10.0 MB/s" in lines[2]
    assert lines[3].count("█") == 63
    assert lines[4].split() == ["data", "forward", "backward", "optimizer", "wait", "transfer", "codec", "rest"]
    assert lines[5] == "late     worker 1 in 20 steps, cost the others 1.31 s"


@pytest.mark.parametrize("width", [20, 40, 72, 200])
def test_no_line_is_wider_than_the_terminal(width):
    seen = Seen(label="a long name of a run " * 3, steps=100_000, step=25, step_s=100.0)
    seen.metrics = {f"score{i}": 0.5 for i in range(9)}
    see(seen, state(record=RECORD, loss=1.0, late=[Late(1.0, 1)]), seconds=1.0, samples=10)
    lines = shown(seen, width)
    assert len(lines) == 6
    assert max(map(len, lines)) <= min(width, 72)


def test_nothing_is_known_before_the_first_record():
    lines = shown(Seen(label="x"))
    assert lines[0].split() == ["x", "step", "0"]
    assert "- " in lines[1] + " "
    assert len(lines) == 2 + 1


def test_nobody_is_late_where_none_has_cost_anything():
    seen = Seen(label="x")
    see(seen, state(record=RECORD, loss=1.0, late=[Late(), Late()]), seconds=1.0, samples=1)
    assert shown(seen)[-1] == "late     nobody"


def test_a_loss_that_is_no_number_leaves_the_line_as_it_was():
    seen = Seen(label="x")
    see(seen, state(record=RECORD, loss=1.0), seconds=1.0, samples=1)
    see(seen, state(record=RECORD, loss=float("nan")), seconds=1.0, samples=1)
    assert list(seen.losses) == [1.0]


@given(st.dictionaries(st.sampled_from([f"{n}_ms" for n in live._BOXES]), st.floats(0, 1e4)), st.integers(1, 100))
def test_the_bar_is_as_wide_as_its_place(record, width):
    found = shares(record, width)
    assert sum(count for _, count in found) in ((width,) if found else (0,))
    assert all(count > 0 for _, count in found)


def test_communication_is_one_part_where_it_is_not_split():
    assert shares({"forward_ms": 3.0, "exposed_comm_ms": 1.0}, 8) == [("forward", 6), ("exposed_comm", 2)]
    assert shares({"forward_ms": 3.0, "exposed_comm_ms": 1.0, "wait_ms": 1.0}, 8) == [("forward", 6), ("wait", 2)]


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.integers(0, 60))
def test_a_sparkline_has_a_character_for_each_stretch(values, width):
    assert len(sparkline(values, width)) == min(len(values), width)


def test_a_sparkline_follows_its_values():
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([3.0, 3.0], 10) == "▁▁"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"


@pytest.mark.parametrize(
    ("steps", "step_s", "text"), [(100, 1.0, "1:15"), (8000, 1.0, "2:12:55"), (None, 1.0, ""), (25, 1.0, "")]
)
def test_the_time_that_is_left(steps, step_s, text):
    assert remaining(Seen(label="x", steps=steps, step=25, step_s=step_s)) == text


def run_through(hook: Live) -> None:
    now = state()
    hook.on_start(now)
    for step in range(1, 5):
        now.step, now.samples, now.loss, now.record = step, 64 * step, 1 / step, RECORD if step % 2 == 0 else None
        hook.on_step(now)
    now.metrics = {"accuracy": 0.75}
    hook.on_end(now)


def test_a_terminal_is_drawn_on_and_given_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    run_through(Live("digits solo x1", stream=terminal))
    text = terminal.getvalue()
    assert text.count("digits solo x1") >= 2  # at the start and at the end
    assert "step 4/100" in text
    assert "accuracy 0.7500" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_after_a_rewind_the_view_counts_from_there():
    hook = Live("x", stream=Terminal())
    now = state(step=50)
    hook.on_start(now)
    now.step = 20
    hook.on_rewind(now)
    assert hook._seen.step == 20
    hook.on_stop(now)
    assert hook._screen is None


def test_off_a_terminal_the_progress_bar_is_used():
    assert isinstance(live.view("x", live=True, progress=True, stream=io.StringIO())[0], Progress)
    assert live.view("x", live=True, progress=False, stream=io.StringIO()) == []
    assert isinstance(live.view("x", live=True, progress=False, stream=Terminal())[0], Live)
    assert isinstance(live.view("x", live=False, progress=True, stream=Terminal())[0], Progress)


def test_without_rich_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(UsageError, match=r"pip install 'dtrain\[live\]'"):
        Live("x", stream=Terminal())


def test_train_draws_on_a_real_terminal(tmp_path):
    """`dtrain train --live` under a pseudo-terminal: the view is there, and the cursor comes back."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "dtrain", "train", "synthetic", "--backend", "solo", "--steps", "12"]
    command += ["--global-batch", "8", "--log-every", "3", "--live", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=side, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(side)
    said = b""
    try:
        while chunk := _read(main):
            said += chunk
    finally:
        os.close(main)
        process.wait()
    assert process.returncode == 0, said.decode()
    assert "step 12/12  100 %" in said.decode()
    assert "█" in said.decode()
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["live"] is True


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so at the end
        return b""
