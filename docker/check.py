"""What holds inside the image: `docker/build.sh` runs it there, by `python - < docker/check.py`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

VENV = Path("/opt/venv")
DTRAIN = str(VENV / "bin" / "dtrain")
RUNS = Path("/work") / f"check-{os.getpid()}"


def check(holds: bool, what: str) -> None:
    """Say it, or end with it."""
    if not holds:
        sys.exit(f"not so: {what}")
    print(f"ok: {what}", flush=True)


def user() -> None:
    check((os.getuid(), os.getgid()) == (10001, 10001), "user and group are 10001")
    check(shutil.which("dtrain") == DTRAIN and Path(sys.prefix) == VENV, f"python and dtrain are those of {VENV}")
    files = [VENV, *VENV.rglob("*")]
    check(len(files) > 1000 and not any(os.access(f, os.W_OK) for f in files), f"its {len(files)} files are read-only")
    check(Path.cwd() == RUNS.parent and os.access(RUNS.parent, os.W_OK), "the working directory may be written")


def train() -> None:
    """Over the parameter server, on two workers."""
    dtrain("train", "digits", "--workers", "2", "--steps", "30", "--run-dir", str(RUNS / "one"), code=0)
    check((RUNS / "one" / "model.safetensors").exists(), "a run of 30 steps on 2 workers has left its model")


def stop() -> None:
    """SIGTERM to the process that the container was started for."""
    run = [DTRAIN, "train", "digits", "--workers", "2", "--run-dir", str(RUNS / "two"), "--no-progress"]
    child = subprocess.Popen([*run, "--epochs", "500"])
    until(lambda: (RUNS / "two" / "metrics.jsonl").exists() or child.poll() is not None)
    child.send_signal(signal.SIGTERM)
    check(child.wait(60) == 75, "a run that gets SIGTERM ends with 75")
    check(any((RUNS / "two" / "checkpoints").iterdir()), "it has saved a checkpoint")


def health() -> None:
    """The health check, with a server, a stopped one, and none."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    dtrain("health", address, "--timeout-s", "1", "--if-any", code=0)
    dtrain("health", address, "--timeout-s", "1", code=69)
    server = subprocess.Popen([DTRAIN, "server", "--bind", address, "--workers", "1"])
    try:
        dtrain("health", address, "--timeout-s", "60", code=0)
        server.send_signal(signal.SIGSTOP)
        dtrain("health", address, "--timeout-s", "1", "--if-any", code=69)
        server.send_signal(signal.SIGCONT)
        server.send_signal(signal.SIGTERM)
        check(server.wait(30) == 128 + signal.SIGTERM, "a server that gets SIGTERM ends with 143")
    finally:
        server.kill()


def dtrain(*arguments: str, code: int) -> None:
    ended = subprocess.run([DTRAIN, *arguments], timeout=120, check=False).returncode
    check(ended == code, f"dtrain {' '.join(arguments)}: {code}")


def until(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            sys.exit(f"not within {timeout_s:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        for step in (user, train, health, stop):
            step()
    finally:
        shutil.rmtree(RUNS, ignore_errors=True)
