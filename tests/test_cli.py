"""The commands: what they say of themselves, what they refuse in one line, and what `launch` passes on."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dtrain
from dtrain import cli, doctor

FLAGS = {
    "train": ["--backend", "--workers", "-n", "--steps", "--seed", "--resume", "--run-dir", "--json", "--timeout-s"],
    "compare": ["--backends", "--workers", "--global-batch", "--dtype", "--json", "--norm-batch"],
    "launch": ["--workers", "-n", "--backend", "--servers", "--timeout-s", "--threads"],
    "server": ["--bind", "--workers", "--timeout-s", "--connect-timeout-s", "--insecure-no-encryption"],
    "doctor": ["--json"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run directories go to a place of their own, and what `main` tells the logging module is forgotten."""
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def dt(capsys: pytest.CaptureFixture[str]):
    """Runs a command here; (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), re.sub(r"\x1b\[[0-9;]*m", "", out), re.sub(r"\x1b\[[0-9;]*m", "", err)

    return run


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dtrain", *arguments], capture_output=True, text=True, timeout=90)


# --- what it says of itself


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_a_command(dt, command: str):
    code, out, err = dt(command, "--help")
    assert (code, err) == (0, "")
    for flag in FLAGS[command]:
        assert re.search(rf"(^|[\s,|]){flag}\b", out), flag


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help(dt, arguments: list[str]):
    code, out, err = dt(*arguments)
    assert (code, err) == (0, "")
    assert all(command in out for command in FLAGS)
    assert "69" in out


def test_version(dt):
    assert dt("--version") == (0, f"dtrain {dtrain.__version__}\n", "")


# --- what cannot be meant: 64, and one line that says why


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "commands:"),
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        (["xyz"], "there is no command 'xyz'\n"),
        (["train", "--bakcend", "ps"], "--bakcend"),
        (["train", "mnist"], "mnist"),
        (["train", "--steps", "many"], "many"),
        (["train", "--steps"], "--steps"),
        (["train", "--dtype", "int8"], "int8"),
        (["launch", "--nosuch", "1", "x.py"], "--nosuch"),
        (["launch", "-n"], "-n"),
        (["doctor", "--yaml", "x"], "--yaml"),
    ],
)
def test_what_the_command_line_refuses(dt, arguments: list[str], words: str):
    code, out, err = dt(*arguments)
    assert code == 64
    assert words in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--backend", "nosuch"], "backend is 'nosuch'; there are solo, threads, ps, allreduce"),
        (["compare", "--backends", "ps,nosuch"], "backend is 'nosuch'"),
        (["compare", "--backends", "ps"], "two or more"),
        (["compare", "--backends", "ps,ps"], "each once"),
        (["launch", "--backend", "nosuch", "x.py"], "backend is 'nosuch'"),
        (["launch"], "nothing to launch"),
        (["launch", "-n", "2"], "nothing to launch"),
        (["launch", "-n", "0", "x.py"], "workers is 0"),
        (["launch", "--servers", "2", "x.py"], "servers 2"),
        (["launch", "--backend", "threads", "x.py"], "backend is threads, which needs no processes: call dtrain.run"),
        (["launch", "--backend", "solo", "x.py"], "backend solo is a world of one, and workers is 2: give -n 1"),
        (["launch", "nosuch.py"], "nosuch.py: there is no such script in "),
        (["train", "-n", "0"], "workers is 0"),
        (["train", "--resume"], "--resume needs --run-dir"),
        (["train", "--option", "nosuch=3"], "recipe 'digits' has no option 'nosuch'"),
        (["train", "--steps", "2", "--epochs", "3"], "epochs is 3, steps 2: give one of them"),
        (["train", "--device", "gpu"], "device is 'gpu'"),
        (["train", "--backend", "ps", "--devices", "cpu"], "--devices goes with --backend threads"),
        (["compare", "--option", "nosuch=3"], "recipe 'digits' has no option 'nosuch'"),
        (["launch", "nosuch-program"], "cannot start 'nosuch-program' as worker 0"),
        (["launch", "--backend", "ps", "/"], "cannot start '/' as worker 0"),
        (["train", "--backend", "solo", "--option", "width"], "--option width: give name=value"),
        (["train", "--backend", "solo", "--devices", "cpu"], "--devices goes with --backend threads"),
        (["train", "--backend", "solo", "--steps", "1", "--json", "/nosuch/x.json"], "--json /nosuch/x.json"),
        (["train", "--steps", "1", "--json", "/nosuch/x.json"], "--json /nosuch/x.json"),
        (["compare", "--json", "/"], "--json /"),
        (["doctor", "--json", "/nosuch/x.json"], "--json /nosuch/x.json"),
    ],
)
def test_what_a_command_refuses_in_one_line(dt, tmp_path: Path, arguments: list[str], words: str):
    code, _, err = dt(*arguments)
    assert code == 64
    assert words in err
    assert err.startswith("dtrain: ")
    assert len(err.splitlines()) == 1
    if "nosuch" in words:
        assert not (tmp_path / "runs").exists(), "refused before a directory was made"


def test_a_log_level_that_there_is_not(dt, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTRAIN_LOG_LEVEL", "chatty")
    code, _, err = dt("doctor")
    assert code == 64
    assert "DTRAIN_LOG_LEVEL=chatty" in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTRAIN_DEBUG", "1")
    with pytest.raises(dtrain.DtrainError, match="nosuch"):
        cli.main(["train", "--backend", "nosuch"])


def test_a_contradiction_in_the_environment(dt, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "DMLC_WORKER_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = dt("train", "--backend", "ps")
    assert code == 64
    assert "RANK=0 and DMLC_WORKER_ID=1 contradict each other" in err


# --- doctor


def test_doctor(dt, tmp_path: Path):
    code, out, err = dt("doctor", "--json", str(tmp_path / "facts.json"))
    assert (code, err) == (0, "")
    facts = json.loads((tmp_path / "facts.json").read_text())
    for name in ("python", "torch", "gloo", "cores", "zeromq", "shared memory MiB", "problems"):
        assert name in facts
    assert facts["gloo"] is True
    assert "torch" in out
    assert "Place in the job" in out
    assert all(problem in out for problem in facts["problems"])


def test_doctor_shows_what_something_has_set(dt, monkeypatch: pytest.MonkeyPatch):
    assert "as dtrain.connect() would take it: alone: no launcher" in dt("doctor")[1]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "DTRAIN_JOB_DIR": "/nosuch"}.items():
        monkeypatch.setenv(name, value)
    out = dt("doctor")[1]
    assert re.search(r"^  rank +1 +RANK$", out, re.M)
    assert "job_dir" not in out
    assert "default" not in out


def test_doctor_says_what_is_wrong_with_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setattr(doctor, "_can_write_tmp", lambda: False)
    monkeypatch.setattr(doctor, "_shm_mib", lambda: 64)
    problems = doctor.examine()["problems"]
    assert any("MASTER_PORT is not set" in p for p in problems)
    assert any("not writable" in p for p in problems)
    assert any("64 MiB" in p for p in problems)


# --- launch


@pytest.mark.parametrize(
    ("arguments", "own", "rest"),
    [
        (["train", "--steps", "5"], ["train", "--steps", "5"], []),
        (["launch"], ["launch"], []),
        (["launch", "x.py"], ["launch"], ["x.py"]),
        (["launch", "-n", "2", "x.py"], ["launch", "-n", "2"], ["x.py"]),
        (["launch", "-n=2", "x.py"], ["launch", "-n=2"], ["x.py"]),
        (["launch", "-n", "2", "x.py", "-n", "9", "--backend", "no"], None, ["x.py", "-n", "9", "--backend", "no"]),
        (["launch", "-n", "2", "--backend=ps", "x.py", "a"], ["launch", "-n", "2", "--backend=ps"], ["x.py", "a"]),
        (["launch", "-n", "2", "--", "--odd-program", "-x"], ["launch", "-n", "2"], ["--odd-program", "-x"]),
        (["launch", "--help"], ["launch", "--help"], []),
        (["launch", "--help", "x.py"], ["launch", "--help"], ["x.py"]),
        (["launch", "-n"], ["launch", "-n"], []),
    ],
)
def test_split_launch(arguments: list[str], own: list[str] | None, rest: list[str]):
    assert cli._split_launch(arguments) == (own or ["launch", "-n", "2"], rest)


SCRIPT = """
import os, sys
print("flags", sys.argv[1:])
print("place", os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["DTRAIN_BACKEND"])
print("threads", os.environ["OMP_NUM_THREADS"], "MASTER_ADDR" in os.environ, "DMLC_NUM_WORKER" in os.environ)
print("a complaint", file=sys.stderr)
sys.stdout.write("no newline at the end")
"""


def test_launch_passes_flags_and_prefixes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The launcher itself stands in somebody else's job: nothing of that reaches the workers."""
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("DMLC_NUM_WORKER", "9")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = in_process("launch", "-n", "2", "--threads", "3", str(script), "--flag", "x", "-n", "7", "--help")
    assert done.returncode == 0, done.stderr
    told = [
        "flags ['--flag', 'x', '-n', '7', '--help']",
        "place {rank} 2 {rank} allreduce",
        "threads 3 False False",
        "no newline at the end",
    ]
    lines = done.stdout.replace("end[worker 1]", "end\n[worker 1]").splitlines()
    first = [line for line in lines if not line.startswith("[worker 1] ")]
    second = [line.removeprefix("[worker 1] ") for line in lines if line.startswith("[worker 1] ")]
    assert first == [line.format(rank=0) for line in told]
    assert second == [line.format(rank=1) for line in told]
    assert sorted(done.stderr.splitlines()) == ["[worker 1] a complaint", "a complaint"]


def test_launch_runs_any_program():
    done = in_process("launch", "-n", "3", "--", "sh", "-c", "exit $((RANK == 2 ? 5 : 0))")
    assert done.returncode == 5
    assert re.search(
        r"dtrain: worker 2 \(pid \d+\) ended with exit code 5; stopping the other 2 processes", done.stderr
    )


def test_launch_tells_the_cause(tmp_path: Path):
    """Of a script's own error: its type, and the first line of its text."""
    script = tmp_path / "script.py"
    script.write_text(
        "import dtrain\nif dtrain.connect().rank == 1:\n    raise RuntimeError('my own bug\\nand more')\n"
    )
    done = in_process("launch", "-n", "2", str(script))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"dtrain: worker 1 \(pid \d+\) failed with RuntimeError: my own bug; stopping the other 1 process", last
    )


def test_launch_mixes_no_lines(tmp_path: Path):
    """Lines of several workers that arrive in pieces stay whole where the output is not a terminal."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "for _ in range(300):\n"
        "    for _ in range(4):\n"
        "        os.write(1, os.environ['RANK'].encode() * 10)\n"
        "    os.write(1, b'\\n')\n"
    )
    done = in_process("launch", "-n", "3", str(script))
    assert done.returncode == 0, done.stderr
    allowed = {"0" * 40, *(f"[worker {rank}] {str(rank) * 40}" for rank in (1, 2))}
    assert set(done.stdout.splitlines()) == allowed
    assert len(done.stdout.splitlines()) == 900


def test_launch_with_a_reader_that_goes_away(tmp_path: Path):
    """`dtrain launch ... | head -1`: worker 1 is not stopped by a pipe that nobody reads."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('first', flush=True)\n"
        "    [print('x' * 80, flush=True) for _ in range(20000)]\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').write('yes')\n"
    )
    command = [sys.executable, "-m", "dtrain", "launch", "-n", "2", str(script)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert child.stdout.readline() == b"[worker 1] first\n"
    child.stdout.close()
    child.wait(60)
    assert (tmp_path / "done").read_text() == "yes"


@pytest.mark.slow
def test_train_in_processes(tmp_path: Path):
    """A few steps from the outside: files, figures, exit code."""
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    done = in_process(
        "train", "digits", "--steps", "3", "--run-dir", str(run), "--json", str(figures), "--backend", "ps"
    )
    assert done.returncode == 0, done.stderr
    assert f"Run directory: {run}" in done.stdout
    assert json.loads(figures.read_text())["workers"] == 2
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "summary.json", "model.safetensors"}
