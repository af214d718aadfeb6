"""Meeting through a store: everyone says who they are before the first collective, and nobody waits without a limit."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

import torch.distributed as dist

from dtrain.comm.peers import Peer
from dtrain.errors import ConnectError, UsageError

_POLL_S = 0.02


def open_store(address: str, *, rank: int, host_it: bool, timeout_s: float, prefix: str) -> dist.Store:
    """The store at `address`, `file:///path` or `tcp://host:port`, under a prefix of our own.

    The prefix holds the job's identity and the number of restarts, so that what an earlier attempt has left in a store
    is not found again; where the number is not the same for all, see `gather`.

    Args:
        host_it: whether worker 0 listens at the address itself (torchrun's agent already does).

    Raises:
        UsageError: the address is of neither form.
        ConnectError: nobody answers there, or something that is not a store.
    """
    url = urlparse(address)
    store: dist.Store
    try:
        port = url.port
    except ValueError:  # not a number up to 65535
        port = None
    if url.scheme == "file" and url.path:
        store = _file_store(url.path)
    elif url.scheme == "tcp" and url.hostname and port:
        store = _tcp_store(url.hostname, port, is_master=host_it and rank == 0, timeout_s=timeout_s)
    else:
        raise UsageError(f"store is {address!r}: give tcp://host:port or file:///path")
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore(prefix, store)


def gather(store: dist.Store, *, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """A part of the store that has only what those write who are here now; return when all have come.

    torchrun keeps one store for all attempts, and its agents count restarts each for themselves (not at all where a
    host comes or goes), so no name that all know is new. Worker 0 makes one up, and calls; whoever is there answers
    with a word of its own, and follows when worker 0 has repeated that word.

    Raises:
        ConnectError: some have not come in time; they are named.
    """
    deadline = time.monotonic() + timeout_s
    try:
        if rank == 0:
            return _call(store, world_size, deadline, timeout_s)
        return _answer(store, rank, world_size, deadline, timeout_s)
    except RuntimeError as error:  # from the store
        raise ConnectError(f"worker {rank} of {world_size}: the store is gone before all had come") from error


def _call(store: dist.Store, world_size: int, deadline: float, timeout_s: float) -> dist.Store:
    name = secrets.token_hex(8)
    store.set("call", json.dumps([name, world_size]))
    others = set(range(1, world_size))
    while missing := {rank for rank in others if not store.check([f"{name}/{rank}"])}:
        if time.monotonic() > deadline:
            raise ConnectError(
                f"worker 0 of {world_size}: workers {sorted(missing)} have not come {_in_time(timeout_s)}"
            )
        time.sleep(_POLL_S)
    store.set(f"{name}/all", json.dumps({rank: store.get(f"{name}/{rank}").decode() for rank in others}))
    return dist.PrefixStore(f"{name}/job", store)


def _answer(store: dist.Store, rank: int, world_size: int, deadline: float, timeout_s: float) -> dist.Store:
    word, answered = secrets.token_hex(8), ""
    while True:
        name, size = json.loads(store.get("call")) if store.check(["call"]) else ("", world_size)
        if name and size == world_size and name != answered:  # else it is an earlier attempt's
            store.set(f"{name}/{rank}", word)
            answered = name
        heard = json.loads(store.get(f"{answered}/all")) if answered and store.check([f"{answered}/all"]) else {}
        if heard.get(str(rank)) == word:  # an earlier attempt's is another
            return dist.PrefixStore(f"{answered}/job", store)
        if time.monotonic() > deadline:
            late = [r for r in range(1, world_size) if not store.check([f"{answered}/{r}"])] if answered else []
            late = late or [0]  # the call was that of an earlier attempt, and so were the answers
            raise ConnectError(f"worker {rank} of {world_size}: workers {late} have not come {_in_time(timeout_s)}")
        time.sleep(_POLL_S)


def _in_time(timeout_s: float) -> str:
    return f"within {timeout_s:g} s; were they started, and with the same store?"


def meet(store: dist.Store, *, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
    """Return when all workers have come and say the same of the job.

    Raises:
        ConnectError: some have not come in time; they are named.
        UsageError: another worker was started with another world size or backend.
    """
    mine = {"world_size": world_size, "backend": backend, "host": socket.gethostname(), "pid": os.getpid()}
    here: set[int] = set()
    try:
        _meet(store, rank, mine, here, timeout_s)
    except RuntimeError as error:  # from the store
        missing = sorted(set(range(world_size)) - here)
        raise ConnectError(
            f"worker {rank} of {world_size}: the store is gone, and workers {missing} had not come; has worker 0, "
            "which keeps it, ended?"
        ) from error


def _meet(store: dist.Store, rank: int, mine: dict[str, Any], here: set[int], timeout_s: float) -> None:
    world_size = mine["world_size"]
    deadline = time.monotonic() + timeout_s
    _claim(store, rank, mine)
    # A job of another size joins under ranks that this one may not have: the first to come sets the tone.
    first = json.loads(store.compare_set("first", "", json.dumps({**mine, "rank": rank})))
    _compare(store, mine, rank, first, first["rank"])
    while len(here) < world_size:
        for other in sorted(set(range(world_size)) - here):
            if store.check([f"join/{other}"]):
                _compare(store, mine, rank, json.loads(store.get(f"join/{other}")), other)
                here.add(other)
        if store.check(["quarrel"]):
            raise UsageError(store.get("quarrel").decode())
        if time.monotonic() > deadline:
            missing = sorted(set(range(world_size)) - here)
            raise ConnectError(f"worker {rank} of {world_size}: workers {missing} have not come {_in_time(timeout_s)}")
        if len(here) < world_size:
            time.sleep(_POLL_S)


def _claim(store: dist.Store, rank: int, mine: dict[str, Any]) -> None:
    """Take a rank that nobody has taken."""
    claim = {**mine, "token": secrets.token_hex(8)}
    holder = json.loads(store.compare_set(f"join/{rank}", "", json.dumps(claim)))
    if holder == claim:
        return
    who = f"pid {holder['pid']} on {holder['host']}"
    if Peer(holder["host"], holder["pid"]).trouble() == "has died":
        raise UsageError(f"the store was left by an earlier job, whose worker {rank} was {who}: give a new one")
    _quarrel(store, f"two workers say that they are worker {rank}, one of them {who}: give each its own rank")


def _compare(store: dist.Store, mine: dict[str, Any], rank: int, other: dict[str, Any], other_rank: int) -> None:
    for name in ("world_size", "backend"):
        if mine[name] != other[name]:
            _quarrel(
                store,
                f"worker {rank} was started with {name} {mine[name]}, worker {other_rank} "
                f"(pid {other['pid']} on {other['host']}) with {other[name]}: start all alike",
            )


def _quarrel(store: dist.Store, text: str) -> NoReturn:
    """Stop, and stop those who wait in the store."""
    store.set("quarrel", text)
    time.sleep(10 * _POLL_S)  # with worker 0, its store would be gone before the others have read this
    raise UsageError(text)


def _file_store(path: str) -> dist.Store:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return dist.FileStore(path, -1)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"store is file://{path}, and no file can be made there: {error}") from error


def _tcp_store(host: str, port: int, *, is_master: bool, timeout_s: float) -> dist.Store:
    """A TCPStore, given up after `timeout_s` whatever the library does: some peers make it wait for much longer."""
    result: list[dist.Store | Exception] = []
    deadline = time.monotonic() + timeout_s
    if not is_master:
        _await_listener(host, port, timeout_s)
    left_s = max(1.0, deadline - time.monotonic())
    listener = _listener(host, port) if is_master else None

    def connect() -> None:
        try:
            limit = timedelta(seconds=left_s)
            result.append(
                dist.TCPStore(host, port, None, is_master, limit, wait_for_workers=False, master_listen_fd=listener)
            )
        except Exception as error:  # the library raises RuntimeError and its subclasses, not all of them public
            result.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="dtrain-store")
    thread.start()
    thread.join(left_s + 1)
    where = f"the store at tcp://{host}:{port}"
    if not result:
        raise ConnectError(f"{where} accepts connections, but does not answer as a store: is it another service?")
    if isinstance(result[0], Exception):
        reason = str(result[0]).strip().splitlines()[0]
        raise ConnectError(f"{where} cannot be reached, or is no store: {reason}") from result[0]
    return result[0]


def _listener(host: str, port: int) -> int | None:
    """A socket to listen with, where the address is this host's own: the library would listen to the whole network."""
    if not (host == "localhost" or host.startswith("127.")):
        return None
    try:
        return socket.create_server((host, port)).detach()
    except OSError as error:
        raise ConnectError(f"cannot keep the store at tcp://{host}:{port}: {error.strerror}") from error


def _await_listener(host: str, port: int, timeout_s: float) -> None:
    """Return when somebody listens there. The library would retry too, but does not tell what it found."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectError(
                    f"nobody listens at tcp://{host}:{port} within {timeout_s:g} s ({error.strerror or error}): "
                    "worker 0 keeps the store there; was it started, and with this address?"
                ) from error
        time.sleep(_POLL_S)
