"""Optimizer state that the workers keep in parts: the same training, and an n-th of the state on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dtrain
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from tests.conftest import BACKENDS, everywhere
from tests.small import Job, Points, differences, distance, fit, make_model, mean_square

FULL = Job("norm").with_config(norm_batch="global", bucket_mb=2e-4)
"""Batch norm over all workers, ragged last batches, and buckets of 26 numbers, which cut most parameters."""

ROUNDING = 1e-12


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lars", "lamb"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_n_workers_with_parts_are_one_with_all(backend: str, optimizer: str, clip: float | None) -> None:
    """In float64; with clipping over all parts; with trust ratios of tensors that several workers have parts of."""
    job = FULL.but(optimizer=optimizer).with_config(clip_grad_norm=clip)
    if optimizer in ("adam", "lamb"):  # which make whole steps of the roundings that biases before a batch norm get
        job = job.but(kind="plain")
    (alone,) = dtrain.run(fit, job, workers=1, backend="threads")
    workers = everywhere(fit, job.but(update="sharded"), backend=backend, workers=3)
    for worker in workers:
        assert distance(worker["parameters"], alone["parameters"]) < ROUNDING
    assert not any(differences(worker["parameters"], workers[0]["parameters"]) for worker in workers)


@pytest.mark.parametrize("backend", ["threads", "ps", "allreduce"])
def test_plain_steps_have_the_same_bits_on_every_backend(backend: str) -> None:
    """Parts are added in worker order everywhere."""
    job = FULL.but(kind="plain", update="sharded", optimizer="adam")
    here = dtrain.run(fit, job, workers=3, backend="threads")
    found = everywhere(fit, job, backend=backend, workers=3)
    assert not differences(found[2]["parameters"], here[0]["parameters"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
@pytest.mark.parametrize(("first", "second"), [("sharded", "sharded"), ("worker", "sharded"), ("sharded", "worker")])
def test_checkpoints_are_those_of_any_update(first: str, second: str, optimizer: str, tmp_path: Path) -> None:
    """State goes from parts to whole and back; also to another number of workers."""
    job = Job(optimizer=optimizer).with_config(bucket_mb=2e-4)
    (alone,) = dtrain.run(fit, job, workers=1, backend="threads")
    saving = job.but(root=str(tmp_path), update=first).with_config(steps=3)
    dtrain.run(fit, saving, workers=2, backend="threads")
    resumed = dtrain.run(fit, job.but(root=str(tmp_path), resume=True, update=second), workers=3, backend="threads")
    assert distance(resumed[2]["parameters"], alone["parameters"]) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_has_the_same_bits(backend: str, tmp_path: Path) -> None:
    job = Job("dropout", count=40, update="sharded", optimizer="adam")
    whole = everywhere(fit, job, backend=backend)
    everywhere(fit, job.but(root=str(tmp_path)).with_config(steps=4), backend=backend)
    resumed = everywhere(fit, job.but(root=str(tmp_path), resume=True), backend=backend)
    names = ("parameters", "buffers", "position", "lr")
    for a, b in zip(resumed, whole, strict=True):
        assert not differences({n: a[n] for n in names}, {n: b[n] for n in names})


def parts(comm: Backend, name: str) -> dict[str, Any]:
    """What a worker keeps and sends, with parameters that are frozen, unused, or used by worker 0 alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({n: make_model("plain", torch.float64) for n in ("all", "some", "none", "frozen")})
    model["frozen"].requires_grad_(False)
    groups = [
        {"params": [*model["all"].parameters()], "lr": 0.02},
        {"params": [*model["some"].parameters(), *model["none"].parameters(), *model["frozen"].parameters()]},
    ]
    optimizer: Any = torch.optim.Adam(groups, lr=0.01)
    update = dtrain.ShardedUpdate(optimizer=optimizer) if name == "sharded" else "worker"
    replica = dtrain.replicate(model, comm, update=update)
    points = Points(4, seed=comm.rank)
    sent = 0
    for step in range(3):
        before = comm.traffic.sent["gradient"]
        loss = mean_square(model["all"], (points.x, points.y))
        if comm.rank == 0 and step > 0:
            loss = loss + mean_square(model["some"], (points.x, points.y))
        replica.backward(loss)
        if replica.updates:
            optimizer.step()
            optimizer.zero_grad()
        replica.publish()
        sent = comm.traffic.sent["gradient"] - before
    pushes = replica.pushes
    mine = sum(o.state_bytes for o in pushes._hosted._optimizers) if pushes else 0  # type: ignore[union-attr]
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "state": pushes.optimizer_state() if pushes else optimizer.state_dict()["state"],
        "bytes": mine,
        "all bytes": pushes.state_bytes() if pushes else 0,
        "table": pushes.table() if pushes else "",
        "sent": sent,
    }


@pytest.mark.parametrize("backend", ["threads", "allreduce"])
def test_parameters_that_not_all_use(backend: str) -> None:
    """Those that nobody used keep their values and have no state; groups have rates of their own."""
    whole = dtrain.run(parts, "worker", workers=2, backend="threads")
    found = everywhere(parts, "sharded", backend=backend)
    assert distance(found[1]["parameters"], whole[0]["parameters"]) < ROUNDING
    assert found[0]["state"].keys() == whole[0]["state"].keys()
    assert all(
        torch.allclose(found[0]["state"][n][k], t, rtol=0, atol=1e-13)
        for n, kept in whole[0]["state"].items()
        for k, t in kept.items()
    )
    assert found[1]["state"] == {}


def test_each_keeps_its_part_and_the_bytes_are_those_of_an_all_reduce() -> None:
    """State of 8-byte moments, twice; a step number for each piece besides (ZeRO, table 1: K P / N)."""
    found = everywhere(parts, "sharded", backend="allreduce")
    whole = everywhere(parts, "worker", backend="allreduce")
    count = sum(p.numel() for p in make_model("plain", torch.float64).parameters())
    moments = 2 * 2 * 8 * count  # of `all` and `some`
    assert sum(w["bytes"] for w in found) == found[0]["all bytes"]
    assert moments <= found[0]["all bytes"] <= moments + 4 * 20
    assert found[0]["sent"] <= whole[0]["sent"] + 64
    assert "worker 1" in found[0]["table"]


def test_what_cannot_be_meant() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="Adafactor needs whole tensors"):
        dtrain.replicate(
            model, Solo(), update=dtrain.ShardedUpdate(optimizer=torch.optim.Adafactor(model.parameters()))
        )
    with pytest.raises(UsageError, match="weight is trained, and the optimizer does not have it"):
        dtrain.replicate(model, Solo(), update=dtrain.ShardedUpdate(optimizer=torch.optim.SGD([model.bias], lr=0.1)))
    with pytest.raises(UsageError, match="clip_grad_norm is 0"):
        dtrain.ShardedUpdate(optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clip_grad_norm=0.0)
    for wrong in ({"amp": "fp16"}, {"nonfinite": "skip"}, {"staleness": 2}, {"send_as": "bf16"}):
        with pytest.raises(UsageError, match="update=sharded"):
            dtrain.TrainConfig(epochs=1, update="sharded", **wrong)  # type: ignore[arg-type]
