"""`launch/mpirun.sh` with the real mpirun of MPICH, and of Open MPI where that is installed."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.faults.job import Job, started
from tests.launch.running import LIMIT_S, STEPS, TRAIN, await_step, free_port, slow, undisturbed, weights

SCRIPT = Path(__file__).parents[2] / "launch" / "mpirun.sh"

NAMES = {"mpich": ("HYDRA", "mpirun.mpich", "mpirun"), "openmpi": ("Open MPI", "mpirun.openmpi", "mpirun")}
PACKAGES = {"mpich": "mpich", "openmpi": "openmpi-bin"}

kinds = pytest.mark.parametrize("kind", ["mpich", "openmpi"])
both = pytest.mark.parametrize("backend", ["allreduce", "ps"])


def mpirun(kind: str) -> str:
    """That kind's command; on Debian `mpirun` is one of those installed."""
    mark, *names = NAMES[kind]
    for name in names:
        if shutil.which(name):
            version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
            if mark in version.stdout:
                return name
    pytest.skip(f"no mpirun of {kind} here: apt-get install {PACKAGES[kind]}")


@contextlib.contextmanager
def mpi(folder: Path, kind: str, *arguments: str, **environ: str) -> Iterator[Job]:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    given = {"MPIRUN": mpirun(kind), "PYTHON": sys.executable, **as_root, **environ}
    with started(folder, [str(SCRIPT), *arguments], **given) as job:
        yield job


def train(folder: Path, *more: str, steps: int = 6) -> list[str]:
    asked = [str(steps) if word == str(STEPS) else word for word in TRAIN]
    return ["train", *asked, "--run-dir", str(folder / "run"), *more]


WHERE = """
import json, sys
from pathlib import Path
import torch
import dtrain
from dtrain import env
comm = dtrain.connect()
flat = torch.tensor([10.0**comm.rank])
comm.all_reduce(flat, "metric/ranks").wait()
place = env.resolve()
names = ("rank", "world_size", "local_rank", "local_world_size", "backend")
found = {name: getattr(place, name) for name in names} | {"sum": float(flat)}
Path(sys.argv[1], f"place{comm.rank}").write_text(json.dumps(found))
comm.close()
"""


def places(folder: Path, workers: int) -> list[dict[str, object]]:
    return [json.loads((folder / f"place{rank}").read_text()) for rank in range(workers)]


def where(folder: Path) -> str:
    script = folder / "where.py"
    script.write_text(WHERE)
    return str(script)


@pytest.mark.parametrize("kind", ["mpich", pytest.param("openmpi", marks=slow)])
def test_each_worker_finds_its_place(tmp_path: Path, kind: str):
    with mpi(tmp_path, kind, where(tmp_path), str(tmp_path)) as job:
        assert job.ends(LIMIT_S) == 0, job.err
    for rank, found in enumerate(places(tmp_path, 2)):
        assert found == {
            **{"rank": rank, "world_size": 2, "local_rank": rank, "local_world_size": 2},
            **{"backend": "allreduce", "sum": 11.0},
        }


@slow
@pytest.mark.parametrize("backend", ["allreduce", "ps"])
def test_on_two_hosts(tmp_path: Path, backend: str):
    """To mpirun they are two; each host's first worker starts a server of `ps` there."""
    hosts = {"HOSTS": "localhost:1,127.0.0.1:1", "MASTER": f"127.0.0.1:{free_port()}", "BACKEND": backend}
    if backend == "ps":
        hosts["KEYS"] = str(tmp_path / "keys")
        subprocess.run([sys.executable, "-m", "dtrain", "keys", hosts["KEYS"]], check=True, capture_output=True)
    with mpi(tmp_path, "mpich", where(tmp_path), str(tmp_path), **hosts) as job:
        assert job.ends(LIMIT_S) == 0, job.err
    found = places(tmp_path, 2)
    assert [(f["rank"], f["local_rank"], f["local_world_size"]) for f in found] == [(0, 0, 1), (1, 0, 1)]
    assert [f["sum"] for f in found] == [11.0, 11.0]


def test_several_hosts_need_a_place_to_meet(tmp_path: Path):
    with mpi(tmp_path, "mpich", HOSTS="a:1,b:1") as job:
        assert job.ends(LIMIT_S) == 1
    assert "set MASTER, host:port of the first of HOSTS" in job.err


@slow
@kinds
@both
def test_train_a_recipe(tmp_path: Path, kind: str, backend: str):
    with mpi(tmp_path, kind, *train(tmp_path), BACKEND=backend) as job:
        assert job.ends(LIMIT_S) == 0, job.err
    assert job.out.count("Run directory") == 1, "worker 0 alone reports"
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (figures["backend"], figures["workers"], figures["steps"]) == (backend, 2, 6)


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("kind", "backend", "number"),
    [("mpich", "allreduce", signal.SIGINT), ("mpich", "ps", signal.SIGTERM), ("openmpi", "allreduce", signal.SIGTERM)],
)
def test_saved_at_a_signal_and_resumed_to_the_same_bits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, backend: str, number: signal.Signals
):
    """Open MPI itself would give the workers a second after SIGTERM."""
    command = train(tmp_path, "--auto-resume", steps=STEPS)
    with mpi(tmp_path, kind, *command, BACKEND=backend) as job:
        await_step(job, 3)
        job.process.send_signal(number)
        assert job.ends(20.0) == 75, job.err
    with mpi(tmp_path, kind, *command, BACKEND=backend) as job:
        assert job.ends(LIMIT_S) == 0, job.err
    assert "resuming" in job.err
    found, expected = weights(tmp_path), undisturbed(tmp_path_factory.getbasetemp(), backend, 2)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@slow
@kinds
def test_a_second_signal_ends_the_job(tmp_path: Path, kind: str):
    """Also where no worker comes to the end of its step."""
    with mpi(tmp_path, kind, *train(tmp_path, steps=4000)) as job:
        await_step(job, 3)
        for worker in workers(job):
            worker.suspend()
        for _ in range(2):
            job.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert job.ends(20.0) not in (0, 75), job.err


def workers(job: Job) -> list[psutil.Process]:
    """The workers in their order; those processes that are mpirun's left out."""
    found = [p for p in job.running() if p.cmdline()[1:4] == ["-m", "dtrain", "train"]]
    return sorted(found, key=lambda p: p.environ().get("PMI_RANK") or p.environ()["OMPI_COMM_WORLD_RANK"])


@slow
@kinds
@both
def test_a_killed_worker_ends_the_job(tmp_path: Path, kind: str, backend: str):
    with mpi(tmp_path, kind, *train(tmp_path, steps=4000), BACKEND=backend) as job:
        await_step(job, 3)
        victim = workers(job)[1]
        victim.kill()
        assert job.ends(20.0) == {"mpich": 9, "openmpi": 137}[kind], job.err
    named = {"mpich": "Killed (signal 9)", "openmpi": "process rank 1 with"}  # MPICH shows some pid, not always its own
    assert named[kind] in job.out + job.err
