"""The same jobs under torchrun: worker 0 starts the parameter server, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.faults.job import VICTIM, started, torchrun

both = pytest.mark.parametrize("backend", ["ps", "allreduce"])
LIMIT_S = 10.0


@both
def test_train_a_recipe(tmp_path: Path, backend: str):
    run = tmp_path / "run"
    command = ["-m", "dtrain", "train", "digits", "--steps", "5", "--backend", backend, "--run-dir", str(run)]
    with started(tmp_path, torchrun(*command, "--json", str(tmp_path / "figures.json"))) as job:
        assert job.ends(60) == 0, job.err
        assert job.out.count("Run directory") == 1, "worker 0 alone reports"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["backend"], figures["workers"], figures["steps"]) == (backend, 2, 5)
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("backend", "who"),
    [
        ("ps", 0),
        ("allreduce", 1),
        pytest.param("ps", 1, marks=pytest.mark.slow),
        pytest.param("allreduce", 0, marks=pytest.mark.slow),
    ],
)
def test_a_restart_recovers(tmp_path: Path, backend: str, who: int):
    """torchrun starts all workers again; the second attempt does not find the addresses of the first."""
    script = [str(VICTIM), str(tmp_path), "--fault", "die once", "--who", str(who), "--steps", "12"]
    command = torchrun("--max-restarts", "1", *script)
    with started(tmp_path, command, DTRAIN_BACKEND=backend, DTRAIN_TIMEOUT_S="20") as job:
        assert job.ends(90) == 0, job.err
    assert [(tmp_path / str(rank)).read_text().split()[1] for rank in range(2)] == ["12", "12"]


@pytest.mark.parametrize("backend", ["ps", pytest.param("allreduce", marks=pytest.mark.slow)])
def test_kill_9_of_a_worker(tmp_path: Path, backend: str):
    """Without restarts: torchrun ends the other, and the server that worker 0 had started ends by itself."""
    command = torchrun(str(VICTIM), str(tmp_path))
    with started(tmp_path, command, DTRAIN_BACKEND=backend) as job:
        pids = job.await_steps(2)
        os.kill(pids[0], signal.SIGKILL)
        assert job.ends(LIMIT_S) == 1
