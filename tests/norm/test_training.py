"""Batch norm in training runs: precise statistics before each evaluation, and workers that weigh by their samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain import checkpoint, cli, norm, runs
from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.hooks import Evaluate, Precise
from dtrain.norm.moments import moments
from dtrain.spec import RunSpec
from tests.norm.test_sync import close, on_threads

DATA = TensorDataset(
    torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5,
    torch.randint(0, 2, (20,), generator=torch.Generator().manual_seed(1)),
)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3, momentum=0.01), nn.Linear(3, 2)).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(comm: Backend, hooks: list[dtrain.Hook], global_batch: int = 10, steps: int = 4) -> dtrain.Trainer:
    model = model_of()
    loader = dtrain.Loader(DATA, global_batch=global_batch, rank=comm.rank, world_size=comm.world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = dtrain.TrainConfig(steps=steps)
    trainer = dtrain.Trainer(model, loss, optimizer, loader, comm=comm, config=config, hooks=hooks)
    trainer.fit()
    return trainer


def test_statistics_are_precise_where_they_are_evaluated() -> None:
    """The running average of 4 steps with momentum 0.01 is nowhere near; the hook's is that of all that it read."""

    def body(comm: Backend) -> list[Tensor]:
        halves = DATA.tensors[0].split(10)
        seen: list[list[Tensor]] = []

        def score(model: nn.Module, batch: Any) -> dict[str, Tensor]:
            seen.append([b.clone() for b in model.buffers()])
            return {"loss": loss(model, batch)}

        hooks = [Precise(lambda epoch: [halves[comm.rank]]), Evaluate(DATA, score)]
        trained(comm, hooks)
        return seen[-1]

    mean, m2, count = moments(DATA.tensors[0])
    for found in on_threads(body, workers=2):
        close(found[0], mean, 1e-12)
        close(found[1], m2 / (count - 1), 1e-12)


@pytest.mark.parametrize(("global_batch", "workers"), [(10, 4), (7, 3)])
def test_workers_weigh_by_their_samples(global_batch: int, workers: int) -> None:
    """Of 7 samples one of three workers has 3 and the others 2 each: checkpoints merge their statistics so."""

    def body(comm: Backend) -> tuple[Tensor, int, dict[str, Tensor] | None]:
        trainer = trained(comm, [], global_batch, steps=1)
        own = trainer.model[0].running_mean.clone()  # type: ignore[index]
        snapshot = trainer.state.snapshot()
        return own, trainer.state.share, None if snapshot is None else snapshot["model"]  # type: ignore[return-value]

    found = on_threads(body, workers=workers)
    shares = torch.tensor([share for _, share, _ in found], dtype=torch.float64)
    assert shares.sum() == global_batch
    saved = found[0][2]
    assert saved is not None
    wanted = (torch.stack([own for own, *_ in found]) * shares.unsqueeze(1)).sum(0) / shares.sum()
    close(saved["0.running_mean"], wanted, 1e-12)


def test_from_the_command_line(tmp_path: Path) -> None:
    """The same run, but for the statistics that it ends with."""
    found = []
    for batches in (0, 3):
        folder = tmp_path / str(batches)
        flags = ["--backend", "threads", "-n", "2", "--steps", "3", "--quiet", "--run-dir", str(folder)]
        options = ["--option", "width=4", "--precise-batches", str(batches), "--norm-batch", "8", "--micro-batch", "16"]
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(["train", "digits", *flags, *options])
        found.append(checkpoint.load_tensors(folder / "model.safetensors"))
    different = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    assert different
    assert all("running" in name for name in different)


def test_a_number_below_zero() -> None:
    with pytest.raises(UsageError, match="precise_batches is -1"):
        runs.train(dtrain.connect(), RunSpec(recipe="digits", precise_batches=-1, progress=False))


def test_all_that_is_promised_is_there() -> None:
    assert all(callable(getattr(norm, name)) or name == "WORDS" for name in norm.__all__)
