"""A small thing to train, in many variants, for tests on all backends. `fit` is sent to processes by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import dtrain
from dtrain.comm.base import Backend
from dtrain.data import BatchedData, Loader
from dtrain.hooks import Checkpoint, Hook, State
from dtrain.largebatch import LAMB, LARS, Rule, cosine, decay, grow
from dtrain.steering import AdaptBatch, Steer
from dtrain.trainer import Trainer

FEATURES = 5


class Points(BatchedData):
    """Points and a smooth function of them, the same for one seed."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.y = (self.x.sin().sum(1, keepdim=True) + self.x.prod(1, keepdim=True)).to(dtype)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class PointStream(IterableDataset[Any]):
    """The same, one after the other."""

    def __init__(self, points: Points) -> None:
        self.points = points

    def __iter__(self) -> Iterator[Any]:
        return (self.points[i] for i in range(len(self.points)))


def make_model(kind: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """`plain`, `norm` (two batch-norm layers) or `dropout` (those, and dropout)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
        if kind != "plain":
            layers += [nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8)]
        layers += [nn.Tanh(), nn.Dropout(0.3)] if kind == "dropout" else [nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(8, 1)).to(dtype)


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def square_sums(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor | float]:
    x, y = batch
    return {"loss": (model(x) - y).double().square().sum(), "count": len(x)}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "lars": lambda p: LARS(p, lr=0.1, trust_coefficient=0.02, weight_decay=1e-3),
    "lamb": lambda p: LAMB(p, lr=0.02, weight_decay=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@dataclass(frozen=True)
class Job:
    """What is trained, and how; see `dtrain.TrainConfig` for `config`."""

    kind: str = "plain"
    count: int = 23
    global_batch: int = 8
    micro_batch: int | None = None
    dtype: torch.dtype = torch.float64
    optimizer: str = "sgd"
    halve_every: int | None = None
    """Steps after which the learning rate is halved."""
    grow: int | None = None
    """Largest global batch, where it grows instead of a rate that is halved at 0.4, 1.1 and 1.5 epochs."""
    adapt: int | None = None
    """Largest global batch, where it follows the gradient noise scale."""
    stream: bool = False
    seed: int = 0
    update: str = "worker"
    """Who steps the optimizer."""
    config: dict[str, Any] = field(default_factory=dict)
    every_steps: int | None = None
    """Save so often, to `root`."""
    root: str | None = None
    resume: bool = False
    resume_step: int | None = None

    def but(self, **more: Any) -> Job:
        return replace(self, **more)

    def with_config(self, **more: Any) -> Job:
        return replace(self, config={**self.config, **more})


def trainer_of(comm: Backend, job: Job, hooks: tuple[Hook, ...] = (), data: Any = None, loss: Any = mean_square) -> Any:
    """The trainer of one worker."""
    if data is None:
        points = Points(job.count, job.dtype)
        data = PointStream(points) if job.stream else points
    model = make_model(job.kind, job.dtype)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())
    loader = Loader(
        data,
        global_batch=job.global_batch,
        micro_batch=job.micro_batch,
        rank=comm.rank,
        world_size=comm.world_size,
        seed=job.seed,
    )
    config = dtrain.TrainConfig(**({"steps": 6, "seed": job.seed, "update": job.update} | job.config))
    if job.grow is not None:
        course = grow(decay([0.4, 1.1, 1.5], 0.5), batch=job.global_batch, max_batch=job.grow)
        hooks = (Steer(optimizer, course, samples=job.count), *hooks)
    if job.adapt is not None:
        rule = Rule(largest=job.adapt, ratio=4.0)
        hooks = (AdaptBatch(optimizer, rule, samples=job.count, schedule=cosine(3), ask_every=4), *hooks)
    if job.root is not None:
        hooks = (*hooks, Checkpoint(Path(job.root), every_steps=job.every_steps, keep=100))
    scheduler = None
    if job.halve_every is not None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, job.halve_every, gamma=0.5)
    return Trainer(
        model,
        loss,
        optimizer,
        loader,
        comm=comm,
        config=config,
        scheduler=scheduler,
        hooks=hooks,
    )


def fit(comm: Backend, job: Job) -> dict[str, Any]:
    """Train as one worker: everything that a worker has at the end."""
    trainer = trainer_of(comm, job)
    if job.resume:
        assert job.root is not None
        trainer.resume(Path(job.root), job.resume_step)
    return result_of(trainer, trainer.fit())


def result_of(trainer: Any, state: State) -> dict[str, Any]:
    return {
        "parameters": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in trainer.model.named_buffers()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "random": torch.rand(8),
        "position": (state.step, state.epoch, state.samples),
        "global_batch": state.global_batch,
        "loss": state.loss,
        "pushes": trainer.replica.pushes and (dict(trainer.replica.pushes.staleness), trainer.replica.pushes.dropped),
        "scale": trainer._scaler.state_dict(),
        "records": trainer.records,
    }


def flatten(tree: Any, where: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by path."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{where}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, value in enumerate(tree) for k, v in flatten(value, f"{where}/{i}").items()}
    return {where: tree}


def differences(a: Any, b: Any) -> list[str]:
    """Paths at which two trees do not hold the same bits."""
    left, right = flatten(a), flatten(b)
    return sorted(set(left) ^ set(right)) + [k for k in left.keys() & right.keys() if not _same(left[k], right[k])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
        )
    return type(a) is type(b) and (a == b or (a != a and b != b))


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest absolute difference."""
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a)
