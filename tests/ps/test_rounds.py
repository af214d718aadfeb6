"""The server's mind, without a socket and without a clock: who may say what when, and what follows."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from dtrain.errors import ProtocolError
from dtrain.ps.rounds import Rounds, Send
from dtrain.ps.wire import Add, Bye, Failed, Hello, Message, Ping, Sum, Welcome

KEY = "gradient/0"


def make(world_size: int = 2, **more: Any) -> Rounds:
    settings = {"host": "h", "pid": 1, "timeout_s": 10.0, "connect_timeout_s": 5.0, "now": 0.0, **more}
    return Rounds(world_size, **settings)


def session(rank: int) -> bytes:
    return b"session-%d" % rank


def hello(rank: int, world_size: int = 2, *, job_id: str = "", patience_ms: int = 10**6) -> Hello:
    return Hello(job_id, rank, world_size, f"host{rank}", 100 + rank, patience_ms)


def joined(world_size: int = 2, **more: Any) -> Rounds:
    rounds = make(world_size, **more)
    for rank in range(world_size):
        rounds.receive(session(rank), hello(rank, world_size), None, 1.0)
    return rounds


def add(
    rounds: Rounds, rank: int, value: Tensor | float, *, key: str = KEY, call: int = 0, part: int = 0, now: float = 2.0
) -> list[Send]:
    payload = value if isinstance(value, Tensor) else torch.tensor([value])
    dtype = str(payload.dtype).removeprefix("torch.")
    return rounds.receive(session(rank), Add(key, call, part, dtype, 0), payload, now)


def failed(sends: list[Send]) -> tuple[set[bytes], str, str]:
    """(who is told, kind, text) of the one failure that all are told."""
    assert sends
    told = {send.message for send in sends}
    assert len(told) == 1
    failure = told.pop()
    assert isinstance(failure, Failed)
    return {send.to for send in sends}, failure.kind, failure.text


# --- joining


def test_all_are_welcomed_when_the_last_has_come():
    rounds = make(3)
    assert rounds.receive(session(2), hello(2, 3), None, 0.1) == []
    assert rounds.receive(session(0), hello(0, 3), None, 0.2) == []
    sends = rounds.receive(session(1), hello(1, 3), None, 0.3)
    assert {s.to for s in sends} == {session(0), session(1), session(2)}
    assert all(s.message == Welcome("h", 1) for s in sends)
    assert not rounds.finished


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (hello(1, 3), "worker 1 (pid 101 on host1) was started with world_size 3, the server with 2"),
        (hello(2), "rank 2 in a job of 2"),
        (hello(2**64 - 1), "in a job of 2"),
        (hello(0), "two workers say that they are worker 0 (pid 100 on host0)"),
        (hello(1, job_id="theirs"), "worker 1 belongs to job theirs, the server to job mine"),
    ],
)
def test_a_hello_that_is_refused_disturbs_nobody(message: Hello, words: str):
    rounds = make(job_id="mine")
    rounds.receive(session(0), hello(0, job_id="mine"), None, 0.1)
    told, kind, text = failed(rounds.receive(b"stranger", message, None, 0.2))
    assert (told, kind) == ({b"stranger"}, "UsageError")
    assert words in text
    assert rounds.failed is None
    assert len(rounds.receive(session(1), hello(1), None, 0.3)) == 2  # without a job id: taken


@pytest.mark.parametrize("message", [Add(KEY, 0, 0, "float32", 0), Bye(""), Ping(), Welcome("h", 1), Failed("x", "y")])
def test_a_message_before_hello_is_refused(message: Message):
    rounds = joined()
    told, kind, _ = failed(rounds.receive(b"stranger", message, torch.ones(1), 2.0))
    assert (told, kind) == ({b"stranger"}, "ProtocolError")
    assert rounds.failed is None
    assert add(rounds, 0, 1.0) == []
    assert len(add(rounds, 1, 1.0)) == 2


def test_a_second_hello_of_one_connection_is_the_end():
    rounds = joined()
    told, kind, _ = failed(rounds.receive(session(0), hello(0), None, 2.0))
    assert (told, kind) == ({session(0), session(1)}, "UsageError")


def test_the_absent_are_named():
    rounds = make(4)
    rounds.receive(session(2), hello(2, 4), None, 0.1)
    assert rounds.tick(5.0) == []
    told, kind, text = failed(rounds.tick(5.1))
    assert (told, kind) == ({session(2)}, "ConnectError")
    assert "workers [0, 1, 3] of 4 have not joined within 5 s" in text
    assert failed(rounds.receive(session(0), hello(0, 4), None, 6.0)) == ({session(0)}, kind, text)  # comes late


def test_the_least_patient_worker_decides():
    rounds = make()
    rounds.receive(session(0), hello(0, patience_ms=2000), None, 1.0)
    assert rounds.tick(3.0) == []
    assert "workers [1] of 2 have not joined" in failed(rounds.tick(3.1))[2]


def test_the_absent_were_perhaps_refused():
    rounds = make()
    rounds.receive(session(0), hello(0), None, 1.0)
    rounds.receive(session(1), hello(1, 3), None, 1.0)
    text = failed(rounds.tick(6.0))[2]
    assert "workers [1] of 2" in text
    assert "refused: worker 1 (pid 101 on host1) was started with world_size 3" in text


def test_patience_ends_with_the_last_hello():
    rounds = make()
    rounds.receive(session(0), hello(0, patience_ms=1), None, 1.0)
    rounds.receive(session(1), hello(1, patience_ms=1), None, 1.0)
    assert rounds.tick(100.0) == []


# --- sums


def in_order(values: list[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_sums_are_in_worker_order_whatever_the_arrival(order: tuple[int, ...]):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(50, generator=generator) * 10.0**k for k in (0, 7, -3, 7)]
    rounds = joined(4)
    for rank in order[:-1]:
        assert add(rounds, rank, values[rank]) == []
    sends = add(rounds, order[-1], values[order[-1]])
    assert {s.to for s in sends} == {session(r) for r in range(4)}
    for send in sends:
        assert send.message == Sum(KEY, 0, 0, 0)
        assert send.payload is not None
        assert torch.equal(send.payload, in_order(values))


def test_rounds_of_different_keys_calls_and_parts_are_separate():
    rounds = joined()
    wheres = [("gradient/0", 0, 0), ("gradient/0", 0, 1), ("gradient/0", 1, 0), ("norm/0", 0, 0)]
    for number, (key, call, part) in enumerate(wheres):
        assert add(rounds, 0, float(number), key=key, call=call, part=part) == []
    for number, (key, call, part) in reversed(list(enumerate(wheres))):
        sends = add(rounds, 1, 10.0, key=key, call=call, part=part)
        assert [(s.message, s.payload.tolist()) for s in sends if s.payload is not None] == [
            (Sum(key, call, part, 0), [number + 10.0])
        ] * 2


def test_a_part_that_comes_twice_is_never_counted_twice():
    rounds = joined()
    add(rounds, 0, 1.0)
    told, kind, text = failed(add(rounds, 0, 1.0))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert "worker 0 (pid 100 on host0) sent gradient/0, round 0, part 0 twice" in text


@pytest.mark.parametrize("other", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int32)])
def test_tensors_that_differ_name_both_workers(other: Tensor):
    rounds = joined()
    add(rounds, 1, 1.0)
    told, kind, text = failed(add(rounds, 0, other))
    assert (told, kind) == ({session(0), session(1)}, "LayoutError")
    assert f"worker 0 (pid 100 on host0) sent {other.numel()} x {str(other.dtype)[6:]}" in text
    assert "workers [1] sent 1 x float32" in text


@pytest.mark.parametrize("message", [Ping(), Welcome("h", 1), Sum(KEY, 0, 0, 0), Failed("CommError", "no")])
def test_a_worker_does_not_say_what_the_server_says(message: Message):
    told, kind, text = failed(joined().receive(session(1), message, None, 2.0))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert type(message).__name__ in text


# --- leaving


def test_all_may_leave():
    rounds = joined()
    assert rounds.receive(session(0), Bye(""), None, 2.0) == []
    assert not rounds.finished
    assert rounds.sessions == [session(1)]
    assert rounds.receive(session(1), Bye(""), None, 2.0) == []
    assert rounds.finished
    assert rounds.failed is None


def test_a_worker_that_others_wait_for_may_not_leave():
    rounds = joined(3)
    add(rounds, 0, 1.0, key="norm/bn1", call=7)
    told, kind, text = failed(rounds.receive(session(2), Bye(""), None, 2.0))
    assert (told, kind) == ({session(0), session(1)}, "CommError")
    assert "worker 2 (pid 102 on host2) left while others waited for its norm/bn1, round 7" in text


def test_a_worker_that_sent_its_part_may_leave():
    rounds = joined()
    add(rounds, 1, 1.0)
    assert rounds.receive(session(1), Bye(""), None, 2.0) == []
    assert len(add(rounds, 0, 1.0)) == 2
    assert rounds.failed is None


def test_who_begins_a_round_after_one_has_left_is_told():
    rounds = joined()
    rounds.receive(session(1), Bye(""), None, 2.0)
    told, kind, text = failed(add(rounds, 0, 1.0))
    assert (told, kind) == ({session(0)}, "CommError")
    assert "worker 1 (pid 101 on host1) (it had finished)" in text


def test_an_error_of_one_worker_is_told_to_all():
    told, kind, text = failed(joined(3).receive(session(1), Bye("ValueError: bad batch"), None, 2.0))
    assert (told, kind) == ({session(0), session(2)}, "CommError")
    assert "worker 1 (pid 101 on host1) failed with ValueError: bad batch" in text


def test_a_lost_connection_names_the_worker_and_what_it_owed():
    rounds = joined(3)
    add(rounds, 0, 1.0)
    told, kind, text = failed(rounds.lost(session(1)))
    assert (told, kind) == ({session(0), session(2)}, "CommError")
    assert "worker 1 (pid 101 on host1) is gone" in text
    assert "while others waited for its gradient/0, round 0" in text
    assert rounds.lost(session(0)) == []  # the first fault counts


def test_a_lost_connection_of_a_stranger_or_of_one_that_left_is_nothing():
    rounds = joined()
    rounds.receive(session(1), Bye(""), None, 2.0)
    assert rounds.lost(b"stranger") == []
    assert rounds.lost(session(1)) == []
    assert rounds.failed is None


def test_the_late_worker_is_named():
    rounds = joined(3)
    add(rounds, 0, 1.0, now=2.0)
    add(rounds, 1, 1.0, now=11.0)
    assert rounds.tick(12.0) == []
    told, kind, text = failed(rounds.tick(12.1))
    assert (told, kind) == ({session(0), session(1), session(2)}, "CommError")
    assert "worker 2 (pid 102 on host2): late with gradient/0, round 0, by 10 s; alive, but no progress" in text
    assert "worker 0 " not in text


def test_no_round_no_time_out():
    rounds = joined()
    add(rounds, 0, 1.0)
    add(rounds, 1, 1.0)
    assert rounds.tick(1e9) == []


def test_after_the_first_fault_everybody_hears_of_that_one():
    rounds = joined()
    rounds.receive(session(1), Bye("ValueError: first"), None, 2.0)
    for sends in (add(rounds, 0, 1.0), rounds.receive(b"late", hello(1), None, 3.0)):
        assert "first" in failed(sends)[2]
    assert rounds.receive(session(0), Bye("CommError: second"), None, 3.0) == []
    assert rounds.tick(1e9) == []
    assert rounds.failed is not None
    assert "first" in rounds.failed.text


def test_bytes_that_cannot_be_read():
    rounds = joined()
    told, kind, _ = failed(rounds.refuse(b"stranger", ProtocolError("a header of 9 bytes")))
    assert (told, kind, rounds.failed) == ({b"stranger"}, "ProtocolError", None)
    told, kind, text = failed(rounds.refuse(session(1), ProtocolError("a header of 9 bytes")))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert "worker 1 (pid 101 on host1) sent a header of 9 bytes" in text


@pytest.mark.parametrize("reason", ["\u4e2d" * 600, "x" * 2000])
def test_long_reasons_still_fit_in_a_header(reason: str):
    from dtrain.ps import wire

    sends = joined().receive(session(0), Bye(reason), None, 2.0)
    assert wire.decode(wire.encode(sends[0].message)) == sends[0].message


# --- all interleavings


WORLD = 3
KEYS = ["gradient/0", "gradient/1", "norm/a"]


class Interleavings(RuleBasedStateMachine):
    """Three workers that each do the same transfers, messages arriving in any order between workers.

    The model: a sum goes to every worker exactly once, when the last contribution has come, and is the sum in worker
    order of contributions that were each counted exactly once.
    """

    @initialize(script=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8), parts=st.integers(1, 2))
    def start(self, script: list[str], parts: int) -> None:
        self.rounds = make(WORLD)
        self.script = []
        calls: Counter[str] = Counter()
        for key in script:
            self.script += [(key, calls[key], part) for part in range(parts)]
            calls[key] += 1
        self.place = dict.fromkeys(range(WORLD), -1)  # -1: has not said Hello
        self.sent: dict[tuple[str, int, int], dict[int, float]] = {}
        self.got: Counter[tuple[bytes, tuple[str, int, int]]] = Counter()
        self.left: set[int] = set()
        self.failed = False
        self.now = 0.0

    def value(self, rank: int, place: int) -> float:
        return float((rank + 1) * 1000 + place) / 7 * 10.0 ** (rank * 4)

    def everyone_joined(self) -> bool:
        return all(place >= 0 for place in self.place.values())

    def check(self, sends: list[Send]) -> None:
        for send in sends:
            if isinstance(send.message, Sum):
                where = (send.message.key, send.message.call, send.message.part)
                came = self.sent[where]
                assert sorted(came) == list(range(WORLD))
                expected = in_order([torch.tensor([came[r]]) for r in range(WORLD)])
                assert send.payload is not None
                assert torch.equal(send.payload, expected)
                self.got[send.to, where] += 1
                assert self.got[send.to, where] == 1

    @precondition(lambda self: not self.failed)
    @rule(rank=st.integers(0, WORLD - 1))
    def step(self, rank: int) -> None:
        """The worker's next message arrives."""
        place = self.place[rank]
        if place < 0:
            sends = self.rounds.receive(session(rank), hello(rank, WORLD), None, self.now)
            self.place[rank] = 0
            assert len(sends) == (WORLD if self.everyone_joined() else 0)
        elif self.everyone_joined() and place < len(self.script):
            where = self.script[place]
            value = self.value(rank, place)
            self.sent.setdefault(where, {})[rank] = value
            self.place[rank] += 1
            self.check(add(self.rounds, rank, value, key=where[0], call=where[1], part=where[2], now=self.now))
        elif place == len(self.script) and rank not in self.left:
            self.left.add(rank)
            assert self.rounds.receive(session(rank), Bye(""), None, self.now) == []

    @precondition(lambda self: not self.failed)
    @rule(data=st.data())
    def stranger(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from([Bye("x"), Add(KEYS[0], 0, 0, "float32", 0), hello(1, 9), hello(7, WORLD)]))
        assert failed(self.rounds.receive(b"stranger", message, torch.ones(1), self.now))[0] == {b"stranger"}

    @precondition(lambda self: not self.failed)
    @rule(seconds=st.floats(0, 0.3))
    def time_passes(self, seconds: float) -> None:
        self.now = min(self.now + seconds, 4.9)
        assert self.rounds.tick(self.now) == []

    @precondition(lambda self: not self.failed and self.everyone_joined() and 0 in self.place)
    @rule(rank=st.integers(0, WORLD - 1), how=st.sampled_from(["lost", "error", "again"]))
    def fault(self, rank: int, how: str) -> None:
        """One worker breaks: everybody who is still here hears of it, and it is named."""
        if rank in self.left:
            return
        if how == "lost":
            sends = self.rounds.lost(session(rank))
        elif how == "error":
            sends = self.rounds.receive(session(rank), Bye("Error: x"), None, self.now)
        else:
            sends = self.rounds.receive(session(rank), hello(rank, WORLD), None, self.now)
        here = {session(r) for r in range(WORLD) if r not in self.left and (how == "again" or r != rank)}
        assert {s.to for s in sends} == here
        assert self.rounds.failed is not None
        assert f"worker {rank} (pid {100 + rank}" in self.rounds.failed.text
        self.failed = True

    @precondition(lambda self: self.failed)
    @rule(rank=st.integers(0, WORLD - 1), bye=st.booleans(), seconds=st.floats(0, 100))
    def after_the_fault(self, rank: int, bye: bool, seconds: float) -> None:
        """Whoever still speaks is told of the first fault, and nothing else happens."""
        self.now += seconds
        message = Bye("Error: y") if bye else Add(KEYS[0], 99, 0, "float32", 0)
        sends = self.rounds.receive(session(rank), message, torch.ones(1), self.now)
        assert sends == ([] if bye else [Send(session(rank), self.rounds.failed)])
        assert self.rounds.tick(self.now) == []

    @invariant()
    def nothing_is_lost(self) -> None:
        """A round whose contributions have all come is over on every worker."""
        for where, came in getattr(self, "sent", {}).items():
            if len(came) == WORLD:
                assert all(self.got[session(r), where] == 1 for r in range(WORLD))

    @invariant()
    def it_ends_when_all_have_left(self) -> None:
        if hasattr(self, "rounds") and not self.failed:
            assert self.rounds.finished == (len(self.left) == WORLD)


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestInterleavings = Interleavings.TestCase
