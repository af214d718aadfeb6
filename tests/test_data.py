"""Laws of the data shares: nothing is dropped, nothing comes twice, whoever asks and however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dtrain.data import BatchedData, Loader, accumulation, cut, empty, share, shuffled, to_device
from dtrain.errors import DataError, UsageError

COUNTS = st.integers(1, 300)
WORKERS = st.integers(1, 9)
PIECES = st.integers(1, 20)


class Numbers(Dataset[Any]):
    """Sample i is the number i, in several shapes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(index), {"squares": torch.full((2,), float(index) ** 2)}


class Whole(Numbers, BatchedData):
    """The same, for whole batches."""

    __getitems__ = None  # samples here are no tuples of tensors

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return indices, {"squares": (indices.double() ** 2).float()[:, None].expand(-1, 2)}


class Stream(IterableDataset[Any]):
    """The same, in order and without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return (Numbers(self.count)[i] for i in range(self.count))


def steps(dataset: Any, *, world_size: int = 1, epoch: int = 0, start: int = 0, **more: Any) -> list[Any]:
    """Of each step of an epoch: first sample, total, and of each worker its micro-batches, lists of sample numbers."""
    workers = []
    for rank in range(world_size):
        loader = Loader(dataset, rank=rank, world_size=world_size, **more)
        workers.append([(s.first, s.total, [ids(m) for m in s.micro_batches]) for s in loader.epoch(epoch, start)])
    numbers = [[(n, total) for n, total, _ in w] for w in workers]
    assert all(n == numbers[0] for n in numbers)
    return [(n, total, [w[k][2] for w in workers]) for k, (n, total) in enumerate(numbers[0])]


def ids(micro: Any) -> list[int]:
    numbers, more = micro.batch
    assert len(numbers) == micro.samples == len(more["squares"])
    assert more["squares"].shape == (micro.samples, 2)
    assert torch.equal(more["squares"][:, 0], numbers.float() ** 2)
    return numbers.tolist()


def flat(found: list[Any]) -> list[int]:
    return [i for _, _, workers in found for worker in workers for micro in worker for i in micro]


# -- shares -----------------------------------------------------------------------------------------------------------


@given(count=COUNTS, world_size=WORKERS, accumulate=PIECES)
def test_shares_of_all_workers_are_the_global_batch(count: int, world_size: int, accumulate: int) -> None:
    """Every position of a global batch is in exactly one share; shares of a micro-batch differ by at most one."""
    workers = [share(count, accumulate=accumulate, rank=r, world_size=world_size) for r in range(world_size)]
    assert {len(w) for w in workers} == {min(accumulate, count)}
    assert sorted(i for worker in workers for micro in worker for i in micro) == list(range(count))
    for shares in zip(*workers, strict=True):
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1


@given(count=COUNTS, world_size=WORKERS, accumulate=PIECES)
def test_micro_batches_do_not_depend_on_the_number_of_workers(count: int, world_size: int, accumulate: int) -> None:
    """The k-th micro-batches of all workers, one after the other, are the k-th micro-batch of one worker."""
    alone = share(count, accumulate=accumulate, rank=0, world_size=1)
    workers = [share(count, accumulate=accumulate, rank=r, world_size=world_size) for r in range(world_size)]
    together = [[i for part in shares for i in part] for shares in zip(*workers, strict=True)]
    assert together == [list(micro) for micro in alone]


@given(global_batch=COUNTS, world_size=WORKERS, micro_batch=st.integers(1, 40), missing=st.integers(0, 299))
def test_no_micro_batch_is_larger_than_asked_for(
    global_batch: int, world_size: int, micro_batch: int, missing: int
) -> None:
    """Also in the last batch of an epoch, which is smaller."""
    accumulate = accumulation(global_batch, micro_batch, world_size)
    for count in {global_batch, max(1, global_batch - missing)}:
        for rank in range(world_size):
            ranges = share(count, accumulate=accumulate, rank=rank, world_size=world_size)
            assert max(map(len, ranges)) <= micro_batch
    assert accumulation(global_batch, None, world_size) == 1


@given(count=st.integers(0, 300), parts=st.integers(1, 20))
def test_cut_has_no_gap_and_no_overlap(count: int, parts: int) -> None:
    """Nearly equal parts, in order."""
    pieces = [cut(count, part, parts) for part in range(parts)]
    assert [i for p in pieces for i in range(count)[p]] == list(range(count))
    assert max(p.stop - p.start for p in pieces) - min(p.stop - p.start for p in pieces) <= 1


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(0, None), (-1, 1), (4, 0), (4, -2)])
def test_a_batch_has_a_sample(global_batch: int, micro_batch: int | None) -> None:
    """The error names both numbers."""
    with pytest.raises(UsageError, match=f"global_batch is {global_batch}, micro_batch {micro_batch}"):
        accumulation(global_batch, micro_batch, 2)


# -- an epoch ---------------------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 60),
    global_batch=st.integers(1, 70),
    world_size=st.integers(1, 6),
    micro_batch=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**62),
    stream=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_sample_once(
    count: int, global_batch: int, world_size: int, micro_batch: int | None, seed: int, stream: bool
) -> None:
    """Over all workers and steps; `total` is the size of each global batch, the last of which is what is left."""
    found = steps(
        Stream(count) if stream else Whole(count),
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=seed,
    )
    assert sorted(flat(found)) == list(range(count))
    totals = [total for _, total, _ in found]
    assert totals == [global_batch] * (count // global_batch) + [count % global_batch] * (count % global_batch > 0)
    assert [first for first, _, _ in found] == [global_batch * k for k in range(len(totals))]
    assert totals == [sum(len(m) for w in workers for m in w) for _, _, workers in found]


@pytest.mark.parametrize(("dataset", "num_workers"), [(Numbers, 0), (Numbers, 2), (Whole, 2), (Stream, 0), (Stream, 1)])
def test_every_way_to_fetch_gives_the_same_steps(dataset: type[Any], num_workers: int) -> None:
    """Sample by sample or in batches, in this process or in others; ragged, and with workers that get nothing."""
    like = {"world_size": 3, "global_batch": 4, "micro_batch": 1, "seed": 3, "shuffle": dataset is not Stream}
    assert steps(dataset(9), num_workers=num_workers, **like) == steps(Whole(9), **like)


@pytest.mark.parametrize("dataset", [Whole, Numbers, Stream])
def test_more_workers_than_samples(dataset: type[Any]) -> None:
    """Workers without a sample have a batch of the right structure, whose tensors have a first dimension of 0."""
    (step,) = steps(dataset(2), world_size=5, global_batch=8, micro_batch=1)
    assert sorted(flat([step])) == [0, 1]
    assert [len(worker) for worker in step[2]] == [2] * 5  # all workers have the same number of micro-batches


@pytest.mark.parametrize("dataset", [Whole, Numbers, Stream])
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_to_start_at_a_step_is_to_skip_those_before(dataset: type[Any], start: int) -> None:
    """From each start on, up to the end, where nothing is left."""
    like = {"world_size": 2, "global_batch": 5, "micro_batch": 2, "seed": 1, "epoch": 3}
    assert steps(dataset(23), start=5 * start, **like) == steps(dataset(23), **like)[start:]


@pytest.mark.parametrize(("dataset", "num_workers"), [(Whole, 0), (Numbers, 0), (Numbers, 2), (Stream, 0)])
def test_a_batch_that_grows_in_mid_epoch(dataset: type[Any], num_workers: int) -> None:
    """Before and after it, the steps are those of loaders of the one and of the other size."""
    loaders = [
        Loader(dataset(50), global_batch=4, micro_batch=3, rank=r, world_size=2, seed=1, num_workers=num_workers)
        for r in range(2)
    ]
    found: list[list[tuple[int, list[list[int]]]]] = [[], []]
    for loader, seen in zip(loaders, found, strict=True):
        for step in loader.epoch(3):
            seen.append((step.first, [ids(m) for m in step.micro_batches]))
            if step.first == 8:
                loader.resize(9)
                assert loader.micro_batch <= 3
                assert loader.first_batch == 4
    like = {"world_size": 2, "micro_batch": 3, "seed": 1, "epoch": 3}
    expected = steps(dataset(50), global_batch=4, **like)[:3] + steps(dataset(50), global_batch=9, start=12, **like)
    assert [(first, [seen[k][1] for seen in found]) for k, (first, _) in enumerate(found[0])] == [
        (first, workers) for first, _, workers in expected
    ]
    assert sorted(i for seen in found for _, micros in seen for m in micros for i in m) == list(range(50))


def test_a_stream_that_is_read_ahead_keeps_its_batch() -> None:
    """What another process has begun cannot be cut anew."""
    loader = Loader(Stream(9), global_batch=2, num_workers=1)
    loader.resize(2)
    with pytest.raises(UsageError, match="num_workers=0"):
        loader.resize(3)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    """Not of the number of workers, of the global batch, or of torch's generator; and that one is left alone."""

    def order(seed: int, epoch: int, **more: Any) -> list[int]:
        loader = Loader(Whole(40), seed=seed, **more)
        return [int(i) for s in loader.epoch(epoch) for m in s.micro_batches for i in m.batch[0]]

    first = order(7, 2, global_batch=8)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert order(7, 2, global_batch=13) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(flat(steps(Whole(40), world_size=3, global_batch=8, seed=7, epoch=2))) == sorted(first)
    assert len({tuple(order(s, e, global_batch=8)) for s, e in [(7, 2), (7, 3), (8, 2), (0, 0)]}) == 4
    assert order(7, 2, global_batch=8, shuffle=False) == list(range(40))
    assert shuffled(40, 7, 2).tolist() == first


@pytest.mark.parametrize("dataset", [Numbers, Stream])
def test_fetching_draws_nothing_from_torchs_generator(dataset: type[Any]) -> None:
    """Else a run that is resumed in the middle of an epoch, and so begins it twice, would draw other numbers."""
    state = torch.get_rng_state()
    steps(dataset(7), global_batch=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_per_epoch() -> None:
    """Known for data sets with a length."""
    assert Loader(Whole(10), global_batch=4).steps_per_epoch == 3
    assert Loader(Whole(8), global_batch=4).steps_per_epoch == 2
    assert Loader(Stream(8), global_batch=4).steps_per_epoch is None


def test_a_stream_without_samples_is_an_epoch_without_steps() -> None:
    """What to say of it is the trainer's affair."""
    assert steps(Stream(0), global_batch=4) == []


def test_errors_name_the_value() -> None:
    """No samples, no batch, a place that is none, a stream with several readers."""
    with pytest.raises(DataError, match="no samples"):
        Loader(Whole(0), global_batch=4)
    with pytest.raises(UsageError, match="global_batch is 0"):
        Loader(Whole(3), global_batch=0)
    with pytest.raises(UsageError, match="micro_batch 0"):
        Loader(Whole(3), global_batch=2, micro_batch=0)
    with pytest.raises(UsageError, match="num_workers is -1"):
        Loader(Whole(3), global_batch=2, num_workers=-1)
    with pytest.raises(UsageError, match="rank is 2, world_size 2"):
        Loader(Whole(3), global_batch=2, rank=2, world_size=2)
    with pytest.raises(UsageError, match="num_workers is 2: a stream is read by one process"):
        Loader(Stream(3), global_batch=2, num_workers=2)


# -- batches ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_an_empty_batch_keeps_its_structure() -> None:
    """Tuples, named tuples, lists and dicts, inside one another; trailing dimensions and types stay."""
    batch = (Pair(torch.ones(3, 2), torch.ones(3)), {"a": [torch.ones(3, 1, dtype=torch.int8)]}, "text", 4)
    pair, more, text, number = empty(batch)
    assert isinstance(pair, Pair)
    assert (pair.x.shape, pair.y.shape) == ((0, 2), (0,))
    assert (more["a"][0].shape, more["a"][0].dtype) == ((0, 1), torch.int8)
    assert (text, number) == ("text", 4)
    assert isinstance(more["a"], list)


def test_a_batch_moves_with_its_structure() -> None:
    """All tensors, wherever they are."""
    batch = (Pair(torch.ones(3), torch.ones(3)), {"a": [torch.ones(3)]}, "text")
    pair, more, text = to_device(batch, torch.device("meta"))
    assert isinstance(pair, Pair)
    assert {t.device.type for t in (pair.x, pair.y, more["a"][0])} == {"meta"}
    assert text == "text"
