"""Running statistics of workers: merged by what each has seen, and how far apart they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain import norm
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.norm.domains import per_domain
from dtrain.norm.ghost import GhostBatchNorm
from dtrain.norm.merge import Drift, drift, merge_statistics, merged_statistics
from tests.norm.test_sync import WORKERS, Silent, close, data, on_threads

PARTS = [data((n, 4), seed) * (seed + 1) + seed for seed, n in enumerate((20, 5, 11))]


def model_of(part: Tensor) -> nn.Sequential:
    """Layers that have seen `part`: a plain one and a ghost one; one without statistics."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with torch.no_grad():
        for layer in model[:2]:
            layer.running_mean.copy_(part.mean(0))
            layer.running_var.copy_(part.var(0, correction=0))
    model[1] = GhostBatchNorm.from_plain(model[1], "1", norm_batch=2)
    return model


def merged_by(samples: list[float]) -> list[dict[str, Tensor]]:
    def body(comm: Backend) -> dict[str, Tensor]:
        return merge_statistics(model_of(PARTS[comm.rank]), comm, samples=samples[comm.rank])

    return on_threads(body)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
def test_weighed_by_samples(scale: float) -> None:
    """Statistics of unequal shares, merged by their sizes, are those of the union; only proportions matter."""
    whole = torch.cat(PARTS)
    for found in merged_by([len(p) * scale for p in PARTS]):
        assert sorted(found) == [f"{i}.running_{name}" for i in range(2) for name in ("mean", "var")]
        for layer in range(2):
            close(found[f"{layer}.running_mean"], whole.mean(0))
            close(found[f"{layer}.running_var"], whole.var(0, correction=0))


def test_a_worker_that_saw_nothing_does_not_count() -> None:
    """Whatever its statistics are; not even if they are no numbers."""

    def body(comm: Backend) -> dict[str, Tensor]:
        part = torch.full((3, 4), torch.nan, dtype=torch.float64) if comm.rank == 1 else PARTS[comm.rank]
        return merge_statistics(model_of(part), comm, samples=[20.0, 0.0, 11.0][comm.rank])

    whole = torch.cat([PARTS[0], PARTS[2]])
    for found in on_threads(body):
        close(found["0.running_mean"], whole.mean(0))
        close(found["0.running_var"], whole.var(0, correction=0))


@pytest.mark.parametrize("samples", [0.0, 1.0])
def test_alike(samples: float) -> None:
    """Where all have seen nothing, or nothing is said, workers count alike; the same bits on each."""
    means = torch.stack([p.mean(0) for p in PARTS])
    variances = torch.stack([p.var(0, correction=0) for p in PARTS])
    found = merged_by([samples] * WORKERS)
    close(found[0]["0.running_mean"], means.mean(0))
    close(found[0]["0.running_var"], variances.mean(0) + means.var(0, correction=0))
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)


@pytest.mark.parametrize("samples", [-1.0, float("nan"), float("inf")])
def test_no_weight(samples: float) -> None:
    with pytest.raises(UsageError, match="samples is"):
        merge_statistics(nn.BatchNorm1d(4), Silent(), samples=samples)


def test_within() -> None:
    """The weights of `merged_statistics`; buffers stay the same objects, and are as before after, in float32 too."""

    def body(comm: Backend) -> None:
        model = model_of(PARTS[comm.rank]).float()
        before, buffer = copy.deepcopy(model.state_dict()), model[0].running_mean
        with merged_statistics(model, comm, samples=len(PARTS[comm.rank])):
            close(model[0].running_mean.double(), torch.cat(PARTS).mean(0), atol=1e-6)
            assert model[0].running_mean is buffer
            assert buffer.dtype is torch.float32
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))

    on_threads(body)


def test_a_model_that_is_a_layer() -> None:
    assert sorted(merge_statistics(nn.BatchNorm1d(4), Solo())) == ["running_mean", "running_var"]
    assert list(drift(nn.BatchNorm1d(4), Solo()).layers) == ["batch_norm"]


def test_each_domain() -> None:
    """Statistics of domains are merged under their own names, those that the layer no longer uses are not."""

    def body(comm: Backend) -> dict[str, Tensor]:
        model = per_domain(nn.Sequential(nn.BatchNorm1d(2)), ["a", "b"])
        model.get_buffer("0.domains.b.running_mean").fill_(comm.rank)
        return merge_statistics(model, comm)

    found = on_threads(body)[0]
    assert sorted(found) == [f"0.domains.{d}.running_{name}" for d in "ab" for name in ("mean", "var")]
    close(found["0.domains.b.running_mean"], torch.ones(2))
    close(found["0.domains.b.running_var"], torch.full((2,), 1 + 2 / 3), atol=1e-6)


# --- drift


def drifts(change: Any) -> list[Drift]:
    def body(comm: Backend) -> Drift:
        model = nn.Sequential(nn.BatchNorm1d(2, eps=0.5), nn.Linear(2, 2), nn.BatchNorm1d(2))
        change(model[0], comm.rank)
        model[2] = norm.convert(model[2], comm=comm)
        return drift(model, comm)

    return on_threads(body)


def test_no_drift() -> None:
    for found in drifts(lambda layer, rank: None):
        assert list(found.layers) == ["0"]
        assert found.layers["0"].means == 0.0
        assert found.layers["0"].variances == 1.0


def test_drift_of_the_worst_channel_and_workers() -> None:
    """Means of 0, 3 and 9 in one channel, all else alike; variances of 1, 1 and 4 in the other. By hand."""

    def change(layer: nn.BatchNorm1d, rank: int) -> None:
        layer.running_mean[0] = [0.0, 3.0, 9.0][rank]  # type: ignore[index]
        layer.running_var[1] = [1.0, 1.0, 4.0][rank]  # type: ignore[index]

    found = drifts(change)
    assert found[0] == found[1] == found[2]
    layer = found[0].layers["0"]
    assert layer.means == pytest.approx(9 / (1 + 14 + 0.5) ** 0.5)  # variance between 0, 3 and 9: 16 + 1 + 25 over 3
    assert layer.variances == pytest.approx(4.5 / 1.5)


def test_drift_as_a_table() -> None:
    lines = str(drifts(lambda layer, rank: layer.running_mean.fill_(rank))[0]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0].strip() == "layer"
    assert lines[2].split() == ["0", "1.359", "1.000"]  # 2 / sqrt(1 + 2 / 3 + 0.5)


def test_a_domain_that_a_worker_never_saw_does_not_count_there() -> None:
    """Its statistics are initial ones there; where nobody saw it, all count. Drift does not see them either."""
    x = data((50, 4))

    def body(comm: Backend) -> tuple[Tensor, Tensor, float]:
        model = norm.per_domain(nn.Sequential(nn.BatchNorm1d(4, momentum=None)).double(), ["a", "b", "c"])
        with norm.domain("a" if comm.rank == 0 else "b"):
            model(x + comm.rank)
        with merged_statistics(model, comm):
            buffers = dict(model.named_buffers())
            means = [buffers[f"0.domains.{name}.running_mean"].clone() for name in ("a", "c")]
        return means[0], means[1], drift(model, comm).layers["0.domains.a"].means

    for a, c, apart in on_threads(body):
        close(a, x.mean(0))
        close(c, torch.zeros(4, dtype=torch.float64))
        assert apart == 0
