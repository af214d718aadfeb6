"""Processors that a process may use; what the processes of a job print into one place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import processes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
    ],
)
def test_cores_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(processes, "_CPU_MAX", file)
    assert processes.cores() == 8
    file.write_text(limit + "\n")
    assert processes.cores() == expected


FAILING = """
import sys
import torch, dtrain
comm = dtrain.connect()
comm.all_reduce(torch.ones(8), "metric/x").wait()
print("two", "words", file=sys.stderr)
raise ValueError("a bad batch")
"""


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
def test_lines_on_a_shared_stderr_stay_whole(tmp_path: Path, backend: str):
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # every write is a packet of its own
    with ours, theirs:
        ours.settimeout(30)
        subprocess.run(
            [sys.executable, "-m", "dtrain", "launch", "-n", "2", "--backend", backend, str(script)],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stderr=theirs,
            timeout=60,
            check=False,
        )
        theirs.send(b"over")
        writes = list(iter(lambda: ours.recv(1 << 16).decode(), "over"))
    assert "ValueError: a bad batch\n" in "".join(writes)
    assert [text for text in writes if not text.endswith("\n")] == []
