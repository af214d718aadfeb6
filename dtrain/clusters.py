"""What the launchers of clusters tell a process of its place: Open MPI, PMI (MPICH, Intel MPI), Slurm, Kubernetes.

Pure functions of the environment. Each launcher numbers the processes that it has started itself; one within another
(mpirun in a Slurm job, torchrun in a Kubernetes pod) numbers others, and the inner one's numbers count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.errors import UsageError

_MPI = {
    "Open MPI": {
        "rank": "OMPI_COMM_WORLD_RANK",
        "world_size": "OMPI_COMM_WORLD_SIZE",
        "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
        "local_world_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    "MPI": {
        "rank": "PMI_RANK",
        "world_size": "PMI_SIZE",
        "local_rank": "MPI_LOCALRANKID",
        "local_world_size": "MPI_LOCALNRANKS",
    },
}
"""Launcher -> field of `env.Place` -> its variable."""

_FIRST_PORT, _PORTS = 20000, 10000  # below those that Linux gives to programs that ask for any


@dataclass(frozen=True)
class Told:
    """What one launcher says."""

    launcher: str
    fields: Mapping[str, tuple[object, str]]
    """Field of `env.Place` -> its value, and the variables that told it."""

    @property
    def rank(self) -> object:
        return self.fields["rank"][0]

    @property
    def world_size(self) -> object:
        return self.fields["world_size"][0]

    def variable(self, field: str) -> str:
        """The variable of a field with its value, as messages show it."""
        value, name = self.fields[field]
        return f"{name}={value}"


def fill(values: dict[str, object], sources: dict[str, str], environ: Mapping[str, str]) -> str | None:
    """Complete what nearer variables and arguments have told of a worker's place; who has numbered the workers.

    Whoever starts processes in a cluster's task numbers them anew: torchrun and `dtrain launch` count for more, and so
    does an argument. What was set by hand must agree with a launcher that counts as many workers.

    Args:
        values: field of `env.Place` -> its value; `sources`: the argument or the variable that set it. Both are added
            to.

    Raises:
        UsageError: it does not agree; or as `told`.
    """
    inner = _inner_launcher(environ)
    if inner is not None or "argument" in (sources.get("rank"), sources.get("world_size")):
        return inner
    by_hand = {name for name in ("rank", "world_size") if name in values}
    who = "ps-lite" if sources.get("rank", "").startswith("DMLC_") else None
    for found in told(environ):
        differs = [n for n in ("rank", "world_size") if n in values and values[n] != found.fields[n][0]]
        if not differs:
            for name, (value, variable) in found.fields.items():
                values.setdefault(name, value)
                sources.setdefault(name, variable)
            who = who or found.launcher
        elif by_hand >= set(differs) and (differs == ["rank"] or len(by_hand) == 1):
            name = differs[0]
            raise UsageError(
                f"{sources[name]}={values[name]} and {found.variable(name)} contradict each other: {found.launcher} "
                f"has set {name} too; unset what was set by hand"
            )
    index = _number(environ, "JOB_COMPLETION_INDEX")  # of an indexed job, which does not tell its size
    if index is not None and "rank" not in values and values.get("world_size", 1) != 1:
        values["rank"], sources["rank"] = index, "JOB_COMPLETION_INDEX"
        return "Kubernetes"
    return who


def by_process(environ: Mapping[str, str]) -> Mapping[str, str]:
    """BytePS's variables count hosts and the processes of each; the same in ps-lite's words, which count processes.

    Raises:
        UsageError: one of them is no number.
    """
    each = _number(environ, "BYTEPS_LOCAL_SIZE")
    hosts = None if each is None else _number(environ, "DMLC_NUM_WORKER")
    if hosts is None or each is None:
        return environ
    more = {"DMLC_NUM_WORKER": str(hosts * each)}
    host, local = (_number(environ, name) for name in ("DMLC_WORKER_ID", "BYTEPS_LOCAL_RANK"))
    if host is not None and local is not None:
        more["DMLC_WORKER_ID"] = str(host * each + local)
    return {**environ, **more}


def _inner_launcher(environ: Mapping[str, str]) -> str | None:
    """The launcher that has started this very process, where it tells."""
    if environ.get("TORCHELASTIC_RUN_ID") and environ.get("RANK"):
        return "torchrun"
    return "dtrain launch" if environ.get("DTRAIN_LAUNCHER_FD") else None


def told(environ: Mapping[str, str]) -> list[Told]:
    """All launchers that have numbered this process among others, the innermost first.

    Raises:
        UsageError: a variable that is not a number where one is meant, or two launchers of one kind that contradict
            each other.
    """
    mpi = [found for launcher, names in _MPI.items() if (found := _numbered(launcher, environ, names))]
    if len({found.world_size for found in mpi}) > 1:  # one process is the shell in which the others were started
        mpi = [found for found in mpi if found.world_size != 1]
    if len(mpi) == 2 and (mpi[0].rank, mpi[0].world_size) != (mpi[1].rank, mpi[1].world_size):
        first, second = (f"{found.variable('rank')}, {found.variable('world_size')}" for found in mpi)
        raise UsageError(f"{first} and {second} contradict each other: both number the processes of mpirun; unset one")
    return [*mpi, *(found for find in (_slurm, _kubeflow) if (found := find(environ)))]


def _slurm(environ: Mapping[str, str]) -> Told | None:
    """A task of srun's: only its variables are set for a step; a batch script by itself is no task."""
    names = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
    found = _numbered("Slurm", environ, names)
    if found is None:
        return None
    fields = dict(found.fields)
    if environ.get("SLURM_STEP_TASKS_PER_NODE"):
        node, variable = _number(environ, "SLURM_NODEID") or 0, "SLURM_STEP_TASKS_PER_NODE"
        tasks = tasks_per_node(environ[variable])
        if not 0 <= node < len(tasks):
            raise UsageError(f"SLURM_NODEID={node} and {variable}={environ[variable]} contradict each other")
        fields["local_world_size"] = tasks[node], variable
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    if job is not None:
        fields["job_id"] = f"slurm-{job}", "SLURM_JOB_ID"
        if environ.get("SLURM_STEP_NODELIST"):
            host, port = first_host(environ["SLURM_STEP_NODELIST"]), _FIRST_PORT + (job + (step or 0)) % _PORTS
            fields["store"] = f"tcp://{host}:{port}", "SLURM_STEP_NODELIST, SLURM_JOB_ID"
    if (restart := _number(environ, "SLURM_RESTART_COUNT")) is not None:
        fields["restart"] = restart, "SLURM_RESTART_COUNT"
    return Told("Slurm", fields)


def _kubeflow(environ: Mapping[str, str]) -> Told | None:
    """A pod of a TrainJob: what is set for the torchrun in it, where none is used. Elastic jobs need torchrun."""
    if not environ.get("PET_NNODES", "").isdigit():
        return None
    found = _numbered("Kubeflow", environ, {"rank": "PET_NODE_RANK", "world_size": "PET_NNODES"})
    if found is None:
        return None
    if environ.get("PET_NPROC_PER_NODE", "1").isdigit() and int(environ.get("PET_NPROC_PER_NODE") or 1) > 1:
        raise UsageError(
            f"PET_NPROC_PER_NODE={environ['PET_NPROC_PER_NODE']}, and this process is alone in its pod: torchrun reads "
            "these variables and starts the others (torchrun -m dtrain train ...)"
        )
    fields = dict(found.fields)
    fields["local_rank"], fields["local_world_size"] = (0, "PET_NODE_RANK"), (1, "PET_NODE_RANK")
    if environ.get("PET_MASTER_ADDR") and environ.get("PET_MASTER_PORT"):
        address = f"tcp://{environ['PET_MASTER_ADDR']}:{environ['PET_MASTER_PORT']}"
        fields["store"] = address, "PET_MASTER_ADDR, PET_MASTER_PORT"
    return Told("Kubeflow", fields)


def _numbered(launcher: str, environ: Mapping[str, str], names: Mapping[str, str]) -> Told | None:
    """What a launcher says that has set rank and world size."""
    numbers = {field: (_number(environ, name), name) for field, name in names.items()}
    found = {field: (value, name) for field, (value, name) in numbers.items() if value is not None}
    return Told(launcher, found) if "rank" in found and "world_size" in found else None


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    text = environ.get(variable)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable}={text}: it is a number, as its launcher sets it") from None


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, written out: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        UsageError: it is of another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE={text}: tasks of each node, as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(text: str) -> str:
    """The first of Slurm's list of hosts: of `node[003-005,9],gpu1` it is node003."""
    first = re.split(r",(?![^\[]*\])", text.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
