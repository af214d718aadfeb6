"""What every test gets: one processor thread, no launch variables, and a look at what it left behind."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; more threads only fight over the cores

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

import dtrain

T = TypeVar("T")

BACKENDS = ["solo", "threads", "ps", "allreduce"]
"""Every backend behind the seam; `solo` is a world of one."""

_LAUNCH_PREFIXES = (
    *("MASTER_", "LOCAL_", "DMLC_", "BYTEPS_", "DTRAIN_", "TORCHELASTIC_"),
    *("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "PET_"),
)
_LAUNCH_NAMES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "JOB_COMPLETION_INDEX")
_SETTLE_S = 5.0


def everywhere(fn: Callable[..., T], *args: object, backend: str, workers: int = 2, timeout_s: float = 30.0) -> list[T]:
    """`dtrain.run`, where `solo` has one worker whatever is asked for.

    For `ps` and `allreduce`, `fn` must be a function of a module: it is sent to other processes by its name.
    """
    return dtrain.run(fn, *args, workers=1 if backend == "solo" else workers, backend=backend, timeout_s=timeout_s)


def remembered(fn: Callable[..., T]) -> Callable[..., T]:
    """Calls `fn` once for each set of arguments. A failure is remembered too: a job that hangs hangs only once."""

    @functools.cache
    def outcome(*args: object) -> tuple[list[T], Exception | None]:
        try:
            return [fn(*args)], None
        except Exception as error:
            return [], error

    def recall(*args: object) -> T:
        results, error = outcome(*args)
        if error is not None:
            raise error
        return results[0]

    return recall


@pytest.fixture(autouse=True)
def no_launch_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has no place in a job but the one it makes."""
    for name in list(os.environ):
        if name in _LAUNCH_NAMES or name.startswith(_LAUNCH_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for temporary files of this session alone, so that what is left behind is certainly ours."""
    folder = tmp_path_factory.mktemp("t")  # short: the path of an ipc socket has at most 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_directory: Path) -> Iterator[None]:
    """No process and no directory of a job outlives the test that started it."""
    before = _leftovers(own_temporary_directory)
    yield
    deadline = time.monotonic() + _SETTLE_S
    while left := _leftovers(own_temporary_directory) - before:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(sorted(left))}")
        time.sleep(0.05)


def _leftovers(folder: Path) -> set[str]:
    return {f"process {_describe(p)}" for p in _job_processes()} | {str(p) for p in folder.glob("dtrain-*")}


def _job_processes() -> list[psutil.Process]:
    """Processes below this one, without Python's own two helpers. A worker looks like the fork server it came from."""
    me = psutil.Process()
    helpers = {p.pid for p in me.children() if _is_helper(p)}
    return [p for p in me.children(recursive=True) if p.pid not in helpers]


def _is_helper(process: psutil.Process) -> bool:
    command = _command(process)
    return "multiprocessing.forkserver" in command or "multiprocessing.resource_tracker" in command


def _describe(process: psutil.Process) -> str:
    return f"{process.pid} ({_command(process)[:80]})"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
