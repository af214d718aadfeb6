"""The sum in place has the bits of the sum in worker order, whatever shares memory and whoever helps."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dtrain.comm.base import DTYPES
from dtrain.errors import UsageError
from dtrain.ps import sums
from dtrain.ps.sums import Reduction
from dtrain.ps.tasks import Pool

SIZES = [0, 1, 7, 4097, 140_001]  # the last one is several pieces of any type


@pytest.fixture(autouse=True)
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled has tests of its own, and would come in the midst of these."""
    monkeypatch.setattr("dtrain.ps.fused.kernel", lambda dtype, count: None)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_ALONE_BYTES", 0)
        pool = Pool(2)
        yield pool
        pool.close()


def reduce(parts: list[Tensor], outputs: list[Tensor], pool: Pool | None = None) -> None:
    Reduction(parts, outputs, pool=pool).finish()


def parts_of(dtype: torch.dtype, workers: int, numel: int) -> list[Tensor]:
    """Values whose sum depends on the order, and overflows where it can."""
    draw = torch.Generator().manual_seed(workers * 1000 + numel)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max, (numel,), generator=draw, dtype=dtype) for _ in range(workers)]
    flats = [torch.randn(numel, generator=draw) * 10 ** (3 * torch.rand(numel, generator=draw)) for _ in range(workers)]
    for flat in flats:
        flat[:7] = torch.tensor([-0.0, 3e38, torch.inf, 1e-42, 6e4, -1.0, torch.finfo(dtype).tiny])[: min(7, numel)]
    return [f.to(dtype) for f in flats]


def in_order(parts: list[Tensor]) -> Tensor:
    """Written out once more: worker 0's first, halves in float32 and rounded once."""
    half = parts[0].dtype in (torch.float16, torch.bfloat16)
    sum_ = parts[0].float() if half else parts[0].clone()
    for part in parts[1:]:
        sum_ = sum_ + part
    return sum_.to(parts[0].dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_sum_in_order(dtype, workers, numel, pool):
    parts = parts_of(dtype, workers, numel)
    wanted = in_order(parts)
    for outputs in (parts, parts[:1], parts[::-1], parts[-1:], [torch.empty_like(wanted) for _ in range(2)], []):
        mine = [p.clone() for p in parts]
        places = [next((m for m, p in zip(mine, parts, strict=True) if p is o), o) for o in outputs]
        reduce(mine, places, pool=pool)
        assert all(same(place, wanted) for place in places)
        for part, before in zip(mine, parts, strict=True):
            assert any(part is p for p in places) or same(part, before)  # what is no output is only read


def test_parts_and_outputs_may_be_other_tensors_over_the_same_memory():
    memory = torch.stack(parts_of(torch.float32, 4, 200_003))
    wanted = in_order(list(memory))
    reduce([row[:] for row in memory], [memory[i] for i in (3, 1, 2, 0)])
    assert all(same(row, wanted) for row in memory)


def test_a_sum_can_be_made_a_little_at_a_time():
    parts = parts_of(torch.float32, 2, 300_001)
    wanted = in_order(parts)
    work, turns = Reduction(parts, parts), 1
    while not work.advance(0.0):
        turns += 1
    assert turns == 3  # pieces of 512 KiB
    assert work.advance(0.0)
    assert same(parts[0], wanted)
    assert same(parts[1], wanted)


def test_helpers_go_on_while_the_caller_does_something_else(pool):
    parts = parts_of(torch.float64, 3, 300_001)
    wanted = in_order(parts)
    work = Reduction(parts, parts, pool=pool)
    assert work._over is not None
    assert work._over.wait(20)
    assert work.advance(0.0)
    assert same(parts[2], wanted)


def test_nothing_is_kept_when_a_sum_is_done(pool):
    parts = [torch.ones(300_001) for _ in range(2)]
    gone = [weakref.ref(p) for p in parts]
    reduce(parts, parts, pool=pool)
    reduce([torch.ones(300_001)], [], pool=pool)
    del parts
    deadline = threading.Event()
    for _ in range(100):
        gc.collect()
        if not any(g() is not None for g in gone):
            break
        deadline.wait(0.05)
    assert [g() for g in gone] == [None, None]


def test_a_pool_can_be_closed_twice():
    pool = Pool(3)
    pool.close()
    pool.close()
    parts = [torch.ones(300_001) for _ in range(2)]
    reduce(parts, parts, pool=pool)
    assert float(parts[1][-1]) == 2.0


@pytest.mark.parametrize(
    ("parts", "outputs", "said"),
    [
        ([], [], "no parts"),
        ([torch.ones(2, 2)], [], r"shape \(2, 2\)"),
        ([torch.ones(4)[::2]], [], "flat contiguous"),
        ([torch.ones(4, dtype=torch.bool)], [], "torch.bool"),
        ([torch.ones(4), torch.ones(5)], [], r"4 x torch.float32 and 5 x"),
        ([torch.ones(4)], [torch.ones(4, dtype=torch.float64)], "and 4 x torch.float64"),
    ],
)
def test_what_cannot_be_summed_is_refused(parts, outputs, said):
    with pytest.raises(UsageError, match=said):
        reduce(parts, outputs)
