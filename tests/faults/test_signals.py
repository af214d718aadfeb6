"""A3: SIGTERM, SIGINT and SIGUSR1 to the launcher: the run is saved at a step common to all, and ends with 75."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dtrain import checkpoint
from tests.faults.forked import Forked, forked
from tests.faults.job import started
from tests.faults.test_recovery import kill, same_bits, slow, train, undisturbed, weights

LIMIT_S = 10.0
SAVED = "dtrain: state saved; start again with --resume to go on"


def at_step_7(job: Forked) -> None:
    job.await_strike("worker 1")


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGTERM, ()),
        pytest.param(signal.SIGINT, (), marks=slow),
        pytest.param(signal.SIGUSR1, (), marks=slow),
        pytest.param(signal.SIGTERM, ("--update", "server"), marks=slow),
        pytest.param(signal.SIGTERM, ("--backend", "allreduce", "--servers", "1"), marks=slow),
        pytest.param(signal.SIGTERM, ("--on-worker-loss", "wait"), marks=slow),
    ],
)
def test_saved_and_resumed_to_the_same_bits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals, flags: tuple[str, ...]
):
    faults = [kill("worker 1", "step", 7, do="sleep")]
    with forked(tmp_path, *train(tmp_path, *flags), faults=faults) as job:
        at_step_7(job)
        job.process.send_signal(number)
        assert job.ends(LIMIT_S) == 75, job.err
        assert SAVED in job.err
        assert "Traceback" not in job.err
    saved = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert 6 <= saved < 20
    with forked(tmp_path, *train(tmp_path, *flags, "--resume")) as job:
        assert job.ends(LIMIT_S * 3) == 0, job.err
    same = tuple(flag for flag in flags if flag not in ("--on-worker-loss", "wait"))
    base = tmp_path_factory.getbasetemp()
    same_bits(weights(tmp_path), undisturbed(base / ("o" + "".join(same).replace("-", "")), *same))


def test_a_second_signal_ends_at_once(tmp_path: Path):
    """Also where a worker would never come to the end of its step."""
    with forked(tmp_path, *train(tmp_path), faults=[kill("worker 1", "step", 7, do="stop")]) as job:
        at_step_7(job)
        job.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        job.process.send_signal(signal.SIGTERM)
        assert job.ends(LIMIT_S) == 143, job.err


@slow
def test_processes_that_fetch_data_outlive_the_signal(tmp_path: Path):
    """The whole process group of a worker gets it."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dtrain", "train", "digits", "-n", "2", "--num-data-workers", "1"]
    with started(tmp_path, [*command, "--epochs", "900", "--log-every", "5", "--run-dir", str(run)]) as job:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert job.process.poll() is None, job.err
            assert time.monotonic() < deadline, job.err
            time.sleep(0.02)
        job.process.send_signal(signal.SIGTERM)
        assert job.ends(LIMIT_S * 2) == 75, job.err
    assert checkpoint.steps(run / "checkpoints")


@pytest.mark.parametrize("backend", ["threads", pytest.param("solo", marks=slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_without_a_launcher(tmp_path: Path, backend: str, number: signal.Signals):
    """All workers are in the process that gets the signal."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dtrain", "train", "digits", "--backend", backend, "--run-dir", str(run)]
    with started(tmp_path, [*command, "--epochs", "900", "--log-every", "5", "--auto-resume"]) as job:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert job.process.poll() is None, job.err
            assert time.monotonic() < deadline, job.err
            time.sleep(0.02)
        job.process.send_signal(number)
        assert job.ends(LIMIT_S) == 75, job.err
        assert "asked to stop: the run is saved at step" in job.err
    assert checkpoint.steps(run / "checkpoints")


@slow
def test_a_signal_before_the_first_step(tmp_path: Path):
    """No worker runs yet, or none has joined: nothing to save that is not there already."""
    with forked(tmp_path, *train(tmp_path), faults=[kill("worker 1", "join", do="note")]) as job:
        at_step_7(job)
        job.process.send_signal(signal.SIGTERM)
        assert job.ends(LIMIT_S) in (75, 143), job.err


@slow
def test_nothing_to_save_where_no_checkpoints_are_asked_for(tmp_path: Path):
    arguments = [a if a != "5" else "never" for a in train(tmp_path)]
    with forked(tmp_path, *arguments, faults=[kill("worker 1", "step", 7, do="sleep")]) as job:
        at_step_7(job)
        job.process.send_signal(signal.SIGINT)
        assert job.ends(LIMIT_S) == 130, job.err


@slow
def test_the_launcher_is_killed(tmp_path: Path):
    """S4: nothing of the job stays."""
    with forked(tmp_path, *train(tmp_path), faults=[kill("worker 1", "step", 7, do="sleep")]) as job:
        at_step_7(job)
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.ends(5.0) == -signal.SIGKILL
