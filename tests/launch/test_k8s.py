"""The Kubernetes manifests say what they mean: what belongs together agrees, exit codes decide, commands are real."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest
import tyro

from dtrain import cli, env, errors
from tests.launch.manifests import GONE, JOB, K8S, POD, Tree, jobs_of, pet, planted, pod_of, pods, read


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
