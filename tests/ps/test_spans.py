"""What servers tell of their rounds: bounded, on the clock of who asks, and refused where it cannot be read."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from dtrain.comm.base import Span, TellsSpans
from dtrain.measure.stopwatch import StepTimes
from dtrain.measure.trace import SERVERS, Chosen, document, events_of_server
from dtrain.ps import spans
from tests.conftest import everywhere


def test_a_round_has_its_first_and_its_last_part() -> None:
    """Of all workers and parts; what was not done is done when its last part came."""
    kept = spans.Spans()
    before_s = time.monotonic()
    for rank in (2, 0, 1):
        kept.came("gradient/0", 7, rank)
    kept.done("gradient/0", 7)
    kept.came("gradient/1", 7, 1)
    kept.done("nothing", 3)
    data, now_s = kept.encode(), time.monotonic()
    first, second = spans.decode(data, before_s, now_s)
    assert (first.name, first.last_rank, second.name, second.last_rank) == ("gradient/0", 1, "gradient/1", 1)
    assert before_s <= first.first_s < first.last_s < first.done_s <= second.first_s <= now_s
    assert second.first_s == second.last_s == second.done_s


def test_an_update_is_done_with_the_oldest_round_of_its_bucket() -> None:
    """The servers' updates know their bucket, and not the workers' step."""
    kept = spans.Spans()
    kept.came("gradient/0", 1, 0)
    kept.came("gradient/0", 2, 1)  # a worker ahead
    kept.done("gradient/0")
    kept.done("gradient/1")
    first, second = spans.decode(kept.encode(), 0.0, 2 * time.monotonic())
    assert first.done_s > first.last_s
    assert second.done_s == second.last_s


def test_what_is_remembered_is_bounded() -> None:
    """By number and by the length of names: it fits one message."""
    kept = spans.Spans()
    for number in range(spans.MOST + 500):
        kept.came("x" * 2000, number, 0)
        kept.came(f"gradient/{number}", number, 0)
    assert len(kept.encode()) < 2**19
    assert len(kept._open) <= spans.MOST
    found = spans.decode(kept.encode(), 0.0, time.monotonic())
    assert len(found) == spans.MOST
    assert found[-1].name == f"gradient/{spans.MOST + 499}"


def test_another_hosts_clock_is_put_right() -> None:
    """A server whose clock is 1000 s ahead, asked at 10 and answering by 10.2: right within 0.1 s."""
    told = json.dumps({"now_s": 1010.15, "rounds": [("a", 1009.0, 1009.5, 1010.0, 3)]}).encode()
    (span,) = spans.decode(told, 10.0, 10.2)
    assert span.last_s == pytest.approx(9.5, abs=0.1)
    (same,) = spans.decode(told.replace(b"1010.15", b"10.15"), 10.0, 10.2)
    assert same.last_s == 1009.5  # the same clock, as far as can be seen: nothing is changed


UNREADABLE = [
    *(b"", b"[]", b"{}", b'{"now_s": 1, "rounds": [1]}', b'{"now_s": "x", "rounds": []}', b"[" * 100_000),
    b'{"now_s": 1, "rounds": [["a", NaN, 1, 1, 0]]}',
    b'{"now_s": 1, "rounds": [["a", 1, 1, 1, Infinity]]}',
]


@pytest.mark.parametrize("data", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        spans.decode(data, 0.0, 1.0)


def _rounds(comm: Any) -> list[list[tuple[str, int, float]]]:
    for number in range(3):
        if comm.rank == 1:
            time.sleep(0.1)
        comm.all_reduce(torch.ones(100_000), f"gradient/{number}").wait()
    assert isinstance(comm, TellsSpans)
    return [[(s.name, s.last_rank, s.last_s - s.first_s) for s in found] for found in comm.server_spans()]


def test_a_server_tells_who_came_last() -> None:
    """Both workers hear the same: worker 1 was last, by about what it slept."""
    for told in everywhere(_rounds, backend="ps"):
        (server,) = told
        mine = [row for row in server if row[0].startswith("gradient/")]
        assert [row[:2] for row in mine] == [(f"gradient/{n}", 1) for n in range(3)]
        assert all(row[2] > 0.02 for row in mine)


def test_servers_have_a_place_in_the_trace() -> None:
    """Each round as waiting and work, in the step in which its last part came; rounds that overlap in rows below."""
    chosen = Chosen()
    for number in range(1, 6):
        chosen.see(StepTimes(number, float(number), number + 0.9, (), (), {}), 1.0)
    told = [Span("gradient/0", 3.9, 4.1, 4.2, 1), Span("gradient/1", 4.0, 4.15, 4.3, 0), Span("late", 7.0, 7.1, 7.2, 0)]
    chosen.see_servers([told, []])
    events = [e for e in chosen.events(0, 0.0) if e["pid"] == SERVERS]
    assert {(e["name"], e["tid"], e["args"]["step"]) for e in events} == {
        *[("wait, gradient/0", 0, 4), ("gradient/0", 0, 4), ("wait, gradient/1", 1, 4), ("gradient/1", 1, 4)],
    }
    assert [e["args"]["last_worker"] for e in events if e["tid"] == 0] == [1, 1]
    names = [e["args"]["name"] for e in json.loads(document([events], {}))["traceEvents"] if e["ph"] == "M"]
    assert names == ["server 0"]
    assert events_of_server([], 0, 1) == []
