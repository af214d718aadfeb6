"""Statistics computed again are those of what the layers are given; a run that fails leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.norm.convert import convert
from dtrain.norm.domains import domain, per_domain
from dtrain.norm.frozen import freeze
from dtrain.norm.precise import Change, Changes, adapt, precise
from dtrain.norm.renorm import renorm
from dtrain.norm.virtual import virtual
from tests.norm.test_sync import SHAPES, Net, Silent, close, data, on_threads, plain_layer

BATCHES = [data((n, 4), seed) * (seed + 1) + seed for seed, n in enumerate((7, 12, 3, 9))]
WHOLE = torch.cat(BATCHES)


def deep(**options: Any) -> nn.Sequential:
    """Two layers of batch norm with something between that is not linear."""
    generator = torch.Generator().manual_seed(3)
    between = nn.Linear(4, 4).double()
    with torch.no_grad():
        for parameter in between.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layers = [plain_layer(nn.BatchNorm1d, **options) for _ in range(3)]
    return nn.Sequential(layers[0], between, nn.Tanh(), layers[1], nn.Dropout(0.5), layers[2])


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def normalise(layer: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias  # type: ignore[operator]


def by_batch(layer: nn.Module, x: Tensor) -> Tensor:
    return normalise(layer, x, x.mean(0), x.var(0, correction=0))


def is_of(layer: nn.Module, values: Tensor) -> None:
    """Mean and unbiased variance of values (n, C)."""
    close(layer.running_mean, values.mean(0))  # type: ignore[arg-type]
    close(layer.running_var, values.var(0))  # type: ignore[arg-type]


# --- average


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_shape(shape: Any) -> None:
    layer, parts = plain_layer(shape[0]), data(shape[1]).split([2, 8, 1])
    precise(layer, iter(parts))
    is_of(layer, torch.cat(parts).transpose(0, 1).flatten(1).T)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    mean=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_any_split_gives_the_union(sizes: list[int], mean: float, seed: int) -> None:
    """However samples are cut into batches, empty ones and single samples too."""
    whole, layer = data((sum(sizes), 4), seed) + mean, plain_layer(nn.BatchNorm1d)
    changes = precise(layer, whole.split(sizes))
    close(layer.running_mean, whole.mean(0), atol=1e-9)  # type: ignore[arg-type]
    close(layer.running_var, whole.var(0), atol=1e-9)  # type: ignore[arg-type]
    assert changes.layers["batch_norm"].values == sum(sizes)


def test_later_layers_get_what_batch_statistics_give() -> None:
    """In one pass, a layer's input is what those before give normalising by the batch; dropout is off."""
    model = deep()
    precise(model, BATCHES)
    is_of(model[0], WHOLE)
    seconds = [torch.tanh(model[1](by_batch(model[0], b))) for b in BATCHES]
    is_of(model[3], torch.cat(seconds).detach())
    is_of(model[5], torch.cat([by_batch(model[3], x) for x in seconds]).detach())


def test_small_spread_far_from_zero() -> None:
    """Float32 at mean 1000 and deviation 0.1, where the mean of squares has no digit left."""
    x = ((data((400, 4)) - 3) / 2 * 0.1 + 1000).float()
    layer = nn.BatchNorm1d(4)
    precise(layer, x.split(32))
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.running_mean, x.double().mean(0).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Inputs of half precision into a layer of float32, and into one of their own type."""
    x = data((64, 4)).to(dtype)
    for own in (torch.float32, dtype):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).to(own)
        precise(model, x.split(16))
        assert model[1].running_var.dtype is own
        torch.testing.assert_close(model[0].running_var.double(), x.double().var(0), rtol=1e-2, atol=0)
        torch.testing.assert_close(model[1].running_var.double(), torch.ones(4).double(), rtol=0.05, atol=0)


def test_a_layer_used_twice() -> None:
    """Both uses are pooled."""
    model, second = Net(), []
    precise(model, BATCHES)
    for batch in BATCHES:
        x = model.inner[0](by_batch(model.shared, batch))
        second.append(model.inner[3](torch.relu(by_batch(model.inner[1], x))))
    is_of(model.shared, torch.cat([*BATCHES, *second]).detach())


def test_restores_all_but_the_statistics() -> None:
    """Modes, hooks, momentum, counts and weights; no gradient is left."""
    model = deep(momentum=None)
    model[3].eval()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda *a: seen.append(a[2]))
    before, modes = state(model), [m.training for m in model.modules()]
    assert precise(model, BATCHES).layers
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{i}.running_{name}" for i in (0, 3, 5) for name in ("mean", "var")}
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model] == [1, 0, 0, 0, 0, 0]
    assert len(seen) == len(BATCHES)
    close(seen[0], by_batch(model[0], BATCHES[0]))
    assert not seen[0].requires_grad
    assert model[0].momentum is None


@pytest.mark.parametrize("estimator", ["average", "ema", "layerwise"])
def test_a_batch_that_raises(estimator: str) -> None:
    """Whichever it is, statistics, modes and hooks are as before."""
    for bad in range(len(BATCHES)):
        model = deep()
        model[3].eval()
        before, modes = state(model), [m.training for m in model.modules()]
        batches = [torch.ones(2, 5).double() if i == bad else b for i, b in enumerate(BATCHES)]
        with pytest.raises(RuntimeError, match=r"size|elements"):
            precise(model, batches, estimator=estimator)
        assert same(state(model), before)
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks for m in model)


def test_layerwise_fails_in_its_last_pass() -> None:
    """Statistics of layers that were done come back too."""
    model, passes = deep(), []

    def forward(model: nn.Module, batch: Tensor) -> None:
        passes.append(1)
        if len(passes) == 3 * len(BATCHES):
            raise KeyboardInterrupt
        model(batch)

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        precise(model, BATCHES, estimator="layerwise", forward=forward)
    assert same(state(model), before)


def test_batches_and_forward() -> None:
    """The first of a tuple or list is the input, unless `forward` says otherwise; batches are read once."""
    layer = plain_layer(nn.BatchNorm1d)
    for batches in ([(b, "label") for b in BATCHES], [[b, 1] for b in BATCHES]):
        precise(layer, iter(batches))
        is_of(layer, WHOLE)
    precise(layer, [{"x": b} for b in BATCHES], forward=lambda model, batch: model(input=batch["x"] + 1))
    is_of(layer, WHOLE + 1)


@pytest.mark.parametrize("estimator", ["average", "ema", "layerwise"])
@pytest.mark.parametrize("batches", [[], [WHOLE[:0]], [WHOLE[:1]]], ids=["none", "empty", "one sample"])
def test_too_few(estimator: str, batches: list[Tensor]) -> None:
    model = deep()
    before = state(model)
    with pytest.raises(UsageError, match=r"no batch came|one value a channel"):
        precise(model, batches, estimator=estimator)
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"estimator": "mean"}, "estimator is 'mean': one of average, ema, layerwise"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"estimator": "layerwise"}, "give a list or a loader"),
    ],
)
def test_refused(options: dict[str, Any], said: str) -> None:
    model, batches = deep(), iter(BATCHES)
    before = state(model)
    with pytest.raises(UsageError, match=said):
        precise(model, batches, **options)
    assert same(state(model), before)
    assert next(batches) is BATCHES[0]


def test_what_has_no_statistics_is_left_alone() -> None:
    """A layer without normalises by the batch, as ever; a model of such layers is not run at all."""
    layer = plain_layer(nn.BatchNorm1d, track_running_stats=False)
    model = nn.Sequential(layer, plain_layer(nn.BatchNorm1d))
    assert list(precise(model, BATCHES).layers) == ["1"]
    is_of(model[1], torch.cat([by_batch(layer, b) for b in BATCHES]).detach())
    assert precise(layer, [None]).layers == {}
    with pytest.raises(UsageError, match="1 is lazy"):
        precise(nn.Sequential(nn.BatchNorm1d(4), nn.LazyBatchNorm1d()), BATCHES)


def test_a_layer_that_no_batch_reaches() -> None:
    """It stays as it is, and says so."""
    model = nn.ModuleDict({"a": plain_layer(nn.BatchNorm1d), "b": plain_layer(nn.BatchNorm1d)})
    before = state(model)
    for estimator in ("average", "layerwise"):
        changes = precise(model, BATCHES, estimator=estimator, forward=lambda model, batch: model["b"](batch))
        assert changes.layers["a"] == Change(mean=0.0, variance=1.0, values=0.0)
        is_of(model["b"], WHOLE)
    assert torch.equal(model["a"].running_mean, before["a.running_mean"])  # type: ignore[arg-type]


def test_compiled() -> None:
    """A compiled model is run as it was written: no graph is made that would keep the hooks, or used that has none."""
    made: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(1)
        return graph

    model = nn.Sequential(plain_layer(nn.BatchNorm1d), nn.Tanh(), plain_layer(nn.BatchNorm1d))
    compiled = torch.compile(model, backend=backend)
    compiled.eval()(WHOLE)
    before = len(made)
    precise(compiled, BATCHES)
    assert len(made) == before > 0
    is_of(model[0], WHOLE)
    close(compiled(WHOLE), model(WHOLE))
    torch._dynamo.reset()


def test_a_batch_of_one_sample() -> None:
    """It has no variance, and is normalised by the statistics of before."""
    model = nn.Sequential(plain_layer(nn.BatchNorm1d), plain_layer(nn.BatchNorm1d))
    old = state(model)
    precise(model, [WHOLE[:1], WHOLE[1:]])
    alone = normalise(model[0], WHOLE[:1], old["0.running_mean"], old["0.running_var"])
    is_of(model[0], WHOLE)
    is_of(model[1], torch.cat([alone, by_batch(model[0], WHOLE[1:])]).detach())


# --- kinds


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ghost": lambda model: convert(model, norm_batch=2, micro_batch=9),
    "synchronised": lambda model: convert(model, norm_batch="global"),
    "renorm": lambda model: renorm(model, warmup=0, r_steps=1, d_steps=1),
}


@pytest.mark.parametrize("estimator", ["average", "ema", "layerwise"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_kinds_give_what_plain_layers_give(kind: str, estimator: str) -> None:
    plain, other = deep(), KINDS[kind](deep())
    assert precise(plain, BATCHES, estimator=estimator) == precise(other, BATCHES, estimator=estimator)
    assert same(state(plain), state(other))


def test_frozen_and_virtual_layers_stay() -> None:
    """And those after a frozen one get what it gives by its own statistics."""
    model = nn.Sequential(freeze(plain_layer(nn.BatchNorm1d)), plain_layer(nn.BatchNorm1d))
    before = state(model)
    assert list(precise(model, BATCHES).layers) == ["1"]
    assert torch.equal(model[0].running_mean, before["0.running_mean"])
    mean, var = before["0.running_mean"], before["0.running_var"]
    is_of(model[1], normalise(model[0], WHOLE, mean, var).detach())
    assert precise(virtual(nn.Sequential(plain_layer(nn.BatchNorm1d)), WHOLE[:4]), BATCHES).layers == {}


@pytest.mark.parametrize("estimator", ["average", "layerwise"])
def test_domains(estimator: str) -> None:
    """Each domain has the statistics of its batches; one that none came of stays, as does what the layer had before."""
    model = per_domain(nn.Sequential(plain_layer(nn.BatchNorm1d)), ["a", "b", "c"], affine="separate")
    before = state(model)

    def forward(model: nn.Module, batch: tuple[str, Tensor]) -> None:
        with domain(batch[0]):
            model(batch[1])

    batches = list(zip("abba", BATCHES, strict=True))
    changes = precise(model, batches, estimator=estimator, forward=forward)
    assert [c.values for c in changes.layers.values()] == [16, 15, 0]
    is_of(model.get_submodule("0.domains.a"), torch.cat([BATCHES[0], BATCHES[3]]))
    is_of(model.get_submodule("0.domains.b"), torch.cat(BATCHES[1:3]))
    kept = [name for name in before if name.startswith(("0.running", "0.domains.c", "0.weight"))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


def test_later_layers_of_domains() -> None:
    """Batches are normalised with the domain's own weight and bias."""
    model = per_domain(
        nn.Sequential(plain_layer(nn.BatchNorm1d), plain_layer(nn.BatchNorm1d)), ["a"], affine="separate"
    )
    model.get_parameter("0.domains.a.weight").data.fill_(7.0)
    with domain("a"):
        precise(model, [WHOLE])
    plain = plain_layer(nn.BatchNorm1d)
    plain.weight.data.fill_(7.0)  # type: ignore[union-attr, operator]
    is_of(model.get_submodule("1.domains.a"), by_batch(plain, WHOLE).detach())


# --- ema


def test_ema_is_bias_corrected() -> None:
    """Of batches of one size: the mean is that of a running average that starts from nothing, divided by its weight;
    the variance that of the mixture of batches with those weights."""
    batches = list(data((10, 6, 4)) * torch.arange(1, 11).view(10, 1, 1))
    layer, decay = plain_layer(nn.BatchNorm1d), 0.8
    precise(layer, batches, estimator="ema", decay=decay)
    mean = square = weight = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        mean = decay * mean + (1 - decay) * batch.mean(0)
        square = decay * square + (1 - decay) * batch.square().mean(0)
        weight = decay * weight + (1 - decay)
    close(layer.running_mean, mean / weight)  # type: ignore[arg-type]
    weights = decay ** torch.arange(9, -1, -1, dtype=torch.float64).repeat_interleave(6)
    weights = weights / weights.sum()
    unbiased = (square / weight - (mean / weight).square()) / (1 - weights.square().sum())
    close(layer.running_var, unbiased, atol=1e-9)  # type: ignore[arg-type]


def test_ema_of_one_batch_or_slow_is_the_average() -> None:
    layer = plain_layer(nn.BatchNorm1d)
    precise(layer, [WHOLE], estimator="ema", decay=0.1)
    is_of(layer, WHOLE)
    precise(layer, BATCHES, estimator="ema", decay=1 - 1e-13)
    is_of(layer, WHOLE)


def test_ema_fades_once_a_forward() -> None:
    """The two uses of a layer in one forward weigh alike."""
    shared = plain_layer(nn.BatchNorm1d, affine=False)
    precise(shared, [BATCHES[0]], estimator="ema", decay=0.1, forward=lambda m, b: (m(b), m(b + 1)))
    is_of(shared, torch.cat([BATCHES[0], BATCHES[0] + 1]))


# --- layerwise


def test_layerwise_normalises_exactly_in_evaluation() -> None:
    """In evaluation, what each layer gives has mean beta and variance gamma² over the data (without eps, and with
    Bessel's correction, as the running variance has it); the one-pass average does not get there."""
    model, given = deep(eps=0.0), {}
    for i in (0, 3, 5):
        model[i].register_forward_hook(lambda layer, args, out: given.update({layer: out}))

    @torch.no_grad()
    def worst() -> float:
        model.eval()(WHOLE)
        off = [(y.mean(0) - layer.bias).abs().max() for layer, y in given.items()]
        off += [(y.var(0) - layer.weight.square()).abs().max() for layer, y in given.items()]
        return float(max(off))

    precise(model, BATCHES)
    assert worst() > 1e-3
    changes = precise(model, BATCHES, estimator="layerwise")
    assert worst() < 1e-12
    assert [c.values for c in changes.layers.values()] == [31.0] * 3


def test_layerwise_in_the_order_of_the_forward() -> None:
    """Not in that of registration or of names; and a second time nothing changes."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.after, self.before = plain_layer(nn.BatchNorm1d, eps=0.0), plain_layer(nn.BatchNorm1d, eps=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.tanh(self.before(x)))  # type: ignore[no-any-return]

    model = Backwards()
    precise(model, BATCHES, estimator="layerwise")
    is_of(model.before, WHOLE)
    is_of(model.after, torch.tanh(normalise(model.before, WHOLE, WHOLE.mean(0), WHOLE.var(0))).detach())
    for change in precise(model, BATCHES, estimator="layerwise").layers.values():
        assert change.mean < 1e-12
        assert change.variance == pytest.approx(1.0, abs=1e-12)


# --- over workers

SHARES: dict[str, list[list[int]]] = {
    "different numbers": [[0], [1, 2], [3]],
    "one without": [[0, 1, 2], [], [3]],
    "all on one": [[], [], [0, 1, 2, 3]],
}


@pytest.mark.parametrize("kind", ["plain", "synchronised"])
@pytest.mark.parametrize("shares", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize("estimator", ["average", "layerwise"])
def test_workers(estimator: str, shares: list[list[int]], kind: str) -> None:
    """As one worker with all batches, with the same bits on each; also in synchronised layers."""
    alone = deep()
    wanted = precise(alone, BATCHES, estimator=estimator)

    def body(comm: Backend) -> tuple[Changes, dict[str, Tensor]]:
        model = deep() if kind == "plain" else convert(deep(), comm=comm)
        mine = [BATCHES[i] for i in shares[comm.rank]]
        changes = precise(model, mine, estimator=estimator, comm=comm)
        assert all(getattr(m, "comm", comm) is comm for m in model)
        return changes, state(model)

    workers = on_threads(body)
    for changes, found in workers:
        assert same(found, workers[0][1])
        assert changes == workers[0][0]
        for name, value in state(alone).items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
        assert [c.values for c in changes.layers.values()] == [c.values for c in wanted.layers.values()]


def test_ema_over_workers() -> None:
    """Each worker's batches fade by themselves; workers count by what is left. One layer, by hand."""

    def body(comm: Backend) -> Tensor:
        layer = plain_layer(nn.BatchNorm1d)
        precise(layer, [[BATCHES[0], BATCHES[1]], [], [BATCHES[3]]][comm.rank], estimator="ema", decay=0.5, comm=comm)
        return layer.running_mean  # type: ignore[return-value]

    weights = [7 * 0.5, 12, 9]
    means = [BATCHES[i].mean(0) for i in (0, 1, 3)]
    wanted = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    for found in on_threads(body):
        close(found, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["average", "layerwise"])
def test_no_batch_on_any_worker(estimator: str) -> None:
    """All are told, and keep what they had."""

    def body(comm: Backend) -> None:
        model = convert(deep(), comm=comm)
        before = state(model)
        with pytest.raises(UsageError, match="on any worker"):
            precise(model, [], estimator=estimator, comm=comm)
        assert same(state(model), before)
        assert all(m.training for m in model.modules())

    on_threads(body)


def test_one_message_and_none_for_no_layer() -> None:
    def body(comm: Backend) -> int:
        model = convert(deep(), comm=comm)
        precise(model, BATCHES, comm=comm)
        return sum(comm.traffic.sent.values())

    rows = 3 * (2 * 4 + 4) * 3 * 8  # layers, floats a layer, workers, bytes
    assert on_threads(body)[1] == rows
    precise(nn.Linear(2, 2), BATCHES, comm=Silent())


def test_synchronised_layers_need_a_backend() -> None:
    """Without, each worker would have statistics of its own, where all others take them for the same."""
    model = convert(deep(), comm=Silent())
    with pytest.raises(UsageError, match="synchronised over 3 workers: give"):
        precise(model, BATCHES)


# --- what is returned


def test_how_much_has_changed() -> None:
    """One layer by hand: means of 0 become those of the data, in its deviations; variances of 4 become its own."""
    layer = nn.BatchNorm1d(4, eps=0.25).double()
    layer.running_var.fill_(4.0)  # type: ignore[union-attr]
    change = precise(layer, BATCHES).layers["batch_norm"]
    assert change.mean == pytest.approx(float((WHOLE.mean(0).square() / (WHOLE.var(0) + 0.25)).mean().sqrt()))
    ratios = (WHOLE.var(0) + 0.25) / 4.25
    assert change.variance == pytest.approx(float(ratios.prod() ** 0.25))
    assert change.values == 31


def test_constant_channels_change_by_finite_numbers() -> None:
    layer = nn.BatchNorm1d(2)
    change = precise(layer, [torch.ones(5, 2)]).layers["batch_norm"]
    assert change.variance == pytest.approx(1e-5, rel=1e-3)
    assert change.mean == pytest.approx(1e5**0.5)


def test_table() -> None:
    changes = Changes({"conv.norm": Change(0.5, 2.0, 31.0), "a": Change(12.25, 0.125, 0.0)})
    assert str(changes).splitlines() == [
        "layer      mean moved (std)  variance (ratio)  values a channel",
        "---------  ----------------  ----------------  ----------------",
        "conv.norm             0.500             2.000                31",
        "a                    12.250             0.125                 0",
    ]


# --- adapt


def test_adapt_replaces() -> None:
    """The target's statistics alone, whatever was there; frozen layers too, which stay frozen."""
    model, other = freeze(deep()), deep()
    adapt(model, iter(BATCHES))
    precise(other, BATCHES)
    assert same(state(model), state(other))
    y = model.train()[0](WHOLE)
    close(y, normalise(model[0], WHOLE, WHOLE.mean(0), WHOLE.var(0)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_adapt_blends_by_samples(shape: Any) -> None:
    """Statistics of s samples, blended as s samples with those of t others, are those of all s + t."""
    source, target = data(shape[1]), data((5, *shape[1][1:]), 7) * 3 + 1
    layer = plain_layer(shape[0])
    precise(layer, [source])
    change = adapt(layer, target.split([3, 2]), source_samples=len(source))
    both = torch.cat([source, target]).transpose(0, 1).flatten(1).T
    is_of(layer, both)
    assert change.layers["batch_norm"].values == len(both)


def test_adapt_blends_over_uses() -> None:
    """A layer used twice has twice as many values for a sample: the old count for as many samples, not values."""
    layer = plain_layer(nn.BatchNorm1d)
    source, target = data((40, 4)), data((10, 4), 5) * 2
    precise(layer, [source])
    adapt(layer, [target], source_samples=20, forward=lambda m, b: (m(b), m(b)))
    close(layer.running_mean, (2 * source.mean(0) + target.mean(0)) / 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["plain", "synchronised"])
def test_adapt_over_workers(kind: str) -> None:
    """Targets are merged, so are workers' own sources; the same bits on each."""

    def body(comm: Backend) -> dict[str, Tensor]:
        layer = plain_layer(nn.BatchNorm1d)
        if kind == "plain":
            layer.running_mean.fill_(comm.rank)  # type: ignore[union-attr]
        else:
            layer.running_mean.fill_(1.0)  # type: ignore[union-attr]
            layer = convert(layer, comm=comm)
        adapt(layer, [[BATCHES[0]], [], BATCHES[1:]][comm.rank], source_samples=31, comm=comm)
        return state(layer)

    workers = on_threads(body)
    for found in workers:
        assert same(found, workers[0])
        close(found["running_mean"], (1.0 + WHOLE.mean(0)) / 2)


def test_adapt_refuses() -> None:
    model = deep()
    before = state(model)
    with pytest.raises(UsageError, match="source_samples is -1"):
        adapt(model, BATCHES, source_samples=-1)
    with pytest.raises(UsageError, match="no batch came"):
        adapt(model, [], source_samples=10)
    assert same(state(model), before)


def failing() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise OSError("the loader is gone")


def test_a_loader_that_raises() -> None:
    model = deep()
    before = state(model)
    with pytest.raises(OSError, match="gone"):
        adapt(model, failing())
    assert same(state(model), before)
    assert not any(m._forward_hooks for m in model)
