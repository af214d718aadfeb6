"""What is under way over a network: bounded, in parts that suit the link, and taken while the program computes."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm import parts
from dtrain.comm.base import Backend
from dtrain.errors import CommError
from dtrain.ps import wire
from dtrain.ps.outbox import Outbox, learn_part_bytes, window_bytes
from dtrain.ps.sockets import is_far
from tests.conftest import everywhere
from tests.ps.serving import Running, all_of, listens_at, process, work_and_leave, workers_of


@dataclass
class FakeLink:
    has_credit: bool = True
    sent: list[int] = field(default_factory=list)
    """Bytes of each request that is not answered."""
    made: int = 0

    @property
    def unanswered_bytes(self) -> int:
        return sum(self.sent)

    def unanswered_of(self, first: int) -> int:
        return sum(self.sent[: max(0, first - (self.made - len(self.sent)))])

    def send(self, nbytes: int) -> None:
        self.sent.append(nbytes)
        self.made += 1

    def answer(self) -> None:
        self.sent.pop(0)


def test_so_much_is_under_way_and_no_more():
    link = FakeLink()
    box = Outbox(link)  # type: ignore[arg-type]
    for nbytes in (40, 40, 40, 500, 40):
        box.put(nbytes, 100, lambda nbytes=nbytes: link.send(nbytes))  # type: ignore[misc]
    assert box.feed()
    assert link.sent == [40, 40]
    assert not box.feed()
    link.answer()
    box.feed()
    assert link.sent == [40, 40]
    link.answer()
    link.answer()
    box.feed()
    assert link.sent == [500], "a message that is larger than the window goes alone"
    link.answer()
    link.has_credit = False
    assert not box.feed()
    link.has_credit = True
    assert box.feed()
    assert link.sent == [40]


def test_what_has_no_window_waits_for_nothing_but_credit():
    link = FakeLink()
    box = Outbox(link)  # type: ignore[arg-type]
    for nbytes, window in ((40, 50), (41, 50), (1, 0)):
        box.put(nbytes, window, lambda nbytes=nbytes: link.send(nbytes))  # type: ignore[misc]
        box.feed()
    assert link.sent == [40, 1]
    link.has_credit = False
    box.put(2, 0, lambda: link.send(2))
    assert link.sent == [40, 1]
    link.has_credit = True
    link.answer()
    box.feed()
    link.answer()
    box.feed()
    assert link.sent == [41, 2]


def test_what_is_in_haste_goes_first_and_has_a_window_of_its_own():
    link = FakeLink()
    box = Outbox(link)  # type: ignore[arg-type]
    for number in range(10, 18):
        box.put(number, 30, lambda number=number: link.send(number), haste=number)  # type: ignore[misc]
    box.feed()
    assert link.sent == [10, 11]
    box.hurry()
    box.feed()
    assert link.sent == [10, 11, 17], "the next one would be more than 30, with 17"
    link.answer()
    assert not box.feed(), "an answer to what went before makes no room"
    link.answer()
    link.answer()
    box.feed()
    assert link.sent == [16]


class Many(FakeLink):
    """Answers in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: dict[int, tuple[int, int]] = {}  # by message: which request, and its size

    @property
    def unanswered_bytes(self) -> int:
        return sum(size for _, size in self.under_way.values())

    def unanswered_of(self, first: int) -> int:
        return sum(size for request, size in self.under_way.values() if request < first)


@dataclass
class Worker:
    """Makes messages one after the other, as backward does, and hurries at its end."""

    box: Outbox
    link: Many
    sizes: list[int]
    made: int = 0
    hurried: bool = False
    sent: list[int] = field(default_factory=list)
    answered: set[int] = field(default_factory=set)

    def go_on(self) -> None:
        if self.made == len(self.sizes):
            self.hurried = self.hurried or not self.box.hurry()
            return
        number, self.made = self.made, self.made + 1
        self.box.put(self.sizes[number], window_bytes(self.sizes[number]), lambda: self.send(number), haste=number)

    def send(self, number: int) -> None:
        self.sent.append(number)
        self.link.under_way[number] = self.link.made, self.sizes[number]
        self.link.made += 1

    def hear(self, number: int) -> None:
        self.answered.add(number)
        del self.link.under_way[number]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_workers_that_hurry_never_wait_for_each_other(data: st.DataObject):
    """A server answers what it has from all of them: whatever happens when, everything is sent in the end."""
    sizes = data.draw(st.lists(st.integers(1, 10).map(lambda n: n * parts.LEAST_BYTES), min_size=1, max_size=20))
    links = [Many() for _ in range(data.draw(st.integers(2, 4)))]
    workers = [Worker(Outbox(link), link, sizes) for link in links]  # type: ignore[arg-type]
    random = data.draw(st.randoms(use_true_random=False))
    while not all(len(w.answered) == len(sizes) for w in workers):
        ways = [w.go_on for w in workers if not w.hurried]
        complete = set.intersection(*(set(w.sent) for w in workers))
        ways += [functools.partial(w.hear, n) for w in workers for n in complete - w.answered]
        ways += [w.box.feed for w in workers]
        before = [(w.made, w.hurried, len(w.sent), len(w.answered)) for w in workers]
        random.shuffle(ways)
        for way in ways[: random.randint(1, len(ways))]:
            way()
        if before == [(w.made, w.hurried, len(w.sent), len(w.answered)) for w in workers]:
            for way in ways:
                way()
            assert before != [(w.made, w.hurried, len(w.sent), len(w.answered)) for w in workers], "all wait"


@pytest.mark.parametrize(
    ("address", "far"),
    [("tcp://127.0.0.1:1", False), ("tcp://[::1]:1", False), ("ipc:///x", False), ("tcp://10.1.2.3:1", True)],
)
def test_what_leaves_the_host(address: str, far: bool):
    assert is_far(address) == far


def test_without_a_window_all_is_sent():
    link = FakeLink()
    box = Outbox(link)  # type: ignore[arg-type]
    for _ in range(5):
        box.put(10**9, 0, lambda: link.send(10**9))
    assert link.sent == [10**9] * 5


class _Paced:
    """A Backend that takes as long as a link of that rate would, for one way."""

    def __init__(self, inner: Backend, bytes_per_s: float) -> None:
        self._inner = inner
        self._bytes_per_s = bytes_per_s
        self.rank, self.world_size = inner.rank, inner.world_size

    def all_reduce(self, flat: Tensor, key: str) -> object:
        time.sleep(flat.nbytes / self._bytes_per_s)
        return self._inner.all_reduce(flat, key)


def learnt(comm: Backend, rates: list[float]) -> int:
    return learn_part_bytes(_Paced(comm, rates[comm.rank] / 2), servers=1)  # type: ignore[arg-type]


def test_parts_are_what_passes_in_three_milliseconds():
    found = everywhere(lambda comm: learnt(comm, [2e8, 2e8]), backend="threads")
    assert len(set(found)) == 1
    assert 160 * 2**10 <= found[0] <= 600_000  # sleep is never too short


def test_the_slowest_worker_counts_and_small_parts_have_a_bound():
    assert everywhere(lambda comm: learnt(comm, [1e12, 3e7]), backend="threads") == [160 * 2**10] * 2


@pytest.mark.parametrize(("rate", "kib"), [(3e9, 1024), (2e8, 584), (2e7, 116), (1e7, 58), (1e5, 16)])
def test_over_slow_links_parts_take_longer(rate: float, kib: int):
    """But never so long as to leave other links idle; and a message costs what it costs."""
    assert parts.part_bytes(rate) == pytest.approx(kib * 2**10, abs=4096)
    assert parts.part_bytes(rate) % 4096 == 0


class _Hesitant(_Paced):
    """The same, and what comes first, of each size, takes much longer."""

    def __init__(self, inner: Backend, bytes_per_s: float) -> None:
        super().__init__(inner, bytes_per_s)
        self._seen: Counter[int] = Counter()

    def all_reduce(self, flat: Tensor, key: str) -> object:
        self._seen[flat.nbytes] += 1
        time.sleep(0.08 if self._seen[flat.nbytes] <= 2 else 0.0)
        return super().all_reduce(flat, key)


def test_a_job_that_is_slow_to_begin_is_no_slow_network():
    paced = 3e6  # parts of 36 KiB; as slow as it begins, they would be of 16
    found = everywhere(lambda comm: learn_part_bytes(_Hesitant(comm, paced), servers=1), backend="threads")  # type: ignore[arg-type]
    assert found[0] == found[1] >= 24 * 2**10


def test_parts_are_never_longer_than_a_message():
    assert everywhere(lambda comm: learnt(comm, [1e15, 1e15]), backend="threads")[0] <= wire.PART_BYTES


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("dtrain.ps.sockets.is_far", lambda address: True)
    monkeypatch.setattr("dtrain.ps.client.learn_part_bytes", lambda comm, servers: 64 * 2**10)
    return 64 * 2**10


def test_sums_go_on_while_the_program_computes(small_parts: int):
    """Without anybody waiting, and with a window's worth under way at most."""
    running = Running("tcp://127.0.0.1:0")
    workers = workers_of(running.address, lanes="off")
    flats = [torch.arange(2**19, dtype=torch.float32) * (w.rank + 1) for w in workers]
    works = [w.all_reduce(f, "gradient/0") for w, f in zip(workers, flats, strict=True)]
    most = 0
    deadline = time.monotonic() + 20
    while any(work.missing for work in works):  # type: ignore[attr-defined]
        most = max(most, *(link.unanswered_bytes for w in workers for link in w.links))
        assert time.monotonic() < deadline, "nothing is taken before somebody waits"
        time.sleep(0.001)
    assert 0 < most <= window_bytes(small_parts) == 4 * small_parts
    assert all(torch.equal(f, torch.arange(2**19, dtype=torch.float32) * 3) for f in flats)
    work_and_leave(workers)
    assert running.ended() is None
    assert not [t for t in threading.enumerate() if t.name == "dtrain-pump"]


@pytest.mark.usefixtures("small_parts")
def test_a_pump_tells_the_program_of_a_server_that_is_gone():
    with process("--bind", "tcp://127.0.0.1:0", "--workers", "2") as child:
        workers = workers_of(listens_at(child), lanes="off")
        flats = [torch.ones(2**20) for _ in workers]
        first = workers[0].all_reduce(flats[0], "gradient/0")  # nobody else sends
        child.kill()
        child.wait(10)
        started = time.monotonic()
        with pytest.raises(CommError, match="is gone"):
            first.wait()
        assert time.monotonic() - started < 10
        all_of(*(w.close for w in workers))
