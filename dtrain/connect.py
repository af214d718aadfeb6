"""`connect`: find this process's place in its job, and join the job over the backend that was asked for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch.distributed as dist

from dtrain import env
from dtrain.comm.allreduce import AllReduce
from dtrain.comm.base import Backend
from dtrain.comm.rendezvous import gather, meet, open_store
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.interfaces import interface_towards
from dtrain.processes import end_with_launcher, print_whole_lines
from dtrain.ps.client import ParameterServer
from dtrain.ps.scheduler import lookup
from dtrain.serving import own_servers

log = logging.getLogger(__name__)

BACKENDS = ("solo", "threads", "ps", "allreduce")
"""Names of the backends that come with dtrain. An entry point in the group `dtrain.backends` adds one: a function from
`Request` to `Backend`."""

_meetings = itertools.count()  # numbers the meetings of this process: each has its own part of the store


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a backend is told."""

    place: env.Place
    """Where this process stands."""
    timeout_s: float
    """Longest wait for another process, in seconds."""
    connect_timeout_s: float
    """Longest wait for the others at the start, in seconds."""


def connect(
    backend: str | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    store: str | None = None,
    server: str | None = None,
    scheduler: str | None = None,
    lanes: str | None = None,
    timeout_s: float | None = None,
    connect_timeout_s: float | None = None,
) -> Backend:
    """Join the job: one call, on every worker.

    What is not given comes from the environment (`DTRAIN_*`, torchrun's variables, `DMLC_*`); without any, this is a
    job of one worker. The resolved place is logged at level info (`DTRAIN_LOG_LEVEL=info`).

    Args:
        backend: `solo`, `ps`, `allreduce`, or the name of an entry point. Default: `allreduce`, alone `solo`.
        rank: this worker's number, from 0.
        world_size: number of workers.
        store: where workers of `allreduce` meet: `tcp://host:port` or `file:///path`.
        server: where the parameter server of `ps` is: `ipc:///path` or `tcp://host:port`; several with commas between,
            in the same order on all workers. Under torchrun, a server on each host is started when none is named.
        scheduler: instead of `server`: where `dtrain scheduler` tells of the servers of `ps`.
        lanes: for `ps`: `auto` (the default) sends through shared memory what a server on this host can see there;
            `off` uses sockets only.
        timeout_s: longest wait for another process in any later call, in seconds; default 60.
        connect_timeout_s: longest wait for the others here, in seconds; default 30.

    Raises:
        UsageError: unknown backend, or arguments and variables that contradict each other.
        ConnectError: some workers, or the server, were not there in time.
        ProtocolError: something else than dtrain answers at the address.
    """
    place = env.resolve(
        backend=backend,
        rank=rank,
        world_size=world_size,
        store=store,
        servers=server,
        scheduler=scheduler,
        lanes=lanes,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
    )
    if place.role != "worker":
        raise UsageError(
            f"this process was started as {place.role}: run `dtrain {place.role}` instead of a training script"
        )
    name = place.backend or ("allreduce" if place.world_size > 1 else "solo")
    log.info("place in the job:\n%s", place.table())
    join = _finder(name)
    if name != "threads":
        end_with_launcher(place, f"worker {place.rank}")
        if place.world_size > 1:
            print_whole_lines()
    limit_s = 60.0 if place.timeout_s is None else place.timeout_s
    patience_s = 30.0 if place.connect_timeout_s is None else place.connect_timeout_s
    if not (limit_s > 0 and patience_s > 0):
        raise UsageError(f"timeout_s is {limit_s}, connect_timeout_s {patience_s}: give seconds, more than 0")
    return join(Request(place=place, timeout_s=limit_s, connect_timeout_s=patience_s))


def check_backend(name: str) -> None:
    """Refuse the name of a backend that there is not.

    Raises:
        UsageError: it is none of ours, and no entry point's; lists what there is.
    """
    _finder(name)


def _finder(name: str) -> Callable[[Request], Backend]:
    own: dict[str, Callable[[Request], Backend]] = {
        "solo": _solo,
        "threads": _threads,
        "ps": _ps,
        "allreduce": _allreduce,
    }
    if name in own:
        return own[name]
    others = {point.name: point for point in entry_points(group="dtrain.backends")}
    if name in others:
        loaded: Callable[[Request], Backend] = others[name].load()
        return loaded
    raise UsageError(f"backend is {name!r}; there are {', '.join([*BACKENDS, *sorted(others)])}")


def _solo(request: Request) -> Backend:
    if request.place.world_size > 1:
        raise UsageError(f"backend solo is a world of one, and world_size is {request.place.world_size}")
    return Solo()


def _threads(request: Request) -> Backend:
    raise UsageError(
        "backend threads runs all workers in one process: call dtrain.run(fn, workers=n, backend='threads') "
        "instead of dtrain.connect()"
    )


def _allreduce(request: Request) -> Backend:
    place = request.place
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (
            place.rank,
            place.world_size,
        ) and place.world_size > 1:
            raise UsageError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} in torch.distributed's group and "
                f"{place.rank} of {place.world_size} here"
            )
        return AllReduce(dist.get_rank(), dist.get_world_size(), store=None, timeout_s=request.timeout_s)
    if place.local_world_size < place.world_size and place.store is not None:
        # gloo takes the address that the host's name stands for, which may be one that no other host can reach.
        name = interface_towards(place.store)
        if name is not None:
            env.set_default("GLOO_SOCKET_IFNAME", name)
    if place.world_size == 1 and place.store is None:
        return AllReduce(0, 1, store=dist.HashStore(), timeout_s=request.timeout_s)
    return AllReduce(place.rank, place.world_size, store=_met(request, "allreduce"), timeout_s=request.timeout_s)


def _ps(request: Request) -> Backend:
    place = request.place
    keys = None if place.keys is None else Path(place.keys)
    address: str | list[str] | None = place.servers
    stop = None
    if address is None and place.scheduler is not None:
        address = lookup(place.scheduler, job_id=place.job_id, keys=keys, timeout_s=request.connect_timeout_s)
        if place.num_servers not in (None, len(address)):
            raise UsageError(
                f"num_servers is {place.num_servers}, and the scheduler at {place.scheduler} tells of "
                f"{len(address)}: start all alike"
            )
    if address is None:
        if place.world_size > 1 and place.store is None:
            raise UsageError("backend ps needs the address of its server: give server=, or set DTRAIN_SERVERS")
        store = _met(request, "ps") if place.world_size > 1 else None
        waits = {"timeout_s": request.timeout_s, "wait_s": request.connect_timeout_s}
        address, stop = own_servers(place, store, **waits)
    return ParameterServer(
        address,
        place.rank,
        place.world_size,
        job_id=place.job_id,
        incarnation=place.restart,
        timeout_s=request.timeout_s,
        connect_timeout_s=request.connect_timeout_s,
        lanes=place.lanes,
        keys=keys,
        on_close=stop,
    )


def _met(request: Request, backend: str) -> dist.Store:
    """The job's store, with everyone there."""
    place = request.place
    store = _open(request, backend)
    if place.launcher == "torchrun":
        store = gather(store, rank=place.rank, world_size=place.world_size, timeout_s=request.connect_timeout_s)
    meet(
        store,
        rank=place.rank,
        world_size=place.world_size,
        backend=backend,
        timeout_s=request.connect_timeout_s,
    )
    return store


def _open(request: Request, backend: str) -> dist.Store:
    place = request.place
    if place.store is None:
        raise UsageError(
            f"backend {backend} with {place.world_size} workers needs a place to meet: start the job with "
            "`dtrain launch` or torchrun, set MASTER_ADDR and MASTER_PORT, or give store='tcp://host:port' or "
            "'file:///path'"
        )
    attempt = "any" if place.launcher == "torchrun" else place.restart
    return open_store(
        place.store,
        rank=place.rank,
        host_it=not env.agent_hosts_store(),
        timeout_s=request.connect_timeout_s,
        prefix=f"dtrain/{place.job_id or 'job'}/{attempt}/{next(_meetings)}",
    )
