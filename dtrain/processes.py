"""Processes of a job on this host: how they are started, and how they end when whoever started them is gone."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from dtrain import env
from dtrain.errors import CommError, DtrainError, UsageError

log = logging.getLogger(__name__)


class Child:
    """A process of the job, in a session of its own, that learns when this process dies."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        place: env.Place,
        *,
        threads: int = 1,
        prefix_output: bool = True,
        one_host: bool = True,
    ) -> None:
        """Start it.

        Args:
            name: as messages call it: `worker 1`, `server`.
            argv: the command.
            place: what it is to find in its environment.
            threads: processor threads it may use.
            prefix_output: put the name before each line that it prints; else lines are copied as they are. A terminal,
                and stderr, are then its own.
            one_host: whether the job is on this host alone, and its collectives stay on the loopback interface.
        """
        self.name = name
        read_end, self._lifeline = os.pipe()
        place = env.Place(**{**vars(place), "launcher_fd": read_end})
        # Errors without a name go straight to where ours go, and outlive this process; see `print_whole_lines`.
        targets = (
            [sys.stdout, sys.stderr] if prefix_output else [None if _is_terminal(sys.stdout) else sys.stdout, None]
        )
        out, err = (None if target is None else subprocess.PIPE for target in targets)
        try:
            self.process = subprocess.Popen(
                list(argv),
                env=env.for_child(place, threads=threads, loopback=env.LOOPBACK if one_host else None),
                pass_fds=(read_end,),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        except OSError as error:
            os.close(self._lifeline)
            raise UsageError(f"cannot start {argv[0]!r} as {name}: {error.strerror}") from error
        finally:
            os.close(read_end)
        prefix = f"[{name}] " if prefix_output else None
        sources = (self.process.stdout, self.process.stderr)
        self._pumps = [_pump(name, s, t, prefix) for s, t in zip(sources, targets, strict=True) if s and t]

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stopped(self) -> bool:
        """Whether it exists and has been stopped (SIGSTOP)."""
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        return False

    def how(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code is None:
            return "was stopped (SIGSTOP)" if self.stopped() else "still ran"
        if code == 0:
            return "ended while others still waited for it (exit code 0)"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it has started, which may have outlived it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        for pump in self._pumps:
            pump.join(1.0)
        return True

    def stop(self, *, grace_s: float = 2.0) -> None:
        """End it: gently, then for certain, and leave nothing behind."""
        if not self.ended() and not self.stopped():
            self.signal(signal.SIGTERM)
            self.wait(grace_s)
        self.signal(signal.SIGKILL)
        self.wait(5.0)
        with contextlib.suppress(OSError):
            os.close(self._lifeline)
        self._lifeline = -1


def server_addresses(folder: str, num_servers: int) -> list[str]:
    """Where the servers of a job on this host listen."""
    names = ["server"] if num_servers == 1 else [f"server{n}" for n in range(num_servers)]
    return [f"ipc://{folder}/{name}" for name in names]


def server_command(
    address: str,
    world_size: int,
    *,
    timeout_s: float,
    server: int = 0,
    num_servers: int = 1,
    on_worker_loss: str = "fail",
) -> list[str]:
    """Command line of a parameter server's process: number `server` of `num_servers`."""
    return [
        *(sys.executable, "-m", "dtrain", "server", "--bind", address),
        *("--workers", str(world_size), "--timeout-s", str(timeout_s)),
        *("--server", str(server), "--servers", str(num_servers), "--on-worker-loss", on_worker_loss),
    ]


def end_with_launcher(place: env.Place, who: str) -> None:
    """End this process, with a word of why, when the one that started it is gone."""
    fd = place.launcher_fd
    if fd is None:
        fd = _parent(place)
    if fd is None or fd in _watched:
        return
    try:
        os.set_inheritable(fd, False)
    except OSError:
        return
    _watched.add(fd)
    if place.job_dir:
        _word_files.append(_word_file(place.job_dir, who))
        atexit.register(_leave_last_word)

    def watch() -> None:
        if place.launcher_fd is None:
            select.select([fd], [], [])  # returns when the process has ended
        else:
            with contextlib.suppress(OSError):
                os.read(fd, 1)  # returns when the launcher's end closes, whatever the reason
        with contextlib.suppress(psutil.Error, OSError):
            for process in psutil.Process().children(recursive=True):
                if os.getsid(process.pid) == os.getsid(0):  # else it looks after itself, and tidies up
                    process.kill()
        message = f"dtrain: {who}: the launcher is gone; stopping\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
        remove(place.job_dir)
        os._exit(CommError.exit_code)

    threading.Thread(target=watch, daemon=True, name="dtrain-lifeline").start()


def _parent(place: env.Place) -> int | None:
    """A descriptor that is readable when the parent has ended, where that is a torchrun; one for all calls."""
    if place.launcher != "torchrun" or _parents:
        return None
    with contextlib.suppress(AttributeError, OSError):  # not on this system, or already gone
        _parents.append(os.pidfd_open(os.getppid()))
        return _parents[0]
    return None


_parents: list[int] = []
_watched: set[int] = set()  # file descriptors that a thread looks at


_GIVEN_UP = ".given-up"
_word_files: list[Path] = []  # where this process leaves word of its error


def leave_word(error: BaseException) -> None:
    """Leave the launcher, if there is one, word of the error that ends this process.

    Python ends a script with 1 whatever the error was; the word has the exit code that fits.
    """
    code = error.exit_code if isinstance(error, DtrainError) else 1
    first_line = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    for file in _word_files:
        with contextlib.suppress(OSError):
            file.write_text(f"{code}\n{_shortened(text)}", encoding="utf-8", errors="replace")


def _leave_last_word() -> None:
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException):
        leave_word(error)


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def left_word(job_dir: str, who: str) -> tuple[int, str] | None:
    """The exit code and the text of the error that ended a process, if it left word."""
    with contextlib.suppress(OSError, ValueError):
        code, text = _word_file(job_dir, who).read_text(encoding="utf-8").split("\n", 1)
        return int(code), text
    return None


def forget_word(job_dir: str, who: str) -> None:
    """Remove it: a process of this name is started again."""
    with contextlib.suppress(OSError):
        _word_file(job_dir, who).unlink()


def give_up(job_dir: str, pid: int, lost: bool) -> None:
    """Tell the launcher that a worker makes no progress and is not waited for; or that it has come again."""
    file = Path(job_dir, f"{pid}{_GIVEN_UP}")
    with contextlib.suppress(OSError):
        if lost:
            file.touch()
        else:
            file.unlink(missing_ok=True)


def given_up(job_dir: str) -> set[int]:
    """Processes that servers have given up."""
    return {int(file.name.removesuffix(_GIVEN_UP)) for file in Path(job_dir).glob(f"*{_GIVEN_UP}")}


def _word_file(job_dir: str, who: str) -> Path:
    return Path(job_dir, who.replace(" ", "-") + ".error")


def remove(job_dir: str | None) -> None:
    """Remove the job's directory of sockets and rendezvous files."""
    if job_dir and Path(job_dir).name.startswith("dtrain-"):
        shutil.rmtree(job_dir, ignore_errors=True)


def print_whole_lines() -> None:
    """Let nothing come into the middle of a line on stderr, which the processes of a job share.

    Without a buffer (`python -u`, PYTHONUNBUFFERED, as in many containers) Python writes a traceback word by word.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # somebody has replaced it, or closed it
        sys.stderr.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]


_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """Processors that this process may use: those that it may run on, and no more than its container's share."""
    try:
        here = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        here = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit: "max 100000"
        quota_us, period_us = map(int, _CPU_MAX.read_text(encoding="ascii").split())
        here = min(here, max(1, quota_us // period_us))
    return here


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _pump(name: str, source: IO[bytes], target: IO[str], prefix: str | None) -> threading.Thread:
    """Copy lines from a child, with a prefix before each; without one, it learns when nobody reads any more."""

    def copy() -> None:
        for line in source:
            text = line.decode(errors="replace").removesuffix("\n")  # the last one may lack it
            try:
                target.write(f"{prefix or ''}{text}\n")
                target.flush()
            except (OSError, ValueError):  # nobody reads any more; the others may go on
                if prefix is None:
                    break
        source.close()

    thread = threading.Thread(target=copy, daemon=True, name=f"dtrain-{name}")
    thread.start()
    return thread
