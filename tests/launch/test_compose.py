"""compose.yaml: what it says is Compose's, every process finds its place, and the job that it describes trains.

Containers are emulated: a host for each (`benchmarks/hosts.py`), with the names, the secrets, the commands and the
environment that the file gives it.
"""

from __future__ import annotations

import copy
import functools
import graphlib
import importlib
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import tyro
import zmq
from safetensors.torch import load_file

from dtrain import cli, env
from dtrain.ps import keys as curve

jsonschema: Any = pytest.importorskip("jsonschema", reason="no jsonschema: pip install -e '.[dev]'")
yaml: Any = pytest.importorskip("yaml", reason="no PyYAML: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "compose.json").read_text(encoding="utf-8"))

sys.path.insert(0, str(ROOT / "benchmarks"))
emulated: ModuleType = importlib.import_module("hosts")
sys.path.remove(str(ROOT / "benchmarks"))

Compose = dict[str, Any]


def read(**variables: str) -> Compose:
    """The file, as Compose reads it with these variables."""
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], text)
    assert "$" not in filled
    return dict(yaml.safe_load(filled))


def words(service: Mapping[str, Any]) -> list[str]:
    """What comes after `dtrain`, the image's entry point."""
    return shlex.split(service["command"])


def named(compose: Compose, start: str) -> list[str]:
    return [name for name in compose["services"] if name.startswith(start)]


# --- the schema


def faults(compose: Compose) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(compose)]


def test_the_schema_is_one_and_the_file_keeps_to_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert faults(read()) == []


def planted(change: Callable[[Compose], object]) -> Compose:
    compose = copy.deepcopy(read())
    change(compose)
    return compose


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["services"]["worker-0"].update(cap_dorp=["ALL"]), "services/worker-0: Additional"),
        (lambda c: c["services"]["worker-0"].update(read_only="yes"), "services/worker-0/read_only"),
        (lambda c: c["services"]["worker-0"].update(shm_size="1 gigabyte"), "services/worker-0/shm_size"),
        (lambda c: c["services"]["worker-0"].update(stop_grace_period="60"), "services/worker-0/stop_grace_period"),
        (lambda c: c["services"]["worker-0"].update(volumes=["runs"]), "services/worker-0/volumes/0"),
        (lambda c: c["services"]["worker-0"]["environment"].update(RANK=0), "services/worker-0/environment/RANK"),
        (lambda c: c["services"]["worker-0"]["depends_on"].update({"server-0": {}}), "'condition' is a required"),
        (
            lambda c: c["services"]["worker-0"]["depends_on"]["server-0"].update(condition="service_ready"),
            "services/worker-0/depends_on/server-0/condition",
        ),
        (lambda c: c["services"]["server-0"]["healthcheck"].update(test="dtrain health"), "healthcheck/test"),
        (lambda c: c["services"]["server-0"]["healthcheck"].update(test=["dtrain", "health"]), "healthcheck/test/0"),
        (lambda c: c["services"]["server-0"]["healthcheck"].update(start_interval=2), "healthcheck/start_interval"),
        (lambda c: c["services"]["server-0"].pop("image"), "'image' is a required"),
        (lambda c: c["services"].update({"server 2": {}}), "services: Additional|services: 'server 2'"),
        (lambda c: c["networks"]["job"].update(internal="true"), "networks/job/internal"),
        (lambda c: c["secrets"]["server.secret"].update(mode="0400"), "secrets/server.secret: Additional"),
        (lambda c: c["secrets"]["server.secret"].pop("file"), "'file' is a required"),
        (lambda c: c.update(version=3), "'version' does not match"),
        (lambda c: c.pop("services"), "'services' is a required"),
    ],
)
def test_a_planted_error_is_found(change: Callable[[Compose], object], said: str):
    found = faults(planted(change))
    assert any(re.search(said, fault) for fault in found), found


def test_what_is_named_is_there():
    compose = read()
    for name, service in compose["services"].items():
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service["secrets"]) <= set(compose["secrets"]), name
        assert set(service.get("depends_on", ())) <= set(compose["services"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(compose["volumes"]), name


# --- places


def test_all_are_shut_in():
    compose = read()
    assert compose["networks"]["job"]["internal"]
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "ports" not in service, name
        told = "server.secret" in service["secrets"], "worker.secret" in service["secrets"]
        assert told == ((False, True) if name.startswith("worker") else (True, False)), name


def test_every_process_finds_its_place():
    compose = read()
    workers, servers = named(compose, "worker-"), named(compose, "server-")
    ranks = []
    for name, service in compose["services"].items():
        command, *arguments = words(service)
        parsed = tyro.cli(cli._COMMANDS[command][0], args=arguments)
        if name in workers:
            place = env.resolve(service["environment"])
            ranks.append(place.rank)
            assert place.world_size == len(workers)
            assert place.scheduler == "tcp://scheduler:9000"
            assert set(service["depends_on"]) == set(servers)
        elif name in servers:
            assert parsed.server == servers.index(name)
            assert parsed.bind.endswith(":5555")
            assert service["healthcheck"]["test"][-1].endswith(":5555")
        else:
            assert parsed.servers == len(servers)
            assert parsed.bind.endswith(":9000")
    assert ranks == list(range(len(workers)))


# --- the job


@functools.cache
def refusal() -> str | None:
    return "libzmq without CURVE" if not zmq.has("curve") else emulated.available()


class Up:
    """The containers, each on a host of its own; `/work` of all is one directory, as the volume is."""

    def __init__(self, hosts: Any, folder: Path, **variables: str) -> None:
        self._compose = read(KEYS=str(folder / "keys"), **variables)
        self._hosts = hosts
        self._work = folder / "work"
        self._services: dict[str, Any] = self._compose["services"]
        names = [f"{hosts.address(n)} {name}\n" for n, name in enumerate(self._services)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        for number, service in enumerate(self._services.values()):
            secrets = [self._compose["secrets"][name]["file"] for name in service["secrets"]]
            script = (
                f"umount /etc/hosts; mount --bind {folder / 'hosts'} /etc/hosts && "
                f"mount -t tmpfs tmpfs /run && mkdir /run/secrets && cp -p {' '.join(secrets)} /run/secrets"
            )
            hosts.run(number, ["sh", "-c", script])
        self.processes: dict[str, Any] = {}
        self._healthy: set[str] = set()

    def __enter__(self) -> Up:
        """In the order of `depends_on`; whoever is to be healthy is asked until it is."""
        order = graphlib.TopologicalSorter({n: s.get("depends_on", {}) for n, s in self._services.items()})
        for name in order.static_order():
            for other, wish in self._services[name].get("depends_on", {}).items():
                if wish["condition"] == "service_healthy":
                    self._await_health(other)
            arguments = [word.replace("/work", str(self._work)) for word in words(self._services[name])]
            self.processes[name] = self._start(name, arguments)
        return self

    def __exit__(self, *_: object) -> None:
        inside = [c for p in self.processes.values() if not p.ended for c in psutil.Process(p.popen.pid).children()]
        for process in self.processes.values():
            process.kill()
        psutil.wait_procs(inside, timeout=10)  # the next ones need their ports

    def _await_health(self, name: str) -> None:
        if name in self._healthy:
            return
        kind, program, *arguments = self._services[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "dtrain")
        deadline = time.monotonic() + 60
        while (asked := self._start(name, arguments)).wait(30):
            assert time.monotonic() < deadline, asked.said() + self.processes[name].said()
            assert not self.processes[name].ended, self.processes[name].said()
        self._healthy.add(name)

    def _start(self, name: str, arguments: list[str]) -> Any:
        place = {**self._services[name]["environment"], "DTRAIN_LOG_LEVEL": "warning"}
        host = list(self._services).index(name)
        return self._hosts.start(host, [sys.executable, "-m", "dtrain", *arguments], place, name=name)

    def stop(self, start: str) -> None:
        """SIGTERM for those whose name begins so, and not for the program that has taken each to its host."""
        for name, process in self.processes.items():
            if name.startswith(start):
                for child in psutil.Process(process.popen.pid).children():
                    child.send_signal(signal.SIGTERM)

    def codes(self, start: str) -> list[int]:
        """How those whose name begins so have ended."""
        return [process.wait(120) for name, process in self.processes.items() if name.startswith(start)]

    def said(self) -> str:
        return "\n".join(f"{name}: {process.said()}" for name, process in self.processes.items())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_job_trains_stops_and_goes_on(tmp_path: Path):
    """`up`, `stop`, and `up` with --resume: the weights are those of one run in one process, to the bit."""
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    curve.make(tmp_path / "keys")
    run = tmp_path / "work" / "run"
    job = "digits --epochs 8"  # long enough to be stopped in the midst of it
    with emulated.hosts(len(read()["services"]), rate="1gbit") as hosts:
        with Up(hosts, tmp_path, RUN=job) as up:
            deadline = time.monotonic() + 120
            while not (run / "metrics.jsonl").exists():
                assert time.monotonic() < deadline, up.said()
                time.sleep(0.05)
            up.stop("worker")
            assert up.codes("worker") == [75] * 4, up.said()
            assert "refused" not in up.said()
        assert any((run / "checkpoints").iterdir())
        with Up(hosts, tmp_path, RUN=job) as up:
            for start, count in (("worker", 4), ("server", 2), ("scheduler", 1)):
                assert up.codes(start) == [0] * count, up.said()
            assert "dtrain: resuming" in up.said()
    alone = tmp_path / "alone"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *shlex.split(job), "--backend", "threads", "-n", "4", "--run-dir", str(alone), "--quiet"])
    assert not stop.value.code
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
