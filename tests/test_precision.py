"""Gradients that travel in half precision: what is rounded, where, and that all workers agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from tests.conftest import BACKENDS, everywhere
from tests.small import Job, Points, differences, distance, fit, make_model, mean_square

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make() -> nn.ModuleDict:
    """One part is used by the last worker alone, one by nobody."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"all": make_model("plain", torch.float32), "some": nn.Linear(5, 1), "none": nn.Linear(5, 1)}
        )


def losses(model: Any, rank: int, world_size: int) -> Iterator[Tensor]:
    """Of two micro-batches of 4 samples."""
    points = Points(8, torch.float32, seed=rank)
    for k in range(2):
        batch = points.x[4 * k : 4 * k + 4], points.y[4 * k : 4 * k + 4]
        loss = mean_square(model["all"], batch)
        yield loss + model["some"](batch[0]).mean() if rank == world_size - 1 else loss


def gradients(comm: Backend, dtype: torch.dtype | None, bucket_mb: float = 8.0) -> tuple[dict[str, Any], int]:
    """In float32, and the bytes that were sent for them."""
    model = make()
    replica = dtrain.replicate(model, comm, send_as=dtype, bucket_mb=bucket_mb)
    before = comm.traffic.sent["gradient"]
    for k, loss in enumerate(losses(model, comm.rank, comm.world_size)):
        replica.backward(loss, samples=4, total=8 * comm.world_size, sync=k == 1)
    return _gradients(model), comm.traffic.sent["gradient"] - before


def _gradients(model: nn.Module) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def expected(dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """Each worker's part rounded, added in float32 in worker order, the sum rounded."""
    alone = []
    for rank in range(world_size):
        model = make()
        for loss in losses(model, rank, world_size):
            (loss * (4 / (8 * world_size))).backward()
        alone.append(_gradients(model))
    found: dict[str, Any] = {}
    for name, p in make().named_parameters():
        parts = [(torch.zeros_like(p) if a[name] is None else a[name]).to(dtype).float() for a in alone]
        total = sum(parts[1:], parts[0]).detach()
        found[name] = None if all(a[name] is None for a in alone) else total.to(dtype).float()
    return found


@pytest.mark.parametrize("bucket_mb", [8.0, 1e-5])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_twice_and_added_in_float32(backend: str, dtype: torch.dtype, bucket_mb: float) -> None:
    """The same bits on every worker and backend; `.grad` keeps the parameter's type."""
    found = everywhere(gradients, dtype, bucket_mb, backend=backend, workers=3)
    wanted = expected(dtype, len(found))
    assert wanted["none.weight"] is None
    assert wanted["some.weight"] is not None
    for worker, _ in found:
        assert not differences(worker, wanted)


@pytest.mark.parametrize("backend", ["threads", "ps", "allreduce"])
def test_half_the_bytes(backend: str) -> None:
    """Of gradients, that is; flags travel with them."""
    half, whole = (everywhere(gradients, dtype, backend=backend)[0][1] for dtype in (torch.bfloat16, None))
    assert half == whole // 2


@pytest.mark.parametrize("send_as", HALF)
def test_a_run_is_near_the_exact_one(send_as: str) -> None:
    """A bf16 number has 8 bits: 1 in 256. Workers stay the same to the bit."""
    job = Job("norm", dtype=torch.float32).with_config(norm_batch="global", steps=8)
    exact = dtrain.run(fit, job, workers=2, backend="threads")
    found = dtrain.run(fit, job.with_config(send_as=send_as), workers=2, backend="threads")
    assert not differences(found[0]["parameters"], found[1]["parameters"])
    error = distance(found[0]["parameters"], exact[0]["parameters"])
    assert 0 < error < (2e-2 if send_as == "bf16" else 1.0)  # the first steps of fp16 look for a scale
    assert bool(found[0]["scale"]) == (send_as == "fp16")


def overflowing(comm: Backend) -> tuple[list[float], list[float]]:
    """Worker 1's gradients alone are too large for float16, once; weights and scale after each step."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.init.ones_(model.weight)
    replica = dtrain.replicate(model, comm, send_as=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weights, scales = [], []
    for factor in (1.0, 1e6, 1.0):
        loss = model(torch.ones(1, 1)).mean() * (factor if comm.rank == 1 else 1.0)
        replica.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(model.weight.item())
        scales.append(scaler.get_scale())
    return weights, scales


@pytest.mark.parametrize("backend", ["threads", "ps", "allreduce"])
def test_loss_scaling_is_agreed(backend: str) -> None:
    """An overflow on one worker is one on all: the step is left out and the scale halved, everywhere."""
    assert everywhere(overflowing, backend=backend) == [([0.5, 0.5, 0.0], [2.0, 1.0, 1.0])] * 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"send_as": torch.float64}, "send_as is torch.float64"),
        ({"send_as": torch.bfloat16, "update": "server"}, "takes gradients as they are"),
    ],
)
def test_what_cannot_be_meant(wrong: dict[str, Any], said: str) -> None:
    model = nn.Linear(1, 1)
    if wrong.pop("update", None):
        wrong["update"] = dtrain.ServerUpdate(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match=said):
        dtrain.replicate(model, Solo(), **wrong)
    with pytest.raises(UsageError, match="send_as is bf16 with update=server"):
        dtrain.TrainConfig(epochs=1, send_as="bf16", update="server")
    with pytest.raises(UsageError, match="send_as is 'fp8'"):
        dtrain.TrainConfig(epochs=1, send_as="fp8")  # type: ignore[arg-type]
