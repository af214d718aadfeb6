"""What the tests of launch files share: a short training run, how far it is, and what it ends with undisturbed."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch

from dtrain import checkpoint
from tests.conftest import remembered
from tests.faults.forked import forked
from tests.faults.job import Job

STEPS = 40
TRAIN = ("digits", "--option", "width=16", "--steps", str(STEPS), "--log-every", "1")
LIMIT_S = 90.0
"""Until a job has ended that starts its workers once or twice; on a busy host that takes most of it."""

slow = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def await_step(job: Job, step: int) -> None:
    """Return when the run in `run` of the job's folder has come so far."""
    deadline = time.monotonic() + LIMIT_S
    metrics = job.folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert job.process.poll() is None, job.err
        assert time.monotonic() < deadline, job.err
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(folder / "run" / "model.safetensors")


@remembered
def undisturbed(base: Path, backend: str, workers: int) -> dict[str, torch.Tensor]:
    """What as many workers, started by `dtrain train` on one host, end with."""
    folder = base / f"{backend}-{workers}"
    run = ("--backend", backend, "-n", str(workers), "--run-dir", str(folder / "run"))
    with forked(folder, "train", *TRAIN, *run) as job:
        assert job.ends(LIMIT_S) == 0, job.err
    return weights(folder)
