"""`dtrain launch` once on each of several hosts: every one starts its own share of the workers of one job."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain import checkpoint
from dtrain.env import Place
from dtrain.errors import UsageError
from dtrain.launcher import Plan
from tests.faults.job import Job, started

slow = pytest.mark.slow

TELL = """
import dtrain
from dtrain import env
from dtrain.comm import collectives

comm = dtrain.connect()
place = env.resolve()
total = collectives.sum_numbers(comm, [1.0], "metric/count")[0]
print(comm.name, place.rank, place.world_size, place.local_rank, place.local_world_size, int(total), flush=True)
comm.close()
"""


@contextlib.contextmanager
def agents(folder: Path, *command: str, **environ: str) -> Iterator[list[Job]]:
    """Two hosts' `dtrain launch -n 2`, both on this one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        jobs = []
        for host in range(2):
            mine = folder / f"host{host}"
            mine.mkdir()
            told = {"RANK": str(host), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            words = [sys.executable, "-m", "dtrain", "launch", "-n", "2", *command]
            jobs.append(stack.enter_context(started(mine, words, **told, **environ)))
        yield jobs


def test_each_starts_its_share(tmp_path: Path):
    script = tmp_path / "tell.py"
    script.write_text(TELL)
    with agents(tmp_path, str(script)) as jobs:
        assert [job.ends(60) for job in jobs] == [0, 0], [job.err for job in jobs]
    said = sorted(line for job in jobs for line in job.out.splitlines())
    assert said == [*(f"[worker {r}] allreduce {r} 4 {r % 2} 2 4" for r in (1, 2, 3)), "allreduce 0 4 0 2 4"]


@slow
def test_one_is_asked_to_stop_and_all_save(tmp_path: Path):
    run = tmp_path / "run"
    train = ["-m", "dtrain", "train", "digits", "--epochs", "400", "--run-dir", str(run), "--log-every", "5", "--quiet"]
    with agents(tmp_path, sys.executable, *train, "--checkpoint-every", "10") as jobs:
        deadline = time.monotonic() + 60
        while not checkpoint.steps(run / "checkpoints"):
            assert time.monotonic() < deadline, [job.err for job in jobs]
            time.sleep(0.05)
        jobs[1].process.send_signal(signal.SIGTERM)
        assert [job.ends(20) for job in jobs] == [75, 75], [job.err for job in jobs]
    assert all("state saved" in job.err for job in jobs)
    assert not (run / "summary.json").exists()


@slow
def test_one_hosts_failure_ends_the_others(tmp_path: Path):
    script = tmp_path / "fail.py"
    script.write_text(TELL.replace("comm.close()", "assert comm.rank != 3\ncollectives.barrier(comm)"))
    with agents(tmp_path, str(script), DTRAIN_TIMEOUT_S="20") as jobs:
        assert [job.ends(40) for job in jobs] == [69, 1], [job.err for job in jobs]
    assert "worker 3" in jobs[1].err
    assert "AssertionError" in jobs[1].err


HOST = Place(rank=1, world_size=2, store="tcp://h:1", launcher="Slurm")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"host": Place(world_size=2, launcher="MPI")}, "host 0 of 2 (MPI), and nothing says where they meet"),
        ({"host": Place(world_size=2, rank=1)}, r"host 1 of 2 (RANK and WORLD_SIZE)"),
        ({"host": HOST, "backend": "ps", "servers": 2}, "servers is 2, and this is host 1 of 2 (Slurm)"),
        ({"host": HOST, "backend": "ps", "on_worker_loss": "wait"}, "on_worker_loss is 'wait', and this is host 1"),
    ],
)
def test_what_needs_one_host_is_refused(plan: dict[str, object], words: str):
    with pytest.raises(UsageError) as caught:
        Plan(**{"workers": 2, "backend": "allreduce", **plan})  # type: ignore[arg-type]
    assert words in str(caught.value)
