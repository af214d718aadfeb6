"""Processors that a process may use."""

from __future__ import annotations

import os
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
