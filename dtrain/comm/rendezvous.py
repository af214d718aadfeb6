"""Meeting through a store: everyone says who they are before the first collective, and nobody waits without a limit."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch.distributed as dist

from dtrain.errors import ConnectError, UsageError

_POLL_S = 0.02


def open_store(address: str, *, rank: int, host_it: bool, timeout_s: float, prefix: str) -> dist.Store:
    """The store at `address`, `file:///path` or `tcp://host:port`, under a prefix of our own.

    The prefix holds the job's identity and the number of restarts: after a restart by torchrun, the addresses that the
    first attempt left in a shared store are not found again.

    Args:
        host_it: whether worker 0 listens at the address itself (torchrun's agent already does).

    Raises:
        UsageError: the address is of neither form.
        ConnectError: nobody answers there, or something that is not a store.
    """
    url = urlparse(address)
    store: dist.Store
    if url.scheme == "file" and url.path:
        Path(url.path).parent.mkdir(parents=True, exist_ok=True)
        store = dist.FileStore(url.path, -1)
    elif url.scheme == "tcp" and url.hostname and url.port is not None:
        store = _tcp_store(url.hostname, url.port, is_master=host_it and rank == 0, timeout_s=timeout_s)
    else:
        raise UsageError(f"store is {address!r}: give tcp://host:port or file:///path")
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore(prefix, store)


def meet(store: dist.Store, *, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
    """Return when all workers have come and say the same of the job.

    Raises:
        ConnectError: some have not come in time; they are named.
        UsageError: another worker was started with another world size or backend.
    """
    mine = {"world_size": world_size, "backend": backend, "host": socket.gethostname(), "pid": os.getpid()}
    store.set(f"join/{rank}", json.dumps(mine))
    deadline = time.monotonic() + timeout_s
    # A job of another size joins under ranks that this one may not have: the first to come sets the tone.
    first = json.loads(store.compare_set("first", "", json.dumps({**mine, "rank": rank})))
    _compare(mine, rank, first, first["rank"])
    here: set[int] = set()
    while len(here) < world_size:
        for other in sorted(set(range(world_size)) - here):
            if store.check([f"join/{other}"]):
                _compare(mine, rank, json.loads(store.get(f"join/{other}")), other)
                here.add(other)
        if store.check(["quarrel"]):
            raise UsageError(store.get("quarrel").decode())
        if time.monotonic() > deadline:
            missing = sorted(set(range(world_size)) - here)
            raise ConnectError(
                f"worker {rank} of {world_size}: workers {missing} have not come within {timeout_s:g} s; "
                "were they started, and with the same store?"
            )
        if len(here) < world_size:
            time.sleep(_POLL_S)


def _compare(mine: dict[str, Any], rank: int, other: dict[str, Any], other_rank: int) -> None:
    for name in ("world_size", "backend"):
        if mine[name] != other[name]:
            raise UsageError(
                f"worker {rank} was started with {name} {mine[name]}, worker {other_rank} "
                f"(pid {other['pid']} on {other['host']}) with {other[name]}: start all alike"
            )


def _tcp_store(host: str, port: int, *, is_master: bool, timeout_s: float) -> dist.Store:
    """A TCPStore, given up after `timeout_s` whatever the library does: some peers make it wait for much longer."""
    result: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            limit = timedelta(seconds=timeout_s)
            result.append(dist.TCPStore(host, port, None, is_master, limit, wait_for_workers=False))
        except Exception as error:  # the library raises RuntimeError and its subclasses, not all of them public
            result.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="dtrain-store")
    thread.start()
    thread.join(timeout_s + 1)
    where = f"the store at tcp://{host}:{port}"
    if not result:
        raise ConnectError(f"{where} accepted the connection and said nothing for {timeout_s:g} s: is it a store?")
    if isinstance(result[0], Exception):
        reason = str(result[0]).strip().splitlines()[0]
        raise ConnectError(f"{where} cannot be reached, or is no store: {reason}") from result[0]
    return result[0]
