"""The scheduler: who is told what, that nobody stops it, and a job that finds itself by ps-lite's variables alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

import dtrain
from dtrain import serving
from dtrain.errors import ConnectError, DtrainError, KeyRefused, ProtocolError, UsageError
from dtrain.ps import keys as curve
from dtrain.ps import wire
from dtrain.ps.scheduler import Roll, Scheduler, lookup, register
from dtrain.ps.wire import Failed, Located, Lookup, Message, Numbered, Register
from tests.ps.serving import Running, dealer, hello, own_socket, reply, work_and_leave, workers_of
from tests.strangers import STRANGERS, closed_port, listening

A, B, C = (f"tcp://127.0.0.1:{port}" for port in (5001, 5002, 5003))


# --- who is told what, without a socket


@pytest.fixture
def roll() -> Roll:
    """Of two servers and two workers."""
    return Roll(2, 2, job_id="job", host_only=True)


def said(roll: Roll, session: bytes, message: Message, now: float = 0.0) -> list[tuple[bytes, Message]]:
    return [(send.to, send.message) for send in roll.receive(session, message, now)]


def test_numbers_in_the_order_of_arrival(roll: Roll):
    assert said(roll, b"a", Register("job", A, 0)) == [(b"a", Numbered(0, 2))]
    assert said(roll, b"b", Register("", B, 0)) == [(b"b", Numbered(1, 2))]


def test_numbers_that_are_asked_for(roll: Roll):
    assert said(roll, b"b", Register("job", B, 2)) == [(b"b", Numbered(1, 2))]
    assert said(roll, b"a", Register("job", A, 0)) == [(b"a", Numbered(0, 2))]
    assert said(roll, b"w", Lookup("", 9)) == [(b"w", Located(0, 2, A)), (b"w", Located(1, 2, B))]


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_server_that_registers_again_keeps_its_number(roll: Roll, wanted: int):
    for session in (b"a", b"a", b"another life"):
        assert said(roll, session, Register("job", A, wanted)) == [(session, Numbered(0, 2))]
    assert said(roll, b"b", Register("job", B, 0)) == [(b"b", Numbered(1, 2))]


def test_who_asks_early_is_told_when_all_have_come(roll: Roll):
    assert said(roll, b"v", Lookup("job", 9000)) == []
    assert said(roll, b"v", Lookup("job", 9000)) == []  # sent again
    said(roll, b"a", Register("job", A, 0))
    told = said(roll, b"b", Register("job", B, 0))
    assert told == [(b"b", Numbered(1, 2)), (b"v", Located(0, 2, A)), (b"v", Located(1, 2, B))]
    assert not roll.finished
    assert "1 of 2 workers have asked" in roll.missing
    said(roll, b"v", Lookup("job", 9000))
    assert not roll.finished, "one worker that asks twice is one"
    said(roll, b"w", Lookup("job", 9000))
    assert roll.finished


def test_who_has_waited_long_enough_is_told_who_is_missing(roll: Roll):
    said(roll, b"v", Lookup("job", 2000), now=10.0)
    said(roll, b"w", Lookup("job", 9000), now=10.0)
    said(roll, b"b", Register("job", B, 2))
    assert roll.late(11.9) == []
    (send,) = roll.late(12.0)
    assert send.to == b"v"
    assert isinstance(send.message, Failed)
    assert send.message.kind == "ConnectError"
    assert f"1 of 2 servers have registered; missing: server 0; here: server 1 at {B}" in send.message.text
    assert roll.late(12.1) == []
    error, sends = roll.end(60.0)
    assert [s.to for s in sends] == [b"w"]
    assert type(error) is ConnectError
    assert "within 60 s" in str(error)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (Register("job", C, 0), UsageError, "one too many: all 2 have registered"),
        (Register("job", C, 1), UsageError, f"wants to be server 0, and so does the one at {A}"),
        (Register("job", C, 3), UsageError, "wants to be server 2 of 2"),
        (Register("job", C, 2**63 - 1), UsageError, "of 2: they count from 0"),
        (Register("job", A, 2), UsageError, "wants to be server 1, and is server 0"),
        (Register("other", C, 0), UsageError, "belongs to another job"),
        (Lookup("other", 9), UsageError, "belongs to another job"),
        (Register("job", "", 0), UsageError, "server address is ''"),
        (Register("job", "tcp://[::1", 0), UsageError, "server address is"),
        (Register("job", "tcp://127.0.0.1:0", 0), UsageError, "where nobody can connect"),
        (Register("job", "tcp://0.0.0.0:5000", 0), UsageError, "where nobody can connect"),
        (Register("job", f"{A}/path", 0), UsageError, "where nobody can connect"),
        (Register("job", f"ipc:///a,{A}", 0), UsageError, "where nobody can connect"),
        (Register("job", "tcp://me@127.0.0.1:5000", 0), UsageError, "where nobody can connect"),
        (Register("job", "tcp://10.0.0.5:5000", 0), UsageError, "is not on this host"),
        (Register("job", "tcp://not-looked-up.invalid:5000", 0), UsageError, "is not on this host"),
        (hello(1), UsageError, "worker 1 takes it for a server"),
        (Numbered(0, 2), ProtocolError, "Numbered, which nobody sends to a scheduler"),
        (wire.Done(0), ProtocolError, "Done"),
    ],
    ids=lambda value: f"{value}"[:40],
)
def test_what_is_refused(roll: Roll, message: Message, kind: type[DtrainError], words: str):
    said(roll, b"a", Register("job", A, 0))
    said(roll, b"b", Register("job", B, 0))
    with pytest.raises(kind) as caught:
        roll.receive(b"c", message, 0.0)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert said(roll, b"w", Lookup("job", 9)) == [(b"w", Located(0, 2, A)), (b"w", Located(1, 2, B))]


# --- over a socket


class Told:
    """A scheduler in a thread."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", servers: int = 2, **more: object) -> None:
        self.scheduler = Scheduler(address, servers, **{"timeout_s": 20.0, "idle_s": 0.1, **more})  # type: ignore[arg-type]
        self.address = self.scheduler.address
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.scheduler.run()
        except Exception as error:
            self.error = error
        finally:
            self.scheduler.close()

    def ended(self) -> Exception | None:
        self._thread.join(15)
        assert not self._thread.is_alive(), "the scheduler does not end"
        return self.error


@contextlib.contextmanager
def told(*arguments: str, **more: object) -> Iterator[Told]:
    running = Told(*arguments, **more)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        running.scheduler.stop()
        running.ended()


def failure(call: Callable[[], object], kind: type[DtrainError]) -> str:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert time.monotonic() - started < 6
    return str(caught.value)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_it_ends_when_everyone_has_asked(transport: str, tmp_path: Path):
    address = "tcp://127.0.0.1:0" if transport == "tcp" else own_socket(tmp_path)
    scheduler = Told(address, num_workers=2)
    found: list[list[str]] = []
    early = threading.Thread(target=lambda: found.append(lookup(scheduler.address)))
    early.start()
    assert register(scheduler.address, A) == (0, 2)
    assert register(scheduler.address, B) == (1, 2)
    early.join(10)
    found.append(lookup(scheduler.address))
    assert found == [[A, B]] * 2
    assert scheduler.ended() is None
    assert not list(tmp_path.iterdir())


def test_it_ends_when_not_all_come_in_time():
    scheduler = Told(timeout_s=0.5)
    register(scheduler.address, A, wanted=1)
    text = failure(lambda: lookup(scheduler.address), ConnectError)
    assert f"the scheduler at {scheduler.address}: within 0.5 s, 1 of 2 servers have registered; missing" in text
    assert "missing: server 0" in str(scheduler.ended())


def test_errors_have_their_type_and_name_the_address():
    with told(servers=1, job_id="job") as scheduler:
        at = f"the scheduler at {scheduler.address}: "
        assert at in failure(lambda: lookup(scheduler.address, timeout_s=0.3), ConnectError)
        assert "another job" in failure(lambda: register(scheduler.address, A, job_id="other"), UsageError)
        register(scheduler.address, A, job_id="job")
        assert at in failure(lambda: register(scheduler.address, B), UsageError)
        assert "so does the one at" in failure(lambda: register(scheduler.address, B, wanted=0), UsageError)


def test_nobody_is_there():
    address = f"tcp://127.0.0.1:{closed_port()}"
    for call in (
        lambda: lookup(address, timeout_s=0.4),
        lambda: register(address, A, timeout_s=0.4),
        lambda: dtrain.connect("ps", rank=0, world_size=2, scheduler=address, connect_timeout_s=0.4),
    ):
        text = failure(call, ConnectError)
        assert f"nobody answers at {address} within 0.4 s: is the scheduler started?" in text


@pytest.mark.parametrize("address", ["", "tcp://127.0.0.1", "tcp://[::1", "127.0.0.1:1", "tcp://127.0.0.1:0"])
def test_no_address_of_a_scheduler(address: str):
    assert repr(address) in failure(lambda: lookup(address, timeout_s=0.4), UsageError)


def test_somebody_else_is_there():
    with listening(STRANGERS[1]) as port:
        text = failure(lambda: lookup(f"tcp://127.0.0.1:{port}", timeout_s=2), ProtocolError)
    assert f"tcp://127.0.0.1:{port} is not dtrain's scheduler" in text


@pytest.mark.parametrize(
    "says",
    [
        [b"who are you?"],
        [wire.encode(Located(0, 1, A)), b""],
        [wire.encode(Numbered(0, 1))],
        [wire.encode(Located(3, 2, A))],
        [wire.encode(Located(0, 1, "tcp://[::1"))],
        [wire.encode(Located(0, 2**40, A))],
    ],
    ids=repr,
)
def test_a_scheduler_that_says_something_else(says: list[bytes]):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as stranger:
        stranger.linger = 0
        address = f"tcp://127.0.0.1:{stranger.bind_to_random_port('tcp://127.0.0.1')}"
        answering = threading.Thread(target=lambda: stranger.send_multipart([stranger.recv_multipart()[0], *says]))
        answering.start()
        assert f"the scheduler at {address}" in failure(lambda: lookup(address, timeout_s=2), ProtocolError)
        answering.join()


def test_a_server_in_its_place_and_it_in_a_servers_place(tmp_path: Path):
    running = Running(own_socket(tmp_path), workers=1)
    assert "is a server and no scheduler" in failure(lambda: lookup(running.address), UsageError)
    work_and_leave(workers_of(running.address, 1))
    assert running.ended() is None
    with told() as scheduler:
        call = lambda: dtrain.connect("ps", rank=0, world_size=1, server=scheduler.address)  # noqa: E731
        assert "this is the job's scheduler, and worker 0 takes it for a server" in failure(call, UsageError)


def test_it_dies_while_others_wait(tmp_path: Path):
    running = Told(own_socket(tmp_path))
    threading.Timer(0.3, running.scheduler.stop).start()
    assert "is gone" in failure(lambda: lookup(running.address, timeout_s=30), ConnectError)
    running.ended()


# --- strangers


@pytest.mark.parametrize("kind", [zmq.PUB, zmq.DEALER, zmq.REQ], ids=["PUB", "DEALER", "REQ"])
def test_strangers_do_not_stop_it(kind: int):
    good = wire.encode(Lookup("", 5))
    frames = [[b""], [b"\x80"], [good, b""], [good[:-1]], [bytes(5000)], [wire.encode(wire.Bye(""))], [b"\x93"] * 5]
    with told() as scheduler, dealer(scheduler.address, kind) as stranger:
        host, port = scheduler.address.removeprefix("tcp://").split(":")
        for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as peer:
                peer.sendall(noise)
        for message in frames:
            with contextlib.suppress(zmq.ZMQError):
                stranger.send_multipart(message, zmq.NOBLOCK)
        if kind == zmq.DEALER:
            refused = reply(stranger)
            assert refused is not None
            assert refused.kind == "ProtocolError"
        assert register(scheduler.address, A) == (0, 2)
        assert register(scheduler.address, B) == (1, 2)
        assert lookup(scheduler.address) == [A, B]
        assert scheduler.ended() is None


# --- keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    curve.make(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")
def test_keys(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Servers come with their own key, workers with theirs; nobody else comes, and no worker registers a server."""
    curve.make(tmp_path / "others")
    own, others = {"keys": folder}, {"keys": tmp_path / "others"}
    with told(servers=1, keys=folder) as scheduler:
        at = scheduler.address
        assert "asks for a key" in failure(lambda: lookup(at, timeout_s=3), ProtocolError)
        failure(lambda: register(at, A, timeout_s=3, **others), ProtocolError)
        (tmp_path / "others" / "server.public").write_text((folder / "server.public").read_text())
        failure(lambda: lookup(at, timeout_s=3, **others), KeyRefused)
        with monkeypatch.context() as patch:
            patch.setattr(curve, "among_servers", lambda _: curve.load(folder, "worker"))
            assert "cannot register a server" in failure(lambda: register(at, A, **own), UsageError)
        assert register(at, "tcp://10.0.0.5:5000", **own) == (0, 1)
        assert lookup(at, **own) == ["tcp://10.0.0.5:5000"]


def test_it_does_not_listen_beyond_this_host():
    assert "--insecure-no-encryption" in failure(lambda: Scheduler("tcp://0.0.0.0:0", 2), UsageError)
    open_to_all = Scheduler("tcp://0.0.0.0:0", 2, insecure_no_encryption=True)
    open_to_all.close()


@pytest.mark.parametrize(("servers", "workers"), [(0, 1), (1001, 1), (-1, 1), (2, 0)])
def test_numbers_that_cannot_be_meant(servers: int, workers: int):
    text = failure(lambda: Scheduler("tcp://127.0.0.1:0", servers, num_workers=workers), UsageError)
    assert f"servers is {servers}, workers {workers}" in text


# --- where a server listens


def test_where_a_server_listens_that_knows_a_scheduler_alone():
    assert serving.bind_towards("tcp://127.0.0.1:5000") == "tcp://127.0.0.1:0"
    assert serving.bind_towards("ipc:///tmp/x") == "tcp://127.0.0.1:0"
    assert serving.seen_from("tcp://127.0.0.1:5000", "tcp://0.0.0.0:7") == "tcp://127.0.0.1:7"
    assert serving.seen_from("tcp://127.0.0.1:5000", "tcp://127.0.0.9:7") == "tcp://127.0.0.9:7"
    assert serving.seen_from("ipc:///tmp/x", "ipc:///tmp/y") == "ipc:///tmp/y"
    text = failure(lambda: serving.bind_towards("tcp://no-such-host.invalid:5"), UsageError)
    assert "scheduler is 'tcp://no-such-host.invalid:5'" in text


# --- the whole job, in processes

WORKER = """
import sys, torch, dtrain
comm = dtrain.connect("ps", connect_timeout_s=60, timeout_s=20)
for _ in range(2):
    flat = torch.full((300_000,), comm.rank + 1.0)
    comm.all_reduce(flat, "gradient/0").wait()
    print(len(comm.addresses), flat[0].item(), flat[-1].item(), flush=True)
    sys.stdin.readline()
comm.close()
"""


def test_a_job_by_ps_lites_variables_alone(tmp_path: Path):
    """And the scheduler is killed when all have met: the job goes on."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    common = {"NUM_WORKER": "2", "NUM_SERVER": "2", "PS_ROOT_URI": "127.0.0.1", "PS_ROOT_PORT": str(closed_port())}
    children: list[subprocess.Popen[str]] = []

    def start(role: str, *command: str, **more: str) -> subprocess.Popen[str]:
        variables = {f"DMLC_{name}": value for name, value in {**common, "ROLE": role, **more}.items()}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        given = {**os.environ, **variables}
        children.append(subprocess.Popen([sys.executable, *command], text=True, env=given, **pipes))  # type: ignore[call-overload]
        return children[-1]

    try:
        workers = [start("worker", str(script), WORKER_ID=str(rank)) for rank in range(2)]
        servers = [start("server", "-m", "dtrain", "server") for _ in range(2)]
        scheduler = start("scheduler", "-m", "dtrain", "scheduler")
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "2 3.0 3.0\n", worker.communicate()
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait(10)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n\n")
            worker.stdin.flush()
        for worker in workers:
            out, err = worker.communicate(timeout=30)
            assert (worker.returncode, out) == (0, "2 3.0 3.0\n"), err
        told = []
        for server in servers:
            out, err = server.communicate(timeout=30)
            assert server.returncode == 0, err
            told.append(out.split("workers, ")[1].strip())
        assert sorted(told) == ["as server 0 of 2", "as server 1 of 2"]
    finally:
        for child in children:
            child.kill()
            child.communicate()
