"""A process of a job is killed, stopped, stuck or replaced in a chosen phase; the job ends, or has the same bits.

`README.md` beside this file says which test shows which row of the table of faults.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain import checkpoint
from tests.conftest import remembered
from tests.faults import soak
from tests.faults.forked import Forked, forked

slow = pytest.mark.slow

STEPS = 20
NOTICED_S = 5.0
"""Until a job ends that is to fail."""
MENDED_S = 20.0
"""Until a job has ended that goes on; on a busy host of two cores the steps take half of it."""
PATIENCE_S = 4.0
"""`--timeout-s` of the jobs that have a worker which is alive and makes no progress."""

Fault = dict[str, Any]


def train(folder: Path, *more: str, workers: int = 2, servers: int = 2) -> list[str]:
    """A short training run in `folder/run`."""
    return [
        *("train", "digits", "--option", "width=16", "--backend", "ps", "-n", str(workers), "--servers", str(servers)),
        *("--steps", str(STEPS), "--checkpoint-every", "5", "--log-every", "1", "--quiet"),
        *("--run-dir", str(folder / "run"), *more),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(folder / "run" / "model.safetensors")


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return found


@remembered
def undisturbed(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """What the same run without a fault ends with."""
    with forked(folder, *train(folder, *more)) as job:
        assert job.ends(60) == 0, job.err
        assert job.alarms == ""
    return weights(folder)


@pytest.fixture
def oracle(tmp_path_factory: pytest.TempPathFactory):
    """`oracle(*flags)`: the weights of the undisturbed run with these flags."""
    base = tmp_path_factory.getbasetemp()
    return lambda *more: undisturbed(base / ("o" + "".join(more).replace("-", "")), *more)


def mended(
    folder: Path, faults: list[Fault], expected: dict[str, torch.Tensor], *more: str, restarts: int = 1
) -> Forked:
    """Run with these faults and --on-worker-loss wait: all ends well, with the same bits, in time."""
    with forked(folder, *train(folder, "--on-worker-loss", "wait", *more), faults=faults) as job:
        struck = job.await_strike(faults[-1]["who"])
        assert job.ends(MENDED_S, since=struck) == 0, job.err
        again = job.err.count("starting it again (")
        assert again == restarts or (again <= 3 and faults[0]["at"] in ("join", "hello")), job.err
        same_bits(weights(folder), expected)
        steps = [r["step"] for r in records(folder) if "loss" in r]
        assert steps == list(range(1, STEPS + 1)), "each step is in the log once"
        assert "Traceback" not in job.err
    return job


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def kill(who: str, at: str, n: int = 1, **more: Any) -> Fault:
    return {"who": who, "at": at, "n": n, **more}


# -- W1, W2: a worker is killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "at", "n"),
    [
        ("worker 1", "step", 12),
        ("worker 1", "push", 12),
        ("worker 0", "commit", 3),
        pytest.param("worker 1", "join", 1, marks=slow),
        pytest.param("worker 1", "joined", 1, marks=slow),
        pytest.param("worker 0", "joined", 1, marks=slow),
        pytest.param("worker 0", "commit", 1, marks=slow),
        pytest.param("worker 0", "committed", 1, marks=slow),
        pytest.param("worker 0", "write", 9, marks=slow),
        pytest.param("worker 0", "write", 12, marks=slow),
        pytest.param("worker 0", "committed", 3, marks=slow),
        pytest.param("worker 1", "step", 1, marks=slow),
        pytest.param("worker 0", "step", 12, marks=slow),
        pytest.param("worker 0", "push", 12, marks=slow),
        pytest.param("worker 1", "step", STEPS, marks=slow),
    ],
)
def test_a_killed_worker_is_replaced(tmp_path: Path, oracle, who: str, at: str, n: int):
    job = mended(tmp_path, [kill(who, at, n)], oracle())
    assert f"dtrain: {who} (pid {job.pids()[who][0]}) was killed by SIGKILL; starting it again (1 of 3)" in job.err


@pytest.mark.parametrize(
    ("who", "at", "n"),
    [
        ("worker 1", "push", 12),
        pytest.param("worker 0", "commit", 3, marks=slow),
        pytest.param("worker 1", "step", 1, marks=slow),
        pytest.param("worker 0", "step", 12, marks=slow),
        pytest.param("worker 1", "joined", 1, marks=slow),
    ],
)
def test_a_killed_worker_is_replaced_where_servers_step(tmp_path: Path, oracle, who: str, at: str, n: int):
    mended(tmp_path, [kill(who, at, n)], oracle("--update", "server"), "--update", "server")


@slow
@pytest.mark.parametrize("update", ["worker", "server"])
@pytest.mark.parametrize(
    "faults",
    [
        [kill("worker 1", "step", 12), kill("worker 0", "rejoin")],
        [kill("worker 1", "step", 12), kill("worker 1", "resume", life=1)],
        [kill("server 1", "hello", 2), kill("worker 0", "step", 7, life=1)],  # its first life saw no other worker
        [kill("worker 1", "step", 12), kill("server 0", "hello", 3)],
    ],
    ids=["a second worker", "the replacement", "a server, then a worker", "a server meanwhile"],
)
def test_a_second_fault_while_the_first_is_mended(tmp_path: Path, oracle, faults: list[Fault], update: str):
    mended(tmp_path, faults, oracle("--update", update), "--update", update, restarts=2)


@slow
@pytest.mark.parametrize(("who", "at"), [("worker 1", "summary"), ("worker 0", "summary"), ("worker 0", "weights")])
def test_a_worker_killed_after_the_last_step(tmp_path: Path, oracle, who: str, at: str):
    """Nothing is lost: either it is replaced and all come to the same end again, or nobody needs it any more."""
    with forked(tmp_path, *train(tmp_path, "--on-worker-loss", "wait"), faults=[kill(who, at)]) as job:
        assert job.ends(MENDED_S, since=job.await_strike(who)) == 0, job.err
        same_bits(weights(tmp_path), oracle())
        assert summary(tmp_path)["steps"] == STEPS


@slow
def test_no_more_than_so_many_restarts(tmp_path: Path):
    faults = [kill("worker 1", "step", 7, life=life) for life in range(3)]
    arguments = train(tmp_path, "--on-worker-loss", "wait", "--max-restarts", "2")
    with forked(tmp_path, *arguments, faults=faults) as job:
        assert job.ends(60) == 69
        assert "no more than 2 restarts (--max-restarts)" in job.err
        assert len(job.pids()["worker 1"]) == 3


@slow
@pytest.mark.parametrize("who", ["worker 0", "worker 1"])
def test_a_worker_killed_when_one_server_has_its_gradient(tmp_path: Path, oracle, who: str):
    """Through sockets: the two halves of a gradient are two messages. The other half is never summed."""
    mended(tmp_path, [kill(who, "push", 12)], oracle(), "--lanes", "off")


@pytest.mark.parametrize(
    ("who", "at", "n"),
    [
        ("worker 1", "push", 7),
        pytest.param("worker 1", "join", 1, marks=slow),
        pytest.param("worker 0", "commit", 2, marks=slow),
        pytest.param("worker 1", "summary", 1, marks=slow),
        pytest.param("server 0", "hello", 2, marks=slow),
    ],
)
def test_fail_ends_the_job(tmp_path: Path, who: str, at: str, n: int):
    with forked(tmp_path, *train(tmp_path), faults=[kill(who, at, n)]) as job:
        struck = job.await_strike(who)
        assert job.ends(NOTICED_S + 5.0, since=struck) == 69, job.err
        pid = job.pids()[who][0]
        assert f"dtrain: {who} (pid {pid}) was killed by SIGKILL; stopping the other 3 processes" in job.err
        if at not in ("join", "hello"):
            assert job.err.count(f"(pid {pid} on ") >= 1, "the others saw by themselves who it was"


@pytest.mark.parametrize(("who", "at", "n"), [("worker 1", "push", 7), pytest.param("worker 0", "step", 7)])
def test_drop_goes_on_without_it(tmp_path: Path, who: str, at: str, n: int):
    arguments = train(tmp_path, "--on-worker-loss", "drop", "--update", "server", workers=3)
    with forked(tmp_path, *arguments, faults=[kill(who, at, n)]) as job:
        assert job.ends(MENDED_S, since=job.await_strike(who)) == 0, job.err
        assert f"dtrain: {who} (pid {job.pids()[who][0]}) was killed by SIGKILL; the others go on without it" in job.err
        assert summary(tmp_path)["steps"] == STEPS
        assert summary(tmp_path)["written_by"] == (1 if who == "worker 0" else 0)
        assert all(t.isfinite().all() for t in weights(tmp_path).values() if t.is_floating_point())
        root = tmp_path / "run" / "checkpoints"
        assert checkpoint.load(root).step == STEPS


# -- W3, W4, W6: a worker fails by itself, is stuck, or slow -------------------------------------------------------


def test_an_exception_is_shown_by_the_others(tmp_path: Path):
    with forked(tmp_path, *train(tmp_path), faults=[kill("worker 1", "step", 7, do="raise")]) as job:
        assert job.ends(NOTICED_S, since=job.await_strike("worker 1")) == 1
        pid = job.pids()["worker 1"][0]
        assert re.search(rf"^dtrain: worker 0: worker 1 \(pid {pid} on .* failed with Boom: a bad batch", job.err, re.M)
        assert f"dtrain: worker 1 (pid {pid}) failed with Boom: a bad batch; stopping" in job.err


def test_a_worker_that_holds_the_gil(tmp_path: Path):
    """It is alive for the kernel and for libzmq's heartbeats, and makes no progress."""
    arguments = train(tmp_path, "--timeout-s", str(PATIENCE_S))
    with forked(tmp_path, *arguments, faults=[kill("worker 1", "step", 7, do="hold the GIL")]) as job:
        assert job.ends(PATIENCE_S + 2 * NOTICED_S, since=job.await_strike("worker 1")) == 69
        pid = job.pids()["worker 1"][0]
        assert re.search(rf"worker 1 \(pid {pid} on .*late with .* alive, but no progress", job.err), job.err


@slow
def test_a_worker_that_holds_the_gil_is_replaced(tmp_path: Path, oracle):
    """Nothing ends it but the launcher: the servers go on to a new epoch that it never comes to."""
    faults = [kill("worker 1", "step", 7, do="hold the GIL")]
    mended(tmp_path, faults, oracle(), "--timeout-s", str(PATIENCE_S))


@pytest.mark.parametrize(
    "flags",
    [("--backup-workers", "1"), pytest.param(("--staleness", "2"), marks=slow)],
    ids=["backup worker", "staleness 2"],
)
def test_a_slow_worker(tmp_path: Path, flags: tuple[str, ...]):
    arguments = train(tmp_path, "--update", "server", *flags, workers=3)
    with forked(tmp_path, *arguments, faults=[kill("worker 2", "every step", do="sleep")]) as job:
        assert job.ends(60) == 0, job.err
    found = summary(tmp_path)
    if "--staleness" in flags:
        assert max(int(s) for row in found["staleness"] for s in row) <= 2 * (2 * 2 + 1), (
            "two others: from 2 behind to 2 ahead"
        )
    else:
        assert found["dropped_gradients"][2] > 0
        assert found["dropped_gradients"][:2] == [0, 0] or sum(found["dropped_gradients"][:2]) < STEPS


# -- W5, S3: stopped for longer than anybody waits, then alive again ------------------------------------------------


@pytest.mark.parametrize(
    ("who", "at", "n", "flags"),
    [
        ("worker 1", "push", 7, ()),
        pytest.param("worker 1", "step", 7, ("--update", "server"), marks=slow),
        pytest.param("server 1", "sum", 9, ("--lanes", "off"), marks=slow),
        pytest.param("server 0", "update", 7, ("--update", "server"), marks=slow),
    ],
)
def test_a_stopped_process_is_replaced_and_counts_for_nothing(
    tmp_path: Path, oracle, who: str, at: str, n: int, flags: tuple[str, ...]
):
    """It is stopped, and the job waits no longer than `--timeout-s`; when it goes on, its place is taken."""
    arguments = train(tmp_path, "--on-worker-loss", "wait", "--timeout-s", str(PATIENCE_S), *flags)
    with forked(tmp_path, *arguments, faults=[kill(who, at, n, do="stop")]) as job:
        struck = job.await_strike(who)
        assert job.ends(PATIENCE_S + MENDED_S + 5, since=struck) == 0, job.err
        same_bits(weights(tmp_path), oracle(*(f for f in flags if f not in ("--lanes", "off"))))


@slow
def test_a_worker_that_goes_on_when_it_was_given_up(tmp_path: Path, oracle):
    """The servers have begun a new epoch without it. What it still sends counts for nothing; it comes again."""
    arguments = train(tmp_path, "--on-worker-loss", "wait")
    with forked(tmp_path, *arguments, faults=[kill("worker 1", "push", 7, do="stop")]) as job:
        job.await_strike("worker 1")
        job.await_text("the job is rewound")
        os.kill(job.pids()["worker 1"][0], signal.SIGCONT)
        assert job.ends(MENDED_S) == 0, job.err
        assert len(job.pids()["worker 1"]) == 1, job.err
        same_bits(weights(tmp_path), oracle())


def test_a_worker_that_was_stopped_for_a_moment(tmp_path: Path, oracle):
    with forked(tmp_path, *train(tmp_path), faults=[kill("worker 1", "step", 7, do="stop")]) as job:
        job.await_strike("worker 1")
        time.sleep(1.0)
        os.kill(job.pids()["worker 1"][0], signal.SIGCONT)
        assert job.ends(MENDED_S) == 0
        assert job.alarms == ""
        same_bits(weights(tmp_path), oracle())


# -- S1, S2: a server is killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "at", "n", "flags"),
    [
        ("server 0", "update", 7, ("--update", "server")),
        pytest.param("server 0", "hello", 1, (), marks=slow),
        pytest.param("server 1", "hello", 2, (), marks=slow),
        pytest.param("server 1", "sum", 9, ("--lanes", "off"), marks=slow),
        pytest.param("server 0", "summed", 9, ("--lanes", "off"), marks=slow),
        pytest.param("server 1", "updated", 7, ("--update", "server"), marks=slow),
        pytest.param("server 1", "update", 1, ("--update", "server"), marks=slow),
        pytest.param("server 0", "fetch", 2, ("--update", "server"), marks=slow),
    ],
)
def test_a_killed_server_is_replaced(tmp_path: Path, oracle, who: str, at: str, n: int, flags: tuple[str, ...]):
    mended(tmp_path, [kill(who, at, n)], oracle(*(f for f in flags if f not in ("--lanes", "off"))), *flags)
    assert summary(tmp_path)["rewinds"] <= 1


@pytest.mark.parametrize(
    ("at", "n"), [("step", 12), pytest.param("commit", 3, marks=slow), pytest.param("step", STEPS, marks=slow)]
)
@pytest.mark.parametrize("server", ["server 1", pytest.param("server 0", marks=slow)])
def test_a_server_killed_while_workers_do_without(tmp_path: Path, oracle, server: str, at: str, n: int):
    """Worker 0 kills it, so that the moment is exact: as it computes, or saves."""
    mended(tmp_path, [kill("worker 0", at, n, do=f"kill {server}")], oracle())


@slow
def test_a_killed_server_where_nobody_waits(tmp_path: Path):
    """Steps are in no order there, so that bits say nothing: the run is whole, and says what was made again."""
    flags = ("--update", "server", "--staleness", "none", "--on-worker-loss", "wait")
    with forked(tmp_path, *train(tmp_path, *flags), faults=[kill("server 1", "update", 20)]) as job:
        assert job.ends(MENDED_S, since=job.await_strike("server 1")) == 0, job.err
    found = summary(tmp_path)
    assert found["steps"] == STEPS
    assert found["rewinds"] == 1
    assert sum(sum(row.values()) for row in found["staleness"]) >= STEPS, "everybody's gradients are accounted for"


# -- S5: a server that nobody looks after --------------------------------------------------------------------------


@slow
def test_a_server_started_again_by_hand(tmp_path: Path):
    """It knows nothing of the job, and says so: nobody goes on from its empty memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    server = ("server", "--bind", address, "--workers", "1")
    place = {"DTRAIN_SERVERS": address, "RANK": "0", "WORLD_SIZE": "1"}
    faults = [kill("launcher", "every step", do="sleep")]
    with forked(tmp_path / "first", *server) as first, ExitStack() as later:
        first.await_text_out("listening at")
        worker = later.enter_context(forked(tmp_path, *train(tmp_path), faults=faults, **place))
        worker.await_strike("launcher")
        first.process.kill()
        first.process.wait()
        second = later.enter_context(forked(tmp_path / "second", *server))
        second.await_text_out("listening at")
        assert worker.ends(NOTICED_S) == 69, worker.err
        assert "this server does not know this worker" in worker.err
        second.process.send_signal(signal.SIGTERM)


# -- A4: a gradient that is not a number -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["abort", "skip"])
def test_a_gradient_that_is_not_a_number(tmp_path: Path, policy: str):
    arguments = train(tmp_path, "--nonfinite", policy, servers=1)
    with forked(tmp_path, *arguments, faults=[kill("worker 1", "nan", 7, do="note")]) as job:
        code = job.ends(MENDED_S)
        assert code == (65 if policy == "abort" else 0), job.err
        assert re.search(r"step 7: the gradient is not finite: .*worker 1.*", job.err), job.err
        assert re.search(r"step 7: .*\b\d+\.(weight|bias)", job.err), "names a parameter"
    if policy == "skip":
        assert all(t.isfinite().all() for t in weights(tmp_path).values() if t.is_floating_point())
        assert summary(tmp_path)["steps"] == STEPS


# -- and at random ----------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("update", ["worker", "server"])
def test_a_short_soak(update: str):
    assert soak.main(["--kills", "3", "--per-run", "3", "--seed", "1", "--steps", "200", "--update", update]) == 0
