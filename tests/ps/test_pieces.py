"""Parts of parameters: how they are numbered and cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from dtrain.errors import UsageError
from dtrain.ps.pieces import Piece, chunks, numbering


def test_parameters_are_numbered_as_in_the_state_dict():
    a, b, c = (Parameter(torch.zeros(n)) for n in (1, 2, 3))
    optimizer = torch.optim.SGD([{"params": [c]}, {"params": [a]}], lr=0.1)
    assert numbering(optimizer, [("a", a), ("b", b), ("c", c)]) == {"c": (0, 0), "a": (1, 1)}
    with pytest.raises(UsageError, match="does not train"):
        numbering(optimizer, [("a", a)])


@pytest.mark.parametrize("limit", [128, 200, 1000, 4096, 10**6])
@pytest.mark.parametrize("whole", [False, True])
def test_chunks_are_small_and_cut_at_grains(limit, whole):
    pieces = [Piece(0, 0, 256, 1000), Piece(1, 0, 0, 5, (5,)), Piece(2, 0, 0, 3000, (3000,)), Piece(3, 0, 0, 130)]
    found = chunks(pieces, limit, 128, whole=whole)
    assert [c.start for c in found] + [4135] == [0, *(c.stop for c in found)]
    assert all(sum(p.numel for p in c.pieces) == c.stop - c.start for c in found)
    assert all(c.stop - c.start <= limit or (whole and len(c.pieces) == 1) for c in found)
    assert all(p.start % 128 == 0 for c in found for p in c.pieces)
    if whole:
        assert [p for c in found for p in c.pieces] == pieces


def test_a_chunk_below_the_grain_is_refused():
    with pytest.raises(UsageError, match="limit_elements"):
        chunks([Piece(0, 0, 0, 9)], 127, 128)
