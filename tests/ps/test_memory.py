"""A worker's buffers in shared memory: found by their address while they live, told once when they are gone."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from dtrain.ps import lanes
from dtrain.ps.memory import Buffers, Common, Place, Staging, bytes_as, size_class

pytestmark = pytest.mark.skipif(not lanes.available(), reason="no /dev/shm on this system")

SIZE = 2**20


def made(buffers: Buffers, nbytes: int = SIZE) -> tuple[int, torch.Tensor]:
    found = buffers.make(nbytes)
    assert found is not None
    number, segment, data = found
    segment.unlink()
    return number, data


def test_tensors_are_found_where_they_lie():
    buffers = Buffers()
    assert buffers.find(torch.zeros(3)) is None
    pairs = [made(buffers) for _ in range(5)]
    for number, data in pairs:
        assert buffers.find(data) == Place(number, 0)
        assert buffers.find(bytes_as(data, torch.float64, SIZE // 8)) == Place(number, 0)
        assert buffers.find(data[SIZE - 1 :]) == Place(number, SIZE - 1)
        assert buffers.find(data.view(torch.float32)[100:200]) == Place(number, 400)
    assert buffers.find(torch.zeros(SIZE)) is None
    assert buffers.unused() == []
    buffers.forget()
    assert buffers.find(pairs[0][1]) is None


def test_a_segment_is_unused_when_its_last_tensor_is_gone():
    buffers = Buffers()
    number, data = made(buffers)
    other, kept = made(buffers)
    view = data.view(torch.float32)[10:]
    del data
    gc.collect()
    assert buffers.unused() == []
    assert buffers.find(view) == Place(number, 40)
    del view
    gc.collect()
    assert buffers.unused() == [number]
    assert buffers.unused() == []
    assert buffers.find(kept) == Place(other, 0)


def test_other_memory_at_the_place_of_a_dead_segment_is_not_taken_for_it():
    """The kernel likes to give the same addresses again, to a plain tensor too."""
    buffers = Buffers()
    number, data = made(buffers)
    address = data.data_ptr()
    del data
    gc.collect()
    plain = [torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8) for _ in range(4)]
    if address not in [p.data_ptr() for p in plain]:
        pytest.skip("the kernel gave other addresses")
    assert [buffers.find(p) for p in plain] == [None] * 4
    assert buffers.unused() == [number]  # and the servers are told all the same


def test_no_room_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(lanes, "DIRECTORY", "/nosuch")
    buffers = Buffers()
    assert [buffers.make(4096) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "gradients go through sockets" in caplog.text


def test_staging_is_used_again():
    staging = Staging()
    assert staging.take(100_000) is None
    data = torch.zeros(size_class(100_000), dtype=torch.uint8)
    staging.give_back(data)
    assert staging.take(10) is None
    assert staging.take(100_000 - 1) is data
    assert staging.take(100_000) is None
    staging.give_back(data)
    staging.forget()
    assert staging.take(100_000) is None


def test_size_classes_are_whole_pages_with_little_slack():
    for nbytes in [1, 4095, 4096, 4097, 100_000, 10**6, 10**6 + 1, 2**30, 2**30 + 1]:
        size = size_class(nbytes)
        assert size >= nbytes
        assert size % mmap.PAGESIZE == 0
        assert size - nbytes < max(mmap.PAGESIZE, nbytes / 7)
        assert size_class(size) == size


def test_common_memory_shows_what_servers_write_until_it_is_moved():
    buffers = Buffers()
    segment = lanes.Segment.create(SIZE)
    view = lanes.Segment.open(segment.name, SIZE, private=True)
    segment.unlink()
    number = buffers.number(view)
    common = Common(number, view, view.bytes)
    assert common.place == Place(number, 0)
    assert buffers.find(common.flat) is None  # what a worker writes there no server sees
    common.flat.fill_(1)
    segment.bytes.fill_(2)
    assert int(common.flat.max()) == 1
    common.show_theirs()
    assert int(common.flat.min()) == 2
    common.flat.untyped_storage().share_memory_()
    segment.bytes.fill_(3)
    assert common.place is None
    common.show_theirs()
    assert int(common.flat.max()) == 2
    del common, view
    gc.collect()
    assert buffers.unused() == [number]
