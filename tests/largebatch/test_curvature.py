"""The loss surface: the same for n workers as for one, the same as the explicit Hessian, and nothing left changed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import LayoutError, UsageError
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.evidence import evidence
from dtrain.largebatch.part import Part, count_samples
from dtrain.largebatch.sharpness import sharpness
from dtrain.largebatch.spectrum import spectral_density, top_eigenvalues, trace
from tests.conftest import everywhere, remembered
from tests.largebatch.surfaces import (
    CLASSES,
    FEATURES,
    SAMPLES,
    Point,
    cross_entropy,
    direction,
    explicit,
    model_of,
    points,
    quadratic,
    shares,
)
from tests.small import Points

KINDS = ["mlp", "norm"]
MANY = ["threads", "ps", "allreduce"]


def whole(kind: str) -> LossSurface:
    """What one process sees of all data in one batch."""
    return LossSurface(model_of(kind), cross_entropy, shares(Solo()))


# --- n workers and one


def survey(comm: Backend) -> dict[str, Any]:
    """Everything there is to measure, as one worker of a job with ragged shares."""
    plain = LossSurface(model_of("mlp"), cross_entropy, shares(comm), comm=comm)
    surface = LossSurface(model_of("norm"), cross_entropy, shares(comm), comm=comm)
    eigenvalues = top_eigenvalues(surface, 2, tolerance=1e-9)
    rising = sharpness(surface, epsilon=0.05)
    density = spectral_density(surface, probes=2, steps=4)
    return {
        "plain product": plain.hessian_vector(direction(plain.size)),
        "samples": surface.samples,
        "value": surface.value(),
        "gradient": surface.gradient(),
        "product": surface.hessian_vector(direction(surface.size, seed=9 if comm.rank == 0 else 100)),
        "eigenvalues": torch.tensor(eigenvalues.values, dtype=torch.float64),
        "eigenvectors": eigenvalues.vectors,
        "trace": trace(surface, probes=4).value,
        "density": torch.tensor([density.nodes, density.weights], dtype=torch.float64),
        "sharpness": rising.value,
        "evaluations": rising.evaluations,
        "log ratio": evidence(surface, precision=200.0, classes=CLASSES).log_ratio,
    }


@remembered
def surveyed(backend: str) -> list[dict[str, Any]]:
    return everywhere(survey, backend=backend, workers=3)


@pytest.mark.parametrize("backend", MANY)
def test_n_workers_see_what_one_sees(backend):
    """Of sharpness to 0.1 %: its search goes where rounding leads it, along biases that batch norm takes away."""
    expected, found = surveyed("solo")[0], surveyed(backend)[0]
    for name in expected.keys() - {"evaluations"}:
        limit = 1e-3 if name == "sharpness" else 1e-10
        torch.testing.assert_close(
            found[name], expected[name], rtol=limit, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", MANY)
def test_all_workers_get_the_same_bits(backend):
    first, *others = surveyed(backend)
    for other in others:
        for name, value in first.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


# --- against the explicit Hessian


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_explicit_hessian(kind):
    surface, matrix = whole(kind), explicit(model_of(kind))
    v = direction(surface.size)
    torch.testing.assert_close(surface.hessian(), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(surface.hessian(rows_at_once=1), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(surface.hessian(rows_at_once=7), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(surface.hessian_vector(v), matrix @ v, rtol=0, atol=1e-12)


def test_the_gradient_is_the_slope_of_the_value():
    surface = whole("norm")
    at, v, h = surface.point(), direction(surface.size), 1e-6
    slope = (surface.value(at + h * v) - surface.value(at - h * v)) / (2 * h)
    assert float(surface.gradient() @ v) == pytest.approx(slope, rel=1e-7)
    bend = (surface.gradient(at + h * v) - surface.gradient(at - h * v)) / (2 * h)
    torch.testing.assert_close(surface.hessian_vector(v), bend, rtol=1e-6, atol=1e-8)
    elsewhere = at + 0.1
    bend = (surface.gradient(elsewhere + h * v) - surface.gradient(elsewhere - h * v)) / (2 * h)
    torch.testing.assert_close(surface.hessian_vector(v, elsewhere), bend, rtol=1e-6, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, SAMPLES), max_size=5).map(sorted))
def test_how_the_data_are_cut_does_not_matter(cuts):
    x, y = points()
    edges = [0, *cuts, SAMPLES]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    surface, expected = LossSurface(model_of("norm"), cross_entropy, batches), whole("norm")
    v = direction(surface.size)
    assert surface.value() == pytest.approx(expected.value(), abs=1e-13)
    torch.testing.assert_close(surface.hessian_vector(v), expected.hessian_vector(v), rtol=0, atol=1e-12)


class Shapes(nn.Module):
    """A model with one thing that is hard to differentiate twice, or to do so in part."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
        self.rnn = nn.LSTM(1, 2, batch_first=True) if kind == "lstm" else None
        self.last = nn.Linear(2 if kind == "lstm" else FEATURES, CLASSES)
        if kind == "shared module":
            self.again = self.first[0]
        if kind == "shared weight":
            self.again = nn.Linear(FEATURES, FEATURES)
            self.again.weight = self.first[0].weight
        if kind == "unused":
            self.spare = nn.Parameter(torch.ones(2))
        if kind == "frozen":
            self.first[0].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False) if self.kind == "checkpointed" else self.first(x)
        if self.kind == "attention":
            heads = x.view(len(x), 1, 2, 2)
            x = F.scaled_dot_product_attention(heads, heads, heads).flatten(1)
        if self.kind.startswith("shared"):
            x = self.again(x)
        if self.rnn is not None:
            x = self.rnn(x[..., None])[0][:, -1]
        return self.last(x)


SHAPES = ["checkpointed", "attention", "lstm", "shared module", "shared weight", "unused", "frozen"]


@pytest.mark.parametrize("kind", SHAPES)
def test_models_of_all_shapes(kind):
    torch.manual_seed(0)
    model = Shapes(kind).double()
    surface = LossSurface(model, cross_entropy, [points()])
    at, v, h = surface.point(), direction(surface.size), 1e-6
    before = state_of(model)
    bend = (surface.gradient(at + h * v) - surface.gradient(at - h * v)) / (2 * h)
    torch.testing.assert_close(surface.hessian_vector(v), bend, rtol=1e-6, atol=1e-7)
    assert same(before, state_of(model))
    if kind == "frozen":
        assert surface.size == sum(p.numel() for p in model.parameters()) - FEATURES**2
    if kind in ("shared module", "shared weight", "unused", "frozen"):
        torch.testing.assert_close(surface.hessian(), explicit(model), rtol=0, atol=1e-12)
    if kind == "unused":
        assert surface.by_name(surface.hessian_vector(v))["spare"].tolist() == [0.0, 0.0]


def test_a_loss_that_is_linear_has_no_curvature():
    surface = LossSurface(Point(torch.ones(3)), lambda model, batch: (model.w * 2.0).sum(), [torch.ones(1)])
    assert surface.gradient().tolist() == [2.0] * 3
    assert surface.hessian_vector(torch.ones(3)).tolist() == [0.0] * 3
    assert surface.hessian().tolist() == [[0.0] * 3] * 3


@pytest.mark.slow
def test_a_compiled_model_is_measured_without_its_graph():
    model = torch.compile(model_of("mlp"), backend="aot_eager")
    cross_entropy(model, points()).backward()  # makes the graph, which cannot be differentiated twice
    surface, v = LossSurface(model, cross_entropy, [points()]), direction(whole("mlp").size)
    torch.testing.assert_close(surface.hessian_vector(v), whole("mlp").hessian_vector(v), rtol=0, atol=1e-12)


def test_float32_is_measured_in_float32():
    x, y = points()
    surface = LossSurface(model_of("norm").float(), cross_entropy, [(x.float(), y)])
    v = direction(surface.size)
    found = surface.hessian_vector(v)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole("norm").hessian_vector(v), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    x, y = points()
    model = model_of("norm").cuda()
    surface = LossSurface(model, cross_entropy, [(x.cuda(), y.cuda())])
    v = direction(surface.size)
    torch.testing.assert_close(surface.hessian_vector(v.cuda()).cpu(), whole("norm").hessian_vector(v))
    found, expected = (top_eigenvalues(s, 2, tolerance=1e-9) for s in (surface, whole("norm")))
    assert found.values == pytest.approx(expected.values, abs=1e-9)
    assert found.vectors.is_cuda
    assert sharpness(surface, dimensions=3).value == pytest.approx(sharpness(whole("norm"), dimensions=3).value)
    assert evidence(surface, precision=200.0).log_occam == pytest.approx(
        evidence(whole("norm"), precision=200.0).log_occam
    )
    assert trace(surface, probes=3).value == pytest.approx(trace(whole("norm"), probes=3).value)


# --- nothing is left changed


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "parameters": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return all(same(before[k], after[k]) for k in before)
    if isinstance(before, list):
        return all(same(a, b) for a, b in zip(before, after, strict=True))
    return before == after


def test_a_model_is_as_it_was():
    model = model_of("norm")
    model[1].eval()  # a layer in another mode than the rest
    cross_entropy(model, points()).backward()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, n=name: fired.append(n))
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: fired.append(n))
    loader = DataLoader(TensorDataset(*points()), batch_size=5, shuffle=True)
    before = state_of(model)
    surface = LossSurface(model, cross_entropy, loader)
    surface.hessian_vector(surface.gradient())
    with torch.no_grad():
        surface.hessian_vector(surface.gradient())
    sharpness(surface)
    assert same(before, state_of(model))
    assert not fired
    assert surface.value() == pytest.approx(whole("norm").value(), abs=1e-12)


def test_a_model_is_as_it_was_after_an_error():
    model = model_of("norm")

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) < 5:
            raise RuntimeError("here")
        return cross_entropy(model, batch)

    x, y = points()
    surface = LossSurface(model, breaks, [(x[:20], y[:20]), (x[20:], y[20:])])
    before = state_of(model)
    with pytest.raises(RuntimeError, match="here"):
        surface.hessian_vector(direction(surface.size))
    assert same(before, state_of(model))


def trained(comm: Backend, measured: bool) -> dict[str, Tensor]:
    """Three steps on a tied model; between them the curvature is looked at, or is not."""
    model = model_of("norm")
    replica = dtrain.replicate(dtrain.norm.convert(model, norm_batch="global", comm=comm), comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(comm.rank)
    surface = LossSurface(model, cross_entropy, shares(comm), comm=comm)
    x, y = points()
    for step in range(3):
        mine = slice(8 * step + 4 * comm.rank, 8 * step + 4 * comm.rank + (4 if step < 2 else 2))
        optimizer.zero_grad()
        replica.backward(cross_entropy(model, (x[mine], y[mine])), samples=len(x[mine]))
        if measured:
            top_eigenvalues(surface)
            evidence(surface, precision=200.0)
        optimizer.step()
    replica.check(buffers=True)
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_measuring_between_the_steps_of_a_tied_model_changes_no_bit():
    with_it, without = (dtrain.run(trained, measured, workers=2, backend="threads")[0] for measured in (True, False))
    assert same(without, with_it)


# --- worker 0 leads


def test_others_follow_worker_0_however_it_decides():
    def work(comm: Backend) -> dict[str, Any]:
        surface = LossSurface(model_of("mlp"), cross_entropy, shares(comm), comm=comm)

        def run(oracle: Any) -> dict[str, Any]:
            assert comm.rank == 0
            v = direction(surface.size)
            for _ in range(3):
                v = oracle.product(v)
            return {"v": v, "loss": oracle.slope(surface.point())[0]}

        return surface.led(run)

    expected = whole("mlp")
    v = direction(expected.size)
    for _ in range(3):
        v = expected.hessian_vector(v)
    for found in dtrain.run(work, workers=3, backend="threads"):
        torch.testing.assert_close(found["v"], v, rtol=1e-10, atol=1e-12)
        assert found["loss"] == pytest.approx(expected.value(), abs=1e-12)


def test_progress_is_shown_by_worker_0_if_asked(capsys):
    trace(whole("mlp"), probes=3)
    assert capsys.readouterr().err == ""
    trace(whole("mlp"), probes=3, progress=True)
    assert "trace: 3pass" in capsys.readouterr().err


# --- a worker's part of a data set


@pytest.mark.parametrize("workers", [1, 3, 5])
def test_each_sample_is_in_one_part(workers):
    data = Points(13)

    def work(comm: Backend) -> list[Tensor]:
        batches = [*Part(data, comm, batch_size=2)]
        plain = [*Part(TensorDataset(data.x, data.y), comm, batch_size=2)]
        assert all(torch.equal(a, b) for a, b in zip((x for x, _ in batches), (x for x, _ in plain), strict=True))
        part = Part(data, comm, batch_size=2)
        assert len([*part]) == len([*part]) == len(part)
        return [x for x, _ in batches]

    parts = dtrain.run(work, workers=workers, backend="threads")
    assert torch.equal(torch.cat([x for part in parts for x in part]), data.x)
    assert all(len(x) <= 2 for part in parts for x in part)


def test_samples_of_a_batch():
    assert count_samples((torch.zeros(3, 2), torch.zeros(9))) == 3
    assert count_samples({"x": [torch.zeros(4)]}) == 4
    with pytest.raises(UsageError, match="samples="):
        count_samples(["text"])
    with pytest.raises(UsageError, match="samples="):
        count_samples(torch.tensor(1.0))


def test_samples_may_be_counted_otherwise():
    """Tokens, say, where the loss is a mean over tokens."""
    x, y = points()
    surface = LossSurface(
        model_of("mlp"), cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], samples=lambda batch: 2 * len(batch[0])
    )
    assert surface.samples == 2 * SAMPLES
    assert surface.value() == pytest.approx(whole("mlp").value(), abs=1e-13)


# --- what cannot be meant


def test_a_vector_by_name():
    surface = whole("mlp")
    parts = surface.by_name(torch.arange(float(surface.size)))
    assert {n: tuple(p.shape) for n, p in parts.items()} == {
        n: tuple(p.shape) for n, p in model_of("mlp").named_parameters()
    }
    assert parts["0.bias"].tolist() == [20.0, 21.0, 22.0, 23.0, 24.0]


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "batches", "said"),
    [
        (lambda: model_of("mlp"), iter([points()]), "iterator"),
        (lambda: model_of("mlp"), [], "no worker has a sample"),
        (lambda: model_of("mlp").half(), [points()], "float16.*model.float"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double()), [points()], "float32, float64"),
        (lambda: frozen(model_of("mlp")), [points()], "no parameter"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
            [points()],
            "0 has no running statistics",
        ),
    ],
)
def test_surfaces_that_cannot_be(make, batches, said):
    with pytest.raises(UsageError, match=said):
        LossSurface(make(), cross_entropy, batches)


def test_questions_that_cannot_be_answered():
    surface = whole("mlp")
    with pytest.raises(UsageError, match=r"shape \(3,\) for 43 parameters"):
        surface.hessian_vector(torch.ones(3))
    with pytest.raises(UsageError, match=r"43 parameters .*top_eigenvalues.*max_parameters=42"):
        surface.hessian(max_parameters=42)
    surface.model[0].bias.requires_grad_(False)
    with pytest.raises(UsageError, match=r"0\.bias was frozen"):
        surface.value()
    no_mean = LossSurface(model_of("mlp"), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), [points()])
    with pytest.raises(UsageError, match="scalar"):
        no_mean.gradient()
    not_finite = LossSurface(Point(torch.zeros(2)), lambda m, b: m.w.abs().pow(1.5).sum(), [torch.ones(1)])
    with pytest.raises(UsageError, match="not finite"):
        not_finite.hessian_vector(torch.ones(2))


def test_batches_must_stay():
    x, y = points()
    batches = [(x, y)]
    surface = LossSurface(model_of("mlp"), cross_entropy, batches)
    batches.append((x[:2], y[:2]))
    with pytest.raises(UsageError, match="23 samples at first and 25 now"):
        surface.value()


def test_workers_with_other_models_are_told_so():
    def work(comm: Backend, what: str) -> str:
        model = model_of("norm") if (what, comm.rank) != ("layout", 1) else model_of("mlp")
        try:
            surface = LossSurface(model, cross_entropy, shares(comm), comm=comm)
            if comm.rank == 1:
                with torch.no_grad():
                    (model[0].weight if what == "weight" else model[1].running_mean).add_(1.0)
            with dtrain.norm.merged_statistics(model, comm) if what == "merged" else torch.enable_grad():
                return f"{surface.value():.3f}"
        except LayoutError as error:
            return str(error)

    def said(what: str) -> set[str]:
        return set(dtrain.run(work, what, workers=3, backend="threads"))

    assert all("models that are measured differ" in text for text in said("layout"))
    assert all(text.startswith("0.weight is not the same on all workers") for text in said("weight"))
    (told,) = said("statistics")
    assert told.startswith("1.running_mean is not")
    assert "merged_statistics(model, comm)" in told
    (merged,) = said("merged")
    assert float(merged) > 0


def test_a_surface_follows_the_model():
    surface = quadratic(torch.eye(3, dtype=torch.float64))
    assert surface.value() == 0.0
    with torch.no_grad():
        surface.model.w.add_(1.0)
    assert surface.value() == 1.5
    assert surface.gradient().tolist() == [1.0] * 3
    kept = surface.point()
    kept.add_(1.0)
    assert surface.value() == 1.5
