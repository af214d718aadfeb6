"""The launch environment, read in this one place.

A process finds its place in a job from the arguments it is given, then from environment variables: dtrain's own,
torchrun's, and ps-lite's `DMLC_*` (with BytePS's) as aliases; then from those of MPI, Slurm and Kubernetes, see
`clusters`. Two variables that give one field different values are an error: nothing is guessed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from dtrain import clusters
from dtrain.errors import UsageError

VARIABLES: dict[str, tuple[str, ...]] = {
    "backend": ("DTRAIN_BACKEND",),
    "rank": ("RANK", "DMLC_WORKER_ID"),
    "world_size": ("WORLD_SIZE", "DMLC_NUM_WORKER"),
    "num_servers": ("DMLC_NUM_SERVER",),
    "local_rank": ("LOCAL_RANK", "BYTEPS_LOCAL_RANK"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "BYTEPS_LOCAL_SIZE"),
    "store": ("DTRAIN_STORE",),
    "servers": ("DTRAIN_SERVERS",),
    "scheduler": ("DTRAIN_SCHEDULER",),
    "role": ("DTRAIN_ROLE", "DMLC_ROLE"),
    "job_id": ("DTRAIN_JOB_ID", "TORCHELASTIC_RUN_ID"),
    "restart": ("DTRAIN_RESTART", "TORCHELASTIC_RESTART_COUNT"),
    "keys": ("DTRAIN_KEYS",),
    "lanes": ("DTRAIN_LANES",),
    "timeout_s": ("DTRAIN_TIMEOUT_S",),
    "connect_timeout_s": ("DTRAIN_CONNECT_TIMEOUT_S",),
    "launcher_fd": ("DTRAIN_LAUNCHER_FD",),
    "job_dir": ("DTRAIN_JOB_DIR",),
}
"""Field of `Place` -> the variables that may set it, the first being the main name."""

_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_ROOT = ("DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT")
"""Host and port variables, which together may set a field where its own variable is absent: see `_pairs`."""

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_INTEGERS = {"rank", "world_size", "local_rank", "local_world_size", "restart", "launcher_fd", "num_servers"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in its job."""

    backend: str | None = None
    """Name of the backend, or None: the caller's default."""
    rank: int = 0
    """This worker's number, 0 to world_size - 1."""
    world_size: int = 1
    """Number of workers in the job."""
    local_rank: int = 0
    """This worker's number among those of its host."""
    local_world_size: int = 1
    """Number of workers on this host."""
    store: str | None = None
    """Where workers meet: `tcp://host:port` or `file:///path`."""
    servers: str | None = None
    """Addresses of the parameter servers, with commas between: `ipc:///path` or `tcp://host:port`."""
    scheduler: str | None = None
    """Where the scheduler listens, that tells of the servers; for itself and for those that name none."""
    num_servers: int | None = None
    """Number of servers, where something has set it."""
    role: str = "worker"
    """`worker`, `server` or `scheduler`."""
    job_id: str = ""
    """Tells one job from another that uses the same address."""
    restart: int = 0
    """How often the launcher has started this process, or the job, again."""
    keys: str | None = None
    """Directory of CURVE keys."""
    lanes: str = "auto"
    """`auto`: shared memory where both ends see the same; `off`: sockets only."""
    timeout_s: float | None = None
    """Longest wait for another process, in seconds."""
    connect_timeout_s: float | None = None
    """Longest wait for all processes to come at the start, in seconds."""
    launcher_fd: int | None = None
    """File descriptor that closes when the launcher dies."""
    job_dir: str | None = None
    """Directory of sockets and rendezvous files, to be removed with the job."""
    launcher: str | None = None
    """Who has numbered the workers: `torchrun`, `dtrain launch`, `ps-lite`, `Open MPI`, `MPI`, `Slurm`, `Kubernetes`,
    `Kubeflow`."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> the argument or the variable that set it."""

    def __post_init__(self) -> None:
        if self.role not in ("worker", "server", "scheduler"):
            raise UsageError(f"role is {self.role!r}: it is worker, server or scheduler")
        if self.world_size < 1:
            raise UsageError(f"world_size is {self.world_size}: a job has at least one worker")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank is {self.rank}, world_size {self.world_size}: ranks run from 0 to world_size - 1")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise UsageError(
                f"local_rank is {self.local_rank}, local_world_size {self.local_world_size}, world_size "
                f"{self.world_size}: they do not fit together"
            )

    def table(self) -> str:
        """One line a field: name, value and what set it."""
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "sources"]
        lines = [f"  {name:<17}{value!s:<28}{self.sources.get(name, 'default')}" for name, value in rows]
        return "\n".join(lines)


def resolve(environ: Mapping[str, str] | None = None, **arguments: object) -> Place:
    """The place of this process: `arguments` that are not None first, then the environment, then defaults.

    Raises:
        UsageError: two variables contradict each other, a value is not a number, or the numbers do not fit together.
    """
    environ = clusters.by_process(os.environ if environ is None else environ)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    pairs = _pairs(environ, arguments)
    for name in VARIABLES:
        if arguments.get(name) is not None:
            values[name], sources[name] = arguments[name], "argument"
            continue
        found = _read(environ, name, pairs)
        if found:
            values[name], sources[name] = _number(name, *found), found[1]
    if values.get("role", "worker") == "worker":
        values["launcher"] = clusters.fill(values, sources, environ)
    if values.get("world_size", 1) != 1 and "rank" not in values:
        raise UsageError(
            f"world_size is {values['world_size']} ({sources['world_size']}) and no rank is given: set RANK, or "
            "DMLC_WORKER_ID, to this worker's number"
        )
    if values.get("role", "worker") == "worker":
        _choose_servers(values, sources)
    if "local_world_size" not in values and "local_rank" not in values:
        _assume_one_host(values, environ)
    return Place(**values, sources=sources)  # type: ignore[arg-type]


def _pairs(environ: Mapping[str, str], arguments: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Field -> the host and port variables that set it, where its own variable is absent.

    ps-lite's pair names the job's scheduler when there are several servers (DMLC_NUM_SERVER is 2 or more). A single
    server needs none: the pair is its own address. Without DMLC_NUM_SERVER, the pair is the address of the process
    that listens there: the scheduler in the scheduler's own process, else the server.
    """
    role = arguments.get("role") or (_read(environ, "role", {}) or [""])[0]
    count = _read(environ, "num_servers", {})
    several = role == "scheduler" if count is None else int(str(_number("num_servers", *count))) > 1
    return {"store": _MASTER, "scheduler" if several else "servers": _ROOT}


def _choose_servers(values: dict[str, object], sources: dict[str, str]) -> None:
    """A worker finds the servers by name or by the scheduler: an argument, then dtrain's variable, then ps-lite's.

    Raises:
        UsageError: both are given, and neither counts for more.
    """
    if "servers" not in values or "scheduler" not in values:
        return
    order = ({"argument"}, {*VARIABLES["servers"], *VARIABLES["scheduler"]}, {", ".join(_ROOT)})
    first, second = ([sources[name] in kind for kind in order] for name in ("servers", "scheduler"))
    if first == second:
        raise UsageError(
            f"servers is {values['servers']} ({sources['servers']}) and scheduler {values['scheduler']} "
            f"({sources['scheduler']}): the scheduler tells where the servers are; give one of them"
        )
    dropped = "scheduler" if first > second else "servers"
    del values[dropped], sources[dropped]


def _assume_one_host(values: dict[str, object], environ: Mapping[str, str]) -> None:
    addresses = [str(values.get(name, "")) for name in ("servers", "scheduler")]
    if "MASTER_ADDR" in environ or any(address.startswith("tcp://") for address in addresses):
        return
    values["local_rank"] = values.get("rank", 0)
    values["local_world_size"] = values.get("world_size", 1)


def _read(environ: Mapping[str, str], name: str, pairs: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """(value, variable) of a field, or None. An empty variable counts as absent."""
    found = [(environ[v], v) for v in VARIABLES[name] if environ.get(v)]
    if name in pairs and not found:
        host, port = pairs[name]
        if environ.get(host) and environ.get(port):
            found = [(f"tcp://{environ[host]}:{environ[port]}", f"{host}, {port}")]
        elif environ.get(host) or environ.get(port):
            missing = port if environ.get(host) else host
            raise UsageError(f"{missing} is not set, but its companion is: set both {host} and {port}, or neither")
    # Job id and restarts may rightly differ: ours are inside torchrun's.
    if len({value for value, _ in found}) > 1 and name not in ("job_id", "restart"):
        both = " and ".join(f"{variable}={value}" for value, variable in found)
        raise UsageError(f"{both} contradict each other: both set {name}; unset one")
    return found[0] if found else None


def _number(name: str, value: str, variable: str) -> object:
    try:
        if name in _INTEGERS:
            return int(value)
        return float(value) if name in ("timeout_s", "connect_timeout_s") else value
    except ValueError:
        raise UsageError(f"{variable}={value}: {name} is a number") from None


def in_job(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher has already given this process a place among others.

    That is so with torchrun's and `dtrain launch`'s variables, and ps-lite's; and in one of several tasks of a cluster.
    """
    environ = os.environ if environ is None else environ
    if bool(environ.get("RANK") and environ.get("WORLD_SIZE")) or bool(environ.get("DMLC_WORKER_ID")):
        return True
    if environ.get("JOB_COMPLETION_INDEX") and environ.get("WORLD_SIZE", "1") != "1":
        return True
    return any(found.world_size != 1 for found in clusters.told(environ))


def agent_hosts_store() -> bool:
    """Whether torchrun's agent already listens at MASTER_ADDR:MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def debug() -> bool:
    """Whether errors are shown with their traceback (DTRAIN_DEBUG=1)."""
    return os.environ.get("DTRAIN_DEBUG", "") not in ("", "0")


def log_level() -> str:
    """Name of the log level (DTRAIN_LOG_LEVEL), `warning` by default."""
    level = (os.environ.get("DTRAIN_LOG_LEVEL") or "warning").upper()
    if level not in _LEVELS:
        raise UsageError(f"DTRAIN_LOG_LEVEL={level.lower()}: it is one of {', '.join(_LEVELS).lower()}")
    return level


def for_child(place: Place, *, threads: int, loopback: str | None) -> dict[str, str]:
    """Environment of a process that is started at `place`: this one's, with the launch variables replaced.

    Args:
        threads: processor threads for the child, unless OMP_NUM_THREADS is already set.
        loopback: name of the loopback interface for gloo, unless GLOO_SOCKET_IFNAME is already set.
    """
    stale = {name for names in VARIABLES.values() for name in names}
    stale = (stale | {*_MASTER, *_ROOT}) - {"DTRAIN_CONNECT_TIMEOUT_S"}  # a wish, which is nobody's place
    child = {k: v for k, v in os.environ.items() if k not in stale and not k.startswith("TORCHELASTIC_")}
    for name, variables in VARIABLES.items():
        value = getattr(place, name)
        if value not in (None, ""):
            child[variables[0]] = str(value)
    child.setdefault("OMP_NUM_THREADS", str(threads))
    if loopback:
        child.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return child


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""Name of the loopback interface."""


def set_default(variable: str, value: str) -> None:
    """Set a variable of this process that a library reads, unless the user has."""
    os.environ.setdefault(variable, value)
