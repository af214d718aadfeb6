"""Joining a job: what the place is taken from, and the error that each wrong start ends in, within seconds."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zmq

import dtrain
from dtrain import env
from dtrain import errors as e
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.comm.rendezvous import gather, meet, open_store
from dtrain.comm.solo import Solo
from dtrain.connect import Request, check_backend
from dtrain.ps import keys as curve
from dtrain.ps.client import ParameterServer
from dtrain.ps.members import Terms
from dtrain.ps.server import Server
from tests.strangers import STRANGERS, closed_port, listening, says_nothing

PATIENCE_S = 0.7
"""What the workers here are told to wait for each other."""

MARGIN_S = 4.0
"""What they may take longer: two cores, several tests at once."""


ALONE = Terms(world_size=1)


# `dtrain.connect` is the function, and hides the module of that name.
connect_module = importlib.import_module("dtrain.connect")


@pytest.fixture(autouse=True)
def brief_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose job has failed does not stay long for workers that come late."""
    monkeypatch.setattr("dtrain.ps.server._LAST_WORDS_S", 0.5)


@contextlib.contextmanager
def within(seconds: float, *, at_least: float = 0.0) -> Iterator[None]:
    """The body ends in time, however it ends."""
    started = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - started
        assert at_least <= took <= seconds, f"took {took:.1f} s"


def failure(call: Callable[[], object], kind: type[Exception] = e.DtrainError) -> str:
    """What the call's error says; it is exactly of that kind."""
    with within(PATIENCE_S + MARGIN_S), pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def together(*calls: Callable[[], object]) -> list[object]:
    """What the calls return or raise, made at the same time."""
    outcomes: list[object] = [None] * len(calls)

    def run(number: int, call: Callable[[], object]) -> None:
        try:
            outcomes[number] = call()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    with within(2 * PATIENCE_S + MARGIN_S):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    return outcomes


@contextlib.contextmanager
def serving(address: str, world_size: int, *, keys: Path | None = None, **terms: object) -> Iterator[str]:
    """A server in a thread; gives its address."""
    told = Terms(world_size=world_size, timeout_s=5, connect_timeout_s=20, **terms)
    server = Server(address, told, threads=1, keys=keys)

    def run() -> None:
        with contextlib.suppress(e.DtrainError):
            server.run()
        server.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield server.address
    thread.join(30)
    assert not thread.is_alive(), "the server outlives its job"


@pytest.fixture(params=["ipc", "tcp"])
def bind(request: pytest.FixtureRequest, own_temporary_directory: Path) -> str:
    """Where a server may listen."""
    path = own_temporary_directory / f"s{time.monotonic_ns()}"
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{path}"


def ps_worker(address: str, rank: int = 0, world_size: int = 2, **more: object) -> Backend:
    more = {"connect_timeout_s": PATIENCE_S, **more}
    return dtrain.connect("ps", rank=rank, world_size=world_size, server=address, **more)


def ring_worker(store: str, rank: int = 0, world_size: int = 2) -> Backend:
    return dtrain.connect(
        "allreduce", rank=rank, world_size=world_size, store=store, connect_timeout_s=PATIENCE_S, timeout_s=5
    )


# --- which backend


def test_alone_by_default():
    comm = dtrain.connect()
    assert (comm.name, comm.rank, comm.world_size) == ("solo", 0, 1)


def test_an_unknown_backend_lists_the_names():
    text = failure(lambda: dtrain.connect("nccl"), e.UsageError)
    assert all(word in text for word in ("'nccl'", "solo", "threads", "ps", "allreduce"))
    assert isinstance(e.UsageError(""), ValueError)


def test_an_unknown_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTRAIN_BACKEND", "horovod")
    assert "'horovod'" in failure(dtrain.connect, e.UsageError)


def test_solo_is_a_world_of_one():
    text = failure(lambda: dtrain.connect("solo", rank=0, world_size=2), e.UsageError)
    assert "world_size is 2" in text


def test_threads_says_how_to_run_them():
    assert "dtrain.run(fn, workers=n" in failure(lambda: dtrain.connect("threads"), e.UsageError)


def test_a_server_process_is_no_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DMLC_ROLE", "server")
    assert "dtrain server" in failure(dtrain.connect, e.UsageError)


@pytest.mark.parametrize("limits", [{"timeout_s": 0}, {"timeout_s": -1.0}, {"connect_timeout_s": float("nan")}])
def test_limits_are_seconds(limits: dict[str, float]):
    assert "more than 0" in failure(lambda: dtrain.connect(**limits), e.UsageError)


def test_an_entry_point_adds_a_backend(monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("mine", f"{__name__}:third_party", "dtrain.backends")
    monkeypatch.setattr(connect_module, "entry_points", lambda group: [point] if group == point.group else [])
    check_backend("mine")
    comm = dtrain.connect("mine", rank=1, world_size=3, timeout_s=7.0)
    assert (comm.name, requests[-1].place.rank, requests[-1].place.world_size) == ("solo", 1, 3)
    assert (requests[-1].timeout_s, requests[-1].connect_timeout_s) == (7.0, 30.0)
    assert "mine" in failure(lambda: dtrain.connect("nosuch"), e.UsageError)


requests: list[Request] = []


def third_party(request: Request) -> Backend:
    requests.append(request)
    return Solo()


# --- the launch environment


def test_ps_lites_variables_are_enough(monkeypatch: pytest.MonkeyPatch, bind: str):
    if bind.startswith("ipc"):
        pytest.skip("ps-lite's variables hold a host and a port")
    with serving(bind, 1) as address:
        port = address.rsplit(":", 1)[1]
        for name, value in {"ROLE": "worker", "NUM_WORKER": "1", "WORKER_ID": "0", "PS_ROOT_PORT": port}.items():
            monkeypatch.setenv(f"DMLC_{name}", value)
        monkeypatch.setenv("DMLC_PS_ROOT_URI", "127.0.0.1")
        comm = dtrain.connect("ps", connect_timeout_s=5)
        assert collectives.sum_numbers(comm, [2.5]) == [2.5]
        comm.close()


def test_contradicting_variables_are_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "DMLC_WORKER_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "RANK=0 and DMLC_WORKER_ID=1" in failure(dtrain.connect, e.UsageError)


@pytest.mark.parametrize(("backend", "words"), [("ps", "server="), ("allreduce", "store=")])
def test_a_job_without_a_place_to_meet(backend: str, words: str):
    assert words in failure(lambda: dtrain.connect(backend, rank=0, world_size=2), e.UsageError)


# --- the address of a parameter server


@pytest.mark.parametrize(
    "address",
    [
        *("", "127.0.0.1:5555", "tcp://127.0.0.1", "tcp://:5555", "tcp://127.0.0.1:http", "tcp://127.0.0.1:99999"),
        *("tcp://127.0.0.1:0", "udp://127.0.0.1:5555", "ipc://", "ipc://relative/path", "http://127.0.0.1:80/"),
    ],
)
def test_no_server_address(address: str):
    assert repr(address) in failure(lambda: ps_worker(address), e.UsageError)


def test_one_of_several_addresses_is_none():
    assert "'nowhere'" in failure(lambda: ps_worker("tcp://127.0.0.1:1,nowhere"), e.UsageError)


def test_one_of_several_servers_is_not_there(bind: str):
    gone = f"tcp://127.0.0.1:{closed_port()}"
    server = Server(bind, Terms(world_size=1, num_servers=2), threads=1)
    text = failure(lambda: ps_worker(f"{server.address},{gone}", 0, 1), e.ConnectError)
    assert f"nobody answers at {gone}" in text
    server.close()


def test_lanes_are_auto_or_off():
    text = failure(lambda: ps_worker("tcp://127.0.0.1:1", lanes="fast"), e.UsageError)
    assert "lanes is 'fast'" in text


@pytest.mark.parametrize("use", [ps_worker, lambda address: Server(address, ALONE)])
def test_the_path_of_a_socket_is_short(use: Callable[[str], object]):
    address = f"ipc:///tmp/{'x' * 120}"
    assert "at most 107 bytes, this one 125" in failure(lambda: use(address), e.UsageError)


def test_nobody_listens_at_the_port():
    address = f"tcp://127.0.0.1:{closed_port()}"
    text = failure(lambda: ps_worker(address), e.ConnectError)
    assert address in text
    assert "is the server started" in text


def test_nobody_listens_at_the_path(tmp_path: Path):
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    for path in (tmp_path / "absent", stale):
        assert str(path) in failure(lambda path=path: ps_worker(f"ipc://{path}"), e.ConnectError)


def test_the_servers_port_speaks_something_else():
    with contextlib.ExitStack() as stack:
        addresses = [f"tcp://127.0.0.1:{stack.enter_context(listening(a))}" for a in STRANGERS]
        outcomes = together(*[lambda a=a: ps_worker(a) for a in addresses])
    for address, stranger, outcome in zip(addresses, STRANGERS, outcomes, strict=True):
        assert type(outcome) is e.ProtocolError, (stranger, outcome)
        assert f"{address} is not dtrain's server" in str(outcome), stranger


@pytest.mark.parametrize("kind", [zmq.PUB, zmq.PULL, zmq.PAIR], ids=lambda k: zmq.SocketType(k).name)
def test_the_servers_port_is_another_kind_of_zeromq_socket(kind: int):
    with zmq.Context() as context, context.socket(kind) as stranger:
        stranger.linger = 0
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        text = failure(lambda: ps_worker(f"tcp://127.0.0.1:{port}"), e.ProtocolError)
    assert str(port) in text


def test_the_servers_port_is_a_zeromq_socket_that_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dtrain.ps.client._MARGIN_S", 0.5)
    with zmq.Context() as context, context.socket(zmq.REP) as stranger:
        stranger.linger = 0
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        text = failure(lambda: ps_worker(f"tcp://127.0.0.1:{port}"), e.ConnectError)
    assert f"the server at tcp://127.0.0.1:{port} said nothing for 1.2 s" in text


@pytest.mark.parametrize("says", [[b""], [b"\x80"], [b"", b"", b""], [b"\x93\x01\x05\x00"], [b"\x00" * 5000]], ids=repr)
def test_the_servers_port_is_a_zeromq_router_of_another_service(says: list[bytes]):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as stranger:
        stranger.linger = 0
        port = stranger.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            while stranger.poll(500):
                stranger.send_multipart([stranger.recv_multipart()[0], *says])

        thread = threading.Thread(target=answer)
        thread.start()
        text = failure(lambda: ps_worker(f"tcp://127.0.0.1:{port}"), e.ProtocolError)
        thread.join()
    assert str(port) in text


def test_another_service_that_answers_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dtrain.ps.client._MARGIN_S", 0.5)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as stranger:
        stranger.linger = 0
        port = stranger.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            if stranger.poll(5000):
                stranger.send_multipart([stranger.recv_multipart()[0], b"who are you?"])

        thread = threading.Thread(target=answer)
        thread.start()
        text = failure(lambda: ps_worker(f"tcp://127.0.0.1:{port}"), e.ProtocolError)
        thread.join()
    assert f"the server at tcp://127.0.0.1:{port} is not dtrain's" in text


# --- who takes part in a parameter server's job


def test_a_missing_worker_is_named(bind: str):
    with serving(bind, 3) as address:
        outcomes = together(lambda: ps_worker(address, 0, 3), lambda: ps_worker(address, 2, 3))
    for outcome in outcomes:
        assert type(outcome) is e.ConnectError, outcome
        assert "workers [1] of 3 have not joined" in str(outcome)


def test_world_sizes_that_differ(bind: str):
    with serving(bind, 2) as address:
        good, bad = together(lambda: ps_worker(address), lambda: ps_worker(address, 1, 3))
    assert type(bad) is e.UsageError, bad
    assert "worker 1" in str(bad)
    assert "world_size 3, the server with 2" in str(bad)
    assert type(good) is e.ConnectError, good
    assert "workers [1] of 2 have not joined" in str(good)
    assert "refused: worker 1" in str(good)
    assert "world_size 3" in str(good)


def test_two_workers_of_one_rank(bind: str):
    with serving(bind, 2) as address:
        outcomes = together(lambda: ps_worker(address), lambda: ps_worker(address))
    assert sorted(type(o).__name__ for o in outcomes) == ["ConnectError", "UsageError"]
    assert "two workers say that they are worker 0" in " ".join(map(str, outcomes))


def test_another_jobs_server(bind: str, monkeypatch: pytest.MonkeyPatch):
    with serving(bind, 1, job_id="theirs") as address:
        monkeypatch.setenv("DTRAIN_JOB_ID", "mine")
        text = failure(lambda: ps_worker(address, 0, 1), e.UsageError)
        assert "belongs to another job than this server" in text
        assert "mine" not in text
        assert "theirs" not in text
        monkeypatch.setenv("DTRAIN_JOB_ID", "theirs")
        ps_worker(address, 0, 1, connect_timeout_s=9).close()  # the server was not disturbed


def test_workers_that_agree_join_and_leave(bind: str):
    with serving(bind, 2) as address:
        first, second = together(*[lambda r=r: ps_worker(address, r, connect_timeout_s=9) for r in range(2)])
        assert isinstance(first, ParameterServer)
        assert isinstance(second, ParameterServer)
        sums = together(*[lambda c=c: collectives.sum_numbers(c, [c.rank + 1.0]) for c in (first, second)])
        assert sums == [[3.0], [3.0]]
        first.close()
        second.close()
    if address.startswith("ipc"):
        assert not Path(address.removeprefix("ipc://")).exists()


def other(bind: str) -> str:
    """A second address of that kind."""
    return bind if bind.endswith(":0") else f"{bind}b"


def test_workers_join_several_servers(bind: str):
    with (
        serving(bind, 2, server=0, num_servers=2) as first,
        serving(other(bind), 2, server=1, num_servers=2) as second,
    ):
        addresses = f"{first},{second}"
        workers = together(*[lambda r=r: ps_worker(addresses, r, connect_timeout_s=9) for r in range(2)])
        assert [type(w) for w in workers] == [ParameterServer] * 2, workers
        flats = [torch.full((300_001,), w.rank + 1.0) for w in workers]
        together(*[lambda w=w, f=f: w.all_reduce(f, "gradient/0").wait() for w, f in zip(workers, flats, strict=True)])
        assert all(torch.equal(f, torch.full((300_001,), 3.0)) for f in flats)
        for worker in workers:
            worker.close()


def test_servers_in_another_order(bind: str):
    with (
        serving(bind, 1, server=0, num_servers=2) as first,
        serving(other(bind), 1, server=1, num_servers=2) as second,
    ):
        text = failure(lambda: ps_worker(f"{second},{first}", 0, 1), e.UsageError)
        assert "server" in text
        assert "order" in text
        ps_worker(f"{first},{second}", 0, 1, connect_timeout_s=9).close()


def test_a_server_of_several_does_not_do_alone(bind: str):
    with serving(bind, 1, server=0, num_servers=1) as address:
        with serving(other(bind), 1, server=1, num_servers=2) as second:
            text = failure(lambda: ps_worker(second, 0, 1), e.UsageError)
            assert "2" in text
            ended = failure(lambda: ps_worker(f"{address},{second}", 0, 1), e.UsageError)
            assert "1" in ended
        ps_worker(address, 0, 1, connect_timeout_s=9).close()


@pytest.mark.parametrize(("lanes", "variable"), [("off", "auto"), (None, "off")])
def test_lanes_off_is_sockets_only(bind: str, monkeypatch: pytest.MonkeyPatch, lanes: str | None, variable: str):
    monkeypatch.setenv("DTRAIN_LANES", variable)
    with serving(bind, 1) as address:
        comm = ps_worker(address, 0, 1, connect_timeout_s=9, lanes=lanes)
        assert isinstance(comm, ParameterServer)
        assert not comm.shares
        assert collectives.sum_numbers(comm, [2.0]) == [2.0]
        comm.close()


@pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")
def test_keys_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine, others = tmp_path / "mine", tmp_path / "others"
    curve.make(mine)
    curve.make(others)
    with serving("tcp://127.0.0.1:0", 1, keys=mine) as address:
        monkeypatch.setenv("DTRAIN_KEYS", str(others))
        assert "server.public" in failure(lambda: ps_worker(address, 0, 1), e.ProtocolError)
        shutil.copy(mine / "server.public", others)
        failure(lambda: ps_worker(address, 0, 1), e.KeyRefused)
        monkeypatch.setenv("DTRAIN_KEYS", str(mine))
        comm = ps_worker(address, 0, 1, connect_timeout_s=9)
        assert collectives.sum_numbers(comm, [2.0]) == [2.0]
        comm.close()


# --- the store where workers of all-reduce meet


@pytest.fixture
def one_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are threads of one process count their meetings as processes do."""
    monkeypatch.setattr(connect_module, "_meetings", itertools.repeat(0))


@pytest.fixture(params=["file", "tcp"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else f"tcp://127.0.0.1:{closed_port()}"


@pytest.mark.parametrize(
    "address",
    [
        *("somewhere", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:abc"),
        *("tcp://:29500", "http://127.0.0.1:80", "file://", "env://"),
    ],
)
def test_no_store_address(address: str):
    assert repr(address) in failure(lambda: ring_worker(address), e.UsageError)


@pytest.mark.parametrize("path", ["/proc/nosuch/store", "/"])
def test_no_file_can_be_made_there(path: str):
    assert f"file://{path}" in failure(lambda: ring_worker(f"file://{path}"), e.UsageError)


def test_nobody_keeps_the_store():
    port = closed_port()
    text = failure(lambda: ring_worker(f"tcp://127.0.0.1:{port}", rank=1), e.ConnectError)
    assert f"nobody listens at tcp://127.0.0.1:{port}" in text
    assert "worker 0" in text


def test_the_stores_port_speaks_something_else():
    with contextlib.ExitStack() as stack:
        addresses = [f"tcp://127.0.0.1:{stack.enter_context(listening(a))}" for a in STRANGERS]
        outcomes = together(*[lambda a=a: ring_worker(a, rank=1) for a in addresses])
    for address, stranger, outcome in zip(addresses, STRANGERS, outcomes, strict=True):
        assert type(outcome) is e.ConnectError, (stranger, outcome)
        assert f"the store at {address}" in str(outcome), stranger


def test_the_stores_port_is_taken():
    with listening(says_nothing) as port:
        text = failure(lambda: ring_worker(f"tcp://127.0.0.1:{port}", rank=0), e.ConnectError)
    assert f"cannot keep the store at tcp://127.0.0.1:{port}" in text
    assert "in use" in text


@pytest.mark.usefixtures("one_meeting")
def test_a_worker_that_does_not_come_is_named(store: str):
    outcomes = together(lambda: ring_worker(store, 0, 3), lambda: ring_worker(store, 2, 3))
    for outcome in outcomes:
        assert type(outcome) is e.ConnectError, outcome
        assert "workers [1] have not come" in str(outcome)


@pytest.mark.usefixtures("one_meeting")
def test_store_world_sizes_that_differ(store: str):
    outcomes = together(lambda: ring_worker(store, 0, 2), lambda: ring_worker(store, 2, 3))
    for outcome in outcomes:
        assert type(outcome) is e.UsageError, outcome
        assert "worker 0 " in str(outcome)
        assert all(word in str(outcome) for word in ("worker 2", "world_size", "3", "2"))


@pytest.mark.usefixtures("one_meeting")
def test_store_backends_that_differ(store: str):
    def other() -> Backend:
        return dtrain.connect("ps", rank=1, world_size=2, store=store, connect_timeout_s=PATIENCE_S)

    outcomes = together(lambda: ring_worker(store, 0, 2), other)
    for outcome in outcomes:
        assert type(outcome) is e.UsageError, outcome
        assert all(word in str(outcome) for word in ("worker 0", "worker 1", "backend", "allreduce", "ps"))


@pytest.mark.usefixtures("one_meeting")
def test_store_two_workers_of_one_rank(tmp_path: Path):
    store = f"file://{tmp_path}/store"
    outcomes = together(*[lambda: ring_worker(store, 1, 3)] * 2, lambda: ring_worker(store, 0, 3))
    for outcome in outcomes:
        assert type(outcome) is e.UsageError, outcome
        assert "two workers say that they are worker 1" in str(outcome)
        assert f"pid {os.getpid()}" in str(outcome)


@pytest.mark.usefixtures("one_meeting")
def test_a_file_left_by_an_earlier_job(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = open_store(f"file://{tmp_path}/store", rank=0, host_it=True, timeout_s=5, prefix="dtrain/job/0/0")
    claim = {"world_size": 2, "backend": "allreduce", "host": socket.gethostname(), "pid": ended.pid, "token": "x"}
    left.set("join/0", json.dumps(claim))
    text = failure(lambda: ring_worker(f"file://{tmp_path}/store"), e.UsageError)
    assert f"left by an earlier job, whose worker 0 was pid {ended.pid}" in text


def test_workers_that_agree_meet(store: str):
    def come(rank: int) -> str:
        mine = open_store(store, rank=rank, host_it=True, timeout_s=5, prefix="p")
        meet(mine, rank=rank, world_size=2, backend="x", timeout_s=5)
        stores.append(mine)  # worker 0's must stay
        return "met"

    stores = []

    assert together(lambda: come(0), lambda: come(1)) == ["met", "met"]


# --- one store for all attempts, as torchrun keeps it


def attempt(store: dist.Store, world_size: int, *ranks: int, timeout_s: float = 5.0) -> list[object]:
    """What the workers of one attempt, threads here, find of each other."""

    def come(rank: int) -> list[str]:
        mine = gather(store, rank=rank, world_size=world_size, timeout_s=timeout_s)
        mine.set(str(rank), f"{rank} of {world_size}")
        return [mine.get(str(other)).decode() for other in range(world_size)]

    return together(*[functools.partial(come, rank) for rank in ranks or range(world_size)])


def test_each_attempt_has_a_part_of_the_store_of_its_own():
    store = dist.HashStore()
    for world_size in (3, 3, 2, 4, 1):
        assert attempt(store, world_size) == [[f"{r} of {world_size}" for r in range(world_size)]] * world_size


def test_what_an_attempt_has_left_misleads_nobody():
    """Worker 0 comes last: until then the others hear an earlier call, and answer it again in vain."""
    store = dist.HashStore()
    attempt(store, 3)
    before = threading.Timer(0.3, lambda: late.extend(attempt(store, 3, 0)))
    late: list[object] = []
    before.start()
    assert attempt(store, 3, 1, 2) == [["0 of 3", "1 of 3", "2 of 3"]] * 2
    before.join()
    assert late == [["0 of 3", "1 of 3", "2 of 3"]]


@pytest.mark.parametrize(("there", "missing"), [((0, 2), [1]), ((1, 2), [0])])
def test_an_attempt_names_who_does_not_come(there: tuple[int, ...], missing: list[int]):
    for outcome in attempt(dist.HashStore(), 3, *there, timeout_s=0.3):
        assert type(outcome) is e.ConnectError, outcome
        assert f"workers {missing} have not come within 0.3 s" in str(outcome)


def test_a_store_of_this_host_is_not_open_to_the_network():
    port = closed_port()
    kept = open_store(f"tcp://127.0.0.1:{port}", rank=0, host_it=True, timeout_s=5, prefix="p")
    elsewhere = [a for a in own_addresses() if not a.startswith("127.")]
    for address in elsewhere:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, port), timeout=2)
    del kept


def own_addresses() -> list[str]:
    import psutil

    return [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]


# --- beside a process group of the program's own


@pytest.fixture
def own_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("own_group")
def test_the_programs_own_group_stays():
    comm = dtrain.connect("allreduce", timeout_s=5)
    assert collectives.sum_numbers(comm, [2.0]) == [2.0]
    comm.close()
    comm.close()
    assert dist.is_initialized()
    dist.all_reduce(torch.ones(1))


@pytest.mark.usefixtures("own_group")
def test_the_programs_own_group_is_another_one():
    text = failure(lambda: ring_worker("file:///tmp/unused", rank=1), e.UsageError)
    assert "rank 0 of 1" in text
    assert "1 of 2" in text


BESIDE = """
import os, sys, torch, torch.distributed as dist, dtrain
from dtrain.comm import collectives
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
for _ in range(2):
    comm = dtrain.connect("allreduce", timeout_s=10)
    assert collectives.sum_numbers(comm, [rank + 1.0]) == [3.0]
    comm.close()
    flat = torch.ones(1)
    dist.all_reduce(flat)
    assert flat.item() == 2
dist.destroy_process_group()
comm = dtrain.connect("allreduce", timeout_s=10)
assert collectives.sum_numbers(comm, [rank + 1.0]) == [3.0]
comm.close()
assert not dist.is_initialized()
comm = dtrain.connect("allreduce", timeout_s=10)
assert collectives.sum_numbers(comm, [rank + 1.0]) == [3.0]
comm.close()
print("fine", rank)
"""


def test_beside_the_programs_own_group_in_two_processes(tmp_path: Path):
    script = tmp_path / "beside.py"
    script.write_text(BESIDE)
    command = [sys.executable, "-m", "dtrain", "launch", "-n", "2", str(script), str(tmp_path / "own")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[worker 1] fine 1", "fine 0"]


# --- the server's address


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:5555", "tcp://[::]:0"])
def test_a_server_does_not_listen_beyond_this_host(address: str):
    text = failure(lambda: Server(address, ALONE), e.UsageError)
    assert "--insecure-no-encryption" in text


def test_a_server_listens_beyond_this_host_when_told():
    server = Server("tcp://0.0.0.0:0", ALONE, insecure_no_encryption=True)
    assert server.address.startswith("tcp://0.0.0.0:")
    server.close()


@pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")
def test_a_server_with_keys_listens_beyond_this_host(tmp_path: Path):
    curve.make(tmp_path / "keys")
    server = Server("tcp://0.0.0.0:0", ALONE, keys=tmp_path / "keys")
    assert server.address.startswith("tcp://0.0.0.0:")
    server.close()


def test_a_server_whose_address_is_not_this_hosts():
    text = failure(lambda: Server("tcp://192.0.2.1:5555", ALONE, insecure_no_encryption=True), e.UsageError)
    assert "cannot listen at tcp://192.0.2.1:5555" in text


def test_the_place_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTRAIN_JOB_ID", "the-job")
    with caplog.at_level("INFO", logger="dtrain.connect"):
        dtrain.connect("solo")
    assert "the-job" in caplog.text
    assert "DTRAIN_JOB_ID" in caplog.text
    assert env.resolve().job_id == "the-job"
