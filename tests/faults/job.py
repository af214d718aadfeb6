"""A job in processes of its own, started as a user starts it, with what is needed to see how it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

VICTIM = Path(__file__).parent / "victim.py"
_TOKEN = "TEST_TOKEN_OF_THIS_JOB"  # noqa: S105  (found again in the environment of every process of a job)


def token_of() -> str:
    """A word by which the processes of one job are known."""
    return secrets.token_hex(7)


class Job:
    """A command, and all that it starts."""

    def __init__(self, folder: Path, command: list[str], **environ: str) -> None:
        self.folder = folder
        self.token = token_of()
        self.temporary = Path(tempfile.mkdtemp(prefix="j"))
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C of ours is for the launcher alone, as in a terminal
                env={
                    **os.environ,
                    **environ,
                    **self.marked(),
                },
            )

    def marked(self) -> dict[str, str]:
        """What each process of the job has in its environment."""
        return {_TOKEN: self.token, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def alarms(self) -> str:
        """What it said but the line that every run begins with."""
        return "".join(line for line in self.err.splitlines(True) if not line.startswith("dtrain: global batch "))

    def running(self) -> list[psutil.Process]:
        """Every process that this job has started, orphans too; forked ones have the token for a name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.name() == self.token or process.environ().get(_TOKEN) == self.token
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def server(self) -> int:
        """Pid of the parameter server."""
        servers = [p.pid for p in self.running() if p.cmdline()[1:4] == ["-m", "dtrain", "server"]]
        assert len(servers) == 1, servers
        return servers[0]

    def await_steps(self, workers: int, step: int = 3, limit_s: float = 60) -> list[int]:
        """The workers' pids, once all have come to that step."""
        deadline = time.monotonic() + limit_s
        while True:
            notes = [self.folder / str(rank) for rank in range(workers)]
            found = [tuple(map(int, n.read_text().split())) for n in notes if n.exists()]
            if len(found) == workers and all(at >= step for _, at in found):
                return [pid for pid, _ in found]
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.err}"
            assert time.monotonic() < deadline, f"only at {found}\n{self.err}"
            time.sleep(0.02)

    def ends(self, within_s: float, since: float | None = None) -> int:
        """The exit code, when every process has ended and nothing is left; fails after the time."""
        since = time.monotonic() if since is None else since
        while self.process.poll() is None or self.running():
            took = time.monotonic() - since
            if took > within_s:
                left = [(p.pid, p.cmdline()[1:5], p.status()) for p in self.running()]
                pytest.fail(f"not over after {took:.1f} s: {left}\n{self.err}")
            time.sleep(0.02)
        took = time.monotonic() - since
        print(f"TOOK {took:.1f} s, ended with {self.process.returncode}\n{self.err}")  # shown where the test fails
        left = [p.name for p in self.temporary.glob("dtrain-*")]
        assert not left, f"left behind: {left}"
        return int(self.process.returncode)

    def kill(self) -> None:
        """End whatever a failed test left, so that it disturbs no other."""
        for process in self.running():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.temporary)


@contextlib.contextmanager
def started(folder: Path, command: list[str], **environ: str) -> Iterator[Job]:
    job = Job(folder, command, **environ)
    try:
        yield job
    finally:
        job.kill()


def launch(backend: str, workers: int, *script: str, timeout_s: float = 30) -> list[str]:
    """Command line of `dtrain launch`."""
    command = [sys.executable, "-m", "dtrain", "launch", "-n", str(workers), "--backend", backend]
    return [*command, "--timeout-s", str(timeout_s), *script]


def torchrun(*script: str, workers: int = 2) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return [*command, *script]
