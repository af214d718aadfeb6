"""`dtrain doctor`: what is here, and what would go wrong."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import zmq

from dtrain import env, processes
from dtrain.errors import UsageError
from dtrain.interfaces import interface_towards
from dtrain.tables import table

_SHM_MIN_BYTES = 256 * 2**20


def examine() -> dict[str, Any]:
    """Facts by name, and `problems`: sentences with what to do."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "dtrain": version("dtrain"),
        "torch": torch.__version__,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "cuda devices": torch.cuda.device_count(),
        "zeromq": zmq.zmq_version(),
        "zeromq ipc": bool(zmq.has("ipc")),
        "zeromq curve": bool(zmq.has("curve")),
        "cores": processes.cores(),
        "torch threads": torch.get_num_threads(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "shared memory MiB": _shm_mib(),
        "open files limit": _open_files(),
        "interfaces": ", ".join(_interfaces()),
        "host name resolves to": _resolved(),
        "scikit-learn": _installed("sklearn"),
        "matplotlib": _installed("matplotlib"),
        "tensorboard": _installed("tensorboard"),
        "numba": _installed("numba"),
        "C++ compiler": shutil.which("c++") or shutil.which("g++") or "none",
    }
    problems: list[str] = []
    try:
        facts["place in the job"] = _place(env.resolve())
    except UsageError as error:
        problems.append(f"launch environment: {error}")
    return facts | {"problems": problems + _problems(facts)}


def text(facts: dict[str, Any]) -> str:
    """The facts as a table, then the problems."""
    rows = [[name, _shown(value)] for name, value in facts.items() if name not in ("problems", "place in the job")]
    body = table(["what", "here"], rows, left=2)
    place = facts.get("place in the job", " unknown, see below")
    problems = [f"! {p}" for p in facts["problems"]] or ["No problem found."]
    return "\n".join([body, "", f"Place in the job, as dtrain.connect() would take it:{place}", "", *problems])


def _place(place: env.Place) -> str:
    """What something has set, a line each, and what has set it."""
    shown = [(n, who) for n, who in place.sources.items() if n not in ("launcher_fd", "job_dir")]
    rows = [[name, str(getattr(place, name)), who] for name, who in shown]
    if place.local_world_size < place.world_size and place.store is not None:
        interface = interface_towards(place.store) or "unknown: set GLOO_SOCKET_IFNAME"
        rows.append(["interface", interface, "by which the store's host is reached"])
    if not rows:
        return " alone: no launcher"
    by = "" if place.launcher is None else f" by {place.launcher}"
    return f"{by}\n\n{table(['field', 'value', 'set by'], rows, left=3)}"


def _problems(facts: dict[str, Any]) -> list[str]:
    found = []
    if not facts["gloo"]:
        found.append("this torch has no gloo: backend allreduce needs it on the processor; use ps or threads")
    if facts["cuda devices"] and not facts["nccl"]:
        found.append("CUDA devices without NCCL: backend allreduce cannot use them")
    if not facts["zeromq ipc"]:
        found.append("this ZeroMQ has no ipc:// transport: give the server a tcp://127.0.0.1:port address")
    if facts["shared memory MiB"] is not None and facts["shared memory MiB"] * 2**20 < _SHM_MIN_BYTES:
        found.append(
            f"shared memory has {facts['shared memory MiB']} MiB: DataLoader workers may fail; in Docker, --shm-size=1g"
        )
    if facts["cores"] == 1:
        found.append("one core: several workers will take turns, and speed says nothing about a cluster")
    if facts["host name resolves to"] == "nothing":
        found.append(
            f"the host name {socket.gethostname()} resolves to no address: gloo under torchrun needs one; set "
            "GLOO_SOCKET_IFNAME=lo on one host, or mend /etc/hosts"
        )
    if isinstance(facts["open files limit"], int) and facts["open files limit"] < 1024:
        found.append(f"only {facts['open files limit']} open files are allowed: ulimit -n 4096")
    if not _can_write_tmp():
        found.append(f"{tempfile.gettempdir()} is not writable: sockets of local jobs go there; set TMPDIR")
    if len(tempfile.gettempdir()) > 80:
        found.append(f"{tempfile.gettempdir()} is too long for a socket's path (107 bytes): set TMPDIR")
    return found


def _shown(value: object) -> str:
    return (
        {True: "yes", False: "no", None: "-"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
    )


def _shm_mib() -> int | None:
    path = Path("/dev/shm")  # noqa: S108  (its size is what is asked for)
    return shutil.disk_usage(path).total // 2**20 if path.is_dir() else None


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _interfaces() -> list[str]:
    return [
        f"{name} {address.address}"
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]


def _resolved() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "nothing"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _can_write_tmp() -> bool:
    try:
        with tempfile.TemporaryFile():
            return True
    except OSError:
        return False
