"""`run`: a function as n workers on this host, in threads or processes, with the server where one is needed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from dtrain import env
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.comm.threads import run_threads
from dtrain.connect import connect
from dtrain.errors import CommError, DtrainError, UsageError
from dtrain.processes import cores, remove, server_addresses
from dtrain.ps.members import Terms
from dtrain.ps.server import Server

T = TypeVar("T")

_PRELOADED = ["torch", "torch._dynamo", "dtrain", "dtrain.jobs"]
"""Imported once, before workers are forked. An optimizer imports torch._dynamo when it is first used: seconds each."""

_GRACE_S = 5.0
"""How long the others may take to notice a fault by themselves and say what they saw, before they are ended."""


def run(
    fn: Callable[..., T],
    *args: object,
    workers: int = 2,
    backend: str = "threads",
    devices: Sequence[torch.device | str] | None = None,
    servers: int = 1,
    lanes: str = "auto",
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `fn(comm, *args)` as each of `workers` workers on this host; what they returned, in worker order.

    With `threads`, in this process. With `ps` and `allreduce`, in processes: `fn` and `args` must be importable there
    (a function of a module), and a script that calls this needs `if __name__ == "__main__":`.

    Args:
        backend: `solo`, `threads`, `ps` or `allreduce`.
        devices: for `threads`, the device of each worker, as `comm.device`.
        servers: for `ps`, how many servers share the work.
        lanes: for `ps`, `auto`: shared memory; `off`: sockets only.
        timeout_s: longest wait of a worker for another, in seconds.

    Raises:
        DtrainError: what the first worker to fail raised, where it is one of dtrain's errors.
        RuntimeError: another error in a worker, with its traceback.
    """
    if workers < 1 or servers < 1:
        raise UsageError(f"workers is {workers}, servers {servers}: a job has at least one")
    if servers != 1 and backend != "ps":
        raise UsageError(f"servers is {servers}, and backend {backend} has none: they go with ps")
    if not 0 < timeout_s < threading.TIMEOUT_MAX:
        raise UsageError(f"timeout_s is {timeout_s}: give seconds, more than 0")
    if backend == "threads":
        share = max(1, cores() // workers)
        return run_threads(lambda comm: fn(comm, *args), workers, devices=devices, timeout_s=timeout_s, cores=share)
    if devices is not None:
        raise UsageError(f"devices go with backend threads; with {backend}, move the model in `fn`")
    if backend == "solo":
        if workers != 1:
            raise UsageError(f"backend solo is a world of one, and workers is {workers}")
        return [fn(Solo(), *args)]
    with tempfile.TemporaryDirectory(prefix="dtrain-") as folder:
        task = _Task(backend, 0, workers, folder, timeout_s, max(1, cores() // workers), servers, lanes)
        return _run_processes(fn, args, task)


@dataclass(frozen=True)
class _Task:
    """What a worker's process is told."""

    backend: str
    rank: int
    workers: int
    folder: str
    timeout_s: float
    threads: int
    servers: int
    lanes: str

    @property
    def addresses(self) -> list[str]:
        return server_addresses(self.folder, self.servers) if self.backend == "ps" else []

    def join(self) -> Backend:
        env.set_default("GLOO_SOCKET_IFNAME", env.LOOPBACK)
        return connect(
            self.backend,
            rank=self.rank,
            world_size=self.workers,
            store=f"file://{self.folder}/store",
            server=",".join(self.addresses) or None,
            lanes=self.lanes,
            timeout_s=self.timeout_s,
        )


def _run_processes(fn: Callable[..., T], args: tuple[object, ...], task: _Task) -> list[T]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    workers = task.workers
    ends: list[Connection] = []
    processes: list[Any] = []
    try:
        servers = [
            context.Process(target=_serve, args=(task, number), daemon=True) for number in range(len(task.addresses))
        ]
        processes += servers
        for rank in range(workers):
            ours, theirs = context.Pipe()
            one = replace(task, rank=rank)
            processes.append(context.Process(target=_work, args=(fn, args, one, theirs), daemon=False))
            ends.append(ours)
            processes[-1].start()
            theirs.close()
        for server in servers:
            server.start()
        return _collect(ends, processes[-workers:])
    finally:
        for process in processes:
            _end(process)
        for end in ends:
            end.close()


def _collect(ends: list[Connection], processes: list[Any]) -> list[Any]:
    """What the workers returned; at the first failure, wait a little for what the others say, then raise the cause."""
    answers: dict[int, tuple[str, Any]] = {}
    give_up_at = float("inf")
    while len(answers) < len(ends) and time.monotonic() < give_up_at:
        waiting = [r for r in range(len(ends)) if r not in answers]
        handles: list[Any] = [ends[r] for r in waiting] + [processes[r].sentinel for r in waiting]
        multiprocessing.connection.wait(handles, timeout=0.2)
        for rank in waiting:
            if ends[rank].poll():
                answers[rank] = _answer(ends[rank], processes[rank])
            elif processes[rank].exitcode is not None and not ends[rank].poll():
                answers[rank] = ("died", _how(processes[rank].exitcode))
        if give_up_at == float("inf") and any(kind != "result" for kind, _ in answers.values()):
            give_up_at = time.monotonic() + _GRACE_S
    _raise_cause(answers)
    return [answers[rank][1] for rank in range(len(ends))]


def _answer(end: Connection, process: Any) -> tuple[str, Any]:
    try:
        kind, value = end.recv()
        end.send("received")
    except (EOFError, OSError):
        process.join(2.0)  # the pipe closes a moment before
        return "died", "ended without an answer" if process.exitcode is None else _how(process.exitcode)
    return kind, value


def _raise_cause(answers: dict[int, tuple[str, Any]]) -> None:
    """Raise what went wrong first: a death before an error of its own before a complaint about another worker."""
    died = [(rank, how) for rank, (kind, how) in sorted(answers.items()) if kind == "died"]
    errors = [(rank, value) for rank, (kind, value) in sorted(answers.items()) if kind == "error"]
    complaints = [(rank, e) for rank, (e, _) in errors if isinstance(e, CommError)]
    own = [(rank, e, text) for rank, (e, text) in errors if not isinstance(e, CommError)]
    if died:
        said = "".join(f"\n  {e}" for _, e in complaints)
        raise CommError(f"worker {died[0][0]} {died[0][1]}{said}")
    if own:
        rank, error, text = own[0]
        if isinstance(error, DtrainError):
            raise error
        raise RuntimeError(f"[worker {rank}] {text}") from error
    if complaints:
        raise complaints[0][1]


def _work(fn: Callable[..., Any], args: tuple[object, ...], task: _Task, end: Connection) -> None:
    """A worker's process."""
    _end_with_parent(task.folder)
    torch.set_num_threads(task.threads)
    comm = None
    try:
        comm = task.join()
        end.send(("result", fn(comm, *args)))
    except Exception as error:
        end.send(("error", (_sendable(error), traceback.format_exc())))
        if comm is not None:
            comm.close()  # here, where the others can be told the reason
    if end.poll(30.0):  # tensors are handed over while this process still lives
        end.recv()
    if comm is not None:
        comm.close()


def _serve(task: _Task, number: int) -> None:
    """A server's process."""
    _end_with_parent(task.folder)
    terms = Terms(world_size=task.workers, server=number, num_servers=task.servers, timeout_s=task.timeout_s)
    server = Server(task.addresses[number], terms)
    try:
        server.run()
    except DtrainError:
        pass  # the workers have been told
    finally:
        server.close()


def _sendable(error: Exception) -> Exception | None:
    """The error, if it is one of ours and so can be rebuilt on the other side."""
    return type(error)(str(error)) if isinstance(error, DtrainError) else None


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            remove(folder)
            os._exit(CommError.exit_code)

    threading.Thread(target=watch, daemon=True, name="dtrain-lifeline").start()


def _end(process: Any) -> None:
    if process.pid is None:
        return
    process.join(1.0 if process.exitcode is None else 0)
    if process.exitcode is None:
        process.kill()
        process.join(5.0)
    process.close()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
