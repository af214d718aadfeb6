"""Which server keeps what: covered exactly, cut where it may be, evenly spread."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.ps.placement import SMALL_BYTES, Range, grain, in_turn, place, split_even, table

NUMELS = st.one_of(st.integers(0, 300), st.integers(0, 100_000), st.sampled_from([0, 1, 128, 1024, 2**20 + 1]))
BUCKETS = st.lists(st.tuples(st.lists(NUMELS, max_size=6), st.sampled_from([2, 4, 8])), min_size=1, max_size=8)


def check_cover(ranges: list[Range], numel: int) -> None:
    assert all(r.start < r.stop for r in ranges)
    assert [r.start for r in ranges] == [0, *(r.stop for r in ranges)][: len(ranges)]
    assert (ranges[-1].stop if ranges else 0) == numel
    assert len({r.server for r in ranges}) == len(ranges)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 9), st.booleans())
def test_ranges_cover_every_bucket_and_cut_only_where_they_may(buckets, servers, whole):
    numels, itemsizes = [b for b, _ in buckets], [size for _, size in buckets]
    placement = place(numels, itemsizes, servers, whole=whole)
    step = grain(sum(map(sum, numels)))
    for ranges, tensors, itemsize in zip(placement, numels, itemsizes, strict=True):
        check_cover(ranges, sum(tensors))
        assert all(0 <= r.server < servers for r in ranges)
        if sum(tensors) * itemsize < SMALL_BYTES:
            assert len(ranges) <= 1
        offsets = list(accumulate(tensors, initial=0))
        for r in ranges[1:]:
            start = max(o for o in offsets if o <= r.start)
            assert r.start == start or (not whole and (r.start - start) % step == 0)
    assert placement == place(numels, itemsizes, servers, whole=whole)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 9))
def test_servers_keep_equal_shares(buckets, servers):
    numels, itemsizes = [b for b, _ in buckets], [size for _, size in buckets]
    loads = [0] * servers
    for ranges, itemsize in zip(place(numels, itemsizes, servers), itemsizes, strict=True):
        for r in ranges:
            loads[r.server] += (r.stop - r.start) * itemsize
    mean = sum(loads) / servers
    sizes = [sum(b) * size for b, size in zip(numels, itemsizes, strict=True)]
    small = [size for size in sizes if 0 < size < SMALL_BYTES]
    few_grains = 2 * grain(sum(map(sum, numels))) * 8
    undivided = max(small, default=0)  # cannot be levelled where large buckets are too few
    assert max(loads) - mean <= max(0.02 * mean, few_grains, undivided)
    if sum(sizes) - sum(small) >= servers * undivided:
        assert max(loads) - min(loads) <= max(0.02 * mean, few_grains)


def test_one_server_keeps_each_bucket_in_one_range():
    assert place([[10, 100_000], [], [0], [7]], [4, 4, 4, 8], 1) == [[Range(0, 0, 100_010)], [], [], [Range(0, 0, 7)]]


def test_all_servers_work_on_each_large_bucket():
    placement = place([[400_000, 100]] * 5, [4] * 5, 4)
    assert [[r.server for r in ranges] for ranges in placement] == [[0, 1, 2, 3]] * 5


def test_small_buckets_go_to_who_has_least():
    assert [r[0].server for r in place([[1000], [10], [10], [2000]], [4] * 4, 3)] == [0, 1, 2, 1]


def test_whole_tensors_are_spread():
    placement = place([[50_000] * 4, [100_000, 100_000]], [4, 4], 2, whole=True)
    assert placement == [
        [Range(0, 0, 100_000), Range(1, 100_000, 200_000)],
        [Range(0, 0, 100_000), Range(1, 100_000, 200_000)],
    ]


def test_the_grain_depends_on_the_size_of_the_model_only():
    assert (grain(0), grain(2**20 - 1), grain(2**20)) == (128, 128, 1024)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**7), st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(0, 100))
def test_a_stateless_tensor_is_split_evenly(numel, itemsize, servers, salt):
    ranges = split_even(numel, itemsize, servers, salt)
    check_cover(ranges, numel)
    if numel * itemsize < SMALL_BYTES:
        assert ranges == ([Range(salt % servers, 0, numel)] if numel else [])
    else:
        assert all(r.start % 1024 == 0 for r in ranges)
        assert all(abs((b.stop - b.start) - numel / servers) <= 1024 for b in ranges)
        assert all((b.server - a.server) % servers == 1 for a, b in pairwise(ranges) if servers < numel / 2048)


@pytest.mark.parametrize("servers", [0, -1])
def test_no_server_is_refused(servers):
    with pytest.raises(UsageError, match="num_servers"):
        place([[1]], [4], servers)
    with pytest.raises(UsageError, match="num_servers"):
        split_even(1, 4, servers, 0)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="itemsizes"):
        place([[1]], [4, 4], 2)


def test_the_table_has_a_row_for_each_server():
    buckets, itemsizes = [[30_000, 0, 10_000], [10]], [4, 8]
    lines = table(["a:1", "b:2"], place(buckets, itemsizes, 2), buckets, itemsizes).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["a:1", "0.080", "49.9", "%", "1", "1"],
        ["b:2", "0.080", "50.1", "%", "1", "1"],
    ]


def test_everybody_begins_with_another_one():
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 3) == []
