"""The commands of the Kubernetes manifests, run as pods would run them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain import checkpoint, errors
from dtrain.ps import keys
from tests.launch.manifests import Pod, Tree, jobs_of, pet, pod_of, pods, read


def mounted(folder: Path, made: Path, volume: Tree, *, mode: int, group: int | None = None) -> Path:
    """A Secret as a kubelet mounts it: links to links to files of one owner and mode."""
    data = folder / "..2026_01_01_00_00_00.1"
    data.mkdir(parents=True)
    (folder / "..data").symlink_to(data.name)
    for item in volume["secret"]["items"]:
        file = data / item["path"]
        file.write_bytes((made / item["key"]).read_bytes())
        file.chmod(mode)
        if group is not None:
            os.chown(file, 0, group)
        (folder / item["path"]).symlink_to(Path("..data", item["path"]))
    return folder


def test_mounted_keys_are_read_by_the_user_of_the_image(tmp_path: Path):
    """With fsGroup the kubelet adds 0440 to the mode, and leaves the files to root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    keys.make(tmp_path / "made")
    for role, job in jobs_of(read("parameter-server")).items():
        pod = pod_of(job)
        volume, user = next(v for v in pod["volumes"] if "secret" in v), pod["securityContext"]
        mode = volume["secret"]["defaultMode"] | 0o440
        mounted(tmp_path / "keys" / role, tmp_path / "made", volume, mode=mode, group=user["fsGroup"])
    code = (
        "import os, sys; from pathlib import Path; from dtrain.ps import keys; os.chdir(sys.argv[1]);"
        "user, group = map(int, sys.argv[2:]); os.setgroups([group]); os.setgid(group); os.setuid(user);"
        "[keys.load(Path(role), role) for role in ('server', 'worker')]"
    )
    words = [str(tmp_path / "keys"), str(user["runAsUser"]), str(user["runAsGroup"])]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


class Cluster:
    """One host that runs pods as processes, in place of many."""

    def __init__(self, folder: Path, jobset: Tree) -> None:
        self.folder, self.jobset = folder, jobset
        self.addresses: dict[str, str] = {}
        self.running: list[subprocess.Popen[str]] = []
        self.over = threading.Event()
        keys.make(folder / "made")
        for role, job in jobs_of(jobset).items():
            volume = next(v for v in pod_of(job)["volumes"] if "secret" in v)
            mounted(folder / role / "keys", folder / "made", volume, mode=0o400)

    def start(self, role: str, *more: str, restart: int = 0) -> list[subprocess.Popen[str]]:
        return [self._start(role, pod, more) for pod in pods(self.jobset, role, restart=restart)]

    def _start(self, role: str, pod: Pod, more: tuple[str, ...]) -> subprocess.Popen[str]:
        (self.folder / "tmp").mkdir(exist_ok=True)
        mounts = {"/keys": self.folder / role / "keys", "/runs": self.folder / "runs", "0.0.0.0:5555": "127.0.0.1:0"}
        places = {**self.addresses, **{path: str(local) for path, local in mounts.items()}}

        def here(text: str) -> str:
            for name, local in places.items():
                text = text.replace(name, local)
            return text

        environ = {name: here(text) for name, text in pod.environ.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "dtrain", *map(here, pod.args), *more],
            env={"PATH": os.environ["PATH"], "TMPDIR": str(self.folder / "tmp"), **environ},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(process)
        return process

    def ready(self, servers: list[subprocess.Popen[str]]) -> None:
        """Wait until all listen; then look again and again whether they do, as the kubelet's probe."""
        self.addresses = {}
        subdomain = self.jobset["spec"]["network"]["subdomain"]
        for pod, server in zip(pods(self.jobset, "server"), servers, strict=True):
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"listening at tcp://(\S+) for 2 workers", line)
            assert found, line
            self.addresses[f"{pod.name}.{subdomain}:5555"] = found[1]
        threading.Thread(target=self._probe, args=(list(self.addresses.values()),)).start()

    def _probe(self, addresses: list[str]) -> None:
        while not self.over.wait(0.2):
            for address in addresses:
                host, _, port = address.rpartition(":")
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                    pass

    def await_checkpoint(self) -> None:
        deadline = time.monotonic() + 60
        while not checkpoint.steps(self.folder / "runs/digits/checkpoints"):
            assert time.monotonic() < deadline, [p.poll() for p in self.running]
            time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, read("parameter-server"))
    yield made
    made.over.set()
    for process in made.running:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=90)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(300)  # two attempts of four processes each, which all import torch
def test_the_parameter_servers_commands_run(cluster: Cluster):
    """SIGTERM to all workers, as preStop holds the servers back; then the next attempt, which goes on to the end."""
    servers = cluster.start("server")
    cluster.ready(servers)
    workers = cluster.start("worker", "--epochs=200", "--no-progress")
    cluster.await_checkpoint()
    for worker in workers:
        worker.terminate()
    stopped = ends(workers)
    assert [code for code, _ in stopped] == [errors.Preempted.exit_code] * 2, stopped
    assert [code for code, _ in ends(servers)] == [0, 0]

    reached = checkpoint.steps(cluster.folder / "runs/digits/checkpoints")[-1]
    servers = cluster.start("server", restart=1)
    cluster.ready(servers)
    workers = cluster.start("worker", f"--steps={reached + 2}", "--no-progress", restart=1)
    results = ends(workers) + ends(servers)
    assert [code for code, _ in results] == [0, 0, 0, 0], results
    summary = json.loads((cluster.folder / "runs/digits/summary.json").read_text())
    assert (summary["backend"], summary["workers"], summary["steps"]) == ("ps", 2, reached + 2)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_trainers_commands_run(tmp_path: Path):
    """Both nodes on this host."""
    trainer = read("allreduce")["spec"]["trainer"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [arg.replace("/runs/", f"{tmp_path}/") for arg in trainer["args"]]
    more = [*trainer["command"][1:], *args, "--steps=4", "--no-progress"]
    command = [sys.executable, "-m", "torch.distributed.run", *more]
    kept = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen(
            command,
            env={**kept, **pet(trainer, node, "127.0.0.1", port)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(trainer["numNodes"])
    ]
    try:
        results = ends(nodes)
    finally:
        for node in nodes:
            node.terminate()
            node.wait(30)
    assert [code for code, _ in results] == [0, 0], results
    summary = json.loads((tmp_path / "digits-allreduce" / "summary.json").read_text())
    assert (summary["backend"], summary["workers"], summary["steps"]) == ("allreduce", 2, 4)
