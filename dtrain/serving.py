"""The servers of a job that names none: the first worker on each host starts one, and all find them by the store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from dtrain import env
from dtrain.errors import ConnectError, UsageError
from dtrain.interfaces import address_towards
from dtrain.processes import Child, remove, server_command

Stop = Callable[[], None]


def own_servers(
    place: env.Place, store: dist.Store | None, *, timeout_s: float, wait_s: float
) -> tuple[str, Stop | None]:
    """Addresses of the job's servers, one on each host; and for a worker that started one, what ends it afterwards.

    On one host the server listens at a socket's file; on several, at a port that the system gives, which needs keys.

    Args:
        store: where all workers meet, all having come; None for a world of one.
        timeout_s: longest wait of a worker for another, for the server.
        wait_s: longest wait for the other hosts' servers.

    Raises:
        UsageError: several hosts without keys, or hosts with unequal numbers of workers.
        ConnectError: another host has not started its server.
    """
    hosts, rest = divmod(place.world_size, place.local_world_size)
    number, local = divmod(place.rank, place.local_world_size)
    if rest or local != place.local_rank:
        raise UsageError(
            f"worker {place.rank} is number {place.local_rank} of {place.local_world_size} on its host, in a job of "
            f"{place.world_size}: start equally many workers on each host, or start servers by hand and name them"
        )
    if hosts > 1 and place.keys is None:
        raise UsageError(
            "the workers are on several hosts, and no server is named: make keys with `dtrain keys DIR`, give them to "
            "all hosts as DTRAIN_KEYS=DIR, and each host starts a server; or start them by hand and set DTRAIN_SERVERS"
        )
    stop = None
    if local == 0:
        address, stop = _start(place, number, hosts, timeout_s)
        if store is not None:
            store.set(f"server{number}", address)
        if hosts == 1:
            return address, _keeping(store, stop)
    assert store is not None  # noqa: S101  (there is another worker)
    try:
        addresses = [store.get(f"server{n}").decode() for n in range(hosts)]
    except RuntimeError as error:
        if stop is not None:
            stop()
        raise ConnectError(
            f"worker {place.rank}: the first worker of a host came, but has not started its server within {wait_s:g} s"
        ) from error
    return ",".join(addresses), None if stop is None else _keeping(store, stop)


def _start(place: env.Place, number: int, hosts: int, timeout_s: float) -> tuple[str, Stop]:
    folder = tempfile.mkdtemp(prefix="dtrain-")
    bind = f"ipc://{folder}/server" if hosts == 1 else f"tcp://{address_towards(place.store or '', 'store')}:0"
    inner = env.Place(role="server", job_id=place.job_id, job_dir=folder, keys=place.keys)
    command = server_command(bind, place.world_size, timeout_s=timeout_s, server=number, num_servers=hosts)
    server = Child("server" if hosts == 1 else f"server {number}", command, inner)

    def stop() -> None:
        server.wait(2.0)  # it ends by itself when all workers have left
        server.stop()
        remove(folder)

    return (bind if hosts == 1 else _told_address(server, folder, stop)), stop


def _told_address(server: Child, folder: str, stop: Stop) -> str:
    """Where the server says that it listens."""
    file = Path(folder, "address")
    deadline = time.monotonic() + 30.0
    while not file.exists():
        if server.ended() or time.monotonic() > deadline:
            stop()
            raise ConnectError(f"{server} {server.how()} before it listened")
        time.sleep(0.02)
    return file.read_text(encoding="utf-8")


def leave_address(job_dir: str | None, address: str) -> None:
    """Tell whoever started this server where it listens."""
    if job_dir is not None:
        made = Path(job_dir, "address.tmp")
        made.write_text(address, encoding="utf-8")
        made.replace(Path(job_dir, "address"))


def bind_towards(scheduler: str) -> str:
    """Where a server listens that was told of a scheduler alone: at the address by which that sees this host."""
    return f"tcp://{_host_towards(scheduler)}:0"


def seen_from(scheduler: str, address: str) -> str:
    """The address at which others find a server, which may listen at all addresses of this host."""
    for everywhere in ("tcp://0.0.0.0:", "tcp://[::]:"):
        if address.startswith(everywhere):
            return f"tcp://{_host_towards(scheduler)}:{address.removeprefix(everywhere)}"
    return address


def _host_towards(scheduler: str) -> str:
    return address_towards(scheduler, "scheduler") if scheduler.startswith("tcp://") else "127.0.0.1"


def _keeping(store: dist.Store | None, stop: Stop) -> Stop:
    """`stop`, and the store kept until then: the others may still be reading."""

    def both(_: dist.Store | None = store) -> None:
        stop()

    return both
