"""Data sets: what `batch` says is what the items say."""

import pytest
import torch
from torch.utils.data import DataLoader

from dtrain.errors import UsageError
from dtrain.recipes.base import Batch
from dtrain.recipes.data import BatchedData, TensorData, WindowData, next_token


def halved(batch: Batch) -> Batch:
    numbers, labels = batch
    return numbers / 2, labels


def spread(samples: int, bank: int = 40) -> WindowData:
    return WindowData(torch.arange(bank), samples=samples, width=9, split=lambda windows, indices: (windows, indices))


DATA = [
    TensorData(torch.arange(20.0).reshape(10, 2), torch.arange(10)),
    TensorData(torch.arange(20.0).reshape(10, 2), torch.arange(10), transform=halved),
    WindowData(torch.arange(31), samples=10, width=4, stride=3, split=next_token),
    spread(10),
]


@pytest.mark.parametrize("data", DATA)
def test_a_batch_is_its_items_stacked(data: BatchedData) -> None:
    indices = [7, 0, 9, 7]
    items = [data[i] for i in indices]
    for together, apart in zip(data.batch(torch.tensor(indices)), zip(*items, strict=True), strict=True):
        assert torch.equal(together, torch.stack(apart))
    for one, other in zip(data.__getitems__(indices), items, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("data", DATA)
def test_a_batch_may_be_empty(data: BatchedData) -> None:
    empty = data.batch(torch.tensor([], dtype=torch.int64))
    for tensor, item in zip(empty, data[0], strict=True):
        assert tensor.shape == (0, *item.shape)
        assert tensor.dtype == item.dtype
    assert data.__getitems__([]) == []


@pytest.mark.parametrize("data", DATA)
def test_indices_count_from_either_end_and_stop_there(data: BatchedData) -> None:
    assert all(torch.equal(a, b) for a, b in zip(data[-1], data[9], strict=True))
    for index in (10, -11):
        with pytest.raises(IndexError, match=f"sample {index} of a data set of 10"):
            data[index]
    assert len(list(data)) == 10  # type: ignore[call-overload]


def test_torch_loads_it() -> None:
    numbers, labels = next(iter(DataLoader(DATA[0], batch_size=4)))
    assert numbers.shape == (4, 2)
    assert labels.tolist() == [0, 1, 2, 3]


def test_strided_windows_share_only_the_last_token() -> None:
    data = WindowData(torch.arange(31), samples=10, width=4, stride=3, split=next_token)
    inputs, targets = data.batch(torch.arange(10))
    assert inputs.flatten().tolist() == list(range(30))
    assert torch.equal(targets, inputs + 1)


def test_scattered_windows_differ_until_the_bank_is_used_up() -> None:
    windows, _ = spread(64).batch(torch.arange(64))  # 32 windows in a bank of 40
    assert sorted(windows[:32, 0].tolist()) == list(range(32))
    assert torch.equal(windows[:32], windows[32:])


def test_tensors_must_agree() -> None:
    with pytest.raises(UsageError, match=r"\[2, 3\] samples"):
        TensorData(torch.zeros(2), torch.zeros(3))
    with pytest.raises(UsageError, match="at least one"):
        TensorData()


def test_the_bank_must_hold_the_windows() -> None:
    with pytest.raises(UsageError, match="need 34 elements, not 33"):
        WindowData(torch.arange(33), samples=11, width=4, stride=3, split=next_token)
    with pytest.raises(UsageError, match="samples=0"):
        spread(0)
    with pytest.raises(UsageError, match="need 9 elements, not 8"):
        spread(1, bank=8)
