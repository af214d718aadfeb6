"""`launch`: a command as n workers on this host, with the server where one is needed; what failed first is named."""

from __future__ import annotations

import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from dtrain import env
from dtrain.errors import CommError
from dtrain.processes import Child, cores, left_word, remove, server_command

_GRACE_S = 5.0
"""How long the others may take to notice a fault by themselves and say what they saw, before they are ended."""


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
        if culprit.ended():
            culprit.wait(0.0)  # for what it still has to say
        print(
            f"dtrain: {culprit} {self._how(culprit)}; stopping the other {rest} process{'' if rest == 1 else 'es'}",
            file=sys.stderr,
            flush=True,
        )
        code = self._code(culprit)
        return code if code > 0 else CommError.exit_code

    def _code(self, child: Child) -> int:
        """Its exit code, or the one that fits the error which ended its script; 0 while it runs."""
        code = child.process.returncode or 0
        word = left_word(self._folder, child.name) if code == 1 else None
        return word[0] if word else code

    def _how(self, child: Child) -> str:
        """How it ended, with the error where it left word of one."""
        code = self._code(child)
        word = left_word(self._folder, child.name) if code > 0 else None
        if word is None:
            return child.how()
        return f"failed with {word[1]}" + (f" (exit code {code})" if code != 1 else "")
