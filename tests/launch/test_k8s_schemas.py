"""The Kubernetes manifests fit the schemas, which find what is planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.launch.manifests import GONE, JOB, K8S, NAMES, PATCH, POD, Tree, planted, read

SCHEMAS = {
    "JobSet": "jobset.json",
    "TrainJob": "trainjob.json",
    "PersistentVolumeClaim": "core.json#/$defs/persistentVolumeClaim",
}


def complaints(document: Tree) -> list[str]:
    """What the schemas have to say against it."""
    files = sorted((Path(__file__).parent / "schemas").glob("*.json"))
    registry = Registry().with_resources([(f.name, Resource.from_contents(json.loads(f.read_text()))) for f in files])
    validator = Draft202012Validator(
        {"$ref": SCHEMAS[document["kind"]]}, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


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
