"""The Kubernetes manifests as the API server, the controllers and the kubelet read them."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]

K8S = Path(__file__).parents[2] / "launch" / "k8s"
NAMES = ["runs", "allreduce", "parameter-server"]


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


def jobs_of(jobset: Tree) -> dict[str, Tree]:
    return {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}


def pod_of(job: Tree) -> Tree:
    return job["template"]["spec"]


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
