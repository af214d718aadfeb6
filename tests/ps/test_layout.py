"""The description of parameters: what it takes, and that anything else is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import ProtocolError
from dtrain.optim import LARS
from dtrain.ps import layout
from dtrain.ps.layout import BucketRange, Layout, Rules
from dtrain.ps.optimizers import spec_of
from dtrain.ps.pieces import Piece

SPEC = spec_of(torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1))
PIECES = ((0, Piece(0, 0, 0, 6, (2, 3), (3, 1))), (1, Piece(1, 0, 128, 72)))
LAYOUT = Layout(Rules(clip=True), SPEC, (BucketRange(0, "float32", 2, PIECES), BucketRange(3, "bfloat16", 9, PIECES)))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(staleness=None, damp=True, compensation=0.5),
        Rules(staleness=3),
        Rules(agreed=True, backup_workers=2, clip=True, grain=128),
    ],
)
def test_round_trip(rules: Rules):
    whole = Layout(rules, SPEC, LAYOUT.ranges)
    assert layout.decode(layout.encode(whole)) == whole


def test_trust_ratios_are_passed_on_or_tensors_stay_whole():
    lars = spec_of(LARS([torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1))
    agreed = Layout(Rules(ratios=True), lars, LAYOUT.ranges)
    assert layout.decode(layout.encode(agreed)) == agreed
    assert not agreed.whole
    assert not agreed.rules.early
    assert Layout(Rules(staleness=None), lars, ()).whole
    assert not LAYOUT.whole
    for rules in (
        Rules(ratios=True, staleness=1),
        Rules(ratios=True, agreed=True),
        Rules(ratios=True, grain=128),
    ):
        with pytest.raises(ProtocolError):
            layout.decode(layout.encode(Layout(rules, lars, LAYOUT.ranges)))


def test_sizes():
    assert [r.numel for r in LAYOUT.ranges] == [78, 78]
    assert [r.nbytes for r in LAYOUT.ranges] == [312, 156]
    assert LAYOUT.nbytes == 468


def test_a_server_may_hold_nothing():
    empty = Layout(Rules(), SPEC, ())
    assert layout.decode(layout.encode(empty)) == empty


@pytest.mark.parametrize(
    ("rules", "early"),
    [(Rules(), True), (Rules(clip=True), False), (Rules(agreed=True), False), (Rules(staleness=1), False)],
)
def test_what_can_be_early(rules: Rules, early: bool):
    assert rules.early is early


def changed(path: tuple[int, ...], value: object) -> bytes:
    """The layout with one thing changed."""
    data: Any = msgpack.unpackb(layout.encode(LAYOUT))
    at = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    packed: bytes = msgpack.packb(data)
    return packed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((0, 0), -2),
        ((0, 0), 2**31),
        ((0, 0), True),
        ((0, 1), 1),
        ((0, 2), -1),
        ((0, 3), None),
        ((0, 4), 1),
        ((0, 4), True),  # Adam has no trust ratios
        ((0, 6), 0),
        ((0, 6), float("nan")),
        ((0, 6), float("inf")),
        ((0, 7), 0),
        ((0,), []),
        ((1,), None),
        ((1, 0), "LBFGS"),
        ((1, 0), "__class__"),
        ((1, 1), []),
        ((2,), 3),
        ((2, 0, 0), -1),
        ((2, 0, 0), 3),
        ((2, 0, 0), 4),
        ((2, 0, 0), 2**17),
        ((2, 0, 0), True),
        ((2, 0, 1), "int32"),
        ((2, 0, 1), "float128"),
        ((2, 0, 1), ["float32"]),
        ((2, 0, 2), 0),
        ((2, 0, 2), 1),
        ((2, 0, 2), 16 * 1024 + 1),
        ((2, 0, 3), []),
        ((2, 0, 3, 0, 0), 2),
        ((2, 0, 3, 0, 1), -1),
        ((2, 0, 3, 0, 2), 1),
        ((2, 0, 3, 0, 3), 2**40),
        ((2, 0, 3, 0, 4), 7),
        ((2, 0, 3, 0, 4), 6.0),
        ((2, 0, 3, 0, 5), [3, 3]),
        ((2, 0, 3, 0, 5), None),
        ((2, 0, 3, 0, 5), "23"),
        ((2, 0, 3, 0, 6), [3]),
        ((2, 0, 3, 0, 6), [3, -1]),
        ((2, 0, 3, 0, 6), [4, 1]),
        ((2, 0, 3, 0, 6), [2**39, 1]),
    ],
)
def test_one_wrong_thing(path: tuple[int, ...], value: object):
    with pytest.raises(ProtocolError) as caught:
        layout.decode(changed(path, value))
    assert len(str(caught.value)) < 300


def test_cut_at_every_byte():
    whole = layout.encode(LAYOUT)
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            layout.decode(whole[:length])


def test_too_long():
    with pytest.raises(ProtocolError, match="fewer, larger parameters"):
        layout.decode(bytes(layout.MAX_BYTES + 1))


@settings(max_examples=300)
@given(st.binary(max_size=100))
def test_any_bytes(data: bytes):
    with pytest.raises(ProtocolError):
        layout.decode(data)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=3))
def test_mutations(changes: list[tuple[int, int]]):
    data = bytearray(layout.encode(LAYOUT))
    for where, value in changes:
        data[where % len(data)] = value
    with contextlib.suppress(ProtocolError):
        found = layout.decode(bytes(data))
        assert layout.decode(layout.encode(found)) == found
