"""Sums in one pass have the bits of sums that numpy makes, where numba is there to compile them."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

from dtrain.comm.base import dtype_name
from dtrain.ps import fused, sums
from dtrain.ps.sums import Reduction
from dtrain.ps.tasks import Pool
from tests.ps.test_sums import in_order, parts_of, same


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernels", {})


def compiled(dtype: str, count: int) -> fused.Kernel | None:
    """What there is when the thread has ended that was to compile it."""
    fused.kernel(dtype, count)
    for thread in threading.enumerate():
        if thread.name == "dtrain-compile":
            thread.join(60)
    return fused.kernel(dtype, count)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_of_the_sum_in_order(dtype: torch.dtype, workers: int, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("numba", reason="needs dtrain[fast]")
    monkeypatch.setattr(sums, "_ALONE_BYTES", 0)
    used = compiled(dtype_name(dtype), workers)
    assert used is not None
    calls: list[int] = []
    monkeypatch.setattr(fused, "kernel", lambda *_: lambda arrays: (calls.append(len(arrays[0])), used(arrays)))
    pool = Pool(2)
    for numel in (1, 7, 4097, 600_001):
        for turned in (False, True):
            parts = parts_of(dtype, workers, numel)
            wanted = in_order(parts)
            Reduction(parts, parts[::-1] if turned else parts, pool=pool).finish()
            assert all(same(part, wanted) for part in parts)
    pool.close()
    assert sum(calls) == 2 * (1 + 7 + 4097 + 600_001)


def test_a_sum_that_is_asked_for_first_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    """The second one, later, is made by what was compiled meanwhile."""
    pytest.importorskip("numba", reason="needs dtrain[fast]")
    monkeypatch.setattr(sums, "_ALONE_BYTES", 0)
    compile_, go = fused._compile, threading.Event()
    monkeypatch.setattr(fused, "_compile", lambda *key: go.wait(60) and compile_(*key))
    parts = parts_of(torch.float32, 2, 100_000)
    wanted = in_order(parts)
    Reduction(parts, parts).finish()
    assert same(parts[0], wanted)
    assert fused.kernel("float32", 2) is None
    go.set()
    deadline = time.monotonic() + 60
    while (used := fused.kernel("float32", 2)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert used is not None
    parts = parts_of(torch.float32, 2, 100_000)
    Reduction(parts, parts).finish()
    assert same(parts[1], wanted)


def test_what_is_not_compiled():
    """Halves are added in float32; of whole numbers and many workers there is little to gain."""
    for dtype, count in (("int64", 2), ("float32", 1), ("float32", 9)):
        assert compiled(dtype, count) is None


def test_without_numba(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compiled("float32", 2) is None


def test_a_numba_that_does_not_work_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "numba", ModuleType("numba"))
    with caplog.at_level(logging.WARNING):
        assert compiled("float32", 2) is None
        assert compiled("float32", 2) is None
    assert len(caplog.records) == 1
    assert "numba cannot compile sums" in caplog.text
