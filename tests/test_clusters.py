"""What Slurm, MPI and Kubernetes tell a process of its place; contradictions are refused."""

from __future__ import annotations

import pytest

from dtrain import clusters, env
from dtrain.errors import UsageError

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[003-005]",
    "SLURM_RESTART_COUNT": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node003",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
}
ALONE = (None, 0, 1, 0, 1)


def numbers(place: env.Place) -> tuple[str | None, int, int, int, int]:
    return place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(SLURM, ("Slurm", 3, 5, 1, 2), id="slurm"),
        pytest.param(OPEN_MPI, ("Open MPI", 3, 4, 1, 2), id="open mpi"),
        pytest.param(PMI, ("MPI", 1, 2, 1, 2), id="mpich"),
        pytest.param(KUBEFLOW, ("Kubeflow", 1, 2, 0, 1), id="a pod of a TrainJob"),
        pytest.param({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, ("Kubernetes", 1, 2, 1, 2), id="indexed job"),
        pytest.param({"JOB_COMPLETION_INDEX": "1"}, ALONE, id="a job of its own on each index"),
        pytest.param(
            {**OPEN_MPI, "PMI_RANK": "0", "PMI_SIZE": "1"}, ("Open MPI", 3, 4, 1, 2), id="mpirun in a shell of srun's"
        ),
        pytest.param({**TORCHRUN, **KUBEFLOW}, ("torchrun", 5, 8, 1, 4), id="torchrun in a pod"),
        pytest.param({**TORCHRUN, **SLURM}, ("torchrun", 5, 8, 1, 4), id="torchrun in a task"),
        pytest.param({**OPEN_MPI, **SLURM}, ("Open MPI", 3, 4, 1, 2), id="mpirun in a Slurm job"),
        pytest.param(
            {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5"}, ("MPI", 3, 5, 1, 2), id="srun --mpi=pmi2 numbers as Slurm"
        ),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": ""}, ALONE, id="a batch script is no task"),
        pytest.param({**SLURM, "RANK": "0", "WORLD_SIZE": "20"}, (None, 0, 20, 0, 20), id="started by hand in a task"),
        pytest.param({**SLURM, "RANK": "3", "WORLD_SIZE": "5"}, ("Slurm", 3, 5, 1, 2), id="by hand, the same"),
        pytest.param(
            {**SLURM, "DTRAIN_LAUNCHER_FD": "5", "RANK": "0", "WORLD_SIZE": "1"}, ("dtrain launch", 0, 1, 0, 1)
        ),
        pytest.param({"PET_NNODES": "1:4", "PET_NODE_RANK": "0"}, ALONE, id="elastic: torchrun alone knows"),
        pytest.param(
            {
                "DMLC_WORKER_ID": "1",
                "DMLC_NUM_WORKER": "2",
                "BYTEPS_LOCAL_RANK": "2",
                "BYTEPS_LOCAL_SIZE": "4",
                "DMLC_PS_ROOT_URI": "h",
                "DMLC_PS_ROOT_PORT": "9",
            },
            ("ps-lite", 6, 8, 2, 4),
            id="BytePS counts hosts",
        ),
    ],
)
def test_the_place(environ: dict[str, str], expected: tuple[str | None, int, int, int, int]):
    place = env.resolve(environ)
    assert numbers(place) == expected
    assert env.in_job(environ) is (place.world_size > 1 or "RANK" in environ)


def test_an_index_of_a_job_of_one_worker_says_nothing():
    environ = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "1"}
    assert numbers(env.resolve(environ)) == ALONE
    assert not env.in_job(environ)


def test_slurm_tells_where_to_meet():
    place = env.resolve(SLURM)
    assert (place.store, place.job_id, place.restart) == ("tcp://node003:22347", "slurm-12345", 1)
    assert place.sources["store"] == "SLURM_STEP_NODELIST, SLURM_JOB_ID"
    by_hand = env.resolve({**SLURM, "MASTER_ADDR": "other", "MASTER_PORT": "1"})
    assert by_hand.store == "tcp://other:1"


def test_kubeflow_tells_where_to_meet():
    assert env.resolve(KUBEFLOW).store == "tcp://job-node-0-0.job:29500"


def test_an_argument_counts_for_more():
    place = env.resolve(SLURM, rank=0, world_size=2)
    assert (place.rank, place.world_size, place.job_id) == (0, 2, "")


@pytest.mark.parametrize("role", ["server", "scheduler"])
def test_servers_and_schedulers_are_no_workers(role: str):
    """A task of Slurm's may be a server: its number among tasks says nothing of workers."""
    place = env.resolve({**SLURM, "DTRAIN_ROLE": role})
    assert (place.rank, place.world_size, place.launcher) == (0, 1, None)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**SLURM, "RANK": "1", "WORLD_SIZE": "5"}, ["RANK=1", "SLURM_PROCID=3", "contradict", "Slurm"]),
        ({**SLURM, "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "SLURM_STEP_NUM_TASKS=5", "contradict"]),
        ({**SLURM, "RANK": "2"}, ["RANK=2", "SLURM_PROCID=3"]),
        ({**PMI, "DMLC_WORKER_ID": "0", "DMLC_NUM_WORKER": "2"}, ["DMLC_WORKER_ID=0", "PMI_RANK=1"]),
        ({**OPEN_MPI, **PMI}, ["OMPI_COMM_WORLD_RANK=3", "PMI_RANK=1", "contradict"]),
        ({**SLURM, "SLURM_PROCID": "x"}, ["SLURM_PROCID=x", "number"]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE=two"]),
        ({**SLURM, "SLURM_NODEID": "9"}, ["SLURM_NODEID=9", "contradict"]),
        ({**KUBEFLOW, "PET_NPROC_PER_NODE": "4"}, ["PET_NPROC_PER_NODE=4", "torchrun"]),
        ({"DMLC_NUM_WORKER": "2", "DMLC_WORKER_ID": "0", "BYTEPS_LOCAL_SIZE": "x"}, ["BYTEPS_LOCAL_SIZE=x", "number"]),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], words: list[str]):
    with pytest.raises(UsageError) as caught:
        env.resolve(environ)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-005,9],gpu1", "node003"),
        ("node[7,9]", "node7"),
        ("rack[2-3]n[10-12].cluster", "rack2n10.cluster"),
        ("a-b[01-02]", "a-b01"),
    ],
)
def test_the_first_host_of_a_list(text: str, host: str):
    assert clusters.first_host(text) == host


@pytest.mark.parametrize(("text", "tasks"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("4,1(x2)", [4, 1, 1])])
def test_tasks_of_each_node(text: str, tasks: list[int]):
    assert clusters.tasks_per_node(text) == tasks
