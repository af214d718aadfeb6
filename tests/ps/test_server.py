"""A real server: bad bytes at its door, what it leaves behind, and how its process ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
import torch
import zmq

from dtrain.cli import main
from dtrain.comm import collectives
from dtrain.errors import CommError, DtrainError, ProtocolError, UsageError
from dtrain.ps import server as server_module
from dtrain.ps import wire
from dtrain.ps.client import ParameterServer
from dtrain.ps.server import Server
from dtrain.ps.wire import Add, Bye, Failed, Hello, Ping, Sum, Welcome


class Running:
    """A server in a thread."""

    def __init__(self, address: str, world_size: int = 2, timeout_s: float = 10) -> None:
        self.server = Server(address, world_size, timeout_s=timeout_s, connect_timeout_s=10)
        self.address = self.server.address
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except Exception as error:
            self.error = error
        finally:
            self.server.close()

    def ended(self) -> Exception | None:
        """What it raised, once it has ended."""
        self.thread.join(15)
        assert not self.thread.is_alive(), "the server outlives its job"
        return self.error


@pytest.fixture(autouse=True)
def brief_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_LAST_WORDS_S", 0.3)


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest, own_temporary_directory: Path) -> str:
    path = own_temporary_directory / f"s{time.monotonic_ns()}"
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{path}"


def pair(address: str) -> list[ParameterServer]:
    """Two workers that have joined."""
    workers: list[ParameterServer] = []

    def join(rank: int) -> None:
        workers.append(ParameterServer(address, rank, 2, timeout_s=10, connect_timeout_s=5))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert len(workers) == 2
    return sorted(workers, key=lambda w: w.rank)


def work_and_leave(workers: list[ParameterServer]) -> None:
    """A few transfers of several parts; everyone gets the sum."""
    flats = [torch.full((300_000,), w.rank + 1.0) for w in workers]
    works = [w.all_reduce(f, "gradient/0") for w, f in zip(workers, flats, strict=True)]
    for work, flat in zip(works, flats, strict=True):
        work.wait()
        assert torch.equal(flat, torch.full((300_000,), 3.0))
    for worker in workers:
        worker.close()


@contextlib.contextmanager
def dealer(address: str, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as stranger:
        stranger.linger = 500
        stranger.connect(address)
        yield stranger


def reply(stranger: zmq.Socket[bytes]) -> Failed | None:
    """What the server says to a stranger, if anything."""
    while stranger.poll(3000):
        message = wire.decode(stranger.recv_multipart()[0])
        if isinstance(message, Failed):
            return message
    return None


HELLO = Hello("", 0, 2, "host", 1, 5000)
ADD = Add("gradient/0", 0, 0, "float32", 0)

BAD_FRAMES: dict[str, list[bytes]] = {
    "an empty frame": [b""],
    "three frames": [wire.encode(HELLO), b"", b""],
    "ten thousand frames": [b""] * 10_000,
    "a long header": [bytes(5000)],
    "a header of a megabyte": [bytes(2**20)],
    "zeros": [bytes(100)],
    "noise": [random.Random(1).randbytes(300)],
    "pickle": [
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x94\x85\x94R\x94."
    ],
    "nested": [b"\x91" * 4000],
    "empty maps": [b"\xdd\x00\x00\x0f\x00" + b"\x80" * 0xF00],
    "another protocol": [msgpack.packb([2, 0, "", 0, 2, "h", 1, 1])],
    "hello with a payload": [wire.encode(HELLO), b"x"],
    "an addition without a payload": [wire.encode(ADD)],
    "an addition before hello": [wire.encode(ADD), bytes(4)],
    "an addition of an unknown type": [wire.encode(Add("gradient/0", 0, 0, "object", 0)), bytes(4)],
    "an addition of three bytes": [wire.encode(ADD), bytes(3)],
    "an addition of nothing": [wire.encode(ADD), b""],
    "a sum": [wire.encode(Sum("gradient/0", 0, 0, 0)), bytes(4)],
    "a welcome": [wire.encode(Welcome("h", 1))],
    "a failure": [wire.encode(Failed("CommError", "all of you, stop"))],
    "a ping": [wire.encode(Ping())],
    "a farewell before hello": [wire.encode(Bye("ValueError"))],
    "a rank that is not there": [wire.encode(Hello("", 2**63, 2, "host", 1, 5000))],
    "another world size": [wire.encode(Hello("", 1, 10**6, "host", 1, 0))],
}


@pytest.mark.parametrize("frames", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_strangers_message_is_refused_and_the_job_goes_on(frames: list[bytes]):
    running = Running("tcp://127.0.0.1:0")
    with dealer(running.address) as stranger:
        stranger.send_multipart(frames)
        answer = reply(stranger)
        assert answer is not None
        assert answer.kind in ("ProtocolError", "UsageError")
        workers = pair(running.address)
        stranger.send_multipart(frames)
        work_and_leave(workers)
    assert running.ended() is None


@pytest.mark.parametrize(
    "kind", [zmq.REQ, zmq.PUB, zmq.SUB, zmq.PUSH, zmq.ROUTER], ids=lambda k: zmq.SocketType(k).name
)
def test_another_kind_of_socket(kind: int):
    running = Running("tcp://127.0.0.1:0")
    with dealer(running.address, kind) as stranger:
        if kind in (zmq.REQ, zmq.PUB):
            stranger.send(b"hello")
        work_and_leave(pair(running.address))
    assert running.ended() is None


def test_a_frame_over_the_limit_ends_that_connection_alone():
    running = Running("tcp://127.0.0.1:0")
    with dealer(running.address) as stranger:
        stranger.send_multipart([wire.encode(ADD), bytes(wire.PART_BYTES + 5000)])
        work_and_leave(pair(running.address))
    assert running.ended() is None


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
RAW: dict[str, bytes] = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "noise": random.Random(2).randbytes(2**20),
    "ZMTP 1": b"\x01\x00",
    "ZMTP 2": b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00",
    "half a greeting": GREETING[:20],
    "a greeting": GREETING,
    "CURVE": GREETING.replace(b"NULL\x00", b"CURVE"),
    "READY of 2^63 bytes": GREETING + b"\x06" + struct.pack(">Q", 2**63) + b"\x05READY",
    "READY of 4 GiB of metadata": GREETING + b"\x04\x19\x05READY\x0bSocket-Type\xff\xff\xff\xff",
    "a frame of 2^40 bytes": GREETING + READY + b"\x02" + struct.pack(">Q", 2**40),
    "a frame of 2^63 bytes": GREETING + READY + b"\x02" + struct.pack(">Q", 2**63),
    "a frame that stays away": GREETING + READY + b"\x02" + struct.pack(">Q", 1000) + b"abc",
}


def test_raw_bytes_at_the_port():
    """All at once, before and while a job works; some hang up, some stay, some reset the connection."""
    running = Running("tcp://127.0.0.1:0")
    where = ("127.0.0.1", int(running.address.rsplit(":", 1)[1]))
    before = psutil.Process().memory_info().rss

    def visit(data: bytes) -> socket.socket:
        visitor = socket.create_connection(where)
        with contextlib.suppress(OSError):
            visitor.sendall(data)
        return visitor

    with contextlib.ExitStack() as stack:
        for data in RAW.values():
            stack.callback(visit(data).close)
        for data in RAW.values():
            resets = visit(data)
            resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            resets.close()
        workers = pair(running.address)
        for data in RAW.values():
            stack.callback(visit(data).close)
        for cut in range(len(GREETING + READY)):
            visit((GREETING + READY)[:cut]).close()
        work_and_leave(workers)
    assert running.ended() is None
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


# --- workers that misbehave once they have joined


class Member:
    """A worker by hand: it may send anything."""

    def __init__(self, stranger: zmq.Socket[bytes], rank: int) -> None:
        self.socket = stranger
        stranger.send(wire.encode(Hello("", rank, 2, "elsewhere", 77, 5000)))


def checksum_is_wrong(address: str) -> list[bytes]:
    payload = bytes(range(8))
    return [wire.encode(Add("metric/sum", 0, 0, "float64", zlib.crc32(payload) ^ 1)), payload]


MISBEHAVIOUR: dict[str, tuple[Callable[[str], list[bytes]], type[DtrainError], str]] = {
    "a wrong checksum": (checksum_is_wrong, ProtocolError, "checksum"),
    "garbage": (lambda _: [bytes(10)], ProtocolError, "a header"),
    "three frames": (lambda _: [b"", b"", b""], ProtocolError, "3 frames"),
    "a sum": (lambda _: [wire.encode(Sum("metric/sum", 0, 0, 0)), bytes(8)], ProtocolError, "Sum"),
    "another type": (
        lambda _: [wire.encode(Add("metric/sum", 0, 0, "float32", 0)), bytes(8)],
        ProtocolError,  # LayoutError, to be exact
        "2 x float32",
    ),
    "an error": (lambda _: [wire.encode(Bye("ValueError: bad batch"))], CommError, "failed with ValueError: bad batch"),
    "hello again": (
        lambda _: [wire.encode(Hello("", 1, 2, "elsewhere", 77, 5000))],
        UsageError,
        "two workers say that they are worker 1",
    ),
}


@pytest.mark.parametrize(("frames", "kind", "words"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_a_worker_that_misbehaves_is_named_to_the_others(
    address: str, frames: Callable[[str], list[bytes]], kind: type[DtrainError], words: str
):
    running = Running(address)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=10, connect_timeout_s=5)
        flat = torch.ones(1, dtype=torch.float64)
        work = good.all_reduce(flat, "metric/sum")
        stranger.send_multipart(frames(address))
        with pytest.raises(kind, match=words) as caught:
            work.wait()
        assert "worker 1 (pid 77 on elsewhere)" in str(caught.value)
        with pytest.raises(kind):  # and so for ever
            good.all_reduce(flat, "metric/sum")
        good.close()
        assert kind is CommError or reply(stranger) is not None  # who left with an error is not told
    assert isinstance(running.ended(), kind)


def test_a_worker_that_says_nothing_is_named(address: str):
    running = Running(address, timeout_s=0.7)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=0.7, connect_timeout_s=5)
        started = time.monotonic()
        with pytest.raises(CommError, match=r"worker 1 \(pid 77 on elsewhere\): late with metric/sum, round 0"):
            collectives.sum_numbers(good, [1.0])
        assert time.monotonic() - started < 4
        good.close()
    assert isinstance(running.ended(), CommError)


def test_a_worker_whose_connection_closes_is_named(address: str):
    running = Running(address)
    with dealer(running.address) as stranger:
        Member(stranger, 1)
        good = ParameterServer(running.address, 0, 2, timeout_s=10, connect_timeout_s=5)
        work = good.all_reduce(torch.ones(1), "metric/sum")
    started = time.monotonic()
    with pytest.raises(CommError, match=r"worker 1 \(pid 77 on elsewhere\) is gone"):
        work.wait()
    assert time.monotonic() - started < 5
    good.close()
    assert isinstance(running.ended(), CommError)


def test_a_closed_backend_says_so(address: str):
    running = Running(address)
    workers = pair(running.address)
    work_and_leave(workers)
    workers[0].close()
    with pytest.raises(CommError, match="worker 0: this backend was closed"):
        workers[0].all_reduce(torch.ones(1), "metric/sum")
    assert running.ended() is None


def test_closing_in_an_old_interpreter_session_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    """`sys.last_value` holds the last error that a session showed: long past, for whoever closes now."""
    monkeypatch.setattr(sys, "last_value", ValueError("of an hour ago"), raising=False)
    running = Running("tcp://127.0.0.1:0")
    work_and_leave(pair(running.address))
    assert running.ended() is None


def test_an_error_that_ends_the_with_block_is_told_to_the_others():
    running = Running("tcp://127.0.0.1:0")
    workers = pair(running.address)
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
        Server(running.address, 2)
    work_and_leave(pair(running.address))
    assert running.ended() is None


def test_a_socket_file_that_was_left_is_taken_over(own_temporary_directory: Path):
    path = own_temporary_directory / "left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    running = Running(f"ipc://{path}")
    work_and_leave(pair(running.address))
    assert running.ended() is None
    assert not path.exists()


def test_no_directory_for_the_socket(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot listen at ipc://"):
        Server(f"ipc://{tmp_path}/nosuch/socket", 2)


# --- the process


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dtrain", "server", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def listens_at(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith("listening at "), line + (child.stderr.read() if child.stderr else "")
    return line.split()[2]


def test_the_process_ends_with_its_workers():
    with process("--bind", "tcp://127.0.0.1:0", "--workers", "2") as child:
        work_and_leave(pair(listens_at(child)))
        assert child.wait(5) == 0
        assert child.communicate()[1] == ""


def test_the_process_names_who_did_not_come(own_temporary_directory: Path):
    path = own_temporary_directory / "s"
    with process("--bind", f"ipc://{path}", "-n", "2", "--connect-timeout-s", "0.5") as child:
        listens_at(child)
        assert child.wait(5) == 69
        assert "dtrain: workers [0, 1] of 2 have not joined within" in child.communicate()[1]
    assert not path.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_process_and_signals(own_temporary_directory: Path, number: int, code: int):
    path = own_temporary_directory / f"s{number}"
    with process("--bind", f"ipc://{path}", "-n", "2") as child:
        workers = pair(listens_at(child))
        work = workers[0].all_reduce(torch.ones(1), "metric/sum")
        os.kill(child.pid, number)
        started = time.monotonic()
        with pytest.raises(CommError, match=rf"the server at ipc://{path} \(pid {child.pid} on .*\) is gone"):
            work.wait()
        assert time.monotonic() - started < 5
        assert child.wait(5) == code
        for worker in workers:
            worker.close()
        if number != signal.SIGKILL:
            assert not path.exists()
        assert "Traceback" not in child.communicate()[1]
    path.unlink(missing_ok=True)


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
