"""Keys: what the files must be, who gets in with them, and what a worker is told that does not."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from dtrain.errors import DtrainError, KeyRefused, ProtocolError, UsageError
from dtrain.ps import keys, sockets
from dtrain.ps.keys import Gatekeeper, Keys
from tests import strangers

FILES = ["server.public", "server.secret", "worker.public", "worker.secret"]
REFUSED = (ProtocolError, KeyRefused)
HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def server(folder: Path) -> Keys:
    return keys.load(folder, "server")


@pytest.fixture
def worker(folder: Path) -> Keys:
    return keys.load(folder, "worker")


@pytest.fixture
def other() -> Keys:
    """Of another job."""
    return Keys(*zmq.curve_keypair(), zmq.curve_keypair()[0])


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Neither a thread nor a descriptor of a context outlives its test."""
    before = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
    yield
    after = before
    for _ in range(100):
        after = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
        if all(a <= b for a, b in zip(after, before, strict=True)):
            return
        time.sleep(0.02)
    pytest.fail(f"threads, descriptors, tasks: {before} before, {after} after")


@contextlib.contextmanager
def listening(server: Keys | None, *, gate: bool = True) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A server's socket and its address."""
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        if server and gate:
            stack.callback(Gatekeeper(context, server).close)
        router = stack.enter_context(sockets.make(context, zmq.ROUTER))
        if server:
            keys.secure(router, server, "server")
        port = router.bind_to_random_port("tcp://127.0.0.1")
        yield router, f"tcp://127.0.0.1:{port}"


@contextlib.contextmanager
def dealer(worker: Keys | None) -> Iterator[zmq.Socket[bytes]]:
    """A worker's socket in a context of its own, not connected yet."""
    with zmq.Context() as context, sockets.make(context, zmq.DEALER) as socket:
        if worker:
            keys.secure(socket, worker, "worker")
        yield socket
        socket.disable_monitor()


def knock(worker: Keys | None, address: str, timeout_s: float = 5.0) -> DtrainError:
    """What a worker is told that does not get in."""
    with dealer(worker) as socket:
        watch = sockets.Watch(socket, address)
        try:
            socket.connect(address)
            started = time.monotonic()
            with pytest.raises(REFUSED) as caught:
                watch.await_handshake(timeout_s)
            assert time.monotonic() - started < timeout_s - 1, "it waited for its whole time"
            assert not watch.connected
        finally:
            watch.monitor.close()
    return caught.value


def talk(router: zmq.Socket[bytes], socket: zmq.Socket[bytes]) -> None:
    socket.send(b"to the server")
    assert router.poll(5000)
    sender, said = router.recv_multipart()
    assert said == b"to the server"
    router.send_multipart([sender, b"to the worker"])
    assert socket.poll(5000)
    assert socket.recv() == b"to the worker"


# --- files


def test_makes_four_files_that_only_their_owner_reads(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in FILES:
        text = (folder / name).read_bytes()
        assert len(text) == 41
        assert text.endswith(b"\n")
        if name.endswith(".secret"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_secret_is_never_open_to_others_whatever_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: dict[str, int] = {}
    real = os.open

    def watched(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = real(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
            created[path] = stat.S_IMODE(os.fstat(fd).st_mode)
        return fd

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(umask)
    try:
        keys.make(tmp_path / "keys")
    finally:
        os.umask(before)
    assert sorted(created) == FILES
    assert created["server.secret"] == created["worker.secret"] == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", FILES)
def test_make_keeps_keys_that_are_there(name: str, folder: Path) -> None:
    for each in FILES:
        if each != name:
            (folder / each).unlink()
    held = (folder / name).read_bytes()
    with pytest.raises(UsageError, match=f"holds keys already .{name}.*new folder"):
        keys.make(folder)
    assert os.listdir(folder) == [name]
    assert (folder / name).read_bytes() == held


def test_make_uses_an_empty_folder_of_ones_own_only(tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(0o700)
    keys.make(own)
    assert sorted(os.listdir(own)) == FILES
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(UsageError, match=r"mode 0755.*chmod 700"):
        keys.make(shared)
    assert not os.listdir(shared)


@pytest.mark.parametrize("kind", ["a file", "a link", "no parent"])
def test_make_refuses_what_is_no_folder(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.touch()
    elif kind == "a link":
        (tmp_path / "real").mkdir(0o700)
        place.symlink_to(tmp_path / "real")
    else:
        place = place / "below"
    with pytest.raises(UsageError, match=f"{place}: cannot write keys there"):
        keys.make(place)
    assert not list(tmp_path.rglob("*.secret"))


@pytest.mark.parametrize("new", [True, False])
def test_make_leaves_nothing_half_done(new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    if not new:
        folder.mkdir(0o700)
    real = os.open

    def full(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "worker.secret":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(UsageError, match="No space left"):
        keys.make(folder)
    assert folder.exists() is not new
    assert not list(tmp_path.rglob("*.*"))


def test_each_role_loads_its_own_and_the_other_public_key(folder: Path, server: Keys, worker: Keys) -> None:
    assert server.peer == worker.public
    assert worker.peer == server.public
    assert len({server.public, server.secret, worker.public, worker.secret}) == 4
    for keyring in (server, worker):
        assert zmq.curve_public(keyring.secret) == keyring.public
    foreign = {"server": "worker.secret", "worker": "server.secret"}
    for role, name in foreign.items():
        (folder / name).rename(folder / "elsewhere")
        keys.load(folder, role)  # type: ignore[arg-type]
        (folder / "elsewhere").rename(folder / name)


@pytest.mark.parametrize("name", ["worker.secret", "worker.public", "server.public"])
def test_load_names_the_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{folder / name}: cannot be read: No such file.*copy {name}"):
        keys.load(folder, "worker")


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "one character short": b"x" * 39,
    "one character long": b"x" * 41,
    "two lines": b"x" * 40 + b"\n" + b"x" * 40,
    "a megabyte": b"x" * 2**20,
    "not Z85": b"~" * 40,
    "beyond 32 bits": b"#" * 40,
    "zeros": bytes(40),
    "not text": b"\xff" * 40,
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("name", ["worker.secret", "worker.public", "server.public"])
def test_load_refuses_what_is_no_key_and_does_not_show_it(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(UsageError, match=f"{folder / name}: not a key.*copy {name}") as caught:
        keys.load(folder, "worker")
    for bad in ("x" * 39, "~~", "##", "xff"):
        assert bad not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o666])
def test_load_refuses_a_secret_that_others_may_open(mode: int, folder: Path) -> None:
    path = folder / "worker.secret"
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"{path} .*mode {mode:04o}.*chmod 600 {path}"):
        keys.load(folder, "worker")
    link = folder.parent / "linked"  # the file counts, not the link
    link.mkdir()
    for name in FILES:
        (link / name).symlink_to(folder / name)
    with pytest.raises(UsageError, match="chmod 600"):
        keys.load(link, "worker")
    path.chmod(0o400)
    keys.load(link, "worker")


@pytest.mark.parametrize("name", ["worker.secret", "worker.public"])
def test_load_refuses_a_pair_that_does_not_belong_together(name: str, folder: Path) -> None:
    shutil.copyfile(folder / name.replace("worker", "server"), folder / name)
    with pytest.raises(UsageError, match=r"worker\.public does not belong to worker\.secret.*copy both"):
        keys.load(folder, "worker")


def test_load_refuses_a_folder_and_a_pipe_in_place_of_a_file(folder: Path) -> None:
    (folder / "worker.secret").unlink()
    os.mkfifo(folder / "worker.secret", 0o600)
    with pytest.raises(UsageError, match="not a key"):
        keys.load(folder, "worker")
    (folder / "worker.secret").unlink()
    (folder / "worker.secret").mkdir(0o700)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        keys.load(folder, "worker")


def test_a_role_is_server_or_worker(folder: Path, server: Keys) -> None:
    with pytest.raises(UsageError, match=r"role is 'client'.*'server' or 'worker'"):
        keys.load(folder, "client")  # type: ignore[arg-type]


def test_without_curve_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with pytest.raises(UsageError, match=r"without CURVE.*pip install pyzmq"):
        keys.load(folder, "worker")


def test_secret_is_not_shown(server: Keys) -> None:
    for shown in (repr(server), str(server), f"{server}", repr([server])):
        assert server.secret.decode() not in shown
        assert repr(server.secret) not in shown
        assert repr(server.public) in shown


# --- sockets


def test_right_keys_talk(server: Keys, worker: Keys) -> None:
    with listening(server) as (router, address), dealer(worker) as socket:
        watch = sockets.Watch(socket, address)
        socket.connect(address)
        watch.await_handshake(5)
        talk(router, socket)
        watch.monitor.close()


def test_wrong_worker_key_is_a_named_error(
    server: Keys, worker: Keys, other: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = replace(other, peer=server.public)
    with caplog.at_level(logging.DEBUG), listening(server) as (router, address):
        for _ in range(2):
            assert "key" in str(knock(stranger, address))
        with dealer(worker) as socket:  # the right one still gets in
            socket.connect(address)
            talk(router, socket)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1, told
    assert "refused a worker" in told[0]
    for keyring in (server, worker, other):
        assert keyring.secret.decode() not in caplog.text


@pytest.mark.parametrize("case", ["wrong server key", "no key at a server with keys", "a key at a server without"])
def test_other_mismatches_are_errors_in_seconds(case: str, server: Keys, worker: Keys, other: Keys) -> None:
    at: Keys | None = server
    mine: Keys | None = worker
    if case == "wrong server key":
        mine = replace(worker, peer=other.public)
    elif case == "no key at a server with keys":
        mine = None
    else:
        at = None
    with listening(at) as (router, address):
        assert address in str(knock(mine, address))
        assert not router.poll(0)


def test_a_peer_with_keys_that_hangs_up_without_a_word() -> None:
    """The kernel drops what a peer had said that ends the connection with something unread."""
    with strangers.listening(strangers.resets_with_keys) as port:
        address = f"tcp://127.0.0.1:{port}"
        assert {event for event, _ in outcomes(None, address, 0.5)} == {HUNG_UP}
        assert "asks for a key and this worker has none" in str(knock(None, address))


HUNG_UP = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
MISMATCH = (int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL), int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH))


def outcomes(worker: Keys | None, address: str, wait_s: float) -> list[tuple[int, int]]:
    """(event, value) of every handshake within that time, up to the first that libzmq does not try again after."""
    seen: list[tuple[int, int]] = []
    with dealer(worker) as socket:
        monitor = socket.get_monitor_socket(HANDSHAKES)
        try:
            socket.connect(address)
            deadline = time.monotonic() + wait_s
            while (left_s := deadline - time.monotonic()) > 0:
                if monitor.poll(int(left_s * 1000)):
                    event = recv_monitor_message(monitor)
                    seen.append((int(event["event"]), int(event["value"])))
                    if event["event"] != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                        break
        finally:
            monitor.close()
    return seen


def test_libzmq_tells_a_worker_apart_what_is_wrong(server: Keys, worker: Keys, other: Keys) -> None:
    """What the texts of `sockets.Watch` rest on; at a mismatch of mechanisms either side may hang up first.

    If the other one does, what it said may be lost.
    """
    with listening(server) as (_, address):
        assert outcomes(worker, address, 5) == [(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)]
        assert outcomes(replace(other, peer=server.public), address, 5) == [(zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)]
        last = [outcomes(None, address, 2)[-1]]
        silent = outcomes(replace(worker, peer=other.public), address, 0.5)
        assert {event for event, _ in silent} == {HUNG_UP}
    with listening(None) as (_, address):
        last.append(outcomes(worker, address, 2)[-1])
    assert all(outcome == MISMATCH or outcome[0] == HUNG_UP for outcome in last), last


def test_without_a_gatekeeper_nobody_gets_in(server: Keys, worker: Keys) -> None:
    with listening(server, gate=False) as (_, address):
        seen = outcomes(worker, address, 0.5)
    assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in {event for event, _ in seen}


def test_a_socket_in_use_is_not_secured_in_silence(server: Keys, worker: Keys) -> None:
    with listening(None) as (router, address), dealer(None) as socket:
        with pytest.raises(UsageError, match="secure it before"):
            keys.secure(router, server, "server")
        socket.connect(address)
        with pytest.raises(UsageError, match="secure it before"):
            keys.secure(socket, worker, "worker")


def test_gatekeepers_in_two_contexts_at_once_and_one_after_another(server: Keys, worker: Keys, other: Keys) -> None:
    for _ in range(2):
        second = replace(other, peer=worker.public)
        with listening(server) as (router, address), listening(second) as (router2, address2):
            for place, to, peer in ((router, address, server), (router2, address2, second)):
                with dealer(replace(worker, peer=peer.public)) as socket:
                    socket.connect(to)
                    talk(place, socket)


def test_one_gatekeeper_for_a_context(server: Keys) -> None:
    with zmq.Context() as context:
        with (
            contextlib.closing(Gatekeeper(context, server)) as first,
            pytest.raises(UsageError, match="has one already"),
        ):
            Gatekeeper(context, server)
        first.close()
