"""The launch environment, read in this one place.

A process finds its place in a job from the arguments it is given, then from environment variables: dtrain's own,
torchrun's, and ps-lite's `DMLC_*` as aliases. Two variables that give one field different values are an error: nothing
is guessed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from dtrain.errors import UsageError

VARIABLES: dict[str, tuple[str, ...]] = {
    "backend": ("DTRAIN_BACKEND",),
    "rank": ("RANK", "DMLC_WORKER_ID"),
    "world_size": ("WORLD_SIZE", "DMLC_NUM_WORKER"),
    "local_rank": ("LOCAL_RANK",),
    "local_world_size": ("LOCAL_WORLD_SIZE",),
    "store": ("DTRAIN_STORE",),
    "servers": ("DTRAIN_SERVERS",),
    "role": ("DTRAIN_ROLE", "DMLC_ROLE"),
    "job_id": ("DTRAIN_JOB_ID", "TORCHELASTIC_RUN_ID"),
    "restart": ("TORCHELASTIC_RESTART_COUNT",),
    "timeout_s": ("DTRAIN_TIMEOUT_S",),
    "launcher_fd": ("DTRAIN_LAUNCHER_FD",),
    "job_dir": ("DTRAIN_JOB_DIR",),
}
"""Field of `Place` -> the variables that may set it, the first being the main name."""

_PAIRS = {"store": ("MASTER_ADDR", "MASTER_PORT"), "servers": ("DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT")}
"""Fields that a host and a port variable together may set, where the field's own variable is absent."""

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_INTEGERS = {"rank", "world_size", "local_rank", "local_world_size", "restart", "launcher_fd"}


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
    """Address of the parameter server: `ipc:///path` or `tcp://host:port`."""
    role: str = "worker"
    """`worker` or `server`."""
    job_id: str = ""
    """Tells one job from another that uses the same address."""
    restart: int = 0
    """How often the launcher has restarted the job."""
    timeout_s: float | None = None
    """Longest wait for another process, in seconds."""
    launcher_fd: int | None = None
    """File descriptor that closes when the launcher dies."""
    job_dir: str | None = None
    """Directory of sockets and rendezvous files, to be removed with the job."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> the argument or the variable that set it."""

    def __post_init__(self) -> None:
        if self.role not in ("worker", "server"):
            raise UsageError(f"role is {self.role!r}: it is worker or server; dtrain needs no scheduler")
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
    environ = os.environ if environ is None else environ
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for name in VARIABLES:
        if arguments.get(name) is not None:
            values[name], sources[name] = arguments[name], "argument"
            continue
        found = _read(environ, name)
        if found:
            values[name], sources[name] = _number(name, *found), found[1]
    if values.get("world_size", 1) != 1 and "rank" not in values:
        raise UsageError(
            f"world_size is {values['world_size']} ({sources['world_size']}) and no rank is given: set RANK, or "
            "DMLC_WORKER_ID, to this worker's number"
        )
    if "local_world_size" not in values and "local_rank" not in values:
        _assume_one_host(values, environ)
    return Place(**values, sources=sources)  # type: ignore[arg-type]


def _assume_one_host(values: dict[str, object], environ: Mapping[str, str]) -> None:
    if "MASTER_ADDR" in environ or str(values.get("servers", "")).startswith("tcp://"):
        return
    values["local_rank"] = values.get("rank", 0)
    values["local_world_size"] = values.get("world_size", 1)


def _read(environ: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """(value, variable) of a field, or None. An empty variable counts as absent."""
    found = [(environ[v], v) for v in VARIABLES[name] if environ.get(v)]
    if name in _PAIRS and not found:
        host, port = _PAIRS[name]
        if environ.get(host) and environ.get(port):
            found = [(f"tcp://{environ[host]}:{environ[port]}", f"{host}, {port}")]
        elif environ.get(host) or environ.get(port):
            missing = port if environ.get(host) else host
            raise UsageError(f"{missing} is not set, but its companion is: set both {host} and {port}, or neither")
    # A job id may rightly differ: ours is inside torchrun's.
    if len({value for value, _ in found}) > 1 and name != "job_id":
        both = " and ".join(f"{variable}={value}" for value, variable in found)
        raise UsageError(f"{both} contradict each other: both set {name}; unset one")
    return found[0] if found else None


def _number(name: str, value: str, variable: str) -> object:
    try:
        if name in _INTEGERS:
            return int(value)
        return float(value) if name == "timeout_s" else value
    except ValueError:
        raise UsageError(f"{variable}={value}: {name} is a number") from None


def in_job(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher has already given this process a place (torchrun's or `dtrain launch`'s variables)."""
    environ = os.environ if environ is None else environ
    return bool(environ.get("RANK") and environ.get("WORLD_SIZE")) or bool(environ.get("DMLC_WORKER_ID"))


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
    stale |= {name for pair in _PAIRS.values() for name in pair}
    child = {k: v for k, v in os.environ.items() if k not in stale and not k.startswith("TORCHELASTIC_")}
    for name, variables in VARIABLES.items():
        value = getattr(place, name)
        if value not in (None, ""):
            child[variables[0]] = str(value)
    child.pop("TORCHELASTIC_RESTART_COUNT", None)
    child.setdefault("OMP_NUM_THREADS", str(threads))
    if loopback:
        child.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return child


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""Name of the loopback interface."""


def set_default(variable: str, value: str) -> None:
    """Set a variable of this process that a library reads, unless the user has."""
    os.environ.setdefault(variable, value)
