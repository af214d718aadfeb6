"""A worker and its server's answers: what it asks for, and what it makes of answers that cannot be meant."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq
from torch import Tensor

import dtrain
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.errors import CommError, ConnectError, DtrainError, Fenced, Finished, ProtocolError, Rewound, UsageError
from dtrain.ps import sockets, wire
from dtrain.ps.client import ParameterServer
from tests.ps.serving import Running, all_of, header, own_socket, sealed, work_and_leave, workers_of
from tests.strangers import closed_port, listening, says_nothing

Answers = Callable[[wire.Message], list[list[bytes]]]
"""What an impostor answers a message with."""


@contextlib.contextmanager
def impostor(answers: Answers) -> Iterator[str]:
    """Address of something that speaks the protocol, and says what it likes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = sockets.make(context, zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            if router.poll(20):
                route, _, head, *_ = router.recv_multipart()
                for frames in answers(wire.decode(head)):
                    with contextlib.suppress(zmq.ZMQError):  # it is gone
                        router.send_multipart([route, *frames])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        over.set()
        thread.join(5)
        context.destroy(linger=0)


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """The impostor knows nothing of how workers of one host find each other."""
    monkeypatch.setattr(ParameterServer, "_settle", lambda worker: None)


WELCOME = wire.Welcome("here", 1, 0, 2**30, "", "fail")


def welcoming(*frames: bytes) -> Answers:
    """Says Welcome, and then always the same."""

    def answers(message: wire.Message) -> list[list[bytes]]:
        return [[wire.encode(WELCOME)]] if isinstance(message, wire.Hello) else [list(frames)]

    return answers


def joined(address: str) -> ParameterServer:
    return ParameterServer(address, 0, 1, timeout_s=5, connect_timeout_s=3, lanes="off")


BAD_ANSWERS: dict[str, tuple[list[bytes], str]] = {
    "nothing in it": ([sealed(b"")], "not msgpack"),
    "not a list": ([sealed(b"\x01")], "not an array"),
    "another protocol": ([header(77, 5)], "install one version everywhere"),
    "an unknown kind": ([header(wire.PROTOCOL, 99)], "unknown kind"),
    "a long header": ([sealed(bytes(5000))], "the limit is"),
    "a worker's message": ([wire.encode(wire.Bye(""))], "sent Bye"),
    "a request": ([wire.encode(wire.Fetch(0, 0, 0))], "sent Fetch"),
    "a sum of nothing": ([wire.encode(wire.Sum(0, 0))], "without its payload"),
    "three frames": ([wire.encode(wire.Sum(0, 0)), bytes(8), b""], "without its payload"),
    "done for a sum": ([wire.encode(wire.Done(0))], "without its payload"),
    "too short a sum": ([wire.encode(wire.Sum(0, 0)), bytes(4)], "1 numbers for metric/x, not 2"),
    "too long a sum": ([wire.encode(wire.Sum(0, 0)), bytes(12)], "3 numbers for metric/x, not 2"),
    "an empty sum": ([wire.encode(wire.Sum(0, 0)), b""], "payload of 0 bytes"),
    "a sum of 7 bytes": ([wire.encode(wire.Sum(0, 0)), bytes(7)], "payload of 7 bytes"),
    "what was not asked": ([wire.encode(wire.Sum(9, 0)), bytes(8)], "request 9, which was not made"),
    "always damaged": ([b"\0" * 8], "for the 101th time"),
    "a wrong crc for ever": ([wire.encode(wire.Sum(0, 1)), bytes(8)], "for the 101th time"),
}


@pytest.mark.usefixtures("no_board")
@pytest.mark.parametrize(("frames", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_an_answer_that_cannot_be_meant_is_an_error_for_good(frames: list[bytes], words: str):
    with impostor(welcoming(*frames)) as address:
        worker = joined(address)
        flat = torch.ones(2)
        with pytest.raises(ProtocolError, match=words) as caught:
            worker.all_reduce(flat, "metric/x").wait()
        assert address in str(caught.value)
        with pytest.raises(ProtocolError, match=words):
            worker.all_reduce(flat, "metric/x").wait()
        assert torch.equal(flat, torch.ones(2))
        worker.close()


@pytest.mark.usefixtures("no_board")
@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (wire.Failed("LayoutError", "x"), ProtocolError),
        (wire.Failed("Fenced", "x"), Fenced),
        (wire.Failed("Finished", "x"), Finished),
        (wire.Failed("CommError", "x"), CommError),
        (wire.Failed("SystemExit", "x"), CommError),  # only what is ours is made by its name
        (wire.Failed("annotations", "x"), CommError),
        (wire.Failed("__builtins__", "x"), CommError),
        (wire.Failed("Rewound", "x"), CommError),
        (wire.Rewind(4, "x"), Rewound),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_what_the_server_says_of_the_end(told: wire.Message, kind: type[DtrainError]):
    with impostor(welcoming(wire.encode(told))) as address:
        worker = joined(address)
        with pytest.raises(kind, match="x") as caught:
            worker.all_reduce(torch.ones(2), "metric/x").wait()
        assert not isinstance(caught.value, Rewound) or caught.value.epoch == 4
        worker.close()


@pytest.mark.usefixtures("no_board")
def test_a_lost_welcome_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dtrain.ps.link._NUDGE_S", 0.2)
    hellos: list[wire.Message] = []

    def answers(message: wire.Message) -> list[list[bytes]]:
        if isinstance(message, wire.Hello):
            hellos.append(message)
        return [[wire.encode(WELCOME)]] if len(hellos) == 2 else []

    with impostor(answers) as address:
        worker = joined(address)
        assert len(hellos) == 2
        assert hellos[0] == hellos[1]
        worker.close()


@pytest.mark.usefixtures("no_board")
def test_an_answer_that_comes_twice_counts_once():
    asked: list[wire.Message] = []

    def answers(message: wire.Message) -> list[list[bytes]]:
        asked.append(message)
        if isinstance(message, wire.Hello):
            return [[wire.encode(WELCOME)]]
        if isinstance(message, wire.Add):
            again = [[wire.encode(wire.Again())]] * (len(asked) < 5)
            answer = [wire.encode(wire.Sum(message.seq, 0)), torch.full((2,), 7.0).numpy().tobytes()]
            return [[wire.encode(wire.Ping())], *again, answer, answer]
        return []

    with impostor(answers) as address:
        worker = joined(address)
        for _ in range(3):
            flat = torch.ones(2)
            worker.all_reduce(flat, "metric/x").wait()
            assert flat.tolist() == [7.0, 7.0]
        worker.close()
    assert len({m.seq for m in asked if isinstance(m, wire.Add)}) == 3


def stopped_at_the_board(comm: Backend) -> int:
    """Worker 1 waits at the board, tells the server so, and is stopped; worker 0 comes there meanwhile, and leaves."""
    if comm.rank == 1:
        script = "sleep 0.5; kill -STOP $PPID; sleep 2.5; kill -CONT $PPID"
        stopper = subprocess.Popen(["sh", "-c", script])
    else:
        time.sleep(1.5)
    collectives.barrier(comm)
    if comm.rank == 1:
        stopper.wait()
    return comm.rank


def test_who_leaves_when_all_is_shown_is_not_missed():
    assert dtrain.run(stopped_at_the_board, workers=2, backend="ps") == [0, 1]


def leaves_early(comm: Backend) -> None:
    if comm.rank == 0:
        collectives.barrier(comm)


def test_who_leaves_without_having_shown_is_named():
    with pytest.raises(CommError, match=r"worker 1 .* has left"):
        dtrain.run(leaves_early, workers=2, backend="ps")


def test_a_server_that_says_nothing_after_hello():
    with impostor(lambda _: []) as address:
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dtrain.ps.client._MARGIN_S", 0.3)
            with pytest.raises(ConnectError, match="said nothing for"):
                ParameterServer(address, 0, 1, timeout_s=1, connect_timeout_s=0.7)
        assert time.monotonic() - started < 5


def test_nobody_and_somebody_else_at_the_address():
    with pytest.raises(ConnectError, match="is the server started"):
        ParameterServer(f"tcp://127.0.0.1:{closed_port()}", 0, 1, connect_timeout_s=0.3)
    with listening(says_nothing) as port, pytest.raises(ProtocolError, match="not dtrain's server"):
        ParameterServer(f"tcp://127.0.0.1:{port}", 0, 1, connect_timeout_s=0.5)


def test_two_servers_named_in_another_order(own_temporary_directory: Path):
    running = [Running(own_socket(own_temporary_directory), 1, server=s, num_servers=2) for s in range(2)]
    addresses = [r.address for r in running]
    for wrong in (addresses[::-1], addresses[:1]):
        with pytest.raises(UsageError, match="in the same order"):
            ParameterServer(wrong, 0, 1, timeout_s=5, connect_timeout_s=3)
    work_and_leave(workers_of(",".join(addresses), 1))
    assert [r.ended() for r in running] == [None, None]


@pytest.mark.parametrize("lanes", ["on", "", "shm"])
def test_lanes_that_there_are_not(lanes: str):
    with pytest.raises(UsageError, match="lanes is"):
        ParameterServer("tcp://127.0.0.1:1", 0, 1, lanes=lanes)


def test_staging_buffers_are_few(own_temporary_directory: Path):
    """Tensors from elsewhere are copied into shared memory; buffers are used again when they are back."""
    running = Running(own_socket(own_temporary_directory), 1)
    (worker,) = workers_of(running.address, 1)
    assert worker.shares
    made = []
    original = worker.shared_bytes
    worker.shared_bytes = lambda nbytes: (made.append(nbytes), original(nbytes))[1]  # type: ignore[method-assign]
    for _ in range(10):
        flats = [torch.full((100_000,), 2.0), torch.full((100_000,), 3.0)]
        works = [worker.all_reduce(flat, f"gradient/{i}") for i, flat in enumerate(flats)]
        for work in works:
            work.wait()
        assert [f.tolist() for f in flats] == [[2.0] * 100_000, [3.0] * 100_000]
    assert 1 <= len(made) <= 2  # the first sum may be over before the second begins
    large = len(made)
    small = torch.ones(10)
    worker.all_reduce(small, "metric/x").wait()
    assert len(made) == large  # what is small is sent
    worker.close()
    assert running.ended() is None


def test_plain_sums_of_gradients_are_refused_where_workers_may_be_dropped(own_temporary_directory: Path):
    """With one of them gone the sum would be no mean; with several servers, some would count it and others not."""
    running = Running(own_socket(own_temporary_directory), 2, on_loss="drop")
    workers = workers_of(running.address, 2)
    with pytest.raises(UsageError, match=r"give replicate\(\) a dtrain.ServerUpdate"):
        workers[0].all_reduce(torch.ones(5), "gradient/0")
    all_of(*(lambda w=w: w.all_reduce(torch.ones(5), "metric/x").wait() for w in workers))
    for worker in workers:
        worker.close()
    assert running.ended() is None


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("without", [0, 1])
def test_shared_memory_may_have_room_for_some_workers_only(without: int, servers: int, own_temporary_directory: Path):
    """The others keep theirs; it is told once, and sums are the same."""
    sockets_ = [own_socket(own_temporary_directory) for _ in range(servers)]
    running = [Running(s, 2, server=i, num_servers=servers) for i, s in enumerate(sockets_)]
    workers = workers_of(",".join(sockets_), 2)
    workers[without]._buffers.make = lambda nbytes: None  # type: ignore[method-assign]

    def sums(rank: int) -> list[Tensor]:
        flats = []
        for call in range(4):
            made = workers[rank].empty(1_000_001, torch.float32, "gradient/0")
            flats.append(made.fill_(rank + 1.0).add_(torch.arange(1_000_001) % 7 * 0.1 + call))
            workers[rank].all_reduce(flats[-1], "gradient/0").wait()
        return flats

    first, second = all_of(lambda: sums(0), lambda: sums(1))
    for call, (a, b) in enumerate(zip(first, second, strict=True)):
        pattern = torch.arange(1_000_001) % 7 * 0.1 + call
        assert torch.equal(a, b)
        assert torch.equal(a, (torch.full_like(a, 1.0) + pattern) + (torch.full_like(a, 2.0) + pattern))
    work_and_leave(workers)
    assert [r.ended() for r in running] == [None] * servers


@pytest.mark.parametrize("numel", [3000, 100_000, 600_000], ids=["a message", "one part", "three parts"])
@pytest.mark.parametrize("far", [0, 1])
def test_a_worker_beside_the_server_and_one_beyond_a_network(far: int, numel: int):
    """Only one of them could share memory with it: then neither does, or the sum of one would change under the other's
    answer; and both send the same parts."""
    running = Running("tcp://127.0.0.1:0", 2)
    workers: dict[int, ParameterServer] = {}
    found: dict[int, list[torch.Tensor]] = {}

    def work(rank: int) -> None:
        lanes = "off" if rank == far else "auto"
        workers[rank] = worker = ParameterServer(running.address, rank, 2, timeout_s=20, lanes=lanes)
        found[rank] = []
        for number in range(20):
            flat = worker.empty(numel, torch.float32, "gradient/0").fill_(rank + number)
            worker.all_reduce(flat, "gradient/0").wait()
            found[rank].append(flat.clone())
            flat.fill_(-1.0)  # as the next backward does, while the other's answer may be under way

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for sums in found.values():
        assert [torch.equal(s, torch.full_like(s, 2.0 * n + 1)) for n, s in enumerate(sums)] == [True] * 20
    assert not any(worker.shares for worker in workers.values())
    work_and_leave([workers[0], workers[1]])
    assert running.ended() is None


def test_credit_bounds_what_is_under_way():
    """A server that takes 4 MiB at once gets 20 MiB all the same."""
    running = Running("tcp://127.0.0.1:0", 2, credit_bytes=4 * 2**20)
    workers = workers_of(running.address, lanes="off")
    flats = [torch.full((5 * 2**20,), w.rank + 1.0) for w in workers]
    sums: list[torch.Tensor] = []

    def work(worker: ParameterServer) -> None:
        worker.all_reduce(flats[worker.rank], "gradient/0").wait()
        sums.append(flats[worker.rank])

    threads = [threading.Thread(target=work, args=(w,)) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [torch.equal(s, torch.full_like(s, 3.0)) for s in sums] == [True, True]
    work_and_leave(workers)
    assert running.ended() is None
