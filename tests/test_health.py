"""`dtrain health`: the server's own loop answers, the job does not notice, and what is wrong is named in time."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from dtrain import cli
from dtrain.errors import CommError, ConnectError, ProtocolError
from dtrain.ps import health, wire
from dtrain.ps import keys as curve
from dtrain.ps.members import Terms
from dtrain.ps.scheduler import Scheduler
from dtrain.ps.server import Server
from dtrain.ps.wire import Standing
from tests.ps.serving import Pair, Running, dealer, hello, listens_at, own_socket, process, work_and_leave, workers_of
from tests.strangers import STRANGERS, Answer, closed_port, http_keeps_open, listening, says_nothing, ssh

needs_curve = pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")


@pytest.fixture
def dt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `dtrain health` in this process; (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["health", *arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def failure(address: str, *, timeout_s: float = 1.0, keys: Path | None = None) -> CommError:
    """What `ask` says of an address where all is not well; in time."""
    started = time.monotonic()
    with pytest.raises(CommError) as caught:
        health.ask(address, keys=keys, timeout_s=timeout_s)
    assert time.monotonic() - started < timeout_s + 1
    assert caught.value.exit_code == 69
    assert address in str(caught.value)
    return caught.value


# --- it answers


def test_a_process_and_a_job_that_does_not_notice(dt: Callable[..., tuple[int, str, str]], tmp_path: Path):
    """Asked before anybody has come, while there are two workers, and when it is stopped."""
    log = tmp_path / "stderr"
    with log.open("w") as stderr, process("--bind", "tcp://127.0.0.1:0", "-n", "2", stderr=stderr.fileno()) as child:
        address = listens_at(child)
        assert health.ask(address) == Standing(0, 1, 0, 2)
        pair = Pair(address)
        try:
            before = pair.digest()
            for _ in range(20):
                assert health.ask(address) == Standing(0, 1, 2, 2)
                pair.step()
            assert pair.digest() == before
            assert dt(address) == (0, f"server 0 of 1 at {address} answers: 2 of 2 workers are here\n", "")

            child.send_signal(signal.SIGSTOP)
            try:
                started = time.monotonic()
                code, out, err = dt(address, "--timeout-s", "0.5")
                assert time.monotonic() - started < 2
            finally:
                child.send_signal(signal.SIGCONT)
            assert (code, out) == (69, "")
            assert f"{address} takes connections, and has not answered within 0.5 s: the server" in err
            assert len(err.splitlines()) == 1
            pair.step()
        finally:
            pair.close()
        assert child.wait(20) == 0
    assert log.read_text() == ""


def test_the_loop_answers_and_not_the_library(tmp_path: Path):
    """libzmq's own threads shake hands for a server whose loop does not go round."""
    server = Server(own_socket(tmp_path), Terms(world_size=1))
    try:
        assert "takes connections, and has not answered within 0.4 s" in str(failure(server.address, timeout_s=0.4))
    finally:
        server.close()


def test_it_is_not_counted_as_refused(tmp_path: Path):
    running = Running(own_socket(tmp_path), workers=1)
    for _ in range(3):
        health.ask(running.address)
    assert running.server.figures()["refused_messages"] == 0
    work_and_leave(workers_of(running.address, 1))
    assert running.ended() is None


def test_one_that_asks_again_and_again_is_not_heard_for_ever(tmp_path: Path):
    """A stranger on one connection has a thousand messages."""
    running = Running(own_socket(tmp_path), workers=1)
    answers = 0
    with dealer(running.address) as stranger:
        for _ in range(3000):
            stranger.say(wire.encode(wire.Inquire()))
        while stranger.poll(300):
            assert isinstance(wire.decode(stranger.recv()), Standing)
            answers += 1
    assert 900 < answers <= 1001
    assert health.ask(running.address).workers == 0
    work_and_leave(workers_of(running.address, 1))
    assert running.ended() is None


def test_a_job_that_has_failed(tmp_path: Path):
    running = Running(own_socket(tmp_path), workers=2)
    with dealer(running.address) as worker:
        worker.say(wire.encode(hello(0, 2)))
        worker.say(wire.encode(wire.Bye("a bad reason")))
        deadline = time.monotonic() + 10
        while running.server._shard.members.failed is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "a bad reason" in str(failure(running.address))
    assert "a bad reason" in str(running.ended())


# --- what else may be there


def test_nobody():
    error = failure(f"tcp://127.0.0.1:{closed_port()}", timeout_s=0.4)
    assert isinstance(error, ConnectError)
    assert "nobody answers at" in str(error)


@pytest.mark.parametrize("answer", STRANGERS, ids=lambda a: a.__name__)
def test_another_service(answer: Answer):
    silent = (says_nothing, http_keeps_open, ssh)
    with listening(answer) as port:
        error = failure(f"tcp://127.0.0.1:{port}", timeout_s=0.5 if answer in silent else 2.5)
    assert type(error) is CommError
    assert ("none of dtrain's" if answer in silent else "is not dtrain's server") in str(error)


@contextlib.contextmanager
def router(*says: bytes) -> Iterator[str]:
    """A ZeroMQ socket that answers one message with these frames."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as stranger:
        stranger.linger = 1000
        port = stranger.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            stranger.send_multipart([stranger.recv_multipart()[0], *says])

        answering = threading.Thread(target=answer)
        answering.start()
        yield f"tcp://127.0.0.1:{port}"
        answering.join(10)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ([b"who are you?"], "is not dtrain's server: it sent a header whose checksum is wrong"),
        ([wire.encode(wire.Ping())], "is not dtrain's server: it answered with Ping"),
        ([wire.encode(Standing(0, 1, 2, 3)), b""], "is not dtrain's server: it answered with Standing"),
        ([wire.encode(wire.Failed("ProtocolError", "a message of unknown kind 38"))], "unknown kind 38"),
    ],
    ids=["noise", "another message", "a payload", "an older server"],
)
def test_another_zeromq_socket(says: list[bytes], words: str):
    with router(*says) as address:
        assert words in str(failure(address))


def test_a_scheduler():
    scheduler = Scheduler("tcp://127.0.0.1:0", 1)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        assert "nobody sends to a scheduler" in str(failure(scheduler.address))
    finally:
        scheduler.stop()
        thread.join(10)
        scheduler.close()


# --- keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    curve.make(tmp_path / "keys")
    return tmp_path / "keys"


def part(folder: Path, *names: str) -> Path:
    """Another directory, with these of the keys."""
    other = folder.parent / "-".join(names)
    other.mkdir(0o700)
    for name in names:
        shutil.copy(folder / name, other)
    return other


@needs_curve
def test_either_pair_of_keys_will_do(folder: Path):
    running = Running("tcp://127.0.0.1:0", workers=1, keys=folder)
    for keys in (
        folder,
        part(folder, "server.secret", "server.public", "worker.public"),
        part(folder, "worker.secret", "worker.public", "server.public"),
    ):
        assert health.ask(running.address, keys=keys) == Standing(0, 1, 0, 1)
    work_and_leave(workers_of(running.address, 1, keys=folder))
    assert running.ended() is None


@needs_curve
def test_no_keys_or_others(folder: Path, tmp_path: Path):
    curve.make(tmp_path / "others")
    running = Running("tcp://127.0.0.1:0", workers=1, keys=folder)
    assert "it asks for a key" in str(failure(running.address, timeout_s=3))
    assert "server.public here is not its key" in str(failure(running.address, timeout_s=3, keys=tmp_path / "others"))
    (tmp_path / "others" / "server.public").write_text((folder / "server.public").read_text())
    assert "refused this worker's key" in str(failure(running.address, timeout_s=3, keys=tmp_path / "others"))
    work_and_leave(workers_of(running.address, 1, keys=folder))
    assert running.ended() is None


@needs_curve
def test_the_servers_key_asks_and_takes_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch):
    running = Running("tcp://127.0.0.1:0", workers=1, keys=folder)
    with monkeypatch.context() as patch:
        load = curve.load
        patch.setattr(curve, "load", lambda f, role: curve.among_servers(load(f, "server")))
        with pytest.raises(ProtocolError, match="a worker that comes with the servers' key"):
            workers_of(running.address, 1, keys=folder)
    assert health.ask(running.address, keys=folder).workers == 0
    work_and_leave(workers_of(running.address, 1, keys=folder))
    assert running.ended() is None


# --- the command


def test_the_environment_names_them(dt: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch):
    running = [Running("tcp://127.0.0.1:0", workers=1, server=n, num_servers=2) for n in range(2)]
    addresses = ",".join(r.address for r in running)
    monkeypatch.setenv("DTRAIN_SERVERS", addresses)
    monkeypatch.setenv("RANK", "3")  # as a worker's container has it
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, out, err = dt()
    assert (code, err) == (0, "")
    assert [line.split(" answers")[0] for line in out.splitlines()] == [
        f"server {n} of 2 at {r.address}" for n, r in enumerate(running)
    ]
    monkeypatch.delenv("DTRAIN_SERVERS")
    host, port = running[1].address.removeprefix("tcp://").split(":")
    monkeypatch.setenv("DMLC_PS_ROOT_URI", host)
    monkeypatch.setenv("DMLC_PS_ROOT_PORT", port)
    assert dt()[:2] == (0, f"server 1 of 2 at {running[1].address} answers: 0 of 1 workers are here\n")
    work_and_leave(workers_of(addresses, 1))
    assert [r.ended() for r in running] == [None, None]


def test_nobody_may_be_well(dt: Callable[..., tuple[int, str, str]]):
    nobody = f"tcp://127.0.0.1:{closed_port()}"
    assert dt(nobody, "--timeout-s", "0.3", "--if-any") == (0, f"nobody listens at {nobody}\n", "")
    code, out, err = dt(nobody, "--timeout-s", "0.3")
    assert (code, out) == (69, "")
    assert f"nobody answers at {nobody}" in err
    with listening(says_nothing) as port:
        assert dt(f"tcp://127.0.0.1:{port}", "--timeout-s", "0.3", "--if-any")[0] == 69


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no address: give tcp://host:port, or set DTRAIN_SERVERS"),
        (["127.0.0.1:5555"], "'127.0.0.1:5555'"),
        (["tcp://127.0.0.1:0"], "'tcp://127.0.0.1:0'"),
        (["tcp://127.0.0.1:5555", "--timeout-s", "0"], "timeout_s is 0.0"),
        (["tcp://127.0.0.1:5555", "--keys", "/nosuch"], "/nosuch/worker.secret"),
    ],
)
def test_what_cannot_be_meant(dt: Callable[..., tuple[int, str, str]], arguments: list[str], words: str):
    code, out, err = dt(*arguments)
    assert (code, out) == (64, "")
    assert words in err
