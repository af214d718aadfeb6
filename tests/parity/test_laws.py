"""The laws of arithmetic: n workers compute what one worker computes, and what a plain torch loop does.

Each case is a small training run. All cases of a backend run in one job, since starting processes costs about a
second; the tests then compare what its workers ended with.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import norm
from dtrain.comm.base import Backend, dtype_name
from dtrain.data import cut
from dtrain.ps import wire
from dtrain.replica import replicate
from tests.conftest import everywhere, remembered

SAMPLES, GLOBAL_BATCH, WORKERS = 27, 10, 3  # steps of 10, 10 and 7 samples
MANY = ["threads", "ps", "allreduce"]


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str = "mlp"
    dtype: torch.dtype = torch.float64
    shares: tuple[int, ...] | None = None  # weights of the workers' shares; None: nearly equal ones
    pieces: tuple[int, ...] = (1,)  # weights of the micro-batches of a step
    tell_total: bool = True
    clip: float | None = None
    optimizer: str = "sgd"
    bucket_mb: float = 8.0
    direct_mb: float = 4.0
    part_bytes: int | None = None
    sleep_seed: int | None = None
    epochs: int = 2


CASES = {
    "mlp": Case(),
    "cnn": Case(model="cnn"),
    "unequal shares": Case(shares=(1, 5, 2)),
    "empty shares": Case(shares=(0, 1, 0)),
    "cnn, unequal shares": Case(model="cnn", shares=(1, 5, 2)),
    "cnn, empty shares": Case(model="cnn", shares=(3, 0, 1)),
    "micro-batches": Case(pieces=(1, 1, 1)),
    "unequal micro-batches": Case(pieces=(5, 1, 3)),
    "unequal micro-batches, total unknown": Case(pieces=(5, 1, 3), tell_total=False),
    "unequal micro-batches and shares": Case(pieces=(5, 1, 3), shares=(2, 0, 5)),
    "unequal micro-batches and shares, total unknown": Case(pieces=(5, 1, 3), shares=(2, 0, 5), tell_total=False),
    "total unknown": Case(shares=(1, 5, 2), tell_total=False),
    "cnn, all of it": Case(model="cnn", pieces=(5, 3, 2), shares=(2, 0, 5), tell_total=False, clip=0.1),
    "cnn, micro-batches": Case(model="cnn", pieces=(2, 1), optimizer="adamw"),
    "clipped": Case(shares=(1, 5, 2), clip=0.05),
    "momentum": Case(optimizer="momentum", shares=(1, 5, 2)),
    "adamw": Case(optimizer="adamw", shares=(1, 5, 2), epochs=3),
    "many buckets": Case(model="cnn", bucket_mb=1e-4),
    "sent from where they lie": Case(model="cnn", shares=(1, 5, 2), pieces=(2, 1), direct_mb=1e-6),
}

BITWISE = {
    f"{dtype_name(dtype)}, {name}": replace(case, dtype=dtype)
    for dtype in (torch.float32, torch.float64)
    for name, case in {
        "as it is": Case(model="cnn", shares=(1, 5, 2)),
        "small buckets": Case(model="cnn", shares=(1, 5, 2), bucket_mb=1e-4),
        "small parts": Case(model="cnn", shares=(1, 5, 2), part_bytes=56),
        "small buckets and parts": Case(model="cnn", shares=(1, 5, 2), bucket_mb=1e-3, part_bytes=1000),
        "pauses": Case(model="cnn", shares=(1, 5, 2), sleep_seed=1),
        "other pauses": Case(model="cnn", shares=(1, 5, 2), sleep_seed=2),
    }.items()
}


# --- a training run


def model_of(case: Case, comm: Backend | None) -> nn.Module:
    model: nn.Module
    if case.model == "mlp":
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
    else:
        # No bias before batch norm: its gradient is 0 but for rounding, which AdamW would divide by its eps.
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False),
            nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5),
        )  # fmt: skip
    if comm is not None:
        model = norm.convert(model, norm_batch="global", comm=comm)
    return model.to(case.dtype)


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    momentum = 0.9 if case.optimizer == "momentum" else 0.0
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0)


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (SAMPLES,), generator=generator)


def portions(positions: range, weights: tuple[int, ...]) -> list[range]:
    """The positions cut in proportion to the weights; nothing dropped, nothing twice."""
    ends = [sum(weights[: i + 1]) * len(positions) // sum(weights) for i in range(len(weights))]
    return [positions[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def share(case: Case, micro: range, rank: int, world_size: int) -> range:
    if world_size == 1:
        return micro
    if case.shares is None:
        return micro[cut(len(micro), rank, world_size)]
    return portions(micro, case.shares)[rank]


def steps(case: Case) -> Iterator[list[range]]:
    """Micro-batches of each step, before they are shared out."""
    for _ in range(case.epochs):
        for start in range(0, SAMPLES, GLOBAL_BATCH):
            yield portions(range(start, min(start + GLOBAL_BATCH, SAMPLES)), case.pieces)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: t.detach().clone().numpy() for name, t in model.state_dict().items()}


def train(comm: Backend, case: Case) -> dict[str, Any]:
    """Parameters and buffers after training with dtrain."""
    torch.manual_seed(0 if comm.rank == 0 else 1000 + comm.rank)  # worker 0's initial values count
    model = model_of(case, comm)
    first_mb = min(1.0, case.bucket_mb)
    replica = replicate(model, comm, bucket_mb=case.bucket_mb, first_bucket_mb=first_mb, direct_mb=case.direct_mb)
    optimizer = optimizer_of(case, model)
    x, y = samples(case.dtype)
    pauses = None if case.sleep_seed is None else random.Random(case.sleep_seed * 100 + comm.rank)
    for micro_batches in steps(case):
        total = sum(map(len, micro_batches)) if case.tell_total else None
        for micro in micro_batches:
            mine = share(case, micro, comm.rank, comm.world_size)
            rows = slice(mine.start, mine.stop)
            if pauses:
                time.sleep(pauses.random() * 0.01)
            loss = F.cross_entropy(model(x[rows]), y[rows])
            replica.backward(loss, samples=len(mine), total=total, sync=micro is micro_batches[-1])
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    replica.check(buffers=True)
    replica.close()
    return state_of(model)


def plain(case: Case) -> dict[str, Any]:
    """The same with torch alone: one process, the mean loss over the global batch."""
    torch.manual_seed(0)
    model = model_of(case, None)
    optimizer = optimizer_of(case, model)
    x, y = samples(case.dtype)
    for micro_batches in steps(case):
        total = sum(map(len, micro_batches))
        for micro in micro_batches:
            rows = slice(micro.start, micro.stop)
            (F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / total).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


def train_all(comm: Backend, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    part_bytes = wire.PART_BYTES
    results = {}
    for name, case in cases.items():
        wire.PART_BYTES = case.part_bytes or part_bytes
        results[name] = train(comm, case)
    wire.PART_BYTES = part_bytes
    return results


@remembered
def trained(backend: str) -> list[dict[str, dict[str, Any]]]:
    return everywhere(train_all, CASES | BITWISE, backend=backend, workers=WORKERS)


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) for name in a)


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


# --- laws


@pytest.mark.parametrize("name", CASES)
def test_solo_is_a_plain_torch_loop(name: str) -> None:
    """A world of one computes what a loop without dtrain computes."""
    assert largest_difference(trained("solo")[0][name], plain(CASES[name])) <= 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", MANY)
def test_n_workers_are_one_worker(backend: str, name: str) -> None:
    """In float64, parameters and batch-norm buffers after training equal the one-worker run to 1e-12."""
    one = trained("solo")[0][name]
    for worker in trained(backend):
        assert largest_difference(worker[name], one) <= 1e-12


def test_training_moves_the_model() -> None:
    """The comparisons above mean something: each case ends somewhere else than it began, and not where others do."""
    torch.manual_seed(0)
    ends = trained("solo")[0]
    assert largest_difference(ends["mlp"], state_of(model_of(CASES["mlp"], None))) > 1e-2
    for name in ("clipped", "momentum", "adamw"):
        assert largest_difference(ends["mlp"], ends[name]) > 1e-3


@pytest.mark.parametrize("name", [*CASES, *BITWISE])
@pytest.mark.parametrize("backend", MANY)
def test_workers_agree_to_the_bit(backend: str, name: str) -> None:
    """All workers of a job hold the same bits, whatever the backend."""
    first, *others = trained(backend)
    assert all(same_bits(first[name], other[name]) for other in others)


@pytest.mark.parametrize("name", [*CASES, *BITWISE])
def test_server_and_threads_are_bitwise_equal(name: str) -> None:
    """Both add in worker order: the parameter server gives the bits of the threads."""
    assert same_bits(trained("ps")[0][name], trained("threads")[0][name])


@pytest.mark.parametrize("name", [n for n in BITWISE if not n.endswith("as it is")])
@pytest.mark.parametrize("backend", ["threads", "ps"])
def test_cutting_and_timing_do_not_change_a_bit(backend: str, name: str) -> None:
    """Bucket sizes, part sizes and random pauses leave every bit as it was."""
    kind = name.split(",")[0]
    run = trained(backend)[0]
    assert same_bits(run[name], run[f"{kind}, as it is"])


def test_single_precision_is_close_to_double() -> None:
    """In float32 the result is that of float64 to rounding."""
    run = trained("ps")[0]
    assert largest_difference(run["float32, as it is"], run["float64, as it is"]) < 1e-4


# --- without samples=: as torch's DistributedDataParallel does it


def loss_of(model: nn.Module, rows: range) -> Tensor:
    x, y = samples(torch.float64)
    return F.cross_entropy(model(x[rows.start : rows.stop]), y[rows.start : rows.stop])


PARTS = [[range(0, 1), range(1, 9)], [range(9, 12), range(12, 14)], [range(14, 20), range(20, 27)]]
"""Two micro-batches for each worker, of unequal sizes."""


def plain_backward(comm: Backend) -> list[Any]:
    torch.manual_seed(0)
    model = model_of(Case(), comm)
    replicate(model, comm)
    loss_of(model, PARTS[comm.rank][0]).backward()
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def plain_no_sync(comm: Backend) -> list[Any]:
    torch.manual_seed(0)
    model = model_of(Case(), comm)
    replica = replicate(model, comm)
    with replica.no_sync():
        loss_of(model, PARTS[comm.rank][0]).backward()
    loss_of(model, PARTS[comm.rank][1]).backward()
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def own_gradients(micro_batches: list[range]) -> list[Tensor]:
    torch.manual_seed(0)
    model = model_of(Case(), None)
    for rows in micro_batches:
        loss_of(model, rows).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize(("fn", "count"), [(plain_backward, 1), (plain_no_sync, 2)])
def test_plain_backward_is_that_of_ddp(backend: str, fn: Callable[[Backend], list[Any]], count: int) -> None:
    """`loss.backward()` gives the mean of the workers' gradients, all weighing the same; under `no_sync()` they add up
    before."""
    each = [own_gradients(micro_batches[:count]) for micro_batches in PARTS]
    expected = [sum(gradients) / WORKERS for gradients in zip(*each, strict=True)]
    for worker in everywhere(fn, backend=backend, workers=WORKERS):
        for got, wanted in zip(worker, expected, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-14)  # type: ignore[union-attr]
