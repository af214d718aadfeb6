"""Laws of steps that servers make: they compute what one torch loop computes, and any servers and lanes the same bits.

All cases run in one job for each kind of servers, since starting processes costs about a second; the tests then
compare what its workers ended with.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain
from dtrain import norm
from dtrain.comm.base import Backend
from tests.conftest import remembered
from tests.parity.test_laws import largest_difference, portions, same_bits, state_of

pytestmark = pytest.mark.timeout(300)  # the first test waits for a whole job, which other tests may slow down

SAMPLES, GLOBAL_BATCH, WORKERS = 27, 10, 3  # steps of 10, 10 and 7 samples
WIDTH = 100  # a layer of 78 KiB: more than one server has a part of it

Model = Callable[[], nn.Module]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """Layers of several sizes, one of which is used or not.

    Weights begin at multiples of 16 bytes however they are laid side by side: on some processors MKL rounds a product
    of matrices otherwise where one does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(36, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 6)])
        self.optional = nn.Linear(WIDTH, WIDTH, bias=False)  # used on request
        self.never = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, optional: bool = True) -> Tensor:
        x = self.layers[0](x.flatten(1)).tanh()
        x = x + self.layers[1](x).tanh()
        return self.layers[2](x + self.optional(x) if optional else x) * self.scale  # type: ignore[no-any-return]


class Tied(Net):
    """One matrix in two places, and one that lies transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.optional.weight = self.layers[1].weight
        self.layers[0].weight = nn.Parameter(self.layers[0].weight.detach().t().contiguous().t())


class Conv(nn.Module):
    """Channels last, with batch norm over all workers' samples."""

    def __init__(self) -> None:
        super().__init__()
        # No bias before batch norm: its gradient is 0 but for rounding, which Adam would divide by its eps.
        self.body = nn.Sequential(
            nn.Conv2d(1, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 32, 3, bias=False),
            nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6),
        ).to(memory_format=torch.channels_last)  # fmt: skip

    def forward(self, x: Tensor, optional: bool = True) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Matrices(nn.Module):
    """Nothing but matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*s, bias=False) for s in ((36, WIDTH), (WIDTH, WIDTH), (WIDTH, 6)))

    def forward(self, x: Tensor, optional: bool = True) -> Tensor:
        for layer in self.layers:
            x = layer(x.flatten(1)).tanh()
        return x


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def groups(model: Any) -> torch.optim.Optimizer:
    """Three groups, with what each has of its own; in another order than the model's."""
    return torch.optim.AdamW(
        [
            {"params": [*model.layers[2].parameters(), model.scale], "lr": 0.02, "betas": (0.8, 0.9)},
            {"params": [*model.layers[0].parameters(), *model.never.parameters()], "weight_decay": 0.0},
            {"params": [*model.optional.parameters(), *model.layers[1].parameters()], "amsgrad": True, "eps": 1e-6},
        ],
        lr=0.01,
        weight_decay=0.1,
    )


def of(cls: type[torch.optim.Optimizer], **settings: Any) -> Optimizer:
    make: Any = cls
    return lambda model: make(model.parameters(), **settings)


@dataclass(frozen=True, kw_only=True)
class Case:
    model: Model = Net
    optimizer: Optimizer = sgd
    dtype: torch.dtype = torch.float64
    shares: tuple[int, ...] = (1, 5, 2)  # weights of the workers' shares
    pieces: tuple[int, ...] = (1,)  # weights of the micro-batches of a step
    tell: str = "samples and total"
    clip: float | None = None
    halve_every: int | None = None
    optional: Callable[[int, int], bool] = lambda step, rank: True  # whether the optional layer is used
    freeze: tuple[tuple[int, ...], ...] = ()  # by step: layers that are frozen from then on
    bucket_mb: float = 0.05
    pauses: int | None = None
    epochs: int = 2
    update: str = "server"
    early: bool = False  # whether forward begins before all parameters are there


CASES = {
    "sgd": Case(),
    "plain sgd": Case(optimizer=of(torch.optim.SGD, lr=0.1)),
    "adam": Case(optimizer=of(torch.optim.Adam, lr=0.01, weight_decay=0.01), epochs=3),
    "adamw, amsgrad": Case(optimizer=of(torch.optim.AdamW, lr=0.01, amsgrad=True)),
    "rmsprop": Case(optimizer=of(torch.optim.RMSprop, lr=0.003, momentum=0.5, centered=True, eps=1e-3)),
    "adagrad": Case(optimizer=of(torch.optim.Adagrad, lr=0.02, initial_accumulator_value=0.1)),
    "adafactor": Case(optimizer=of(torch.optim.Adafactor, lr=0.02)),
    "muon": Case(model=Matrices, optimizer=of(torch.optim.Muon, lr=0.01, ns_steps=3)),
    "groups and a schedule": Case(optimizer=groups, halve_every=2, epochs=3),
    "clipped": Case(clip=0.05),
    "clipped, groups": Case(clip=0.05, optimizer=groups, halve_every=2, bucket_mb=8.0),
    "not clipped by a large limit": Case(clip=1e6),
    "empty shares": Case(shares=(0, 1, 0)),
    "micro-batches": Case(pieces=(5, 1, 3), shares=(2, 0, 5), clip=0.3),
    "total unknown": Case(pieces=(5, 1, 3), shares=(2, 0, 5), tell="samples"),
    "equal shares": Case(shares=(1, 1, 1), tell="nothing"),
    "used by none": Case(optional=lambda step, rank: step % 2 == 0),
    "used by none, late": Case(optional=lambda step, rank: step > 1, optimizer=groups),
    "used by some": Case(optional=lambda step, rank: rank == 1, clip=0.1),
    "used by some, late": Case(optional=lambda step, rank: rank == step - 2),
    "frozen and unfrozen": Case(freeze=((0,), (0,), (1,), (1,), (), (2,)), halve_every=2),
    "frozen and unfrozen, adam": Case(freeze=((), (0, 1), (0, 1), (1,), ()), optimizer=groups, clip=0.1),
    "tied": Case(model=Tied, optimizer=of(torch.optim.AdamW, lr=0.01)),
    "tied, adafactor": Case(model=Tied, optimizer=of(torch.optim.Adafactor, lr=0.02)),
    "batch norm": Case(model=Conv),
    "batch norm, all of it": Case(
        model=Conv, pieces=(5, 3, 2), shares=(2, 0, 5), clip=0.1, halve_every=2,
        optimizer=of(torch.optim.Adam, lr=0.01),
    ),
    "one bucket": Case(bucket_mb=8.0),
    "many buckets": Case(bucket_mb=1e-4),
}  # fmt: skip

HALVES = {
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "bfloat16, adamw": Case(dtype=torch.bfloat16, optimizer=of(torch.optim.AdamW, lr=0.01, eps=1e-3)),
    "float16, clipped": Case(dtype=torch.float16, clip=0.1),
    "float32": Case(dtype=torch.float32, model=Conv, clip=0.1, optimizer=of(torch.optim.Adam, lr=0.01)),
    "float32, sgd": Case(dtype=torch.float32),
}
EARLY = {
    f"{name}, early": replace(CASES[name], early=True)
    for name in (
        *("sgd", "adam", "clipped, groups", "micro-batches", "used by some, late", "frozen and unfrozen, adam"),
        *("tied", "batch norm", "one bucket", "many buckets"),
    )
}
PAUSES = {f"{name}, pauses": replace(CASES[name], pauses=i) for i, name in enumerate(("sgd", "clipped", "batch norm"))}
SUMS = {
    f"sums of {name}": replace((CASES | HALVES)[name], update="worker") for name in ("sgd", "batch norm", "float32")
}
JOBS = {
    "1 server": {"servers": 1},
    "2 servers, sockets only": {"servers": 2, "lanes": "off"},
    "3 servers": {"servers": 3},
}


def rows_of(case: Case, micro: range, rank: int, world_size: int) -> slice:
    part = micro if world_size == 1 else portions(micro, case.shares)[rank]
    return slice(part.start, part.stop)


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (SAMPLES,), generator=generator)


def steps(case: Case) -> list[list[range]]:
    """Micro-batches of each step, before they are shared out."""
    found = []
    for _ in range(case.epochs):
        for start in range(0, SAMPLES, GLOBAL_BATCH):
            stop = min(start + GLOBAL_BATCH, SAMPLES)
            if case.tell == "nothing":  # as many samples for each worker
                stop -= (stop - start) % WORKERS
            found.append(portions(range(start, stop), case.pieces))
    return found


def freeze(model: Any, case: Case, step: int) -> None:
    if case.freeze:
        frozen = case.freeze[min(step, len(case.freeze) - 1)]
        for number, layer in enumerate(model.layers):
            layer.requires_grad_(number not in frozen)


def model_of(case: Case, rank: int = 0) -> Any:
    torch.manual_seed(rank)
    return case.model().to(case.dtype)


def plain(case: Case) -> dict[str, Any]:
    """The parameters after training with torch alone: one process, the mean loss over the global batch."""
    model = model_of(case)
    optimizer = case.optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, case.halve_every or 1000, gamma=0.5)
    x, y = samples(case.dtype)
    for step, micro_batches in enumerate(steps(case)):
        freeze(model, case, step)
        total = sum(map(len, micro_batches))
        for micro in micro_batches:
            if case.model is Conv:  # batch norm sees the micro-batches of all workers as one
                (F.cross_entropy(model(x[micro]), y[micro], reduction="sum") / total).backward()
                continue
            for rank in range(WORKERS):
                rows = rows_of(case, micro, rank, WORKERS)
                if rows.start < rows.stop:
                    out = model(x[rows], case.optional(step, rank))
                    (F.cross_entropy(out, y[rows], reduction="sum") / total).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return state_of(model) if case.dtype != torch.bfloat16 else state_of(model.float())


def train(comm: Backend, case: Case) -> dict[str, Any]:
    """The same with dtrain."""
    model = model_of(case, comm.rank)  # worker 0's initial values count
    if case.model is Conv:
        model = norm.convert(model, norm_batch="global", comm=comm)
    optimizer = case.optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, case.halve_every or 1000, gamma=0.5)
    update: Any = case.update
    if update == "server":
        update = dtrain.ServerUpdate(optimizer=optimizer, clip_grad_norm=case.clip, early_forward=case.early)
    replica = dtrain.replicate(model, comm, bucket_mb=case.bucket_mb, first_bucket_mb=case.bucket_mb, update=update)
    x, y = samples(case.dtype)
    pauses = None if case.pauses is None else random.Random(case.pauses * 100 + comm.rank)
    for step, micro_batches in enumerate(steps(case)):
        freeze(model, case, step)
        total = sum(map(len, micro_batches))
        for micro in micro_batches:
            rows = rows_of(case, micro, comm.rank, comm.world_size)
            count, last = rows.stop - rows.start, micro is micro_batches[-1]
            if pauses:
                time.sleep(pauses.random() * 0.02)
            given: dict[str, Any] = {"samples": count, "total": total} if case.tell == "samples and total" else {}
            given = {"samples": count} if case.tell == "samples" else given
            out = model(x[rows], case.optional(step, comm.rank))
            replica.backward(F.cross_entropy(out, y[rows]), **given, sync=last)
        if replica.updates:
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
        replica.publish()
        schedule.step()
        optimizer.zero_grad()
    replica.check(buffers=True)
    replica.close()
    return state_of(model) if case.dtype != torch.bfloat16 else state_of(model.float())


def train_all(comm: Backend, names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: train(comm, ALL[name]) for name in names}


ALL = CASES | HALVES | EARLY | PAUSES | SUMS


@remembered
def trained(job: str) -> list[dict[str, Any]]:
    return dtrain.run(train_all, list(ALL), workers=WORKERS, backend="ps", timeout_s=30.0, **JOBS[job])  # type: ignore[arg-type]


@remembered
def alone(name: str) -> dict[str, Any]:
    return plain(ALL[name])


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, *PAUSES])
@pytest.mark.parametrize("job", JOBS)
def test_servers_step_as_torch_does(job: str, name: str) -> None:
    """In float64, parameters and batch-norm buffers equal those of a loop of one process to 1e-12."""
    one = alone(name)
    for worker in trained(job):
        assert largest_difference(worker[name], one) <= 1e-12


LIMITS = {
    "bfloat16": 0.1,
    "bfloat16, adamw": 0.1,
    "float16": 0.01,
    "float16, clipped": 0.01,
    "float32": 1e-4,
    "float32, sgd": 1e-6,
}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_lower_precision_is_close(name: str, limit: float) -> None:
    """To rounding, which Adam may make larger."""
    assert largest_difference(trained("1 server")[0][name], alone(name)) <= limit


@pytest.mark.parametrize("name", ALL)
def test_servers_and_lanes_do_not_change_a_bit(name: str) -> None:
    """All workers of all jobs end with the same bits: 1, 2 and 3 servers, by shared memory and by sockets."""
    first, *others = [worker for job in JOBS for worker in trained(job)]
    assert all(same_bits(first[name], other[name]) for other in others)


@pytest.mark.parametrize("name", PAUSES)
def test_timing_does_not_change_a_bit(name: str) -> None:
    """Nor do pauses that make gradients arrive in other orders."""
    assert same_bits(trained("3 servers")[0][name], trained("1 server")[0][name.removesuffix(", pauses")])


def test_cutting_does_not_change_a_bit() -> None:
    """The size of buckets decides what travels together, and nothing else."""
    run = trained("3 servers")[0]
    assert same_bits(run["one bucket"], run["sgd"])
    assert same_bits(run["many buckets"], run["sgd"])


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("job", JOBS)
def test_an_early_forward_does_not_change_a_bit(job: str, name: str) -> None:
    """It computes of the same parameters, whenever they come."""
    for early, plainly in zip(trained(job), trained("1 server"), strict=True):
        assert same_bits(early[name], plainly[name.removesuffix(", early")])


def test_training_moves_the_model() -> None:
    """The comparisons above mean something: cases end somewhere else than they began, and not where others do."""
    begin = state_of(model_of(CASES["sgd"]))
    ends = trained("1 server")[0]
    assert largest_difference(ends["sgd"], begin) > 1e-2
    for name in ("plain sgd", "adam", "adamw, amsgrad", "rmsprop", "adagrad", "adafactor", "clipped", "used by some"):
        assert largest_difference(ends["sgd"], ends[name]) > 1e-3, name
    assert (ends["sgd"]["never.weight"] == begin["never.weight"]).all()  # weight decay, but nobody's gradient


def test_plain_sums_do_not_depend_on_servers() -> None:
    """Where every worker steps, any number of servers gives the bits of the threads."""
    found = dtrain.run(train_all, list(SUMS), workers=WORKERS, backend="threads", timeout_s=30.0)
    for name in SUMS:
        assert same_bits(found[0][name], trained("1 server")[0][name])
        assert same_bits(found[0][name], trained("3 servers")[0][name])


def test_servers_step_as_workers_do() -> None:
    """Where every worker steps, the result is the same to rounding."""
    run = trained("1 server")[0]
    for name in ("sgd", "batch norm"):
        assert largest_difference(run[f"sums of {name}"], run[name]) <= 1e-14
