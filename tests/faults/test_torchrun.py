"""The same jobs under torchrun: worker 0 starts the parameter server, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain import checkpoint
from dtrain.runs import train as train_run
from dtrain.spec import RunSpec
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


@pytest.mark.slow
@pytest.mark.timeout(300)
@both
def test_a_restart_goes_on_from_the_last_commit(tmp_path: Path, backend: str):
    """No flag says so: torchrun tells that it has started the job before."""
    run = tmp_path / "run"
    train = ["-m", "dtrain", "train", "digits", "--epochs", "8", "--checkpoint-every", "20", "--run-dir", str(run)]
    with started(tmp_path, torchrun("--max-restarts", "1", *train, "--backend", backend)) as job:
        deadline = time.monotonic() + 60
        while not [step for step in checkpoint.steps(run / "checkpoints") if step >= 40]:
            assert time.monotonic() < deadline, job.err
            time.sleep(0.02)
        workers = [p for p in job.running() if "train" in p.cmdline() and p.environ().get("RANK") == "1"]
        assert len(workers) == 1
        workers[0].kill()
        assert job.ends(90) == 0, job.err
        assert "resuming" in job.err
    dtrain.run(train_run, RunSpec(run_dir=str(tmp_path / "alone"), epochs=8, progress=False), workers=2)
    found, expected = (checkpoint.load_tensors(d / "model.safetensors") for d in (run, tmp_path / "alone"))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves(tmp_path: Path, number: signal.Signals):
    """torchrun passes it on, and waits; it ends with 1 whatever its workers end with."""
    run = tmp_path / "run"
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    train = ["train", "digits", "--epochs", "900", "--log-every", "5", "--run-dir", str(run)]
    command = str(Path(sys.executable).with_name("torchrun"))
    with started(tmp_path, [str(script), *train], TORCHRUN=command) as job:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline, job.err
            time.sleep(0.02)
        job.process.send_signal(number)
        assert job.ends(40) == 1, job.err
        assert "asked to stop: the run is saved at step" in job.err
    assert checkpoint.steps(run / "checkpoints")
    assert not list((run / "checkpoints").glob("*.tmp-*"))


@pytest.mark.parametrize("backend", ["ps", pytest.param("allreduce", marks=pytest.mark.slow)])
def test_kill_9_of_a_worker(tmp_path: Path, backend: str):
    """Without restarts: torchrun ends the other, and the server that worker 0 had started ends by itself."""
    command = torchrun(str(VICTIM), str(tmp_path))
    with started(tmp_path, command, DTRAIN_BACKEND=backend) as job:
        pids = job.await_steps(2)
        os.kill(pids[0], signal.SIGKILL)
        assert job.ends(LIMIT_S) == 1
