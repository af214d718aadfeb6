"""The Kubernetes manifests: they fit the schemas, say what they mean, and their commands run as pods would run them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from dtrain import checkpoint, cli, env, errors
from dtrain.ps import keys

Tree = dict[str, Any]

K8S = Path(__file__).parents[2] / "launch" / "k8s"
SCHEMAS = {
    "JobSet": "jobset.json",
    "TrainJob": "trainjob.json",
    "PersistentVolumeClaim": "core.json#/$defs/persistentVolumeClaim",
}
NAMES = ["runs", "allreduce", "parameter-server"]

# -- files and schemas ------------------------------------------------------------------------------------------------


class Strict(yaml.SafeLoader):
    """As kubectl reads: a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"twice in one mapping: {twice} {node.start_mark}"
        return super().construct_mapping(node, deep)


def read(name: str) -> Tree:
    document = yaml.load((K8S / f"{name}.yaml").read_text(), Loader=Strict)  # noqa: S506  (a safe loader)
    assert isinstance(document, dict)
    return json.loads(json.dumps(document))  # what an anchor stands for is a copy of its own, as for the server


def complaints(document: Tree) -> list[str]:
    """What the schemas have to say against it."""
    files = sorted((Path(__file__).parent / "schemas").glob("*.json"))
    registry = Registry().with_resources([(f.name, Resource.from_contents(json.loads(f.read_text()))) for f in files])
    validator = Draft202012Validator(
        {"$ref": SCHEMAS[document["kind"]]}, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


GONE = object()
JOB, POD = "spec.replicatedJobs.0.template.spec", "spec.replicatedJobs.0.template.spec.template.spec"
PATCH = "spec.runtimePatches.0.trainingRuntimeSpec.template.spec.replicatedJobs.0"


def planted(name: str, path: str, value: object) -> Tree:
    """The file with something else at that place."""
    document = copy.deepcopy(read(name))
    at: Any = document
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in way:
        at = at[part]
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return document


@pytest.mark.parametrize("name", NAMES)
def test_the_files_fit_the_schemas(name: str):
    assert complaints(read(name)) == []


def test_no_file_is_left_out():
    assert sorted(path.stem for path in K8S.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "path", "value", "says"),
    [
        ("runs", "spec.accessModes", "ReadWriteMany", "is not of type 'array'"),
        ("runs", "spec.resources.requests.storage", "10 GB", "'10 GB'"),
        ("parameter-server", "apiVersion", "jobset.x-k8s.io/v1alpha1", "was expected"),
        ("parameter-server", "metadata.name", GONE, "'name' is a required property"),
        ("parameter-server", "metadata.name", "Digits_1", "does not match"),
        ("parameter-server", "metadata.annotations.dtrain/workers", 2, "is not of type 'string'"),
        ("parameter-server", "spec.failurePolicy.maxRestart", 3, "'maxRestart' was unexpected"),
        ("parameter-server", "spec.failurePolicy.rules.0.action", "Restart", "is not one of"),
        ("parameter-server", "spec.failurePolicy.rules.0.name", "for-good", "does not match"),
        ("parameter-server", "spec.failurePolicy.rules.0.onJobFailureReasons", ["ExitCode"], "is not one of"),
        ("parameter-server", "spec.failurePolicy.rules.0.onJobFailureMessagePatterns", ["(64"], "is not a 'regex'"),
        ("parameter-server", "spec.replicatedJobs.1.dependsOn.0.status", "Running", "is not one of"),
        ("parameter-server", "spec.replicatedJobs.1.name", GONE, "'name' is a required property"),
        ("parameter-server", f"{JOB}.completions", "two", "is not of type 'integer'"),
        ("parameter-server", f"{JOB}.backofLimit", 0, "'backofLimit' was unexpected"),
        ("parameter-server", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", [0], "less than the minimum"),
        ("parameter-server", f"{JOB}.podFailurePolicy.rules.0.onPodConditions", [], "is valid under each of"),
        ("parameter-server", f"{JOB}.podFailurePolicy.rules.1.onPodConditions.0.status", True, "is not one of"),
        ("parameter-server", f"{POD}.restartPolicy", "OnFailure", "'Never' was expected"),
        ("parameter-server", f"{POD}.containers.0.args.4", 2, "is not of type 'string'"),
        ("parameter-server", f"{POD}.containers.0.env.1.value", 2, "is not of type 'string'"),
        ("parameter-server", f"{POD}.containers.0.ports.0.containerPort", "5555", "is not of type 'integer'"),
        ("parameter-server", f"{POD}.containers.0.resources.limits.memory", "2GB", "is not valid under any"),
        ("parameter-server", f"{POD}.volumes.0.secret.defaultMode", "0400", "is not of type 'integer'"),
        ("parameter-server", f"{POD}.volumes.0.secret.items.0.path", GONE, "'path' is a required property"),
        ("allreduce", "spec.runtimeRef.name", GONE, "'name' is a required property"),
        ("allreduce", "spec.trainer.numNode", 2, "'numNode' was unexpected"),
        ("allreduce", "spec.trainer.numProcPerNode", "auto", "is not of type 'integer'"),
        ("allreduce", "spec.trainer.env.0.name", "PET_NNODES", "should not be valid under"),
        ("allreduce", "spec.podTemplateOverrides", [], "'podTemplateOverrides' was unexpected"),
        ("allreduce", "spec.runtimePatches.0.manager", "me", "does not match"),
        ("allreduce", f"{PATCH}.name", "worker", "'node' was expected"),
        ("allreduce", f"{PATCH}.template.spec.template.spec.containers.0.env", [], "'env' was unexpected"),
    ],
)
def test_an_error_is_caught(name: str, path: str, value: object, says: str):
    found = complaints(planted(name, path, value))
    assert any(says in complaint for complaint in found), found


# -- meaning ----------------------------------------------------------------------------------------------------------


def jobs_of(jobset: Tree) -> dict[str, Tree]:
    return {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}


def pod_of(job: Tree) -> Tree:
    return job["template"]["spec"]


def expect(said: object, meant: object, what: str) -> None:
    assert said == meant, f"{what}: {said!r}, and it should be {meant!r}"


def check_volumes(pod: Tree) -> None:
    mounts = pod["containers"][0]["volumeMounts"]
    expect(sorted(m["name"] for m in mounts), sorted(v["name"] for v in pod["volumes"]), "volumes that are mounted")
    expect(len({m["mountPath"] for m in mounts}), len(mounts), "mount paths that differ")
    for volume in pod["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            expect(claim["claimName"], read("runs")["metadata"]["name"], "the claim")
        if secret := volume.get("secret"):
            text = (K8S / "parameter-server.yaml").read_text()
            made = re.findall(r"dtrain keys (\w+) && kubectl create secret generic (\S+) --from-file=(\w+)", text)
            expect([("mykeys", secret["secretName"], "mykeys")], made, "the secret")


def check_user(pod: Tree) -> None:
    user, own = pod["securityContext"], pod["containers"][0]["securityContext"]
    expect((user["runAsNonRoot"], user["runAsUser"], user["runAsGroup"]), (True, 10001, 10001), "the user")
    expect(user["fsGroup"], user["runAsGroup"], "the group of the volumes")  # else the keys cannot be read
    expect((own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]), (False, True), "what is confined")
    expect(own["capabilities"], {"drop": ["ALL"]}, "capabilities")


def check_jobset(jobset: Tree) -> None:
    """Whether what belongs together agrees."""
    jobs, spec = jobs_of(jobset), jobset["spec"]
    expect(list(jobs), ["server", "worker"], "the jobs, in this order")
    expect(spec["successPolicy"], {"operator": "All", "targetReplicatedJobs": ["worker"]}, "success")
    order = [None, [{"name": "server", "status": "Ready"}]]
    expect([job.get("dependsOn") for job in spec["replicatedJobs"]], order, "order")
    for job in jobs.values():
        expect((job["completionMode"], job["backoffLimit"]), ("Indexed", 0), "mode, and pods that may fail")
        expect(job["parallelism"], job["completions"], "pods at a time")
        check_volumes(pod_of(job))
        check_user(pod_of(job))
    longest = f"{jobset['metadata']['name']}-worker-0-{jobs['worker']['completions'] - 1}-abcde"
    assert len(longest) <= 63, f"{longest} is too long for a pod"

    server = pod_of(jobs["server"])
    container, command = server["containers"][0], parsed(pods(jobset, "server")[0].args)
    expect(command.bind, "tcp://0.0.0.0:5555", "the servers' address")
    port = int(command.bind.rpartition(":")[2])
    expect(container["ports"], [{"containerPort": port}], "the port")
    expect(container["readinessProbe"]["tcpSocket"]["port"], port, "the port of the probe")
    rest_s = server["terminationGracePeriodSeconds"] - container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert rest_s >= 10, f"{rest_s} s are left to the server to end"
    hosts = [f"{pod.name}.{spec['network']['subdomain']}" for pod in pods(jobset, "server")]
    environ = pods(jobset, "worker")[0].environ
    expect(environ["DTRAIN_SERVERS"].split(","), [f"tcp://{host}:{port}" for host in hosts], "servers")
    expect(int(environ["WORLD_SIZE"]), jobs["worker"]["completions"], "WORLD_SIZE")
    expect(environ["DTRAIN_JOB_ID"], pods(jobset, "server")[0].environ["DTRAIN_JOB_ID"], "the job's id")
    for number, pod in enumerate(pods(jobset, "server")):
        told = parsed(pod.args)
        expect((told.server, told.servers), (number, jobs["server"]["completions"]), "server of servers")
        expect(told.workers, jobs["worker"]["completions"], "workers")
    for number, pod in enumerate(pods(jobset, "worker", restart=3)):
        place = env.resolve(pod.environ)
        expect((place.rank, place.restart, place.keys), (number, 3, "/keys"), "a worker's place")
        assert env.in_job(pod.environ), "a worker would start workers of its own"


def test_what_belongs_together_agrees():
    check_jobset(read("parameter-server"))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("metadata.name", "other", "servers"),
        ("spec.network.subdomain", "other", "servers"),
        ("spec.successPolicy.targetReplicatedJobs", ["workers"], "success"),
        ("spec.replicatedJobs.1.dependsOn", GONE, "order"),
        ("spec.replicatedJobs.1.dependsOn.0.name", "servers", "order"),
        ("spec.replicatedJobs.1.template.spec.completions", 3, "pods at a time"),
        (f"{JOB}.backoffLimit", 6, "pods that may fail"),
        (f"{POD}.containers.0.args.1", "--bind=tcp://127.0.0.1:5555", "the servers' address"),
        (f"{POD}.containers.0.args.2", "--server=0", "server of servers"),
        (f"{POD}.containers.0.args.4", "3", "server of servers"),
        (f"{POD}.containers.0.args.6", "3", "workers"),
        (f"{POD}.containers.0.args.0", "serve", "there is no command"),
        (f"{POD}.containers.0.args.3", "--num-servers", "no such flag"),
        (f"{POD}.containers.0.readinessProbe.tcpSocket.port", 5556, "the port of the probe"),
        (f"{POD}.containers.0.lifecycle.preStop.sleep.seconds", 60, "left to the server"),
        (f"{POD}.containers.0.volumeMounts.0.name", "key", "volumes that are mounted"),
        (f"{POD}.volumes.0.secret.secretName", "keys", "the secret"),
        (f"{POD}.securityContext.fsGroup", GONE, "fsGroup"),
        (f"{POD}.securityContext.runAsUser", 0, "the user"),
    ],
)
def test_a_contradiction_is_caught(path: str, value: object, says: str):
    with pytest.raises((AssertionError, KeyError), match=says):
        check_jobset(planted("parameter-server", path, value))


def fate(jobset: Tree, exit_code: int, *, drained: bool = False) -> str:
    """What becomes of the JobSet when a worker ends so: its Job's rules in the controller's words, then its own."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(jobs_of(jobset)["worker"]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if exit_code in rule.get("onExitCodes", {}).get("values", []):
            found = f"Container dtrain for pod ns/p failed with exit code {exit_code}"
        elif drained and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            found = "Pod ns/p has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{found} matching FailJob rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def codes(kind: type[errors.DtrainError]) -> set[int]:
    return {kind.exit_code}.union(*(codes(sub) for sub in kind.__subclasses__()))


def test_exit_codes_decide():
    jobset = read("parameter-server")
    for_good = {e.exit_code for e in (errors.UsageError, errors.DataError, errors.ProtocolError, errors.KeyRefused)}
    saved = {errors.Preempted.exit_code}
    counted = {errors.DtrainError.exit_code, errors.CommError.exit_code}
    assert for_good | saved | counted | {0} == codes(errors.DtrainError), "an exit code that the files know nothing of"
    assert {fate(jobset, code) for code in for_good} == {"FailJobSet"}
    assert {fate(jobset, code) for code in saved} == {"RestartJobSetAndIgnoreMaxRestarts"}
    assert {fate(jobset, code) for code in counted | {128 + signal.SIGKILL}} == {"RestartJobSet"}
    assert fate(jobset, 128 + signal.SIGTERM, drained=True) == "RestartJobSetAndIgnoreMaxRestarts"
    policies = [job["podFailurePolicy"] for job in jobs_of(jobset).values()]
    assert policies[0] == policies[1]
    said = re.findall(r"\d\d", (K8S / "parameter-server.yaml").read_text().partition("# Exit codes")[2][:120])
    assert {int(code) for code in said} == for_good | saved, "what the first lines say"


# -- pods -------------------------------------------------------------------------------------------------------------


@dataclass
class Pod:
    """What the kubelet starts."""

    name: str
    args: list[str]
    environ: dict[str, str]


def pods(jobset: Tree, role: str, *, restart: int = 0) -> list[Pod]:
    """The pods of a replicated job, as the controllers of JobSet and Job make them."""
    name, job = jobset["metadata"]["name"], jobs_of(jobset)[role]
    container = pod_of(job)["containers"][0]
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/jobset-uid": "3c2ff1c8-7d5d-4d34-9a3a-0d4dd0f4e7b9",
        "jobset.sigs.k8s.io/restart-attempt": str(restart),
    }
    made = []
    for index in range(job["completions"]):
        environ = {entry["name"]: value(entry, labels) for entry in container["env"]}
        environ["JOB_COMPLETION_INDEX"] = str(index)  # the Job's controller adds it to each container
        args = [expanded(arg, environ) for arg in container["args"]]
        made.append(Pod(f"{name}-{role}-0-{index}", args, environ))
    return made


def value(entry: Tree, labels: dict[str, str]) -> str:
    if "value" in entry:
        return str(entry["value"])
    source = entry["valueFrom"]
    if "resourceFieldRef" in source:
        return "1"  # core, whatever is asked for
    return labels[source["fieldRef"]["fieldPath"].removeprefix("metadata.labels['").removesuffix("']")]


def expanded(text: str, environ: dict[str, str]) -> str:
    """$(NAME) as the kubelet reads it; a name that is not in the environment stays, and no flag takes it."""
    return re.sub(r"\$\((\w+)\)", lambda found: environ.get(found[1], found[0]), text)


def parsed(args: list[str]) -> Any:
    """The command that dtrain's own parser makes of it: a flag that has another name is an error."""
    assert args[0] in cli._COMMANDS, f"there is no command {args[0]}"
    try:
        return tyro.cli(cli._COMMANDS[args[0]][0], args=args[1:], console_outputs=False)
    except SystemExit:
        raise AssertionError(f"no such flag, or no such value: dtrain {' '.join(args)}") from None


def test_the_workers_command_is_real():
    for pod in pods(read("parameter-server"), "worker"):
        command = parsed(pod.args)
        assert (command.recipe, command.backend, command.auto_resume) == ("digits", "ps", True)
        assert command.run_dir.startswith("/runs/")


def test_torchrun_reads_what_the_trainer_tells(monkeypatch: pytest.MonkeyPatch):
    """Kubeflow's runtime sets PET_*; torchrun's parser takes them for its flags, and ours the rest."""
    from torch.distributed.run import get_args_parser

    trainer = read("allreduce")["spec"]["trainer"]
    for name, text in pet(trainer, 1, "digits-allreduce-node-0-0.digits-allreduce", 29500).items():
        monkeypatch.setenv(name, text)
    torchrun, *rest = [*trainer["command"], *trainer["args"]]
    read_as = get_args_parser().parse_args(rest)
    assert torchrun == "torchrun"
    assert (read_as.nnodes, read_as.nproc_per_node, int(read_as.node_rank)) == ("2", "1", 1)
    assert (read_as.master_addr, int(read_as.master_port), read_as.module, read_as.training_script) == (
        "digits-allreduce-node-0-0.digits-allreduce",
        29500,
        True,
        "dtrain",
    )
    command = parsed(read_as.training_script_args)
    assert (command.recipe, command.backend, command.auto_resume) == ("digits", "allreduce", True)
    assert command.run_dir.startswith("/runs/")


def test_the_trainers_volumes_and_user():
    pod = read("allreduce")["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = pod["template"]["spec"]["template"]["spec"]
    check_volumes(pod)
    check_user(pod)


def pet(trainer: Tree, node: int, address: str, port: int) -> dict[str, str]:
    """What Kubeflow's plugin for torch sets on a node, and the controller of its Job."""
    return {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": str(port),
        "JOB_COMPLETION_INDEX": str(node),
    }


# -- for real ---------------------------------------------------------------------------------------------------------


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
