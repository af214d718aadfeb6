"""step.py measures torch RPC beside DDP, and leaves none of its processes behind. Its figures are nothing to test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks"

TINY = """
import step
step.QUICK = [step.Case("tiny", {"model": "mlp", "hidden": "16"}, batch=4, repeats=1, rounds=1, steps=1)]
"""
MAIN = """
if __name__ == "__main__":
    step.main()
"""
DIES = """
import os
from torch.distributed import rpc
def dies(trainer, loss):
    if rpc.get_worker_info().name == "trainer1":
        os._exit(9)
    going_on(trainer, loss)
going_on, step.peers.RpcTrainer.step = step.peers.RpcTrainer.step, dies
"""


def run(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """step.py with a tiny case. The folder is its temporary one, by which its processes are known."""
    folder.mkdir()
    file = folder.with_suffix(".py")
    file.write_text(script, encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SCRIPTS), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), "--quick", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


def left(folder: Path) -> list[str]:
    """Processes, and files for a meeting, that are still there after a moment."""
    deadline = time.monotonic() + 5.0
    while found := [*_processes(folder), *map(str, (*folder.glob("dtrain-*"), *folder.glob("pymp-*")))]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def _processes(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder):
                found.append(f"process {process.pid}")
        except psutil.Error:  # it has ended, or is not ours
            continue
    return found


@pytest.mark.slow
def test_torch_rpc_does_the_same_work_in_the_same_run_and_who_is_absent_is_named(tmp_path: Path) -> None:
    folder, record, picture = tmp_path / "t", tmp_path / "record", tmp_path / "picture.png"
    files = ("--json", record, "--picture", picture)
    done = run(TINY + MAIN, folder, "--contender", "server", "--peers", "rpc", "ray", *files)
    assert done.returncode == 0, done.stderr  # the weights were compared
    written = json.loads(record.read_text(encoding="utf-8"))
    assert [row["baseline"] for row in written["rows"]] == ["DDP", "DDP, bucket views", "torch RPC"]
    for row in written["rows"]:
        assert row["rounds"] == 1
        assert row["contender_ms"] > 0
        assert row["baseline_ms"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert f"absent: Ray: {written['absent']['Ray']}" in done.stdout
    assert not left(folder)


@pytest.mark.slow
def test_a_worker_that_dies_takes_everything_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    done = run(TINY + DIES + MAIN, folder, "--peers", "rpc")
    assert done.returncode != 0
    assert "worker 1 ended with exit code 9" in done.stderr
    assert not left(folder)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("peers")


def test_the_server_answers_all_when_the_last_gradients_have_come(peers: ModuleType) -> None:
    batch = peers._Batch(2, lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.5))
    batch.begin([torch.zeros(2), torch.zeros(1)])
    for expected in ([-3.0, -1.0], [-7.5, -2.5]):  # a step of 3 and 1, then one and a half of them
        first = batch.add([torch.tensor([1.0, 1.0]), torch.tensor([4.0])])
        assert not first.done()
        second = batch.add([torch.tensor([2.0, 0.0]), torch.tensor([1.0])])
        for answer in (first, second):
            assert answer.value()[0].tolist() == expected


def test_ray_is_absent_whether_or_not_it_is_installed(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.absent("ray") == "ray is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "cannot take turns" in peers.absent("ray")
