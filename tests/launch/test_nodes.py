"""torchrun over several hosts, for real: emulated hosts, each with a network of its own, and one agent on each.

A host that is killed and comes back, and one that does not, end with the weights of the run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import dtrain
from dtrain import checkpoint
from dtrain.ps import keys
from dtrain.runs import train
from dtrain.spec import RunSpec

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))
emulated: Any = importlib.import_module("hosts")
sys.path.remove(str(SCRIPTS))

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"
slow = pytest.mark.slow


@functools.cache
def refusal() -> str | None:
    return emulated.available()


class Cluster:
    """Hosts, and the torchrun on each that belongs to one job."""

    def __init__(self, hosts: Any, folder: Path, nodes: str, train: list[str], **environ: str) -> None:
        self.hosts, self.nodes, self.train, self.environ = hosts, nodes, train, environ
        self.run = folder / "run"
        self.port = hosts.port()
        self.agents: dict[int, Any] = {}

    def start(self, host: int) -> None:
        words = ["train", *self.train, "--run-dir", str(self.run), "--auto-resume", "--quiet"]
        told = {
            "NNODES": self.nodes,
            "MASTER": f"{self.hosts.name(0)}:{self.port}",
            "NPROC": "1",
            "MAX_RESTARTS": "3",
            "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
            "PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1",  # be quick about hosts that are gone
            "OMP_NUM_THREADS": "1",
            "DTRAIN_TIMEOUT_S": "20",
            "TMPDIR": str(self.run.parent),
        }
        name = f"agent {host}"
        self.agents[host] = self.hosts.start(host, [SCRIPT, *words], {**told, **self.environ}, name=name)

    def ends(self, within_s: float) -> None:
        emulated.finish(list(self.agents.values()), timeout_s=within_s)
        assert not self.left(), "workers outlived their agent"

    def left(self) -> list[psutil.Process]:
        return [p for agent in self.agents.values() for p in family(agent.popen.pid)]

    def await_checkpoint(self, step: int, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while not [s for s in checkpoint.steps(self.run / "checkpoints") if s >= step]:
            over = [agent.said() for agent in self.agents.values() if agent.ended]
            assert not over, over
            assert time.monotonic() < deadline, [agent.said() for agent in self.agents.values()]
            time.sleep(0.02)

    def await_step(self, step: int, within_s: float = 60.0) -> None:
        """Until the log has that step."""
        log, deadline = self.run / "metrics.jsonl", time.monotonic() + within_s
        while not log.exists() or f'"step": {step}' not in log.read_text():
            assert time.monotonic() < deadline, [agent.said() for agent in self.agents.values()]
            time.sleep(0.02)

    def lose(self, host: int) -> None:
        """As if its power was cut: all processes there at once."""
        for process in family(self.agents.pop(host).popen.pid):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load_tensors(self.run / "model.safetensors")


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [process for process in [*parent.children(recursive=True), parent] if runs(process)]
    except psutil.NoSuchProcess:
        return []


def runs(process: psutil.Process) -> bool:
    """Zombies do not: nobody collects them on an emulated host."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.contextmanager
def cluster(count: int, folder: Path, nodes: str, train: list[str], **environ: str) -> Iterator[Cluster]:
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    with emulated.hosts(count, rate="1gbit") as hosts:
        yield Cluster(hosts, folder, nodes, train, **environ)


def undisturbed(folder: Path, workers: int, **spec: Any) -> dict[str, torch.Tensor]:
    """The weights of the same run, by threads in this process."""
    dtrain.run(train, RunSpec(run_dir=str(folder), progress=False, **spec), workers=workers)
    return checkpoint.load_tensors(folder / "model.safetensors")


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("of-the-job") / "keys"
    keys.make(folder)
    return folder


both = pytest.mark.parametrize("backend", ["allreduce", "ps"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("backend", ["allreduce", pytest.param("ps", marks=slow)])
def test_two_nodes(tmp_path: Path, key_folder: Path, backend: str):
    """No variable names an interface or a server: one is found, the other started on each host."""
    command = ["digits", "--steps", "10"]
    with cluster(2, tmp_path, "2", command, BACKEND=backend, DTRAIN_KEYS=str(key_folder)) as job:
        job.start(0)
        job.start(1)
        job.ends(90)
    same_bits(job.weights(), undisturbed(tmp_path / "alone", 2, steps=10))


LONG = ["digits", "--epochs", "12", "--checkpoint-every", "20", "--log-every", "5"]


@slow
@both
@pytest.mark.timeout(300)
def test_a_node_is_killed_and_comes_back(tmp_path: Path, key_folder: Path, backend: str):
    with cluster(2, tmp_path, "2", [*LONG], BACKEND=backend, DTRAIN_KEYS=str(key_folder)) as job:
        job.start(0)
        job.start(1)
        job.await_checkpoint(40)
        job.lose(1)
        job.start(1)
        job.ends(150)
        assert "resuming" in job.agents[0].said()
    same_bits(job.weights(), undisturbed(tmp_path / "alone", 2, epochs=12))


@slow
@both
@pytest.mark.timeout(300)
def test_three_nodes_become_two(tmp_path: Path, key_folder: Path, backend: str):
    """The same global batch and order of the samples: in float64 only rounding tells them apart."""
    exact = ["--dtype", "float64", "--norm-batch", "global"]
    with cluster(
        3,
        tmp_path,
        "2:3",
        [
            *LONG,
            *exact,
        ],
        BACKEND=backend,
        DTRAIN_KEYS=str(key_folder),
    ) as job:
        for host in range(3):
            job.start(host)
        job.await_checkpoint(40)
        job.lose(2)
        job.ends(150)
        assert "resuming" in job.agents[0].said() + job.agents[1].said()
    expected = undisturbed(tmp_path / "alone", 3, epochs=12, dtype="float64", norm_batch="global")
    found = job.weights()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-9


@slow
@pytest.mark.timeout(300)
def test_an_agent_is_killed_alone(tmp_path: Path):
    """Its worker ends with it: an orphan would train on, and write checkpoints, beside the new one."""
    with cluster(2, tmp_path, "2", [*LONG], BACKEND="allreduce") as job:
        job.start(0)
        job.start(1)
        job.await_checkpoint(40)
        agent = job.agents.pop(1)
        members = family(agent.popen.pid)
        psutil.Process(agent.popen.pid).children()[0].send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while alive := [process for process in members if runs(process)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.02)
        job.start(1)
        job.ends(150)
    same_bits(job.weights(), undisturbed(tmp_path / "alone", 2, epochs=12))


@slow
@pytest.mark.timeout(300)
def test_a_third_node_comes(tmp_path: Path):
    """torchrun ends all workers to start them with the new one: they are asked to, and save first."""
    exact = ["--dtype", "float64", "--norm-batch", "global"]
    command = ["digits", "--epochs", "25", "--checkpoint-every", "1000", "--log-every", "5", *exact]
    with cluster(3, tmp_path, "2:3", command, BACKEND="allreduce") as job:
        job.start(0)
        job.start(1)
        job.await_step(40)
        job.start(2)
        job.ends(150)
        assert "resuming" in job.agents[0].said()
    workers = json.loads((job.run / "summary.json").read_text())["workers"]
    assert workers == 3, "without it"
    expected = undisturbed(tmp_path / "alone", 2, epochs=25, dtype="float64", norm_batch="global")
    found = job.weights()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-9
