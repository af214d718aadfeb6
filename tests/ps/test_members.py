"""Who takes part, as one server sees it: joining, requests that come twice, leaving, being lost, coming again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtrain.errors import ProtocolError, UsageError
from dtrain.ps import wire
from dtrain.ps.members import Send, Terms
from dtrain.ps.wire import Add, Again, Bye, Done, Failed, Fetch, Hello, Message, Ping, Rewind, Sum, Unshare, Welcome
from tests.ps.acting import Host, hello, session


def make(world_size: int = 2, **more: Any) -> Host:
    terms = {"host": "h", "pid": 1, "timeout_s": 10.0, "connect_timeout_s": 5.0, "credit_bytes": 64, **more}
    return Host(Terms(world_size=world_size, **terms))


def joined(world_size: int = 2, **more: Any) -> Host:
    host = make(world_size, **more)
    for rank in range(world_size):
        host.receive(session(rank), hello(rank, world_size))
    return host


def failed(sends: list[Send]) -> tuple[set[bytes], str, str]:
    """(who is told, kind, text) of the one failure that all are told."""
    told = {send.message for send in sends}
    assert len(told) == 1
    failure = told.pop()
    assert isinstance(failure, Failed)
    return {send.to for send in sends}, failure.kind, failure.text


def tick(host: Host, now: float) -> list[Send]:
    host.act(host.shard.tick(now))
    return host.flush()


def away(host: Host, rank: int, now: float) -> list[Send]:
    host.act(host.shard.away(session(rank), now))
    return host.flush()


def add(seq: int, low: int = 0, call: int = 0) -> Add:
    return Add(seq, low, "gradient/0", call, 0, "float32", 0)


# --- joining


def test_all_are_welcomed_when_the_last_has_come():
    host = make(3, credit_bytes=7, on_loss="wait")
    assert host.receive(session(2), hello(2, 3, probe="found")) == []
    assert host.receive(session(0), hello(0, 3)) == []
    sends = host.receive(session(1), hello(1, 3))
    assert {s.to: s.message for s in sends} == {
        session(0): Welcome("h", 1, 0, 7, "", "wait"),
        session(1): Welcome("h", 1, 0, 7, "", "wait"),
        session(2): Welcome("h", 1, 0, 7, "found", "wait"),
    }


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (hello(1, 3), "worker 1 (pid 101 on host1) was started with world_size 3, the server with 2"),
        (hello(2), "rank 2 in a job of 2"),
        (hello(2**62), "in a job of 2"),
        (hello(0), "two workers say that they are worker 0 (pid 100 on host0)"),
        (hello(1, job_id="theirs"), "worker 1 (pid 101 on host1) belongs to another job"),
        (hello(1, server=1, num_servers=2), "takes this for server 1 of 2, and it is server 0 of 1"),
    ],
)
def test_a_hello_that_is_refused_disturbs_nobody(message: Hello, words: str):
    host = make(job_id="mine")
    host.receive(session(0), hello(0, job_id="mine"))
    told, kind, text = failed(host.receive(b"stranger", message))
    assert (told, kind) == ({b"stranger"}, "UsageError")
    assert words in text
    assert "theirs" not in text
    assert "mine" not in text
    assert len(host.receive(session(1), hello(1))) == 2  # without a job id: taken


@pytest.mark.parametrize("message", [add(0), Fetch(0, 0, 0), Ping(), Welcome("h", 1, 0, 1, "", ""), Failed("x", "y")])
def test_a_message_before_hello_is_refused(message: Message):
    host = joined()
    told, kind, _ = failed(host.receive(b"stranger", message, torch.ones(1)))
    assert (told, kind) == ({b"stranger"}, "StateLost")
    assert host.receive(b"stranger", Bye("")) == []
    assert host.shard.members.failed is None


def test_hello_that_comes_twice_is_answered_twice():
    host = make()
    assert host.receive(session(0), hello(0)) == []
    assert host.receive(session(0), hello(0)) == []
    assert len(host.receive(session(1), hello(1))) == 2
    (send,) = host.receive(session(0), hello(0))
    assert isinstance(send.message, Welcome)


def test_another_hello_on_the_same_connection_is_the_end():
    told, kind, text = failed(joined().receive(session(0), hello(1)))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert "said Hello twice" in text


def test_the_absent_are_named():
    host = make(4)
    host.receive(session(2), hello(2, 4))
    host.receive(b"other", hello(1, 3))
    assert tick(host, 5.0) == []
    told, kind, text = failed(tick(host, 5.1))
    assert (told, kind) == ({session(2)}, "ConnectError")
    assert "workers [0, 1, 3] of 4 have not joined within 5 s; refused: worker 1" in text
    assert failed(host.receive(session(0), hello(0, 4))) == ({session(0)}, kind, text)  # comes late


def test_the_least_patient_worker_decides():
    host = make()
    host.receive(session(0), hello(0, patience_ms=2000))
    assert tick(host, 3.0) == []
    assert "workers [1] of 2 have not joined" in failed(tick(host, 3.1))[2]


def test_who_leaves_before_all_have_joined_is_lost():
    host = make(3)
    host.receive(session(0), hello(0, 3))
    host.receive(session(1), hello(1, 3))
    told, kind, text = failed(host.receive(session(1), Bye("")))
    assert (told, kind) == ({session(0)}, "CommError")
    assert "worker 1 (pid 101 on host1) left before all had joined" in text


def test_terms_are_checked():
    with pytest.raises(UsageError, match="on_loss is 'ignore'"):
        Terms(world_size=1, on_loss="ignore")


# --- requests


def test_a_request_that_comes_twice_is_answered_twice_and_counted_once():
    host = joined()
    one = torch.ones(1)
    assert host.receive(session(0), add(0), one) == []
    assert host.receive(session(0), add(0), one) == []  # pending
    assert len(host.receive(session(1), add(0), one)) == 2
    (again,) = host.receive(session(0), add(0), one)
    assert again.message == Sum(0, 0)
    assert again.payload is not None
    assert again.payload.tolist() == [2.0]
    assert len(host.summed) == 1


def test_low_frees_answers():
    host = joined()
    for rank in range(2):
        host.receive(session(rank), add(0), torch.ones(3))
    member = host.shard.members.of_rank(0)
    assert member is not None
    assert (member.held_bytes, list(member.answers)) == (12, [0])
    host.receive(session(0), Unshare(1, 1, 0))
    assert (member.held_bytes, list(member.answers)) == (0, [1])
    assert host.receive(session(0), add(0), torch.ones(3)) == []  # from long ago


def test_requests_may_come_in_any_order():
    host = joined()
    assert host.receive(session(0), add(1, 0, call=1), torch.ones(1)) == []
    assert host.receive(session(0), add(0), torch.ones(1)) == []
    assert [s.message for s in host.receive(session(1), add(0), torch.ones(1))] == [Sum(0, 0)] * 2


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (add(100_000), "request 100000, and 0 is unanswered"),
        (add(0, low=1), "request 0, with all answers before 1"),
        (Done(0), "sent Done, which a worker does not send"),
        (Welcome("h", 1, 0, 1, "", ""), "sent Welcome"),
    ],
)
def test_what_a_worker_cannot_mean_is_the_end(message: Message, words: str):
    told, kind, text = failed(joined().receive(session(1), message, torch.ones(1)))
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert words in text


def test_a_worker_that_is_heard_again_is_there():
    host = joined(grace_s=1.0)
    host.act(host.shard.away(session(1), 0.0))
    assert host.receive(session(1), Ping()) == []
    host.act(host.shard.tick(5.0))
    assert host.flush() == []


def test_overload():
    host = joined()
    assert host.receive(session(0), add(0), torch.ones(16)) == []
    assert host.receive(session(0), add(0), torch.ones(16)) == []  # it is the same one
    assert "overload" in failed(host.receive(session(0), add(1, call=1), torch.ones(1)))[2]


def test_damage_is_asked_for_again():
    host = joined()
    host.act(host.shard.refuse(session(0), wire.Damaged("a payload")))
    assert host.flush() == [Send(session(0), Again())]
    host.act(host.shard.refuse(b"stranger", wire.Damaged("a header")))
    assert failed(host.flush())[0] == {b"stranger"}
    host.act(host.shard.refuse(session(1), ProtocolError("a header of 9 bytes")))
    told, kind, text = failed(host.flush())
    assert (told, kind) == ({session(0), session(1)}, "ProtocolError")
    assert "worker 1 (pid 101 on host1) sent a header of 9 bytes" in text
    host.act(host.shard.refuse(session(0), wire.Damaged("a payload")))
    assert failed(host.flush()) == ({session(0)}, kind, text)  # the first fault, not this one


# --- going


def test_all_may_leave():
    host = joined()
    for rank in range(2):
        assert not host.shard.members.finished
        assert host.receive(session(rank), Bye("")) == []
    assert host.shard.members.finished


@pytest.mark.parametrize("reason", ["\u4e2d" * 600, "x" * 2000, "ValueError: bad batch"])
def test_an_error_of_one_worker_is_told_to_all(reason: str):
    told, kind, text = failed(joined(3).receive(session(1), Bye(reason)))
    assert (told, kind) == ({session(0), session(2)}, "CommError")
    assert text.startswith("worker 1 (pid 101 on host1) failed with " + reason[:300])
    assert wire.decode(wire.encode(Failed(kind, text))) == Failed(kind, text)


def test_who_is_out_of_reach_for_longer_than_the_grace_is_lost():
    host = joined(grace_s=2.0)
    assert away(host, 1, 1.0) == []
    assert away(host, 1, 2.5) == []
    told, kind, text = failed(tick(host, 3.0))
    assert (told, kind) == ({session(0)}, "CommError")
    assert "worker 1 (pid 101 on host1) is gone: its connection closed" in text


@pytest.mark.parametrize("how", ["it speaks", "it is reached", "it is damaged"])
def test_who_is_back_in_time_is_not_lost(how: str):
    host = joined(grace_s=2.0)
    away(host, 1, 1.0)
    if how == "it speaks":
        host.receive(session(1), add(0), torch.ones(1))
    elif how == "it is reached":
        host.shard.back(session(1))
    else:
        host.shard.refuse(session(1), wire.Damaged("a header"))
    assert tick(host, 3.5) == []
    assert away(host, 1, 4.0) == []
    assert tick(host, 5.9) == []
    assert failed(tick(host, 6.0))[0] == {session(0)}


def test_a_lost_connection_of_a_stranger_or_of_one_that_left_is_nothing():
    host = joined()
    host.receive(session(1), Bye(""))
    host.act(host.shard.away(b"stranger", 1.0))
    host.shard.back(b"stranger")
    assert away(host, 1, 1.0) == []


def test_after_the_first_fault_everybody_hears_of_that_one():
    host = joined()
    host.receive(session(1), Bye("ValueError: first"))
    for sends in (host.receive(session(0), add(0), torch.ones(1)), host.receive(b"late", hello(1))):
        assert "first" in failed(sends)[2]
    assert host.receive(session(0), Bye("CommError: second")) == []
    assert tick(host, 1e9) == []


# --- wait: coming again


def test_a_lost_worker_rewinds_the_job():
    host = joined(on_loss="wait")
    (send,) = away(host, 1, 1.0)
    assert send.to == session(0)
    assert isinstance(send.message, Rewind)
    assert send.message.epoch == 1
    assert host.forgotten == [[]]
    # Who missed that is told again; so is who was lost, as it perhaps could only not be reached.
    for rank in (0, 1):
        (again,) = host.receive(session(rank), add(5), torch.ones(1))
        assert isinstance(again.message, Rewind)
    # They come again, the replacement from epoch 0 at first.
    assert host.receive(b"a", hello(0, epoch=1)) == []
    (early,) = host.receive(b"b", hello(1, incarnation=1))
    assert isinstance(early.message, Rewind)
    assert {s.to for s in host.receive(b"c", hello(1, incarnation=1, epoch=1))} == {b"a", b"c"}


def test_a_worker_that_could_not_be_reached_takes_its_place_again_if_nobody_has_it():
    host = joined(on_loss="wait")
    away(host, 1, 1.0)
    (send,) = host.receive(session(1), Ping())
    assert isinstance(send.message, Rewind)
    assert host.receive(b"a", hello(0, epoch=1)) == []
    assert {s.to for s in host.receive(b"b", hello(1, epoch=1))} == {b"a", b"b"}
    # The replacement that was started meanwhile has it all the same.
    sends = host.receive(b"c", hello(1, incarnation=1, epoch=1))
    assert {s.to for s in sends if isinstance(s.message, Rewind)} == {b"a", b"b", b"c"}


def test_a_hello_that_was_on_its_way_during_a_rewind_is_told_of_it():
    host = make(3, on_loss="wait")
    for rank in (0, 1):
        host.receive(session(rank), hello(rank, 3))
    away(host, 1, 1.0)
    (send,) = host.receive(session(0), hello(0, 3))
    assert isinstance(send.message, Rewind)


def test_a_newer_life_rewinds_and_an_older_one_is_fenced():
    host = joined(on_loss="wait")
    sends = host.receive(b"new", hello(1, incarnation=1))
    assert {s.to for s in sends} == {session(0), session(1), b"new"}
    assert all(isinstance(s.message, Rewind) for s in sends)
    # The older one comes again too, as it was told to, even before the newer.
    assert failed(host.receive(b"old", hello(1, epoch=1)))[:2] == ({b"old"}, "Fenced")
    host.receive(b"newer", hello(1, incarnation=1, epoch=1))
    assert len(host.receive(b"a", hello(0, epoch=1))) == 2
    assert failed(host.receive(b"older", hello(1, epoch=1)))[:2] == ({b"older"}, "Fenced")


def test_a_server_that_was_started_anew_takes_the_epoch_of_the_others():
    host = make(on_loss="wait")
    assert failed(host.receive(session(0), add(3), torch.ones(1)))[1] == "StateLost"
    assert host.receive(b"a", hello(0, epoch=4)) == []
    sends = host.receive(b"b", hello(1, epoch=5))
    assert [(s.to, s.message.epoch) for s in sends if isinstance(s.message, Rewind)] == [(b"a", 5)]
    sends = host.receive(b"c", hello(0, epoch=5))
    assert {s.message.epoch for s in sends if isinstance(s.message, Welcome)} == {5}


def test_without_rewinds_there_is_no_later_epoch():
    told, kind, text = failed(make().receive(session(0), hello(0, epoch=4)))
    assert (told, kind) == ({session(0)}, "UsageError")
    assert "epoch 4 of a job that is never rewound" in text


def test_time_to_join_begins_anew_with_an_epoch():
    host = joined(on_loss="wait")
    host.act(host.shard.away(session(1), 100.0))
    host.flush()
    assert tick(host, 105.0) == []
    assert "workers [0, 1] of 2" in str(host.shard.members.absent(105.1))


def test_who_comes_after_the_end_has_finished():
    host = joined(on_loss="wait")
    host.receive(session(0), Bye(""))
    assert away(host, 1, 2.0) == []  # nothing to rewind for
    assert failed(host.receive(b"new", hello(1, incarnation=1)))[:2] == ({b"new"}, "Finished")
    assert host.shard.members.finished


# --- drop


def test_the_job_goes_on_without_a_dropped_worker():
    host = joined(3, on_loss="drop")
    assert away(host, 1, 2.0) == []
    assert host.forgotten == [[session(1)]]
    assert host.shard.members.expected == [0, 2]
    assert failed(host.receive(session(1), add(0), torch.ones(1)))[:2] == ({session(1)}, "Fenced")
    assert failed(host.receive(b"new", hello(1, 3, incarnation=1)))[:2] == ({b"new"}, "Finished")
    assert host.receive(session(0), add(0), torch.ones(1)) == []
    assert len(host.receive(session(2), add(0), torch.ones(1))) == 2


def test_the_last_worker_is_not_dropped():
    host = joined(2, on_loss="drop")
    away(host, 1, 2.0)
    away(host, 0, 2.0)
    assert host.shard.members.failed is not None


def test_nobody_is_dropped_before_all_have_joined():
    host = make(3, on_loss="drop")
    for rank in range(2):
        host.receive(session(rank), hello(rank, 3))
    assert failed(away(host, 1, 2.0))[:2] == ({session(0)}, "CommError")
