"""The commands: what they say of themselves, what they refuse in one line, and what `launch` passes on."""

from __future__ import annotations

import json
import logging
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import dtrain
from dtrain import cli, doctor

FLAGS = {
    "train": [
        *("--backend", "--workers", "-n", "--steps", "--seed", "--resume", "--run-dir", "--json", "--timeout-s"),
        *("--servers", "--lanes", "--update", "--staleness", "--backup-workers", "--damping", "--delay-compensation"),
        *("--nonfinite", "--on-worker-loss", "--max-restarts", "--early-forward"),
    ],
    "compare": ["--backends", "--workers", "--global-batch", "--dtype", "--json", "--norm-batch"],
    "plan": [
        *("--workers", "--backends", "--servers", "--batches", "--hardware", "--link-rate", "--latency-us", "--place"),
        *("--profile", "--save-profile", "--run", "--verify", "--json", "--global-batch", "--norm-batch", "--update"),
    ],
    "launch": [
        *("--workers", "-n", "--backend", "--servers", "--timeout-s", "--threads", "--on-worker-loss"),
        "--max-restarts",
    ],
    "server": [
        *("--bind", "--workers", "--server", "--servers", "--timeout-s", "--connect-timeout-s", "--on-worker-loss"),
        "--scheduler",
        *("--threads", "--credit-mb", "--keys", "--metrics-port", "--insecure-no-encryption"),
    ],
    "scheduler": [
        *("--bind", "--servers", "--workers", "-n", "--timeout-s", "--idle-s", "--keys", "--insecure-no-encryption")
    ],
    "keys": ["DIR"],
    "doctor": ["--json"],
    "health": ["--timeout-s", "--keys", "--if-any"],
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
        (["train", "--update", "all"], "all"),
        (["train", "--lanes", "fast"], "fast"),
        (["train", "--nonfinite", "pray"], "pray"),
        (["launch", "--on-worker-loss", "retry", "x.py"], "retry"),
        (["keys"], "DIR"),
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
        (["launch", "--servers", "2", "x.py"], "servers is 2, and backend allreduce has none: they go with ps"),
        (["launch", "--backend", "ps", "--servers", "0", "x.py"], "servers 0"),
        (["launch", "--on-worker-loss", "wait", "x.py"], "on_worker_loss is 'wait' with backend allreduce"),
        (["launch", "--backend", "ps", "--max-restarts", "-1", "x.py"], "max_restarts is -1"),
        (["launch", "--backend", "threads", "x.py"], "backend is threads, which needs no processes: call dtrain.run"),
        (["launch", "--backend", "solo", "x.py"], "backend solo is a world of one, and workers is 2: give -n 1"),
        (["launch", "nosuch.py"], "nosuch.py: there is no such script in "),
        (["train", "-n", "0"], "workers is 0"),
        (["train", "--resume"], "--resume needs --run-dir"),
        (["train", "--option", "nosuch=3"], "recipe 'digits' has no option 'nosuch'"),
        (["train", "--steps", "2", "--epochs", "3"], "epochs is 3, steps 2: give one of them"),
        (["train", "--device", "gpu"], "device is 'gpu'"),
        (["train", "--backend", "ps", "--devices", "cpu"], "--devices goes with --backend threads"),
        (["train", "--backend", "allreduce", "--update", "server"], "update is 'server' with backend allreduce"),
        (["train", "--backend", "solo", "--update", "server"], "update is 'server' with backend solo"),
        (["train", "--staleness", "2"], "staleness is 2 with update=worker"),
        (["train", "--backup-workers", "1"], "backup_workers is 1 with update=worker"),
        (["train", "--staleness", "abc"], "staleness is 'abc': a number of steps, or `none` for no bound"),
        (["train", "--update", "server", "--staleness", "-1"], "staleness is '-1'"),
        (["train", "--update", "server", "--nonfinite", "skip"], "nonfinite is 'skip' with update=server"),
        (["train", "--update", "server", "--amp", "fp16"], "amp is fp16 with update=server"),
        (["train", "--update", "server", "--staleness", "2", "--norm-batch", "global"], "norm_batch is global"),
        (["train", "--on-worker-loss", "drop"], "on_worker_loss is 'drop'"),
        (["train", "--backend", "allreduce", "--on-worker-loss", "wait"], "with backend allreduce: it needs backend"),
        (["train", "--on-worker-loss", "wait", "--checkpoint-every", "never"], "nothing to go back to"),
        (["train", "--backend", "allreduce", "--servers", "2"], "servers is 2, and backend allreduce has none"),
        (["train", "--backend", "solo", "--servers", "2"], "servers is 2, and backend solo has none"),
        (["train", "--backend", "threads", "--servers", "2"], "servers is 2, and backend threads has none"),
        (["train", "--servers", "0"], "servers 0"),
        (["train", "--max-restarts", "-1"], "max_restarts is -1"),
        (["server", "--bind", "tcp://127.0.0.1:0", "-n", "1", "--server", "2", "--servers", "2"], "server is 2 of 2"),
        (["server", "--bind", "tcp://127.0.0.1:0", "-n", "1", "--keys", "/nosuch"], "/nosuch/server.secret"),
        (["server", "--bind", "tcp://0.0.0.0:0", "-n", "1"], "--insecure-no-encryption"),
        (["server", "-n", "1"], "no address: give --bind"),
        (["server", "-n", "1", "--scheduler", "nowhere"], "server address is 'nowhere'"),
        (["scheduler", "--servers", "2"], "no address: give --bind"),
        (["scheduler", "--bind", "tcp://127.0.0.1:0"], "servers is not given: say --servers 2, or set DMLC_NUM_SERVER"),
        (["scheduler", "--bind", "tcp://127.0.0.1:0", "--servers", "0"], "servers is 0, workers 1"),
        (["scheduler", "--bind", "tcp://0.0.0.0:0", "--servers", "2"], "--insecure-no-encryption"),
        (["scheduler", "--bind", "tcp://127.0.0.1:0", "--servers", "2", "--keys", "/nosuch"], "/nosuch/server.secret"),
        (["keys", "/nosuch/keys"], "/nosuch/keys: cannot write keys there"),
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
    if "nosuch" in words or arguments[0] == "train":
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


# --- keys


@pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")
def test_keys_are_made_once(dt, tmp_path: Path):
    folder = tmp_path / "keys"
    code, out, err = dt("keys", str(folder))
    assert (code, err) == (0, "")
    assert f"keys are in {folder}" in out
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert made.keys() == {"server.public", "server.secret", "worker.public", "worker.secret"}
    assert len(set(made.values())) == 4
    for name in ("server.secret", "worker.secret"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert made[name].decode().strip() not in out

    code, _, err = dt("keys", str(folder))
    assert code == 64
    assert "holds keys already" in err
    assert len(err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == made


def test_keys_into_a_folder_that_others_may_read(dt, tmp_path: Path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    code, _, err = dt("keys", str(folder))
    assert code == 64
    assert f"chmod 700 {folder}" in err
    assert list(folder.iterdir()) == []


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
    assert re.search(r"^rank +1 +RANK$", out, re.M)
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


# --- scheduler


def test_one_server_needs_no_scheduler(dt, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"ROLE": "scheduler", "NUM_SERVER": "1", "PS_ROOT_URI": "10.0.0.5", "PS_ROOT_PORT": "9"}.items():
        monkeypatch.setenv(f"DMLC_{name}", value)
    assert dt("scheduler") == (0, "one server, which listens at tcp://10.0.0.5:9 itself: no scheduler is needed\n", "")


def test_a_scheduler_whose_servers_do_not_come(dt):
    code, out, err = dt("scheduler", "--bind", "tcp://127.0.0.1:0", "--servers", "2", "-n", "3", "--timeout-s", "0.2")
    assert code == 69
    assert out.startswith("listening at tcp://127.0.0.1:")
    assert "for 2 servers, 3 workers" in out
    assert err == "dtrain: within 0.2 s, 0 of 2 servers have registered; missing: server 0, 1\n"


def test_a_server_whose_scheduler_is_not_there(dt):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    code, _, err = dt("server", "-n", "1", "--scheduler", address, "--connect-timeout-s", "0.3")
    assert code == 69
    assert err == f"dtrain: nobody answers at {address} within 0.3 s: is the scheduler started?\n"
