"""Which steps a server makes, of whose gradients, and who may have the parameters when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.errors import LayoutError, ProtocolError
from dtrain.ps import turn
from dtrain.ps.effects import Build, Direct, Give, Load, Measure, Reply, StoreWork, TellSquares, Update
from dtrain.ps.layout import Rules
from dtrain.ps.members import Terms
from dtrain.ps.store import Store
from dtrain.ps.wire import (
    Begin,
    Bye,
    Chosen,
    Clip,
    Closed,
    Commit,
    Done,
    Open,
    Pull,
    Push,
    PushShared,
    Put,
    Ready,
    Received,
    Request,
    Scale,
)
from tests.ps.acting import Host, described, gradient, hello, session

SETTINGS = torch.zeros(1, dtype=torch.uint8)


class Steps:
    """A store, and requests with numbers of their own."""

    def __init__(self, world_size: int = 2, server: int = 0, buckets: tuple[int, ...] = (0,), **rules: Any) -> None:
        self.store = Store(world_size, server)
        self.expected = list(range(world_size))
        self.now = 1.0
        self.seq = 0
        self.buckets = buckets
        for rank in self.expected:
            work = self(rank, Open, payload=described(Rules(**rules), buckets))
        assert [type(w) for w in work] == [Build]

    def __call__(
        self, rank: int, kind: type[Request], *fields: object, payload: Tensor | None = None
    ) -> list[StoreWork]:
        self.seq += 1
        request: Any = kind(self.seq, 0, *fields, *([] if payload is None else [0]))  # type: ignore[arg-type]
        return self.store.receive(rank, request, payload, self.expected, self.now)

    def begin(self, rank: int, step: int = 0, share: float = 0.25) -> list[StoreWork]:
        return self(rank, Begin, step, share, payload=SETTINGS)

    def push(self, rank: int, step: int = 0, bucket: int = 0) -> list[StoreWork]:
        return self(rank, Push, step, bucket, 0, b"\x01", payload=gradient(rank, step, bucket))

    def send(self, rank: int, step: int = 0, share: float = 0.25) -> list[StoreWork]:
        """All that a step begins with."""
        return [*self.begin(rank, step, share), *(w for b in self.buckets for w in self.push(rank, step, b))]

    def drop(self, rank: int) -> list[StoreWork]:
        self.expected.remove(rank)
        return self.store.drop(rank, self.expected)


def ranks(work: list[StoreWork]) -> list[tuple[int, list[int]]]:
    """The updates: bucket, and whose gradients."""
    return [(w.bucket, [g.rank for g in w.gradients]) for w in work if isinstance(w, Update)]


def answers(work: list[StoreWork]) -> dict[int, list[type]]:
    found: dict[int, list[type]] = {}
    for w in work:
        if isinstance(w, Reply):
            found.setdefault(w.rank, []).append(type(w.answer))
    return found


def closed(work: list[StoreWork]) -> dict[int, tuple[int, int, int, float]]:
    found = [(w.rank, w.answer) for w in work if isinstance(w, Reply) and isinstance(w.answer, Closed)]
    return {rank: (c.version, c.behind, c.counted, c.factor) for rank, c in found}


def given(work: list[StoreWork]) -> list[int]:
    return [w.rank for w in work if isinstance(w, Give)]


# --- the parameters


def test_all_describe_the_same():
    store = Store(2, 0)
    assert store.receive(1, Open(5, 0, 0), described(Rules(), (0,)), [0, 1], 1.0) == []
    (build,) = store.receive(0, Open(3, 0, 0), described(Rules(), (0,)), [0, 1], 1.0)
    assert isinstance(build, Build)
    assert sorted(build.asked) == [(0, 3), (1, 5)]
    assert (store.dtype_of(0), store.nbytes_of(0)) == ("float64", 24)
    with pytest.raises(ProtocolError, match="bucket 1"):
        store.dtype_of(1)


@pytest.mark.parametrize(
    "other", [described(Rules(clip=True), (0,)), described(Rules(), (1,)), described(Rules(), (0,), 4)]
)
def test_a_worker_that_describes_something_else_is_named(other: Tensor):
    store = Store(3, 0)
    for rank in range(2):
        store.receive(rank, Open(0, 0, 0), described(Rules(), (0,)), [0, 1, 2], 1.0)
    with pytest.raises(LayoutError, match=r"workers \[2\] describe other parameters, .* than worker 0"):
        store.receive(2, Open(0, 0, 0), other, [0, 1, 2], 1.0)


def test_nothing_before_the_description():
    with pytest.raises(ProtocolError, match="Pull before the parameters were described"):
        Store(1, 0).receive(0, Pull(0, 0, 0, 0, 0), None, [0], 1.0)


def test_values_come_in_parts_in_any_order():
    steps = Steps()
    first, second = torch.ones(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    assert answers(steps(0, Put, 1, 2, payload=second)) == {0: [Done]}
    (load,) = steps(0, Put, 0, 2, payload=first)
    assert isinstance(load, Load)
    assert [p.numel() for p in load.parts] == [2, 1]
    for rank, part, parts in ((1, 0, 1), (0, 2, 2), (0, 0, 10**6)):
        with pytest.raises(ProtocolError, match="not here, not now"):
            steps(rank, Put, part, parts, payload=first)


def test_who_does_not_describe_is_late():
    store = Store(2, 0)
    store.receive(1, Open(0, 0, 0), described(Rules(), (0,)), [0, 1], 5.0)
    assert store.late([0, 1], 15.0, 10.0) is None
    assert store.late([0, 1], 15.1, 10.0) == ([0], "the description of its parameters")
    assert store.waits_for(0) == "description of the parameters"
    assert store.waits_for(1) == ""


def test_who_does_not_describe_may_be_dropped():
    store = Store(2, 0)
    store.receive(1, Open(7, 0, 0), described(Rules(agreed=True), (0,)), [0, 1], 5.0)
    (build,) = store.drop(0, [1])
    assert isinstance(build, Build)
    assert build.asked == [(1, 7)]


def test_a_drop_before_anything_is_nothing():
    assert Store(2, 0).drop(0, [1]) == []


# --- synchronous


def test_buckets_are_updated_as_soon_as_all_have_sent_them():
    steps = Steps(buckets=(0, 1))
    assert steps(1, Pull, 1, 1, 0) == []
    steps.begin(0)
    steps.begin(1)
    assert steps.push(0, bucket=1) == []
    (update,) = steps.push(1, bucket=1)
    assert isinstance(update, Update)
    assert (update.bucket, [g.rank for g in update.gradients], update.factor) == (1, [0, 1], 1.0)
    assert [rank for rank, _ in update.pulls] == [1]
    assert given(steps(0, Pull, 1, 1, 0)) == [0]
    assert steps(0, Pull, 1, 0, 0) == []
    steps.push(1)
    work = steps.push(0)
    assert ranks(work) == [(0, [0, 1])]
    assert closed(work) == {0: (1, 0, 2, 1.0), 1: (1, 0, 2, 1.0)}


def test_a_pull_of_a_later_step_waits_for_it():
    steps = Steps()
    assert steps(0, Pull, 2, 0, 0) == []
    for step in range(2):
        assert not steps.send(0, step)
        work = steps.send(1, step)
        (update,) = [w for w in work if isinstance(w, Update)]
        assert [rank for rank, _ in update.pulls] == ([0] if step else [])


def test_parts_come_in_any_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turn, "PART_BYTES", 16)
    steps = Steps(1)
    values = gradient(0, 0, 0)
    assert steps(0, Push, 0, 0, 1, b"\x01", payload=values[2:]) == []
    assert steps.begin(0) == []
    update = steps(0, Push, 0, 0, 0, b"\x01", payload=values[:2])[0]
    assert isinstance(update, Update)
    assert torch.equal(torch.cat(update.gradients[0].payloads), values)


@pytest.mark.parametrize(
    ("kind", "fields", "numel", "words"),
    [
        (Push, (0, 7, 0, b"\x01"), 3, "bucket 7, which this server does not hold"),
        (Push, (0, 0, 1, b"\x01"), 3, "3 numbers for bucket 0, part 1"),
        (Push, (0, 0, 0, b"\x01"), 2, "2 numbers"),
        (Push, (0, 0, 0, b""), 3, "0 bytes of flags"),
        (Push, (1, 0, 0, b"\x01"), 3, "sent step 1, and step 0 is due"),
        (PushShared, (0, 0, b"\x01", 0, 0), 2, "2 numbers"),
        (Begin, (5, 1.0), 1, "sent step 5, and step 0 is due"),
        (Put, (0, 0), 1, "Put of part 0 of 0"),
    ],
)
def test_what_does_not_fit(kind: type[Request], fields: tuple[object, ...], numel: int, words: str):
    payload = torch.zeros(numel, dtype=torch.float64)
    request: Any = kind(9, 0, *fields, *([] if kind is PushShared else [0]))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=words):
        Steps().store.receive(0, request, payload, [0, 1], 1.0)


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_bucket_is_sent_or_shared_but_not_both(monkeypatch: pytest.MonkeyPatch, shared_first: bool):
    monkeypatch.setattr(turn, "PART_BYTES", 16)
    steps = Steps()

    def send(shared: bool) -> None:
        if shared:
            request = PushShared(90, 0, 0, 0, b"\x01", 0, 0)
            steps.store.receive(0, request, gradient(0, 0, 0), [0, 1], 1.0)
        else:
            steps(0, Push, 0, 0, 1, b"\x01", payload=gradient(0, 0, 0)[2:])

    send(shared_first)
    with pytest.raises(ProtocolError, match="twice"):
        send(not shared_first)


def test_the_late_worker_is_named_and_time_begins_with_the_first_whole_gradient():
    steps = Steps(3)
    steps.begin(0)
    steps.now = 50.0
    steps.push(0)
    steps.begin(1)
    assert steps.store.late([0, 1, 2], 60.0, 10.0) is None
    assert steps.store.late([0, 1, 2], 60.1, 10.0) == ([1, 2], "the gradient of step 0")
    assert steps.store.waits_for(2) == "gradient of step 0"
    assert steps.store.waits_for(0) == ""


# --- clipping


def test_the_first_factor_closes_the_step_and_the_others_hear_later():
    steps = Steps(clip=True)
    assert steps.send(0) == []
    work = steps.send(1)
    assert isinstance(work[0], Measure)
    assert [[g.rank for g in gs] for gs in work[0].gradients] == [[0, 1]]
    assert [w.asked[0] for w in work if isinstance(w, TellSquares)] == [0, 1]
    work = steps(1, Clip, 0, 0.5)
    assert ranks(work) == [(0, [0, 1])]
    assert isinstance(work[0], Update)
    assert (work[0].factor, work[0].measured) == (0.5, True)
    assert closed(work) == {1: (1, 0, 2, 0.5)}
    assert closed(steps(0, Clip, 0, 0.25)) == {0: (1, 0, 2, 0.5)}


def test_a_gradient_is_not_used_again_for_the_next_step():
    """A worker that has yet to send its factor of step 0 has sent nothing of step 1."""
    steps = Steps(clip=True)
    steps.send(0)
    steps.send(1)
    steps(1, Clip, 0, 0.5)
    assert steps.send(1, 1) == []
    assert closed(steps(0, Clip, 0, 0.5)) == {0: (1, 0, 2, 0.5)}
    assert isinstance(steps.send(0, 1)[0], Measure)


def test_no_factor_before_the_norm():
    steps = Steps(1, clip=True, agreed=True)
    steps.send(0)
    with pytest.raises(ProtocolError, match="before the norm was told"):
        steps(0, Clip, 0, 0.5)


# --- trust ratios


def ratios(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(torch.uint8)


def tells(work: list[StoreWork]) -> list[int]:
    return [w.asked[0] for w in work if isinstance(w, TellSquares)]


def test_a_step_with_ratios_is_made_when_all_have_passed_them_on():
    steps = Steps(ratios=True, buckets=(0, 1))
    assert steps.send(1) == []
    work = steps.send(0)
    assert isinstance(work[0], Direct)
    assert [[g.rank for g in gs] for gs in work[0].gradients] == [[0, 1], [0, 1]]
    assert (work[0].factor, work[0].measured, tells(work)) == (1.0, False, [0, 1])
    assert steps(1, Scale, 0, payload=ratios(0.5, 2.0)) == []
    work = steps(0, Scale, 0, payload=ratios(0.5, 2.0))
    assert ranks(work) == [(0, [0, 1]), (1, [0, 1])]
    assert [w.ratios for w in work if isinstance(w, Update)] == [[0.5, 2.0]] * 2
    assert closed(work) == {0: (1, 0, 2, 1.0), 1: (1, 0, 2, 1.0)}
    assert isinstance([*steps.send(0, 1), *steps.send(1, 1)][0], Direct)


def test_ratios_come_after_clipping_and_the_first_factor_counts():
    steps = Steps(clip=True, ratios=True)
    work = [*steps.send(0), *steps.send(1)]
    assert isinstance(work[0], Measure)
    work = steps(1, Clip, 0, 0.5)
    assert isinstance(work[0], Direct)
    assert (work[0].factor, work[0].measured, tells(work)) == (0.5, True, [1])
    assert steps(1, Scale, 0, payload=ratios(3.0)) == []  # worker 0 has yet to hear of the norms
    assert [type(w) for w in steps(0, Clip, 0, 0.25)] == [TellSquares]
    assert [w.ratios for w in steps(0, Scale, 0, payload=ratios(3.0)) if isinstance(w, Update)] == [[3.0]]


def test_ratios_that_cannot_be_meant():
    def told(count: int = 2) -> Steps:
        steps = Steps(ratios=True)
        for rank in range(count):
            steps.send(rank)
        return steps

    for count, fields, payload, words in [
        (1, (0,), ratios(1.0), "norms it was not told"),
        (2, (1,), ratios(1.0), "norms it was not told"),
        (2, (0,), ratios(1.0, 1.0), "16 bytes from worker 0, for 1 pieces"),
        (2, (0,), ratios(1.0)[:3], "3 bytes from worker 0, for 1 pieces"),
    ]:
        with pytest.raises(ProtocolError, match=words):
            told(count)(0, Scale, *fields, payload=payload)
    steps = told()
    steps(0, Scale, 0, payload=ratios(1.0))
    with pytest.raises(ProtocolError, match="norms it was not told"):
        steps(0, Scale, 0, payload=ratios(1.0))  # twice
    with pytest.raises(ProtocolError, match="workers 0 and 1 passed on different trust ratios"):
        steps(1, Scale, 0, payload=ratios(1.5))
    with pytest.raises(ProtocolError, match="norms it was not told"):
        Steps()(0, Scale, 0, payload=ratios(1.0))


def test_who_does_not_pass_ratios_on_is_late():
    steps = Steps(ratios=True)
    steps.send(0)
    steps.send(1)
    assert steps.store.waits_for(0) == steps.store.waits_for(1) == "word on the norms of step 0"
    steps(1, Scale, 0, payload=ratios(1.0))
    assert steps.store.waits_for(0) == "word on the norms of step 0"
    assert steps.store.waits_for(1) == ""
    assert steps.store.late(steps.expected, steps.now + 5.0, 10.0) is None
    assert steps.store.late(steps.expected, steps.now + 11.0, 10.0) == ([0], "its word on the norms of step 0")


# --- agreed


def make_agreed(world_size: int = 3, backup: int = 1, server: int = 0, **more: Any) -> Steps:
    return Steps(world_size, server, agreed=True, backup_workers=backup, **more)


def chosen(work: list[StoreWork]) -> dict[int, bytes]:
    found = [(w.rank, w.answer) for w in work if isinstance(w, Reply) and isinstance(w.answer, Chosen)]
    return {rank: c.ranks for rank, c in found}


def test_a_step_is_made_of_those_that_are_ready_first():
    steps = make_agreed()
    for rank in (2, 0, 1):
        assert answers(steps.send(rank)) == {rank: [Received]}
    assert steps(2, Ready, 0) == []
    assert chosen(steps(0, Ready, 0)) == {0: b"\0\0\2\0", 2: b"\0\0\2\0"}
    assert chosen(steps(1, Ready, 0)) == {1: b"\0\0\2\0"}
    work = steps(1, Commit, 0, b"\0\0\2\0")  # whoever is first passes it on
    assert ranks(work) == [(0, [0, 2])]
    assert isinstance(work[0], Update)
    assert work[0].factor == 1 / (0.25 + 0.25)
    assert closed(work) == {1: (1, 0, 0, 1.0)}
    assert answers(work) == {1: [Done, Closed]}  # its push is answered too
    assert closed(steps(0, Commit, 0, b"\0\0\2\0")) == {0: (1, 0, 2, 1.0)}
    assert steps.send(0, 1)
    assert closed(steps(2, Commit, 0, b"\0\0\2\0")) == {2: (1, 0, 2, 1.0)}


def test_who_was_counted_stays_so_when_the_next_step_is_made_before_it_asks():
    steps = make_agreed(2, 1)
    for rank in (0, 1):
        steps.send(rank)
    steps.store._ready[0] = 99  # both are ready at once
    assert chosen(steps(1, Ready, 0)).keys() == {0, 1}
    steps(0, Commit, 0, b"\0\0\1\0")
    steps.send(0, 1)
    steps(0, Ready, 1)
    assert closed(steps(0, Commit, 1, b"\0\0"))[0][2] == 1
    assert closed(steps(1, Commit, 0, b"\0\0\1\0")) == {1: (2, 0, 2, 1.0)}


def test_who_comes_after_the_step_is_told_of_whom_it_was_made():
    """Another server may not have heard of it, and the chosen may be gone."""
    steps = make_agreed()
    for rank in (0, 1):
        steps.send(rank)
        steps(rank, Ready, 0)
    steps(0, Commit, 0, b"\0\0\1\0")
    assert answers(steps.send(2)) == {2: [Received]}
    assert chosen(steps(2, Ready, 0)) == {2: b"\0\0\1\0"}
    assert closed(steps(2, Commit, 0, b"\0\0\1\0")) == {2: (1, 0, 0, 1.0)}


def test_a_commit_without_ranks_waits_until_the_step_is_closed():
    steps = make_agreed(server=1)
    for rank in range(3):
        steps.send(rank)
    assert steps(2, Commit, 0, b"") == []
    work = steps(0, Commit, 0, b"\0\0\1\0")
    assert closed(work) == {0: (1, 0, 2, 1.0), 2: (1, 0, 0, 1.0)}


@pytest.mark.parametrize("packed", [b"\0\0\0\0", b"\1\0\0\0", b"\0\0\2\0", b"\7\0"])
def test_a_commit_of_others_than_are_here(packed: bytes):
    steps = make_agreed(server=1)
    for rank in (0, 1):
        steps.send(rank)
    with pytest.raises(ProtocolError, match="step 0 of workers"):
        steps(0, Commit, 0, packed)


def test_two_sets_for_one_step():
    steps = make_agreed()
    for rank in range(3):
        steps.send(rank)
        steps(rank, Ready, 0)
    with pytest.raises(ProtocolError, match="not what this server was told before"):
        steps(2, Commit, 0, b"\0\0\2\0")


def test_only_server_0_chooses():
    steps = make_agreed(server=1)
    steps.send(0)
    with pytest.raises(ProtocolError, match="to server 1"):
        steps(0, Ready, 0)


def test_ready_without_a_gradient():
    steps = make_agreed()
    steps.begin(0)
    with pytest.raises(ProtocolError, match="has not sent it"):
        steps(0, Ready, 0)


def test_who_does_not_get_ready_is_late():
    steps = make_agreed(2, 0)
    for rank in (0, 1):
        steps.send(rank)
    steps(1, Ready, 0)
    assert steps.store.late([0, 1], 12.0, 10.0) == ([0], "the gradient of step 0")


def test_a_dropped_worker_is_not_waited_for():
    steps = make_agreed(3, 0)
    for rank in (0, 1):
        steps.send(rank)
        assert steps(rank, Ready, 0) == []
    steps.begin(2)
    assert chosen(steps.drop(2)) == {0: b"\0\0\1\0", 1: b"\0\0\1\0"}
    assert ranks(steps(0, Commit, 0, b"\0\0\1\0")) == [(0, [0, 1])]


def test_a_worker_that_is_dropped_after_it_was_chosen_still_counts():
    steps = make_agreed(2, 0)
    for rank in (0, 1):
        steps.send(rank)
        steps(rank, Ready, 0)
    assert steps.drop(1) == []
    work = steps(0, Commit, 0, b"\0\0\1\0")
    assert ranks(work) == [(0, [0, 1])]
    assert list(steps.store._turns) == []  # its gradient is not kept


def test_norms_with_agreement():
    steps = make_agreed(2, 0, clip=True)
    for rank in (0, 1):
        steps.send(rank)
        steps(rank, Ready, 0)
    work = steps(0, Commit, 0, b"\0\0\1\0")
    assert [type(w) for w in work] == [Measure, TellSquares]
    assert [type(w) for w in steps(1, Commit, 0, b"\0\0\1\0")] == [TellSquares]
    assert closed(steps(1, Clip, 0, 0.5)) == {1: (1, 0, 2, 0.5)}
    assert closed(steps(0, Clip, 0, 0.5)) == {0: (1, 0, 2, 0.5)}


# --- each worker by itself


def test_updates_without_a_bound():
    steps = Steps(staleness=None)
    for step in range(3):
        work = steps.send(0, step, 0.5)
        assert ranks(work) == [(0, [0])]
        assert isinstance(work[0], Update)
        assert work[0].factor == 2.0
        assert closed(work)[0] == (step + 1, 0, 1, 1.0)
        assert given(steps(0, Pull, step + 1, 0, 0)) == [0]
    assert closed(steps.send(1, 0, 0.5)) == {1: (4, 3, 1, 1.0)}


def test_staleness_counts_from_the_first_bucket_that_was_pulled():
    steps = Steps(buckets=(0, 1), staleness=None)
    assert given(steps(0, Pull, 0, 0, 0)) == [0]
    steps.send(1, 0)
    assert given(steps(0, Pull, 0, 1, 0)) == [0]
    assert closed(steps.send(0, 0))[0][1] == 1


@pytest.mark.parametrize("staleness", [1, 2])
def test_the_fastest_waits_for_the_slowest(staleness: int):
    steps = Steps(staleness=staleness)
    for step in range(staleness):
        steps.send(0, step)
        assert given(steps(0, Pull, step + 1, 0, 0)) == [0]
    steps.send(0, staleness)
    assert steps(0, Pull, staleness + 1, 0, 0) == []
    assert steps.store.late([0, 1], 12.0, 10.0) == ([1], "the gradient of its step 0")
    work = steps.send(1, 0)
    assert given(work) == [0]
    assert closed(work)[1][1] == staleness + 1


@pytest.mark.parametrize("how", ["leaves", "is dropped"])
def test_who_is_gone_is_not_waited_for(how: str):
    steps = Steps(3, staleness=1)
    for step in range(2):
        steps.send(0, step)
        steps.send(1, step)
    assert steps(0, Pull, 2, 0, 0) == []
    assert given(steps.drop(2) if how == "is dropped" else steps.store.leave(2, steps.expected)) == [0]


def test_a_pull_waits_for_the_workers_own_step():
    steps = Steps(staleness=None)
    assert steps(0, Pull, 1, 0, 0) == []
    assert given(steps.send(0)) == [0]


# --- on a server


def hosting(on_loss: str, rules: Rules, world_size: int = 2) -> Host:
    host = Host(Terms(world_size=world_size, on_loss=on_loss, credit_bytes=10, timeout_s=10.0))
    for rank in range(world_size):
        host.receive(session(rank), hello(rank, world_size))
    host.shard.members.allow(10**6)
    for rank in range(world_size):
        host.receive(session(rank), Open(0, 0, 0), described(rules, (0,)))
    return host


def send_step(host: Host, rank: int) -> None:
    host.receive(session(rank), Begin(1, 1, 0, 0.5, 0), SETTINGS)
    host.receive(session(rank), Push(2, 1, 0, 0, 0, b"\x01", 0), gradient(rank, 0, 0))


def test_a_worker_may_have_a_whole_gradient_under_way():
    host = hosting("fail", Rules(staleness=None))
    send_step(host, 0)
    assert host.shard.members.failed is None
    assert len(host.updates) == 1


def test_where_workers_are_dropped_they_have_to_agree():
    host = hosting("drop", Rules())
    assert host.shard.members.failed is not None
    assert "rules without agreement" in host.shard.members.failed.text


@pytest.mark.parametrize("on_loss", ["drop", "wait"])
def test_who_is_lost_after_others_have_finished_holds_nobody_up(on_loss: str):
    host = hosting(on_loss, Rules(staleness=1), 3)
    host.receive(session(0), Bye(""))
    for step in range(2):
        host.receive(session(1), Begin(2 * step + 1, 1, step, 0.5, 0), SETTINGS)
        push = Push(2 * step + 2, 1, step, 0, 0, b"\x01", 0)
        host.receive(session(1), push, gradient(1, step, 0))
    assert host.receive(session(1), Pull(9, 1, 2, 0, 0)) == []
    host.act(host.shard.away(session(2), 2.0))
    assert [s.to for s in host.flush()] == [session(1)]


def test_a_step_that_begins_after_one_has_left_is_told():
    host = hosting("wait", Rules())
    host.receive(session(1), Bye(""))
    (send,) = host.receive(session(0), Begin(1, 1, 0, 0.5, 0), SETTINGS)
    assert "began step 0: not all are here any more: worker 1" in str(send.message)


def test_workers_that_differ_when_one_is_dropped():
    host = Host(Terms(world_size=3, on_loss="drop"))
    for rank in range(3):
        host.receive(session(rank), hello(rank, 3))
    for rank in range(2):
        host.receive(session(rank), Open(0, 0, 0), described(Rules(agreed=True), (rank,)))
    host.act(host.shard.away(session(2), 2.0))
    assert {str(s.message)[:25] for s in host.flush()} == {"Failed(kind='LayoutError'"}
