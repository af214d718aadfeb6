"""Faults of a job that `dtrain launch` runs: everybody else ends in time, the culprit is named, nothing is left.

Every test starts real processes and lets them train first. `Job.ends` looks for processes, orphans included, and for
the job's directory with its socket and its store.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.job import VICTIM, Job, launch, started

LIMIT_S = 10.0
STOP_TIMEOUT_S = 6.0

both = pytest.mark.parametrize("backend", ["ps", "allreduce"])
slow = pytest.mark.slow


def one_now(first: str, then: str) -> pytest.MarkDecorator:
    """Both backends, the second one with the slow tests."""
    return pytest.mark.parametrize("backend", [first, pytest.param(then, marks=slow)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def victims(backend: str, folder: Path, workers: int = 2, *, fault: str = "none", timeout_s: float = 30) -> list[str]:
    return launch(backend, workers, str(VICTIM), str(folder), "--fault", fault, timeout_s=timeout_s)


def launchers_line(job: Job) -> str:
    """What the launcher said of the end."""
    lines = [line for line in job.err.splitlines() if re.match(r"dtrain: (worker|server).*stopping the other", line)]
    assert len(lines) == 1, job.err
    return lines[0]


@both
def test_kill_9_of_a_worker(folder: Path, backend: str):
    with started(folder, victims(backend, folder, 3)) as job:
        pids = job.await_steps(3)
        os.kill(pids[1], signal.SIGKILL)
        assert job.ends(LIMIT_S) == 69
        assert f"dtrain: worker 1 (pid {pids[1]}) was killed by SIGKILL" in launchers_line(job)
        # Its fellows saw by themselves who it was, without the launcher.
        own = [line for line in job.err.splitlines() if "CommError: worker" in line]
        assert len(own) == 2, job.err
        assert all(f"worker 1 (pid {pids[1]} on " in line for line in own)


def test_kill_9_of_the_server(folder: Path):
    with started(folder, victims("ps", folder)) as job:
        job.await_steps(2)
        server = job.server()
        os.kill(server, signal.SIGKILL)
        assert job.ends(LIMIT_S) == 69
        assert f"dtrain: server (pid {server}) was killed by SIGKILL" in launchers_line(job)
        assert job.err.count(f"(pid {server} on ") >= 2
        assert "is gone while this worker waited for" in job.err


@both
def test_kill_9_of_the_launcher(folder: Path, backend: str):
    with started(folder, victims(backend, folder)) as job:
        job.await_steps(2)
        job.process.kill()
        assert job.ends(LIMIT_S) == -signal.SIGKILL
        assert "the launcher is gone; stopping" in job.err


@slow
@both
def test_kill_9_of_the_launcher_while_workers_start(folder: Path, backend: str):
    with started(folder, victims(backend, folder)) as job:
        while len(job.running()) < 3:
            time.sleep(0.02)
        job.process.kill()
        assert job.ends(LIMIT_S) == -signal.SIGKILL


@both
def test_sigstop_of_a_worker(folder: Path, backend: str):
    with started(folder, victims(backend, folder, timeout_s=STOP_TIMEOUT_S)) as job:
        pids = job.await_steps(2)
        os.kill(pids[1], signal.SIGSTOP)
        assert job.ends(STOP_TIMEOUT_S + LIMIT_S) == 69
        assert f"dtrain: worker 1 (pid {pids[1]}) was stopped (SIGSTOP)" in launchers_line(job)
        assert f"worker 1 (pid {pids[1]} on " in job.err


@slow
def test_sigstop_of_the_server(folder: Path):
    with started(folder, victims("ps", folder, timeout_s=STOP_TIMEOUT_S)) as job:
        job.await_steps(2)
        server = job.server()
        os.kill(server, signal.SIGSTOP)
        assert job.ends(STOP_TIMEOUT_S + LIMIT_S) == 69
        assert f"dtrain: server (pid {server}) was stopped (SIGSTOP)" in launchers_line(job)


@slow
@both
def test_a_worker_that_makes_no_progress(folder: Path, backend: str):
    with started(folder, victims(backend, folder, fault="stuck", timeout_s=2)) as job:
        pids = job.await_steps(2, step=5)
        assert job.ends(2 + LIMIT_S) == 69
        assert re.search(rf"worker 1 \(pid {pids[1]} on .*late.*alive, but no progress", job.err), job.err


@both
def test_an_exception_in_a_worker(folder: Path, backend: str):
    with started(folder, victims(backend, folder, fault="raise")) as job:
        pids = job.await_steps(2, step=5)
        assert job.ends(LIMIT_S) == 1
        assert f"dtrain: worker 1 (pid {pids[1]}) failed with Boom: a bad batch; stopping" in launchers_line(job)
        assert "[server]" not in job.err, "it would say the same again"
        assert re.search(r"^\[worker 1\] .*Traceback \(most recent call last\):", job.err, re.M)
        assert "Boom: a bad batch" in job.err
        # The other worker says what happened there, too.
        assert re.search(rf"CommError: .*worker 1 \(pid {pids[1]} .*Boom: a bad batch", job.err)


@slow
@both
def test_sys_exit_in_a_worker(folder: Path, backend: str):
    with started(folder, victims(backend, folder, fault="exit")) as job:
        pids = job.await_steps(2, step=5)
        assert job.ends(LIMIT_S) == 3
        assert f"dtrain: worker 1 (pid {pids[1]}) ended with exit code 3" in launchers_line(job)


@one_now("allreduce", "ps")
def test_a_worker_that_leaves_while_others_go_on(folder: Path, backend: str):
    with started(folder, victims(backend, folder, fault="leave")) as job:
        pids = job.await_steps(2, step=5)
        assert job.ends(LIMIT_S) == 69
        assert f"dtrain: worker 1 (pid {pids[1]}) ended while others still waited" in launchers_line(job)
        assert re.search(rf"CommError: .*worker 1 \(pid {pids[1]} .*(left|finished)", job.err), job.err


@one_now("allreduce", "ps")
def test_a_model_that_differs(folder: Path, backend: str):
    with started(folder, victims(backend, folder, fault="model")) as job:
        assert job.ends(30) == 76
        assert "LayoutError: models differ between workers, first at number 0" in job.err
        assert "worker 0 has weight (8, 64)" in job.err
        assert "worker 1 has weight (9, 64)" in job.err
        assert re.search(r" failed with LayoutError: models differ .*\(exit code 76\); stopping", launchers_line(job))


@pytest.mark.parametrize(
    ("backend", "number", "code"),
    [
        ("ps", signal.SIGINT, 130),
        ("allreduce", signal.SIGTERM, 143),
        pytest.param("allreduce", signal.SIGINT, 130, marks=slow),
        pytest.param("ps", signal.SIGTERM, 143, marks=slow),
    ],
)
def test_signals_to_the_launcher(folder: Path, backend: str, number: signal.Signals, code: int):
    with started(folder, victims(backend, folder)) as job:
        job.await_steps(2)
        job.process.send_signal(number)
        assert job.ends(LIMIT_S) == code
        assert f"dtrain: {number.name}: stopping 2 workers" in job.err
        launcher = [line for line in job.err.splitlines() if line.startswith("dtrain: worker")]
        assert not launcher, "no worker is to blame"


@slow
def test_a_second_signal_changes_nothing(folder: Path):
    with started(folder, victims("ps", folder)) as job:
        job.await_steps(2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            job.process.send_signal(number)
            time.sleep(0.01)
        assert job.ends(LIMIT_S) in (130, 143)
        assert "Traceback" not in job.err.split("[worker")[0]


@pytest.mark.parametrize("after_s", [0.0, pytest.param(0.05, marks=slow), pytest.param(0.3, marks=slow)])
def test_ctrl_c_while_workers_start(folder: Path, after_s: float):
    with started(folder, victims("ps", folder)) as job:
        while len(job.running()) < 2:
            time.sleep(0.005)
        time.sleep(after_s)
        job.process.send_signal(signal.SIGINT)
        assert job.ends(LIMIT_S) == 130
        assert "Traceback" not in job.err


GRANDCHILD = """
import subprocess, sys, time
from pathlib import Path
import dtrain
from dtrain.comm import collectives
from tests.faults.victim import note
comm = dtrain.connect()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
for step in range(10**9):
    note(Path(sys.argv[1], str(comm.rank)), step)
    collectives.barrier(comm)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("whom", ["launcher", pytest.param("worker", marks=slow)])
def test_what_a_worker_has_started_ends_too(folder: Path, whom: str):
    script = folder / "script.py"
    script.write_text(GRANDCHILD)
    here = str(VICTIM.parents[2])
    with started(folder, launch("ps", 2, str(script), str(folder)), PYTHONPATH=here) as job:
        pids = job.await_steps(2)
        assert len(job.running()) == 6
        (job.process.kill if whom == "launcher" else psutil.Process(pids[1]).kill)()
        job.ends(LIMIT_S)


@one_now("ps", "allreduce")
def test_a_job_that_ends_well_leaves_nothing(folder: Path, backend: str):
    with started(folder, [*victims(backend, folder, 2), "--steps", "4"]) as job:
        assert job.ends(30) == 0
        assert job.alarms == ""


THREADS = """
import atexit, os
from pathlib import Path
def threads():
    return sum("gloo" in Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task"))
atexit.register(lambda: print("at the end", threads(), flush=True))  # called after dtrain's own
import torch, dtrain
comm = dtrain.connect()
comm.all_reduce(torch.ones(8), "metric/x").wait()
assert threads()
"""

UNDER_WAY = """
import sys, time
import torch, dtrain
comm = dtrain.connect()
sys.setswitchinterval(1000)
comm.all_reduce(torch.ones(8), "metric/x")
until = time.perf_counter() + 0.5
while time.perf_counter() < until:  # whoever wants Python's lock gets it when Python ends
    pass
"""


def test_no_thread_of_gloo_outlives_python(folder: Path):
    script = folder / "script.py"
    script.write_text(THREADS)
    with started(folder, launch("allreduce", 2, str(script))) as job:
        assert job.ends(30) == 0
        assert sorted(job.out.splitlines()) == ["[worker 1] at the end 0", "at the end 0"]


def test_python_may_end_while_a_transfer_is_under_way(folder: Path):
    script = folder / "script.py"
    script.write_text(UNDER_WAY)
    with started(folder, launch("allreduce", 4, str(script))) as job:
        assert job.ends(30) == 0
        assert job.err == ""
