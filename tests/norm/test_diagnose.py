"""The doctor for batch norm, on models whose ailments are known, and on healthy ones; figures against direct ones."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain import norm
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.norm.diagnose import MEAN_NOISE, Diagnosis, diagnose
from dtrain.norm.domains import domain, per_domain
from tests.norm.test_sync import Silent, on_threads

CHANNELS = 16


def batches(count: int = 20, size: int = 64, seed: int = 0, make: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Inputs (size, CHANNELS) of mean 3 and standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    return [make(torch.randn(size, CHANNELS, generator=generator) * 2 + 3) for _ in range(count)]


def network(**options: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.BatchNorm1d(CHANNELS, **options),
            nn.Linear(CHANNELS, CHANNELS),
            nn.Dropout(0.5),
            nn.ReLU(),
            nn.BatchNorm1d(CHANNELS, **options),
            nn.Linear(CHANNELS, 3),
        )


def trained(count: int, size: int = 64, **options: Any) -> nn.Sequential:
    """Running averages of so many batches, without dropout; the weights stay."""
    model = network(**options)
    model[2].p = 0.0
    with torch.no_grad():
        for x in batches(count, size, seed=1):
            model(x)
    model[2].p = 0.5
    return model


def findings(found: Diagnosis) -> dict[str, set[str]]:
    return {layer.path: set(layer.findings) for layer in found.layers}


def test_a_healthy_model() -> None:
    found = diagnose(trained(100), batches())
    assert findings(found) == {"0": set(), "4": set()}
    assert found.suspicious == found.advice == []
    assert found.batches == 20
    assert "Nothing suspicious" in str(found)


def test_figures() -> None:
    """The figures of the first layer, computed here from its inputs directly."""
    model, data = trained(5), batches(7, 9)
    row = diagnose(model, data).layers[0]
    whole = torch.cat(data).double()
    sigma, variance = whole.std(0), whole.var(0)
    means, variances = torch.stack([x.double().mean(0) for x in data]), torch.stack([x.double().var(0) for x in data])
    ratio = model[0].running_var.double() / variance

    def rms(x: Tensor) -> float:
        return x.pow(2).mean().sqrt().item()

    assert row.path == "0"
    assert row.kind == "BatchNorm1d"
    assert (row.samples, row.values) == (9, 9)
    assert row.mean_shift == pytest.approx(rms((model[0].running_mean.double() - whole.mean(0)) / sigma), rel=1e-5)
    assert row.variance_ratio == pytest.approx(ratio.log().mean().exp().item(), rel=1e-5)
    assert row.variance_factor == pytest.approx(torch.tensor(rms(ratio.log())).exp().item(), rel=1e-5)
    assert row.mean_noise == pytest.approx(rms(means.std(0) / sigma), rel=1e-5)
    assert row.variance_noise == pytest.approx(rms(variances.std(0) / variance), rel=1e-5)


def test_output_shift() -> None:
    """The change from training-mode batch norm to evaluation, without dropout in either."""
    model, data = trained(5), batches(3)
    training = copy.deepcopy(model)
    training[2].p = 0.0
    with torch.no_grad():
        a = torch.cat([training(x) for x in data])
        b = torch.cat([copy.deepcopy(model).eval()(x) for x in data])
    wanted = ((a - b).pow(2).mean() / a.pow(2).mean()).sqrt().item()
    assert diagnose(model, data).output_shift == pytest.approx(wanted, rel=1e-5)


def test_stale_until_recomputed() -> None:
    """Averages with a small momentum lag; with the statistics of the data set by hand, nothing is suspicious."""
    model = trained(20, momentum=0.01)
    found = diagnose(model, batches())
    assert findings(found) == {"0": {"stale"}, "4": {"stale"}}
    assert "82 % is the initial value" in str(found)
    assert any("norm.precise" in text for text in found.advice)
    assert found.output_shift > 0.25
    x = torch.cat(batches(100, seed=1))
    with torch.no_grad():
        for i, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean.copy_(x.mean(0))
                layer.running_var.copy_(x.var(0))
            x = layer.eval()(x) if i != 2 else x
    model.train()
    better = diagnose(model, batches())
    assert better.suspicious == []
    assert better.output_shift < found.output_shift / 2


def test_other_data() -> None:
    """Data that are preprocessed otherwise than those of training are seen as such."""
    found = diagnose(trained(100), batches(make=lambda x: x * 2 - 1))
    row = found.layers[0]
    assert "stale" in row.findings
    assert row.mean_shift == pytest.approx((5 - 3) / 4, abs=0.1)  # mean 5 and deviation 4, but 3 and 2 were learnt
    assert row.variance_ratio == pytest.approx(1 / 4, rel=0.1)
    assert "initial value" not in str(found)


@pytest.mark.parametrize(("size", "noisy"), [(4, True), (64, False)])
def test_noise(size: int, noisy: bool) -> None:
    """Small batches scatter by 1 / sqrt(samples); and are noisy, but neither stale nor unlike."""
    found = diagnose(trained(1000, 64), batches(40, size))
    assert ("noisy" in found.layers[0].findings) is noisy
    assert "unlike" not in found.layers[0].findings
    assert found.layers[0].mean_noise == pytest.approx(size**-0.5, rel=0.2)
    assert (size**-0.5 > MEAN_NOISE) is noisy


def test_ghost_groups_are_what_is_judged() -> None:
    model = norm.convert(trained(200), norm_batch=4, micro_batch=64, comm=Solo())
    row = diagnose(model, batches()).layers[0]
    assert row.kind == "GhostBatchNorm"
    assert row.samples == 4
    assert "noisy" in row.findings


def test_kinds_that_do_not_use_statistics_of_batches() -> None:
    """A frozen layer is not noisy, whatever the size of batches; a virtual one has no use for running averages."""
    frozen = diagnose(norm.freeze(trained(1000)), batches(40, 4)).layers[0]
    assert frozen.mean_noise > MEAN_NOISE
    assert frozen.findings == {}
    assert diagnose(norm.virtual(network(), batches(1)[0]), batches(40, 4)).layers[0].findings == {}


def test_batches_that_are_not_drawn_alike() -> None:
    """Sorted data: the means of batches differ by more than chance."""
    ordered = torch.cat(batches(20)).sort(0).values.split(64)
    assert "unlike" in diagnose(trained(100), ordered).layers[0].findings


def test_dead_channels() -> None:
    def kill(x: Tensor) -> Tensor:
        x[:, 3], x[:, 7] = 0.0, 1000.0
        return x

    row = diagnose(trained(100), batches(make=kill)).layers[0]
    assert row.dead == (3, 7)
    assert "2 of 16 channels are constant (3, 7)" in row.findings["dead"]
    assert "stale" not in row.findings  # dead channels do not count in the other figures


class Odd(nn.Module):
    """A layer used twice, one not used, one without running statistics, one in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.BatchNorm1d(CHANNELS)
        self.unused = nn.BatchNorm1d(CHANNELS)
        self.untracked = nn.BatchNorm1d(CHANNELS, track_running_stats=False)
        self.image = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.untracked(self.twice(self.twice(x)))
        return {"image": self.image(x.view(-1, 4, 2, 2))}


def test_odd_layers() -> None:
    found = diagnose(Odd(), [(x, None) for x in batches(4, 8)])
    rows = {row.path: row for row in found.layers}
    assert "unused" in rows["unused"].findings
    assert rows["untracked"].mean_shift != rows["untracked"].mean_shift
    assert "stale" not in rows["untracked"].findings
    assert (rows["image"].samples, rows["image"].values) == (8, 32)
    assert "unused" in str(found)


def state(model: nn.Module) -> list[Any]:
    tensors = list(model.state_dict(keep_vars=True).values())
    return [[id(t) for t in tensors], [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model]]


@pytest.mark.parametrize("fails", [None, 0, 3], ids=["", "in the first forward", "in the fourth"])
def test_nothing_is_changed(fails: int | None) -> None:
    """Parameters, buffers, training flags, hooks are as before; also where a forward raises."""
    model = trained(3)
    model[0].eval()
    before, values, calls = state(model), copy.deepcopy(model.state_dict()), []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        calls.append(m.training)
        y: Tensor = m(x)
        if len(calls) - 1 == fails:
            raise ZeroDivisionError
        return y

    if fails is None:
        diagnose(model, iter(batches(3)), forward=forward)
    else:
        with pytest.raises(ZeroDivisionError):
            diagnose(model, batches(3), forward=forward)
    assert calls
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values.values(), strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="no batch-norm layer"):
        diagnose(nn.Linear(2, 2), batches(1))
    with pytest.raises(UsageError, match="no batches"):
        diagnose(network(), [])
    with pytest.raises(UsageError, match="give their backend as comm"):
        diagnose(norm.convert(network(), comm=Silent()), batches(1))


def test_layers_of_several_domains() -> None:
    """Each is judged by the statistics of the domain around the call."""
    model = per_domain(network(), ["seen", "unseen"])
    model[2].p = 0.0
    with torch.no_grad(), domain("seen"):
        for x in batches(100, seed=1):
            model(x)
    with domain("seen"):
        assert diagnose(model, batches()).suspicious == []
    with domain("unseen"):
        assert "stale" in diagnose(model, batches()).layers[0].findings


def test_text_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(trained(20, momentum=0.01), batches(4, 4))
    text = str(found)
    assert text.splitlines()[0].split("  ")[0] == "layer"
    assert "stale, noisy" in text
    assert "Stale:" in text
    assert "Noisy:" in text
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"dtrain\[report\]"):
        found.draw(tmp_path / "drift.png")


def same(a: Diagnosis, b: Diagnosis) -> None:
    assert a.batches == b.batches
    assert a.output_shift == pytest.approx(b.output_shift, rel=1e-6)
    for left, right in zip(a.layers, b.layers, strict=True):
        for name in ("samples", "values", "mean_shift", "variance_ratio", "mean_noise", "variance_noise"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-5)


def test_over_workers() -> None:
    """Workers with batches of their own, one with none, get the diagnosis of one that has all of them."""
    data = batches(10)
    shares = [data[:7], [], data[7:]]
    alone = diagnose(trained(20), data)

    def body(comm: Backend) -> Diagnosis:
        return diagnose(trained(20), shares[comm.rank], comm=comm)

    for found in on_threads(body):
        same(found, alone)


def test_running_statistics_of_all_workers() -> None:
    """Plain layers that have followed different data are judged by their merged averages, and keep their own."""

    def body(comm: Backend) -> float:
        model = nn.Sequential(nn.BatchNorm1d(CHANNELS, momentum=1.0))
        with torch.no_grad():
            model(batches(1, 1000)[0] + 10 * comm.rank)
        own = model[0].running_mean.clone()
        found = diagnose(model, [x + 10 * comm.rank for x in batches(2, 500, seed=5)], comm=comm)
        assert torch.equal(model[0].running_mean, own)
        return found.layers[0].mean_shift

    assert max(on_threads(body)) < 0.05


def test_synchronised_statistics() -> None:
    """What is judged is the statistics of all workers together: three times the samples, sqrt(3) less scatter."""
    data = batches(12, 12)

    def body(comm: Backend) -> Diagnosis:
        model = norm.convert(trained(100), norm_batch="global", comm=comm)
        return diagnose(model, [x.split(4)[comm.rank] for x in data], comm=comm)

    alone = diagnose(trained(100), data)
    for found in on_threads(body):
        assert found.layers[0].samples == 12
        assert found.layers[0].mean_noise == pytest.approx(alone.layers[0].mean_noise, rel=1e-5)
        assert found.layers[1].mean_noise == pytest.approx(alone.layers[1].mean_noise, rel=1e-4)
        assert found.output_shift == pytest.approx(alone.output_shift, rel=1e-4)
