"""Sums over workers: which rounds are open, who is missing, what is made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dtrain.comm.base import dtype_name
from dtrain.ps import wire
from dtrain.ps.members import Send
from dtrain.ps.wire import Add, AddShared, Await, Bye, Done, Resume, Sum
from tests.ps.acting import Host, session
from tests.ps.test_members import away, failed, joined, tick

KEY = "gradient/0"


def add(
    host: Host,
    rank: int,
    value: Tensor | float,
    *,
    seq: int = 0,
    key: str = KEY,
    call: int = 0,
    part: int = 0,
    now: float = 2.0,
) -> list[Send]:
    payload = value if isinstance(value, Tensor) else torch.tensor([value])
    dtype = dtype_name(payload.dtype)
    return host.receive(session(rank), Add(seq, 0, key, call, part, dtype, 0), payload, now)


def in_order(values: list[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_sums_are_in_worker_order_whatever_the_arrival(order: tuple[int, ...]):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(50, generator=generator) * 10.0**k for k in (0, 7, -3, 7)]
    host = joined(4, credit_bytes=1000)
    for rank in order[:-1]:
        assert add(host, rank, values[rank]) == []
    sends = add(host, order[-1], values[order[-1]])
    assert {s.to for s in sends} == {session(r) for r in range(4)}
    for send in sends:
        assert send.message == Sum(0, 0)
        assert send.payload is not None
        assert torch.equal(send.payload, in_order(values))


def test_rounds_of_different_keys_calls_and_parts_are_separate():
    host = joined()
    wheres = [("gradient/0", 0, 0), ("gradient/0", 0, 1), ("gradient/0", 1, 0), ("norm/0", 0, 0)]
    for seq, (key, call, part) in enumerate(wheres):
        assert add(host, 0, float(seq), seq=seq, key=key, call=call, part=part) == []
    for seq, (key, call, part) in reversed(list(enumerate(wheres))):
        sends = add(host, 1, 10.0, seq=9 - seq, key=key, call=call, part=part)
        assert {s.to: s.message for s in sends} == {session(0): Sum(seq, 0), session(1): Sum(9 - seq, 0)}
        assert all(s.payload is not None and s.payload.tolist() == [seq + 10.0] for s in sends)


def test_shared_and_sent_parts_are_summed_together():
    host = joined()
    place = torch.ones(2)
    host.receive(session(1), AddShared(0, 0, KEY, 0, 0, "float32", 0, 0, 2), place)
    assert {s.to: s.message for s in add(host, 0, torch.ones(2))} == {session(0): Sum(0, 0), session(1): Done(0)}
    assert place.tolist() == [2.0, 2.0]


PARTS = ("part 0", "part 1", "part 2")
ORDERS = [
    order
    for order in itertools.permutations(("whole 0", "whole 1", *PARTS))
    if tuple(what for what in order if what in PARTS) == PARTS  # one connection keeps its order
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_worker_without_shared_memory_sums_with_those_that_have_some(order: tuple[str, ...]):
    """It sends in parts what lies there in one piece; whoever is first, and however they mix."""
    numel = 2 * wire.PART_BYTES // 4 + 5
    values = [torch.randn(numel, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    host, whole = joined(3, credit_bytes=2**30), [values[0].clone(), values[2].clone()]
    parts = wire.parts_of(values[1])
    sends: list[Send] = []
    for what, number in (o.split() for o in order):
        if what == "part":
            sends += add(host, 1, parts[int(number)], seq=int(number), part=int(number))
        else:
            rank = 2 * int(number)
            request = AddShared(0, 0, KEY, 0, 0, "float32", 0, 0, numel)
            sends += host.receive(session(rank), request, whole[int(number)])
    assert sorted((s.to, s.message.seq) for s in sends) == [  # type: ignore[union-attr]
        *((session(0), 0), (session(1), 0), (session(1), 1), (session(1), 2), (session(2), 0)),
    ]
    wanted = in_order(values)
    got = [s.payload for s in sends if isinstance(s.message, Sum) and s.payload is not None]
    assert torch.equal(torch.cat(got), wanted)
    assert all(torch.equal(w, wanted) for w in whole)


def test_sizes_that_differ_are_refused_also_where_some_share():
    for first, second in ((300_000, 300_001), (300_000, 262_144), (100, 90)):
        host = joined(3, credit_bytes=2**30)
        host.receive(session(0), AddShared(0, 0, KEY, 0, 0, "float32", 0, 0, first), torch.ones(first))
        sends = host.receive(session(1), AddShared(0, 0, KEY, 0, 0, "float32", 0, 0, second), torch.ones(second))
        assert f"sent {first} x float32" in failed(sends)[2]
    host = joined(credit_bytes=2**30)
    host.receive(session(0), AddShared(0, 0, KEY, 0, 0, "float32", 0, 0, 100), torch.ones(100))
    assert "sent 100 x float32" in failed(add(host, 1, torch.ones(99)))[2]


def test_a_part_in_two_requests_is_never_counted_twice():
    host = joined()
    add(host, 0, 1.0)
    told, kind, text = failed(add(host, 0, 1.0, seq=1))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert "worker 0 sent gradient/0, round 0, part 0 twice" in text


@pytest.mark.parametrize("other", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int32)])
def test_tensors_that_differ_name_both_workers(other: Tensor):
    host = joined()
    add(host, 1, 1.0)
    told, kind, text = failed(add(host, 0, other))
    assert (told, kind) == ({session(0), session(1)}, "LayoutError")
    assert f"worker 0 sent {other.numel()} x {str(other.dtype)[6:]}" in text
    assert "workers [1] sent 1 x float32" in text


def test_a_worker_that_others_wait_for_may_not_leave():
    host = joined(3)
    add(host, 0, 1.0, key="norm/bn1", call=7)
    told, kind, text = failed(host.receive(session(2), Bye("")))
    assert (told, kind) == ({session(0), session(1)}, "CommError")
    assert "worker 2 (pid 102 on host2) left while others waited for its norm/bn1, round 7" in text


def test_a_worker_that_sent_its_part_may_leave():
    host = joined()
    add(host, 1, 1.0)
    assert host.receive(session(1), Bye("")) == []
    assert [s.to for s in add(host, 0, 1.0)] == [session(0)]


def test_who_begins_a_round_after_one_has_left_is_told():
    host = joined()
    host.receive(session(1), Bye(""))
    told, kind, text = failed(add(host, 0, 1.0))
    assert (told, kind) == ({session(0)}, "CommError")
    assert "worker 1 (pid 101 on host1) (it had finished)" in text


def test_a_lost_connection_names_the_worker_and_what_it_owed():
    host = joined(3)
    add(host, 0, 1.0)
    told, kind, text = failed(away(host, 1, 2.0))
    assert (told, kind) == ({session(0), session(2)}, "CommError")
    assert "worker 1 (pid 101 on host1) is gone" in text
    assert "while others waited for its gradient/0, round 0" in text
    assert away(host, 0, 2.0) == []  # the first fault counts


# -- the board, where workers sum among themselves


def await_(host: Host, rank: int, missing: list[int], *, seq: int, call: int = 3, now: float = 2.0) -> list[Send]:
    message = Await(seq, seq, "metric/barrier", call, wire.pack_ranks(missing))
    return host.receive(session(rank), message, None, now)


def answer(rank: int, seq: int) -> list[Send]:
    return [Send(session(rank), Done(seq))]


def test_who_shows_its_part_and_leaves_is_not_missed():
    host = joined()
    assert await_(host, 0, [1], seq=0) == answer(0, 0)
    assert host.receive(session(1), Bye("")) == []  # it lies on the board by now
    assert host.receive(session(0), Resume(1, 1)) == answer(0, 1)
    assert host.receive(session(0), Bye("")) == []
    assert host.shard.members.finished


def test_who_told_of_one_that_left_looks_once_more():
    host = joined(3)
    host.receive(session(1), Bye(""))
    assert await_(host, 0, [1, 2], seq=0) == answer(0, 0)  # under way when worker 1 left, perhaps
    assert await_(host, 2, [1], seq=0) == answer(2, 0)
    assert host.receive(session(0), Resume(1, 1)) == answer(0, 1)
    assert await_(host, 0, [1], seq=2, call=4) == answer(0, 2)  # another one
    told, kind, text = failed([s for s in await_(host, 0, [1], seq=3, call=4) if s not in answer(0, 3)])
    assert (told, kind) == ({session(0), session(2)}, "CommError")
    assert "worker 0 (pid 100 on host0) waits for metric/barrier, round 4, and worker 1" in text
    assert "has left (it had finished): give every worker the same number of steps" in text


def test_the_late_one_is_named_however_often_it_is_told_of():
    host = joined(2, timeout_s=10.0)
    for seq, now in enumerate((2.0, 5.0, 8.0, 11.0)):
        assert await_(host, 0, [1], seq=seq, now=now) == answer(0, seq)
    assert tick(host, 11.9) == []
    told, kind, text = failed(tick(host, 12.1))
    assert (told, kind) == ({session(0)}, "CommError")
    assert "worker 1 (pid 101 on host1): late with metric/barrier, round 3" in text


# -- time


def test_the_late_worker_is_named():
    host = joined(3)
    add(host, 0, 1.0, now=2.0)
    add(host, 1, 1.0, now=11.0)
    assert tick(host, 12.0) == []
    told, kind, text = failed(tick(host, 12.1))
    assert host.given_up == [102]
    assert (told, kind) == ({session(0), session(1)}, "CommError")
    assert "worker 2 (pid 102 on host2): late with gradient/0, round 0, by 10 s; alive, but no progress" in text
    assert "worker 0 " not in text


def test_no_round_no_time_out():
    host = joined()
    add(host, 0, 1.0)
    add(host, 1, 1.0)
    assert tick(host, 1e9) == []


def test_a_dropped_worker_is_in_no_open_round():
    host = joined(3, on_loss="drop")
    add(host, 2, 1.0)
    add(host, 0, 4.0)
    add(host, 2, 1.0, seq=1, call=1)  # of this round, nothing else has come
    sends = away(host, 1, 2.0)
    assert {s.to: s.payload.tolist() for s in sends if s.payload is not None} == {session(0): [5.0], session(2): [5.0]}
    assert away(host, 2, 2.0) == []
    assert [s.payload.tolist() for s in add(host, 0, 8.0, seq=1, call=1) if s.payload is not None] == [[8.0]]


def test_a_rewind_forgets_rounds():
    host = joined(on_loss="wait")
    add(host, 0, 1.0)
    away(host, 1, 2.0)
    assert tick(host, 3.0) == []
    assert host.shard.tick(1e9) != []  # nobody came again
    assert host.shard.members.failed is not None
    assert host.shard.members.failed.kind == "ConnectError"
