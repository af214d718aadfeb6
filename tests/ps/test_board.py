"""Small sums on a board that all workers see."""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.base import DTYPES
from dtrain.errors import LayoutError
from dtrain.ps import board
from dtrain.ps.board import Board
from tests.ps.test_sums import in_order

KEY = "norm/layer"

pytestmark = pytest.mark.skipif(not board.possible(), reason="this processor does not keep the order of stores")


def boards(world_size: int) -> list[Board]:
    memory = torch.zeros(board.nbytes(world_size), dtype=torch.uint8)
    return [Board(memory, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_bits_are_those_of_a_server(dtype: torch.dtype, workers: int):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 40, (workers, 257), generator=generator)
    parts = [(row / 7 if dtype.is_floating_point else row).to(dtype) for row in numbers]
    wanted = in_order(parts)
    all_ = boards(workers)
    posts = [b.post(part, KEY) for b, part in reversed(list(zip(all_, parts, strict=True)))][::-1]
    assert all(b.advance(p) for b, p in zip(all_, posts, strict=True))
    assert all(torch.equal(part, wanted) for part in parts)


def test_who_is_missing():
    first, _, third = boards(3)
    post = first.post(torch.ones(4), KEY)
    assert first.missing(post) == [1, 2]
    third.post(torch.ones(4), KEY)
    assert first.missing(post) == [1]
    assert not first.advance(post)


def test_a_slot_is_not_written_before_all_have_read_it():
    """However far ahead a worker is, nobody finds another message than the one it waits for."""
    fast, slow = boards(2)
    sent = []
    while fast.has_room(KEY):
        sent.append(fast.post(torch.tensor([float(len(sent))]), KEY))
    assert len(sent) == 8
    for number in range(20):
        post = slow.post(torch.tensor([100.0]), KEY)
        assert slow.advance(post)
        assert post.flat.item() == 100.0 + number
        assert fast.advance(sent[number])
        assert sent[number].flat.item() == 100.0 + number
        assert fast.has_room(KEY)
        sent.append(fast.post(torch.tensor([float(len(sent))]), KEY))


def test_lanes_do_not_wait_for_each_other():
    first, second = boards(2)
    first.post(torch.ones(1), "gradient/0")
    one, other = first.post(torch.ones(1), KEY), second.post(torch.ones(1), KEY)
    assert first.advance(one)
    assert second.advance(other)


@pytest.mark.parametrize(
    ("flat", "key", "words"),
    [
        (torch.ones(3), KEY, "worker 1 sent 3 x float32"),
        (torch.ones(2, dtype=torch.float64), KEY, "worker 1 sent 2 x float64"),
        (torch.ones(2), "norm/other", "as something else"),
    ],
)
def test_workers_that_show_different_tensors(flat: torch.Tensor, key: str, words: str):
    first, second = boards(2)
    one, other = first.post(torch.ones(2), KEY), second.post(flat, key)
    with pytest.raises(LayoutError, match=words):
        first.advance(one)
    with pytest.raises(LayoutError, match="worker 0 sent 2 x float32"):
        second.advance(other)
