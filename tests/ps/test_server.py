"""A real server: sums over both lanes and any number of servers, what it leaves behind, and how its process ends."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from dtrain.cli import main
from dtrain.comm import collectives
from dtrain.errors import CommError, DtrainError, KeyRefused, ProtocolError, UsageError
from dtrain.ps import fused, lanes, wire
from dtrain.ps import keys as curve
from dtrain.ps import server as server_module
from dtrain.ps.client import ParameterServer
from dtrain.ps.members import Terms
from dtrain.ps.server import Server
from dtrain.ps.wire import Add, Bye, Sum
from tests.ps.serving import (
    Running,
    Stranger,
    all_of,
    dealer,
    hello,
    listens_at,
    own_socket,
    process,
    reply,
    work_and_leave,
    workers_of,
)
from tests.ps.test_fused import compiled

DTYPES = sorted(wire.DTYPE_NAMES)
SIZES = [1, 1023, 16_385, 100_003, 600_001]


@pytest.fixture(autouse=True)
def brief_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_LAST_WORDS_S", 0.3)


@pytest.fixture(autouse=True, scope="module")
def compiled_before() -> None:
    """What numba starts for itself when it is first used does not count, and servers here use what it has compiled."""
    for dtype in fused.DTYPES:
        compiled(dtype, 2)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Neither a thread nor a descriptor nor a segment of this process outlives its test."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        mine = [n for n in os.listdir(lanes.DIRECTORY) if n.startswith(f"dtrain-{os.getpid()}-")]
        return psutil.Process().num_threads(), psutil.Process().num_fds(), len(mine)

    before = held()
    yield
    deadline = time.monotonic() + 5
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, f"threads, descriptors, segments: {before} before, {held()} after"
        time.sleep(0.02)


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest, own_temporary_directory: Path) -> str:
    return "tcp://127.0.0.1:0" if request.param == "tcp" else own_socket(own_temporary_directory)


# --- sums


def inputs(dtype: str, numel: int) -> list[torch.Tensor]:
    """Two workers' tensors, whose sum is rounded."""
    kind = wire.DTYPE_NAMES[dtype]
    source = torch.Generator().manual_seed(numel)
    if kind.is_floating_point:
        return [torch.randn(numel, generator=source).to(kind) for _ in range(2)]
    return [torch.randint(0, 100, (numel,), generator=source).to(kind) for _ in range(2)]


def sums(folder: Path, servers: int, lane: str, scheme: str = "ipc") -> dict[tuple[str, int], torch.Tensor]:
    """Of all types and sizes: half of the tensors from `empty`, the others from elsewhere; all at once."""
    running = [
        Running(own_socket(folder) if scheme == "ipc" else "tcp://127.0.0.1:0", server=s, num_servers=servers)
        for s in range(servers)
    ]
    workers = workers_of(",".join(r.address for r in running), lanes=lane)
    cases = [(dtype, numel) for dtype in DTYPES for numel in SIZES]

    def work(worker: ParameterServer) -> list[torch.Tensor]:
        assert worker.shares == (lane == "auto")
        flats = []
        for number, case in enumerate(cases):
            flat = inputs(*case)[worker.rank]
            if (number + worker.rank) % 2:
                flat = worker.empty(case[1], flat.dtype, "k").copy_(flat)
            flats.append(flat)
        works = [worker.all_reduce(flat, f"gradient/{n}") for n, flat in enumerate(flats)]
        for each in reversed(works):
            each.wait()
        worker.close()
        return flats

    first, second = all_of(*(lambda w=w: work(w) for w in workers))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for server in running:
        assert server.ended() is None
        assert scheme != "ipc" or not Path(server.address.removeprefix("ipc://")).exists()
    return dict(zip(cases, first, strict=True))


@pytest.fixture(scope="module")
def of_one(own_temporary_directory: Path) -> dict[tuple[str, int], torch.Tensor]:
    return sums(own_temporary_directory, 1, "off")


@pytest.mark.parametrize(
    ("servers", "lane", "scheme"),
    [
        (1, "auto", "ipc"),
        (2, "auto", "ipc"),
        (3, "auto", "ipc"),
        (3, "off", "ipc"),
        (2, "off", "tcp"),
        (2, "auto", "tcp"),
    ],
)
def test_the_same_bits_over_any_lane_and_servers(
    own_temporary_directory: Path, of_one: dict[tuple[str, int], torch.Tensor], servers: int, lane: str, scheme: str
):
    for (dtype, numel), found in sums(own_temporary_directory, servers, lane, scheme).items():
        assert torch.equal(found, of_one[dtype, numel]), (dtype, numel)
        a, b = inputs(dtype, numel)
        wanted = a + b if a.dtype.itemsize != 2 else (a.float() + b.float()).to(a.dtype)
        assert torch.equal(found, wanted), (dtype, numel)


def test_workers_of_different_lanes_in_one_job():
    """One in another container, say: it reaches the server by tcp alone."""
    running = Running("tcp://127.0.0.1:0")
    workers = workers_of(running.address, each=[{"lanes": "auto"}, {"lanes": "off"}])
    assert [w.shares for w in workers] == [False, False]  # all or none
    flats = [w.empty(wire.PART_BYTES // 8, torch.float64, "k").fill_(w.rank + 1) for w in workers]

    def work(rank: int) -> None:
        workers[rank].all_reduce(flats[rank], "gradient/0").wait()
        workers[rank].close()

    all_of(lambda: work(0), lambda: work(1))
    assert all(float(f.min()) == float(f.max()) == 3.0 for f in flats)
    assert running.ended() is None


def test_a_small_shared_memory_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """It is full for gradients, though not for the few bytes of a probe."""
    create = lanes.Segment.create.__func__  # type: ignore[attr-defined]

    def crowded(cls: type, nbytes: int) -> lanes.Segment:
        if nbytes > 100:
            raise lanes.NoRoom("there is 0.1 MiB left: gradients go through sockets")
        return create(cls, nbytes)

    monkeypatch.setattr(lanes.Segment, "create", classmethod(crowded))
    running = Running("tcp://127.0.0.1:0")
    workers = workers_of(running.address)
    assert all(w.shares for w in workers)
    flats = [w.empty(100_000, torch.float32, "k").fill_(1) for w in workers]
    works = [w.all_reduce(f, "gradient/1") for w, f in zip(workers, flats, strict=True)]
    for work in works:
        work.wait()
    assert all(torch.equal(f, torch.full((100_000,), 2.0)) for f in flats)
    work_and_leave(workers)
    assert running.ended() is None
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == len(workers), told
    assert all("through sockets" in line for line in told)


def test_memory_goes_with_its_last_tensor():
    with process("--bind", "tcp://127.0.0.1:0", "--workers", "2") as child:
        workers = workers_of(listens_at(child))

        def mapped() -> set[str]:
            lines = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            return {line.split("/")[-1] for line in lines if "dtrain-" in line}

        first = [w.empty(300_000, torch.float32, "k") for w in workers]
        once = mapped()
        assert len(once) == 2
        assert not [n for n in os.listdir(lanes.DIRECTORY) if n.startswith(f"dtrain-{os.getpid()}-")]
        views = [f[100:] for f in first]
        del first
        second = [w.empty(1000, torch.float32, "k") for w in workers]  # says what is used no more: nothing
        assert once < mapped()
        del views, second
        third = [w.empty(1000, torch.float32, "k") for w in workers]
        works = [w.all_reduce(t, "gradient/1") for w, t in zip(workers, third, strict=True)]
        for work in works:
            work.wait()
        assert len(mapped()) == 2
        assert not once & mapped()
        work_and_leave(workers)
        assert child.wait(30) == 0


# --- keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    curve.make(tmp_path / "keys")
    return tmp_path / "keys"


def other_keys(folder: Path, *files: str) -> Path:
    """The job's keys, but for these files."""
    other, mixed = folder.parent / "other", folder.parent / "mixed"
    curve.make(other)
    shutil.copytree(folder, mixed)
    for file in files:
        shutil.copy2(other / file, mixed / file)
    return mixed


@pytest.mark.parametrize("lane", ["auto", "off"])
def test_the_right_keys(folder: Path, lane: str):
    running = Running("tcp://127.0.0.1:0", keys=folder)
    work_and_leave(workers_of(running.address, keys=folder, lanes=lane))
    assert running.ended() is None


WORKER = ("worker.public", "worker.secret")
MISFITS: dict[str, tuple[bool, tuple[str, ...] | None, type[DtrainError], str]] = {
    "another worker's key": (True, WORKER, KeyRefused, "refused this worker's key"),
    "another server's key": (True, ("server.public",), ProtocolError, "server.public here is not its key"),
    "no key": (True, None, ProtocolError, "asks for a key and this worker has none"),
    "a server without": (False, (), ProtocolError, "uses no keys and this worker does"),
}


@pytest.mark.parametrize(("keyed", "other", "kind", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_keys_that_do_not_fit(
    folder: Path, keyed: bool, other: tuple[str, ...] | None, kind: type[DtrainError], words: str
):
    running = Running("tcp://127.0.0.1:0", keys=folder if keyed else None)
    mine = None if other is None else other_keys(folder, *other)
    started = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        ParameterServer(running.address, 0, 2, keys=mine, timeout_s=30, connect_timeout_s=8)
    assert time.monotonic() - started < 6
    assert caught.value.exit_code == (77 if kind is KeyRefused else 76)
    work_and_leave(workers_of(running.address, keys=folder if keyed else None))  # the right ones still get in
    assert running.ended() is None


# --- workers that misbehave once they have joined


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker by hand knows nothing of how workers of one host find each other."""
    monkeypatch.setattr(ParameterServer, "_settle", lambda worker: None)


class Member:
    """A worker by hand: it may send anything."""

    def __init__(self, stranger: Stranger, rank: int) -> None:
        self.socket = stranger
        stranger.say(wire.encode(hello(rank)))


ADD = Add(0, 0, "metric/sum", 0, 0, "float64", 0)
MISBEHAVIOUR: dict[str, tuple[list[bytes], type[DtrainError], str]] = {
    "three frames": ([b"", b"", b""], ProtocolError, "3 frames"),
    "a sum": ([wire.encode(Sum(0, 0)), bytes(8)], ProtocolError, "Sum"),
    "another type": (
        [wire.encode(Add(0, 0, "metric/sum", 0, 0, "float32", 0)), bytes(8)],
        ProtocolError,  # LayoutError, to be exact
        "2 x float32",
    ),
    "an error": ([wire.encode(Bye("ValueError: bad batch"))], CommError, "failed with ValueError: bad batch"),
    "hello again": ([wire.encode(hello(1, pid=78))], ProtocolError, "worker 1 .* said Hello twice"),
}


@pytest.mark.usefixtures("no_board")
@pytest.mark.parametrize(("frames", "kind", "words"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_a_worker_that_misbehaves_is_named_to_the_others(
    address: str, frames: list[bytes], kind: type[DtrainError], words: str
):
    running = Running(address)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=30, connect_timeout_s=20)
        flat = torch.ones(1, dtype=torch.float64)
        work = good.all_reduce(flat, "metric/sum")
        stranger.say(*frames)
        with pytest.raises(kind, match=words) as caught:
            work.wait()
        assert re.search(r"workers? \[?1", str(caught.value))
        with pytest.raises(kind):  # and so for ever
            good.all_reduce(flat, "metric/sum")
        good.close()
        assert kind is CommError or reply(stranger) is not None  # who left with an error is not told
    assert isinstance(running.ended(), kind)


@pytest.mark.usefixtures("no_board")
def test_what_the_network_damaged_is_asked_for_again(address: str):
    running = Running(address)
    payload = torch.full((1,), 2.0, dtype=torch.float64).numpy().tobytes()
    message = Add(0, 0, "metric/sum", 0, 0, "float64", wire.checksum_of(memoryview(payload)))
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=30, connect_timeout_s=20)
        flat = torch.ones(1, dtype=torch.float64)
        work = good.all_reduce(flat, "metric/sum")
        for damaged in ([wire.encode(message)[:-1] + b"\0", payload], [wire.encode(message), b"\1" + payload[1:]]):
            stranger.say(*damaged)
            while not isinstance(wire.decode(stranger.recv_multipart()[0]), wire.Again):
                pass
        stranger.say(wire.encode(message), payload)
        work.wait()
        assert float(flat) == 3.0
        stranger.say(wire.encode(Bye("")))
        good.close()
        assert running.ended() is None


@pytest.mark.usefixtures("no_board")
def test_a_worker_that_says_nothing_is_named(address: str):
    running = Running(address, timeout_s=0.7)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=0.7, connect_timeout_s=20)
        started = time.monotonic()
        with pytest.raises(CommError, match=r"worker 1 \(pid 77 on elsewhere\): late with metric/sum, round 0"):
            collectives.sum_numbers(good, [1.0])
        assert time.monotonic() - started < 4
        good.close()
    assert isinstance(running.ended(), CommError)


@pytest.mark.usefixtures("no_board")
def test_a_worker_whose_connection_closes_is_named(address: str):
    running = Running(address)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=30, connect_timeout_s=20)
        work = good.all_reduce(torch.ones(1), "metric/sum")
    started = time.monotonic()
    with pytest.raises(CommError, match=r"worker 1 \(pid 77 on elsewhere\) is gone"):
        work.wait()
    assert time.monotonic() - started < 5
    good.close()
    assert isinstance(running.ended(), CommError)


@pytest.mark.usefixtures("no_board")
def test_who_left_well_is_not_lost_though_an_answer_cannot_reach_it(address: str, monkeypatch: pytest.MonkeyPatch):
    """Its farewell has come, and is still unread when the server answers what it had asked before."""
    running = Running(address)
    workers = workers_of(running.address)
    drain, stopped, go_on = running.server._drain, threading.Event(), threading.Event()

    def late() -> None:
        stopped.set()
        assert go_on.wait(20)
        drain()

    monkeypatch.setattr(running.server, "_drain", late)
    try:
        workers[0].all_reduce(torch.ones(1), "metric/sum")
        assert stopped.wait(20)
        workers[0].close()
        work = workers[1].all_reduce(torch.ones(1), "metric/sum")
        time.sleep(0.5)  # libzmq tells nobody when it has seen a connection's end
    finally:
        go_on.set()
    work.wait()
    workers[1].close()
    assert running.ended() is None


def test_a_closed_backend_says_so(address: str):
    running = Running(address)
    workers = workers_of(running.address)
    work_and_leave(workers)
    workers[0].close()
    with pytest.raises(CommError, match="worker 0: this backend was closed"):
        workers[0].all_reduce(torch.ones(1), "metric/sum")
    assert running.ended() is None


def test_closing_in_an_old_interpreter_session_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    """`sys.last_value` holds the last error that a session showed: long past, for whoever closes now."""
    monkeypatch.setattr(sys, "last_value", ValueError("of an hour ago"), raising=False)
    running = Running("tcp://127.0.0.1:0")
    work_and_leave(workers_of(running.address))
    assert running.ended() is None


def test_an_error_that_ends_the_with_block_is_told_to_the_others():
    running = Running("tcp://127.0.0.1:0")
    workers = workers_of(running.address)
    work = workers[1].all_reduce(torch.ones(1), "metric/sum")

    def fails() -> None:
        try:
            raise ValueError("\u4e2d" * 3000)
        finally:
            workers[0].close()

    with pytest.raises(ValueError, match="\u4e2d"):
        fails()
    with pytest.raises(CommError, match=r"worker 0 .* failed with ValueError: \u4e2d"):
        work.wait()
    workers[1].close()
    running.ended()


# --- addresses


def test_two_servers_at_one_address(address: str):
    running = Running(address)
    with pytest.raises(UsageError, match="cannot listen at"):
        Server(running.address, Terms(world_size=2))
    work_and_leave(workers_of(running.address))
    assert running.ended() is None


def test_a_socket_file_that_was_left_is_taken_over(own_temporary_directory: Path):
    path = own_temporary_directory / "left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    running = Running(f"ipc://{path}")
    work_and_leave(workers_of(running.address))
    assert running.ended() is None
    assert not path.exists()


def test_no_directory_for_the_socket(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot listen at ipc://"):
        Server(f"ipc://{tmp_path}/nosuch/socket", Terms(world_size=2))


# --- the process


def test_the_process_ends_with_its_workers():
    with process("--bind", "tcp://127.0.0.1:0", "--workers", "2") as child:
        work_and_leave(workers_of(listens_at(child)))
        assert child.wait(30) == 0
        assert child.communicate()[1] == ""


def test_the_process_names_who_did_not_come(own_temporary_directory: Path):
    path = own_temporary_directory / "s"
    with process("--bind", f"ipc://{path}", "-n", "2", "--connect-timeout-s", "0.5") as child:
        listens_at(child)
        assert child.wait(30) == 69
        assert "dtrain: workers [0, 1] of 2 have not joined within" in child.communicate()[1]
    assert not path.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_process_and_signals(own_temporary_directory: Path, number: int, code: int):
    path = own_temporary_directory / f"s{number}"
    with process("--bind", f"ipc://{path}", "-n", "2") as child:
        workers = workers_of(listens_at(child))
        work = workers[0].all_reduce(torch.ones(1), "metric/sum")
        os.kill(child.pid, number)
        started = time.monotonic()
        if number == signal.SIGTERM:  # the first one lets the workers leave, see below
            time.sleep(0.2)
            os.kill(child.pid, number)
        with pytest.raises(CommError, match=rf"the server at ipc://{path} \(pid {child.pid} on .*\) is gone"):
            work.wait()
        assert time.monotonic() - started < 5
        assert child.wait(30) == code
        for worker in workers:
            worker.close()
        if number == signal.SIGINT:
            assert not path.exists()
        assert "Traceback" not in child.communicate()[1]
    path.unlink(missing_ok=True)


def test_a_server_that_is_asked_to_stop_lets_its_workers_finish(own_temporary_directory: Path):
    """A whole job gets the signal at once, and workers want their servers to save."""
    path = own_temporary_directory / "s"
    with process("--bind", f"ipc://{path}", "-n", "2") as child:
        workers = workers_of(listens_at(child))
        os.kill(child.pid, signal.SIGUSR1)
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.3)
        work_and_leave(workers)
        assert child.wait(30) == 0
        assert "asked to stop; waiting until 2 workers have left" in child.communicate()[1]
    assert not path.exists()


def test_a_server_without_workers_stops_at_once(own_temporary_directory: Path):
    path = own_temporary_directory / "s"
    with process("--bind", f"ipc://{path}", "-n", "2") as child:
        listens_at(child)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(5) == 143
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no address"),
        (["--bind", "tcp://0.0.0.0:0"], "--insecure-no-encryption"),
        (["--bind", "tcp://127.0.0.1"], "give ipc:///path or tcp://host:port"),
        (["--bind", "ipc:///nosuch/socket"], "cannot listen at"),
        (["--bind", "tcp://127.0.0.1:0", "-n", "0"], "world_size is 0"),
    ],
)
def test_the_command_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["server", *arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert stop.value.code == 64
    assert words in err
    assert err.startswith("dtrain: ")
    assert len(err.splitlines()) == 1
    assert out == ""
