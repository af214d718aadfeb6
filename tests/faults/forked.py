"""Jobs whose processes are forked from one that has imported everything: a start costs milliseconds, not seconds.

The launcher is a process of its own and dtrain's own code; only where it would start a new Python, the process is
forked instead. Its environment, its files, its session and its signals are those that it would have had. A test says
in advance where a process is to have a fault: see `POINTS`. Nothing in dtrain knows of these.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import inspect
import json
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from tests.faults.job import Job, token_of

_PRELOADED = [
    "torch",
    "torch._dynamo",
    "dtrain",
    "dtrain.jobs",
    "dtrain.cli",
    "sklearn.datasets",
    "tests.faults.forked",
]
_FAULTS, _FOLDER = "TEST_FAULTS", "TEST_FOLDER"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a pool do not survive a fork


# -- the test's side ---------------------------------------------------------------------------------------------------


class Forked(Job):
    """A `dtrain` command in processes of its own, and all that it starts."""

    def __init__(self, folder: Path, arguments: list[str], faults: list[dict[str, Any]], **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.token = token_of()
        self.temporary = Path(tempfile.mkdtemp(prefix="j"))
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        for file in (self._out, self._err):
            file.write_text("")
        environ |= {
            **self.marked(),
            _FAULTS: json.dumps(faults),
            _FOLDER: str(folder),
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.process = _Process(
            context.Process(target=_be_launcher, args=(arguments, environ, str(folder), self.token))
        )

    def pids(self) -> dict[str, list[int]]:
        """The pids that each process of the job has had, by its name, in order."""
        found: dict[str, list[int]] = {}
        with suppress(FileNotFoundError):
            for line in (self.folder / "processes").read_text().splitlines():
                pid, who = line.split(" ", 1)
                found.setdefault(who, []).append(int(pid))
        return found

    def await_pid(self, who: str, life: int = 0, limit_s: float = 60) -> int:
        """Its pid in that life, once it has begun."""
        self.until(lambda: len(self.pids().get(who, [])) > life, limit_s, f"{who} has no life {life}")
        return self.pids()[who][life]

    def await_strike(self, who: str, limit_s: float = 60) -> float:
        """When the fault came, once it has (`time.monotonic`, which all processes of a host share)."""
        note = self.folder / f"struck-{who}"
        self.until(note.exists, limit_s, f"no fault in {who}")
        return float(note.read_text())

    def await_text(self, text: str, limit_s: float = 60) -> None:
        """Return when stderr has it."""
        self.until(lambda: text in self.err, limit_s, f"not said: {text}")

    def await_text_out(self, text: str, limit_s: float = 60) -> None:
        """Return when stdout has it."""
        self.until(lambda: text in self.out, limit_s, f"not printed: {text}")

    def until(self, true: Callable[[], bool], limit_s: float, else_: str) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            assert self.process.poll() is None or true(), f"{else_}; ended with {self.process.returncode}\n{self.err}"
            assert time.monotonic() < deadline, f"{else_}, after {limit_s:g} s\n{self.err}"
            time.sleep(0.01)


class _Process:
    """What `Job` needs of a `Popen`."""

    def __init__(self, process: Any) -> None:
        self._process = process
        process.start()
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self._process.join()

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@contextmanager
def forked(
    folder: Path, *arguments: str, faults: list[dict[str, Any]] | None = None, **environ: str
) -> Iterator[Forked]:
    """`dtrain ARGUMENTS`, with `faults`: dicts of who, at, and perhaps n, do, life (see `install`)."""
    job = Forked(folder, list(arguments), faults or [], **environ)
    try:
        yield job
    finally:
        job.kill()


# -- the job's side ----------------------------------------------------------------------------------------------------


def _be_launcher(arguments: list[str], environ: dict[str, str], folder: str, token: str) -> None:
    from dtrain import cli, processes

    os.setsid()
    _mark(token)
    os.environ.update(environ)
    tempfile.tempdir = None
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out.txt", os.O_WRONLY), (2, "err.txt", os.O_WRONLY)):
        os.dup2(os.open(Path(folder, name), flags | (os.O_CREAT if flags else 0) | os.O_APPEND, 0o600), number)
    _renew_streams()
    processes.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
        Popen=_Fork, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    install("launcher", 0)
    cli.main(arguments)


class _Fork(subprocess.Popen):  # type: ignore[type-arg]
    """A child that goes on in a copy of this process, where `Popen` would start another Python."""

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *args, **kwargs).arguments
        if given["args"][0] != sys.executable:
            return super()._execute_child(*args, **kwargs)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                code = _be_child(given)
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def _be_child(given: dict[str, Any]) -> int:
    os.setsid()
    for number, source in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[source] not in (-1, number):
            os.dup2(given[source], number)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in given["pass_fds"]:
            with suppress(OSError):
                os.close(fd)
    os.environ.clear()
    os.environ.update(given["env"])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    logging.root.handlers.clear()
    _renew_streams()
    sys.argv = list(given["args"][1:])
    who, life = _who()
    with Path(os.environ[_FOLDER], "processes").open("a") as file:
        file.write(f"{os.getpid()} {who}\n")
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    install(who, life)
    code = 0
    try:
        _run(list(given["args"]))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.last_value = error
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _run(argv: list[str]) -> None:
    from dtrain import cli

    if argv[1:3] == ["-m", "dtrain"]:
        cli.main(argv[3:])
    else:
        runpy.run_path(argv[1], run_name="__main__")


def _who() -> tuple[str, int]:
    life = int(os.environ.get("DTRAIN_RESTART", "0"))
    if os.environ.get("DTRAIN_ROLE") != "server":
        return f"worker {os.environ['RANK']}", life
    return f"server {sys.argv[sys.argv.index('--server') + 1]}", life


def _renew_streams() -> None:
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _mark(token: str) -> None:
    """Be found again by the name of the process, which forked ones inherit."""
    ctypes.CDLL(None).prctl(15, token[:15].encode(), 0, 0, 0)


# -- faults ------------------------------------------------------------------------------------------------------------


class Boom(Exception):
    """What a worker that fails by itself raises."""


def install(who: str, life: int) -> None:
    """Let this process have the faults that were asked for.

    who: `worker 1`, `server 0`, `launcher`. life: 0, or how often it had been started again. at: one of `POINTS`. n:
    which time (of a step: its number, counted from 1). do: one of `_DEEDS`, or `kill server 0`: another process.
    """
    for fault in json.loads(os.environ.get(_FAULTS, "[]")):
        if (fault["who"], fault.get("life", 0)) == (who, life):
            POINTS[fault["at"]](partial(_strike, who, fault.get("do", "kill")), fault.get("n", 1))


def _strike(who: str, deed: str) -> None:
    draft = Path(os.environ[_FOLDER], f"draft-{os.getpid()}")
    draft.write_text(str(time.monotonic()))
    draft.rename(draft.with_name(f"struck-{who}"))
    if deed.startswith("kill "):
        _kill(deed.removeprefix("kill "))
    else:
        _DEEDS[deed]()


def _kill(who: str) -> None:
    """Kill the present life of another process of the job."""
    lines = Path(os.environ[_FOLDER], "processes").read_text().splitlines()
    os.kill([int(line.split()[0]) for line in lines if line.split(" ", 1)[1] == who][-1], signal.SIGKILL)


def _boom() -> None:
    raise Boom("a bad batch")


_DEEDS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _boom,
    "hold the GIL": lambda: ctypes.PyDLL(None).sleep(1000),
    "sleep": lambda: time.sleep(0.1),
    "note": lambda: None,
}


def _counted(owner: Any, name: str, deed: Callable[[], object], n: int, *, before: bool = True) -> None:
    """Do it at the n-th call of that function, before or after it."""
    original, calls = getattr(owner, name), [0]

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        mine = calls[0] == n
        if mine and before:
            deed()
        result = original(*args, **kwargs)
        if mine and not before:
            deed()
        return result

    setattr(owner, name, wrapper)


def _at_step(deed: Callable[[], object], n: int, *, every: bool = False) -> None:
    from dtrain.trainer import Trainer

    original, done = Trainer._forward, []

    def forward(self: Trainer, micro: Any) -> Any:
        if every or (self.state.step + 1 == n and not done):
            done.append(n)
            deed()
        return original(self, micro)

    Trainer._forward = forward  # type: ignore[method-assign]


def _in_push(deed: Callable[[], object], n: int) -> None:
    """When one server has its part of that step's gradient, and the other has not; or all see it in shared memory."""
    from dtrain.ps import wire
    from dtrain.ps.client import ParameterServer
    from dtrain.ps.link import Link

    at: list[int] = []
    _at_step(lambda: at.append(n), n)
    ask, all_reduce = Link.ask, ParameterServer.all_reduce

    def asking(self: Link, kind: Any, *fields: object, **more: Any) -> None:
        ask(self, kind, *fields, **more)
        pushes = kind in (wire.Push, wire.PushShared)
        if at and (pushes or (kind in (wire.Add, wire.AddShared) and str(fields[0]).startswith("gradient/"))):
            at.clear()
            time.sleep(0.2)  # for libzmq to send it
            deed()

    def reducing(self: ParameterServer, flat: Any, key: str) -> Any:
        work = all_reduce(self, flat, key)
        if at and key.startswith("gradient/"):
            at.clear()
            deed()
        return work

    Link.ask, ParameterServer.all_reduce = asking, reducing  # type: ignore[method-assign]


def _nan(deed: Callable[[], object], n: int) -> None:
    from dtrain.trainer import Trainer

    original, done = Trainer._forward, []

    def forward(self: Trainer, micro: Any) -> Any:
        loss = original(self, micro)
        if self.state.step + 1 == n and not done:
            done.append(n)
            deed()
            return loss * float("nan")
        return loss

    Trainer._forward = forward  # type: ignore[method-assign]


def _of(
    module: str, owner: str | None, name: str, *, before: bool = True
) -> Callable[[Callable[[], object], int], None]:
    def put(deed: Callable[[], object], n: int) -> None:
        found = sys.modules.get(module) or __import__(module, fromlist=["_"])
        _counted(found if owner is None else getattr(found, owner), name, deed, n, before=before)

    return put


POINTS: dict[str, Callable[[Callable[[], object], int], None]] = {
    "join": _of("dtrain.ps.client", "ParameterServer", "_join"),
    "joined": _of("dtrain.ps.client", "ParameterServer", "_join", before=False),
    "step": _at_step,
    "every step": partial(_at_step, every=True),
    "push": _in_push,
    "nan": _nan,
    "write": _of("dtrain.checkpoint", None, "_write_file"),  # the n-th file of all checkpoints is not begun
    "commit": _of("dtrain.checkpoint", None, "commit"),  # all files are there; the checkpoint is not yet one
    "committed": _of("dtrain.checkpoint", None, "commit", before=False),
    "rejoin": _of("dtrain.ps.client", "ParameterServer", "rejoin"),
    "resume": _of("dtrain.trainer", "Trainer", "resume"),
    "summary": _of("dtrain.runs", None, "summarise_run"),
    "weights": _of("dtrain.checkpoint", None, "save_tensors", before=False),  # the final ones are on disk
    "hello": _of("dtrain.ps.members", "Members", "join"),  # of a server
    "sum": _of("dtrain.ps.server", "Server", "_sum_up"),
    "summed": _of("dtrain.ps.server", "Server", "_sum_up", before=False),
    "update": _of("dtrain.ps.holder", "Holder", "update"),
    "updated": _of("dtrain.ps.holder", "Holder", "update", before=False),
    "fetch": _of("dtrain.ps.server", "Server", "_save"),  # the optimizer's state, for a checkpoint
}
