"""Each worker's share of the data: a pure function of (seed, epoch, step, worker).

The user gives the global batch. It is cut into micro-batches, the same ones for any number of workers, and each
micro-batch into one share a worker: the k-th micro-batches of all workers together are the k-th micro-batch of one
worker. Shares differ by at most one sample; the last batch of an epoch is what is left. Nothing is dropped, nothing
comes twice.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dtrain.errors import DataError, UsageError

Collate = Callable[[list[Any]], Any]

Batch: TypeAlias = tuple[Tensor, ...]
"""Tensors whose first dimension counts the same samples."""


@dataclass(frozen=True)
class Micro:
    """One forward of one worker."""

    batch: Any
    """What the loss takes; with no sample in it where `samples` is 0."""
    samples: int
    """This worker's share of the micro-batch."""


class Share(TypedDict):
    """A micro-batch's part in its step: keyword arguments of `Replica.backward`."""

    samples: int
    total: int
    sync: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one worker sees it."""

    first: int
    """Position in the epoch of its first sample, from 0."""
    total: int
    """Samples of all workers and micro-batches together."""
    micro_batches: Iterator[Micro] | list[Micro]


class BatchedData(Dataset[Batch]):
    """A map-style data set whose one primitive is `batch`; single items are cut from it.

    Subclasses give `__len__` and `batch`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Tensor) -> Batch:
        """The samples at `indices` [n] (int64, each in 0..len-1), stacked in that order: tensors [n, ...]."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        return tuple(tensor[0] for tensor in self.batch(torch.tensor([index % len(self)])))

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Several items by one `batch`: the hook that torch's DataLoader looks for."""
        stacked = self.batch(torch.tensor(indices, dtype=torch.int64))
        return list(zip(*stacked, strict=True))


def shuffled(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: (num_samples,) int64; one shuffle for all workers."""
    return torch.randperm(num_samples, generator=_generator(seed * 1_000_003 + epoch))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def cut(count: int, part: int, parts: int) -> slice:
    """Positions of one of `parts` nearly equal parts of `count` things."""
    return slice(part * count // parts, (part + 1) * count // parts)


def accumulation(global_batch: int, micro_batch: int | None, world_size: int) -> int:
    """How many micro-batches a step has, so that none holds more than `micro_batch` samples of a worker.

    Raises:
        UsageError: a batch of no samples.
    """
    if global_batch < 1 or (micro_batch is not None and micro_batch < 1):
        raise UsageError(f"global_batch is {global_batch}, micro_batch {micro_batch}: a batch has at least one sample")
    return 1 if micro_batch is None else math.ceil(global_batch / (micro_batch * world_size))


def share(count: int, *, accumulate: int, rank: int, world_size: int) -> list[range]:
    """Positions in a global batch of `count` samples that are one worker's, a range for each micro-batch."""
    pieces = min(accumulate, count)
    ranges = []
    for k in range(pieces):
        piece = cut(count, k, pieces)
        mine = cut(piece.stop - piece.start, rank, world_size)
        ranges.append(range(piece.start + mine.start, piece.start + mine.stop))
    return ranges


def leave_signals(_: int) -> None:
    """Let a process that fetches data live while its worker, which is asked to stop, saves. It ends with that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Loader:
    """Steps of an epoch for one worker, from any map-style or iterable data set.

    A `BatchedData` is asked for whole micro-batches; other data sets go through torch's DataLoader.
    Of an iterable data set, each worker reads the whole stream and keeps its share; its order is the data set's own.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        collate: Collate = default_collate,
    ) -> None:
        """
        Args:
            global_batch: samples in one optimizer step, over all workers.
            micro_batch: most samples of one forward of a worker; more are accumulated. None: no limit.
            num_workers: processes that fetch ahead, as in torch's DataLoader.
            collate: makes a batch of a list of samples.

        Raises:
            UsageError: a batch of no samples, or a stream with several readers; DataError: a data set of none.
        """
        if num_workers < 0:
            raise UsageError(f"num_workers is {num_workers}: give 0 or more")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank is {rank}, world_size {world_size}: ranks run from 0 to world_size - 1")
        if isinstance(dataset, IterableDataset) and num_workers > 1:
            raise UsageError(f"num_workers is {num_workers}: a stream is read by one process, give 0 or 1")
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_batch = global_batch
        """The global batch that it was made with."""
        self._most = micro_batch
        self._place = {"rank": rank, "world_size": world_size}
        self._resize(global_batch)
        self._shuffle = shuffle
        self._num_workers = num_workers
        self._collate = collate
        self.num_samples: int | None = None
        if not isinstance(dataset, IterableDataset):
            self.num_samples = len(dataset)  # type: ignore[arg-type]
            if self.num_samples == 0:
                raise DataError("the data set has no samples")

    def resize(self, global_batch: int) -> None:
        """Give the steps to come another global batch, in mid-epoch too; all workers do, between the same two steps.

        Micro-batches are no larger than they were allowed to be: what does not fit is accumulated.

        Raises:
            UsageError: a batch of no samples, or a stream that another process reads ahead.
        """
        if isinstance(self.dataset, IterableDataset) and self._num_workers and global_batch != self.global_batch:
            raise UsageError("the global batch of a stream cannot change while a process reads ahead: num_workers=0")
        self._resize(global_batch)

    def _resize(self, global_batch: int) -> None:
        self._accumulate = accumulation(global_batch, self._most, self.world_size)
        self.global_batch = global_batch
        """Samples of a step to come, over all workers."""
        self.micro_batch = math.ceil(global_batch / (self._accumulate * self.world_size))
        """Most samples of one forward of a worker."""
        self.share = sum(map(len, share(global_batch, accumulate=self._accumulate, **self._place)))
        """Samples of a full global batch that are this worker's."""
        self.even = global_batch % (self._accumulate * self.world_size) == 0
        """Whether all of them have that many, but for an epoch's last batch."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Of the present global batch; None for a stream of unknown length."""
        return self.steps_from(0)

    def steps_from(self, first: int) -> int | None:
        """Steps of the present global batch from a sample of the epoch to its end; None for a stream."""
        return None if self.num_samples is None else math.ceil((self.num_samples - first) / self.global_batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """The steps of an epoch, from sample number `start` on."""
        if isinstance(self.dataset, IterableDataset):
            return self._stream(epoch, start)
        return self._map(epoch, start)

    def batches(self, epoch: int) -> Iterator[tuple[Any, Share]]:
        """The epoch for a loop of one's own: each batch with what `Replica.backward` is to know of it.

        for (x, y), share in loader.batches(epoch):
            replica.backward(loss(model(x), y), **share)
            if share["sync"]:
                optimizer.step()
                optimizer.zero_grad()
        """
        for step in self.epoch(epoch):
            micro_batches = list(step.micro_batches)
            for position, micro in enumerate(micro_batches, 1):
                yield micro.batch, Share(samples=micro.samples, total=step.total, sync=position == len(micro_batches))

    def _map(self, epoch: int, start: int) -> Iterator[Step]:
        assert self.num_samples is not None  # noqa: S101
        count = self.num_samples
        order = shuffled(count, self.seed, epoch) if self._shuffle else torch.arange(count)
        while start < count:
            size = self.global_batch
            for step in self._steps(epoch, order, start):
                yield step
                start = step.first + step.total
                if size != self.global_batch:
                    break

    def _steps(self, epoch: int, order: Tensor, start: int) -> Iterator[Step]:
        """The steps from sample `start` on, of the present global batch."""
        batches = order[start:].split(self.global_batch)
        shares = [share(len(b), accumulate=self._accumulate, **self._place) for b in batches]
        indices = [b[r.start : r.stop] for b, ranges in zip(batches, shares, strict=True) for r in ranges]
        # A worker without a share still takes part in the forward: it fetches a sample to learn the shapes.
        spare = [b[:1] for b, ranges in zip(batches, shares, strict=True) for _ in ranges]
        fetched = self._fetch(epoch, start, [i if len(i) else s for i, s in zip(indices, spare, strict=True)])
        micros = (Micro(b if len(i) else empty(b), len(i)) for b, i in zip(fetched, indices, strict=True))
        for batch, ranges in zip(batches, shares, strict=True):
            yield Step(start, len(batch), islice(micros, len(ranges)))
            start += len(batch)

    def _fetch(self, epoch: int, start: int, indices: list[Tensor]) -> Iterable[Any]:
        if isinstance(self.dataset, BatchedData) and self._num_workers == 0:
            return map(self.dataset.batch, indices)
        return DataLoader(
            self.dataset,
            batch_sampler=[i.tolist() for i in indices],
            num_workers=self._num_workers,
            collate_fn=self._collate,
            generator=self._own_generator(epoch, start),
            worker_init_fn=leave_signals,
        )

    def _own_generator(self, epoch: int, start: int) -> torch.Generator:
        """What a DataLoader draws from, so that it leaves torch's own generator, and with it a resumed run, alone.

        One that begins in mid-epoch, after a change of the batch, draws other numbers.
        """
        return _generator(((self.seed * 31 + epoch) * 1009 + self.rank) * 1_000_003 + start)

    def _stream(self, epoch: int, start: int) -> Iterator[Step]:
        generator = self._own_generator(epoch, start)
        loader = DataLoader(
            _Shares(self, start),
            batch_size=None,
            num_workers=self._num_workers,
            generator=generator,
            worker_init_fn=leave_signals,
        )
        for first, total, micros in loader:
            yield Step(first, total, [Micro(batch, samples) for batch, samples in micros])

    def read(self, start: int) -> Iterator[tuple[int, int, list[tuple[Any, int]]]]:
        """Of a stream, from sample `start` on: (first sample, samples in the global batch, this worker's part)."""
        source = islice(iter(self.dataset), start, None)
        while samples := list(islice(source, self.global_batch)):
            ranges = share(len(samples), accumulate=self._accumulate, **self._place)
            yield start, len(samples), [self._micro(samples, r) for r in ranges]
            start += len(samples)

    def _micro(self, samples: Sequence[Any], mine: range) -> tuple[Any, int]:
        if len(mine) == 0:
            return empty(self._collate([samples[0]])), 0
        return self._collate(list(samples[mine.start : mine.stop])), len(mine)


class _Shares(IterableDataset[Any]):
    """A worker's part of a stream, for torch's DataLoader."""

    def __init__(self, loader: Loader, start: int) -> None:
        self._loader = loader
        self._start = start

    def __iter__(self) -> Iterator[tuple[int, int, list[tuple[Any, int]]]]:
        return self._loader.read(self._start)


def empty(batch: Any) -> Any:
    """The batch without its samples: tensors of first dimension 0."""
    return map_tensors(lambda tensor: tensor[:0], batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with each of its tensors changed; what else is in it stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch
