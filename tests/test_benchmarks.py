"""The benchmark scripts run, and say what they are meant to say. Their figures are nothing to test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def test_sync_measures_every_transport_beside_gloo(tmp_path: Path) -> None:
    done = run(SCRIPTS / "sync.py", "--numel", 256, 3000, "--workers", 2, "--rounds", 3, "--json", tmp_path / "record")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record").read_text(encoding="utf-8"))
    measured = {(row["bytes"], row["contender"]) for row in record["rows"]}
    for nbytes in (1024, 12000):
        assert measured >= {(nbytes, name) for name in ("ps ipc", "ps tcp", "allreduce", "gloo")}
        assert ((nbytes, "ps shm") in measured) != ("ps shm" in record["absent"])
    for row in record["rows"]:
        assert row["rounds"] == 3
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["contender"] != "gloo" or row["ratio"] == 1
    for name in ("MPI", "DeepSpeed"):  # measured, or said to be absent: never an error
        assert ((1024, name) in measured) != (f"absent: {name}: " in done.stdout)


@pytest.mark.parametrize("script", ["step.py", "sync.py"])
def test_help(script: str) -> None:
    done = run(SCRIPTS / script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "--json" in done.stdout
