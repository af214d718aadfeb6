"""Jobs on this host: `run` for a function, `launch` for a command; n workers, and the server where one is needed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from dtrain import env
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.comm.threads import run_threads
from dtrain.connect import connect
from dtrain.errors import CommError, DtrainError, UsageError
from dtrain.processes import Child, cores, left_code, remove, server_command
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
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `fn(comm, *args)` as each of `workers` workers on this host; what they returned, in worker order.

    With `threads`, in this process. With `ps` and `allreduce`, in processes: `fn` and `args` must be importable there
    (a function of a module), and a script that calls this needs `if __name__ == "__main__":`.

    Args:
        backend: `solo`, `threads`, `ps` or `allreduce`.
        devices: for `threads`, the device of each worker, as `comm.device`.
        timeout_s: longest wait of a worker for another, in seconds.

    Raises:
        DtrainError: what the first worker to fail raised, where it is one of dtrain's errors.
        RuntimeError: another error in a worker, with its traceback.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}: a job has at least one")
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
        return _run_processes(fn, args, workers, backend, folder, timeout_s)


@dataclass(frozen=True)
class _Task:
    """What a worker's process is told."""

    backend: str
    rank: int
    workers: int
    folder: str
    timeout_s: float
    threads: int

    def join(self) -> Backend:
        server = f"ipc://{self.folder}/server" if self.backend == "ps" else None
        env.set_default("GLOO_SOCKET_IFNAME", env.LOOPBACK)
        return connect(
            self.backend,
            rank=self.rank,
            world_size=self.workers,
            store=f"file://{self.folder}/store",
            server=server,
            timeout_s=self.timeout_s,
        )


def _run_processes(
    fn: Callable[..., T], args: tuple[object, ...], workers: int, backend: str, folder: str, timeout_s: float
) -> list[T]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    threads = max(1, cores() // workers)
    ends: list[Connection] = []
    processes: list[Any] = []
    try:
        if backend == "ps":
            processes.append(context.Process(target=_serve, args=(folder, workers, timeout_s), daemon=True))
        for rank in range(workers):
            ours, theirs = context.Pipe()
            task = _Task(backend, rank, workers, folder, timeout_s, threads)
            processes.append(context.Process(target=_work, args=(fn, args, task, theirs), daemon=False))
            ends.append(ours)
            processes[-1].start()
            theirs.close()
        if backend == "ps":
            processes[0].start()
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
                answers[rank] = _answer(ends[rank])
            elif processes[rank].exitcode is not None and not ends[rank].poll():
                answers[rank] = ("died", _how(processes[rank].exitcode))
        if give_up_at == float("inf") and any(kind != "result" for kind, _ in answers.values()):
            give_up_at = time.monotonic() + _GRACE_S
    _raise_cause(answers)
    return [answers[rank][1] for rank in range(len(ends))]


def _answer(end: Connection) -> tuple[str, Any]:
    try:
        kind, value = end.recv()
        end.send("received")
    except (EOFError, OSError):
        return "died", "ended without an answer"
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
    _end_with_parent()
    torch.set_num_threads(task.threads)
    comm = None
    try:
        comm = task.join()
        answer: tuple[str, Any] = ("result", fn(comm, *args))
    except Exception as error:
        answer = ("error", (_sendable(error), traceback.format_exc()))
    end.send(answer)
    if end.poll(30.0):  # tensors are handed over while this process still lives
        end.recv()
    if comm is not None:
        comm.close()


def _serve(folder: str, workers: int, timeout_s: float) -> None:
    """The server's process."""
    _end_with_parent()
    server = Server(f"ipc://{folder}/server", workers, timeout_s=timeout_s)
    try:
        server.run()
    except DtrainError:
        pass  # the workers have been told
    finally:
        server.close()


def _sendable(error: Exception) -> Exception | None:
    """The error, if it is one of ours and so can be rebuilt on the other side."""
    return type(error)(str(error)) if isinstance(error, DtrainError) else None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
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


def launch(
    command: Sequence[str], *, workers: int, backend: str, timeout_s: float = 60.0, threads: int | None = None
) -> int:
    """Run a command as each of `workers` workers, with the environment that `dtrain.connect()` reads.

    Worker 0 prints where this process does; the others' lines begin with their name. At the first failure the rest has
    a few seconds to end by itself, then it is ended; what failed first is named on stderr.

    Args:
        command: program and arguments; `sys.executable` and a script, say.
        backend: `ps` starts a server beside the workers.
        timeout_s: longest wait of a worker for another.
        threads: processor threads for each worker; by default the cores are shared out.

    Returns:
        Exit code: 0, or that of the first failure (69 where a process was killed; 130 after Ctrl-C, 143 after SIGTERM).
    """
    folder = tempfile.mkdtemp(prefix="dtrain-")
    job = _Job(folder, workers, backend, timeout_s, threads or max(1, cores() // workers))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {n: signal.signal(n, lambda number, _: job.interrupt(number)) for n in numbers}
    try:
        job.start(command)
        return job.follow()
    except _Signalled as caught:
        print(f"dtrain: {signal.Signals(caught.number).name}: stopping {workers} workers", file=sys.stderr)
        return 128 + caught.number
    finally:
        job.stop()
        remove(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Job:
    """The processes of one launch."""

    def __init__(self, folder: str, workers: int, backend: str, timeout_s: float, threads: int) -> None:
        self._folder = folder
        self._workers = workers
        self._backend = backend
        self._timeout_s = timeout_s
        self._threads = threads
        self._children: list[Child] = []
        self._signal = 0

    def interrupt(self, number: int) -> None:
        """Make `start` or `follow` end soon: a signal's handler that raised could lose a child just being started."""
        self._signal = self._signal or number

    def _look(self) -> None:
        if self._signal:
            raise _Signalled(self._signal)

    def start(self, command: Sequence[str]) -> None:
        job_id = secrets.token_hex(8)
        address = f"ipc://{self._folder}/server" if self._backend == "ps" else None
        if address:
            place = env.Place(role="server", job_id=job_id, job_dir=self._folder)
            argv = server_command(address, self._workers, timeout_s=self._timeout_s)
            self._children.append(Child("server", argv, place))
        for rank in range(self._workers):
            self._look()
            place = env.Place(
                backend=self._backend,
                rank=rank,
                world_size=self._workers,
                local_rank=rank,
                local_world_size=self._workers,
                store=f"file://{self._folder}/store",
                servers=address,
                job_id=job_id,
                job_dir=self._folder,
                timeout_s=self._timeout_s,
            )
            child = Child(f"worker {rank}", command, place, threads=self._threads, prefix_output=rank > 0)
            self._children.append(child)

    def follow(self) -> int:
        """Wait for all; the exit code of the job."""
        while True:
            bad = [c for c in self._children if c.ended() and c.process.returncode != 0]
            if bad:
                return self._explain(bad)
            if all(c.ended() for c in self._children):
                return 0
            self._look()
            time.sleep(0.05)

    def stop(self) -> None:
        """End whatever still runs."""
        running = [c for c in self._children if not c.ended()]
        for child in running:
            child.signal(signal.SIGTERM if not child.stopped() else signal.SIGKILL)
        deadline = time.monotonic() + 2.0
        for child in running:
            child.wait(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            child.stop(grace_s=0.0)

    def _explain(self, bad: list[Child]) -> int:
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not all(c.ended() or c.stopped() for c in self._children):
            self._look()
            time.sleep(0.05)
        # Whoever ends with 69 complains about somebody else: look for the one who does not, or who is stopped.
        everyone = [c for c in self._children if c.ended() and c.process.returncode != 0]
        own = [c for c in bad + everyone if self._code(c) != CommError.exit_code]
        stopped = [c for c in self._children if not c.ended() and c.stopped()]
        early = [c for c in self._children if c.process.returncode == 0]
        culprit = (own or stopped or early or bad)[0]
        rest = len([c for c in self._children if c is not culprit])
        print(
            f"dtrain: {culprit} {culprit.how()}; stopping the other {rest} processes",
            file=sys.stderr,
            flush=True,
        )
        code = self._code(culprit)
        return code if code > 0 else CommError.exit_code

    def _code(self, child: Child) -> int:
        """Its exit code, or the one that fits the error which ended its script; 0 while it runs."""
        code = child.process.returncode
        return (code == 1 and left_code(self._folder, child.name)) or code or 0
