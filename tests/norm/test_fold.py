"""Folded models compute in evaluation what the original does; what cannot be folded is said, and works all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain import norm, recipes
from dtrain.comm.solo import Solo
from dtrain.norm.fold import Folded, fold

EXACT = 1e-12


def ready(model: nn.Module) -> nn.Module:
    """float64, with parameters and buffers that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.double()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check(model: nn.Module, x: Any, folded: list[str], left: list[str]) -> Folded:
    """Fold; compare paths, and the output with that of the model in evaluation; the model is as it was."""
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found = fold(model, x)
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert found.folded == folded
    assert [path for path, _ in found.left] == left
    assert not any(m.training for m in found.model.modules())
    inputs = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        wanted, got = copy.deepcopy(model).eval()(*inputs), found.model(*inputs)
    assert (wanted - got).abs().max() < EXACT
    assert found.max_difference == (wanted - got).abs().max()
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in found.model.modules()) == len(left)
    return found


LAYERS: dict[str, tuple[Callable[..., nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "linear": (nn.Linear, nn.BatchNorm1d, (5, 3)),
    "conv1d": (lambda *c, **k: nn.Conv1d(*c, 3, **k), nn.BatchNorm1d, (5, 3, 7)),
    "conv2d": (lambda *c, **k: nn.Conv2d(*c, 3, padding=1, stride=2, **k), nn.BatchNorm2d, (5, 3, 7, 6)),
    "conv3d": (lambda *c, **k: nn.Conv3d(*c, 2, **k), nn.BatchNorm3d, (5, 3, 4, 3, 4)),
    "transposed": (lambda *c, **k: nn.ConvTranspose2d(*c, 3, **k), nn.BatchNorm2d, (5, 3, 4, 3)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=list(LAYERS))
def test_each_kind_of_layer(kind: tuple[Any, ...], bias: bool, affine: bool) -> None:
    make, batch_norm, shape = kind
    model = ready(nn.Sequential(make(3, 4, bias=bias), batch_norm(4, affine=affine, eps=1e-3), nn.ReLU()))
    found = check(model, random(*shape), ["0 -> 1"], [])
    assert "1 of 1" in str(found)
    assert f"{found.max_difference:.1e}" in str(found)


def test_grouped_convolution() -> None:
    check(ready(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))), random(2, 4, 5, 5), ["0 -> 1"], [])


def test_resnet() -> None:
    """All 20 layers of a residual network, in each of which branches are joined and ReLUs work in place."""
    model = recipes.build("synthetic", model="resnet", image="64", dtype=torch.float64).model
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            ready(layer)
    x = random(2, 3, 64, 64)
    found = fold(model, x)
    assert len(found.folded) == 20
    assert found.folded[0] == "stem.0 -> stem.1"
    assert found.left == []
    with torch.no_grad():
        wanted, got = copy.deepcopy(model).eval()(x), found.model(x)
    assert (wanted - got).abs().max() / wanted.abs().max() < EXACT
    assert type(found.model) is type(model)


class Branches(nn.Module):
    """Layers that must be left alone, each for another reason; `fine` can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.after_shared = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.forked, self.after_forked = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.one, self.other, self.twice = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.read, self.after_read = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.late = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)
        self.fine, self.after_fine = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_shared(self.shared(self.shared(x)))
        fork = self.forked(x)
        x = fork + self.after_forked(fork)
        x = self.twice(self.one(x)) + self.twice(self.other(x))
        x = self.after_read(self.read(x)) + self.read.weight.sum()
        return self.after_fine(self.fine(self.late(torch.relu(x))))  # type: ignore[no-any-return]


def test_reasons_to_leave_a_layer() -> None:
    model = ready(Branches())
    with torch.no_grad():
        for p in model.parameters():
            p.div_(10)  # so that 1e-12 is far above rounding
    left = ["after_shared", "after_forked", "twice", "after_read", "late", "unused"]
    found = check(model, random(4, 3), ["fine -> after_fine"], left)
    why = dict(found.left)
    assert "shared, the layer before, is used elsewhere too" in why["after_shared"]
    assert "the output of forked" in why["after_forked"]
    assert "called 2 times" in why["twice"]
    assert "read, the layer before" in why["after_read"]
    assert "no convolution or linear layer right before" in why["late"]
    assert "called 0 times" in why["unused"]
    assert all(f"left: {path}: {reason}" in str(found) for path, reason in found.left)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), (5, 3), "no running statistics"),
        (nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.BatchNorm1d(4)), (5, 4, 6), "in groups"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (5, 4, 3), "channels in another dimension"),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (4, 4), "channels in another dimension"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)), (5, 3), "hooks"),
        (nn.BatchNorm1d(4), (5, 4), "whole model"),
    ],
    ids=["no statistics", "grouped transposed", "channels last", "no batch", "weight norm", "only batch norm"],
)
def test_more_reasons(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    found = check(model.double(), random(*shape), [], ["1" if isinstance(model, nn.Sequential) else "batch_norm"])
    assert reason in found.left[0][1]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x + y))
        return out if out.sum() > 0 else -out


def test_a_model_that_cannot_be_traced() -> None:
    """It comes back unchanged, with the reason; several inputs are a tuple."""
    found = check(ready(Untraceable()), (random(4, 3), random(4, 3)), [], ["norm"])
    assert "torch.fx cannot trace" in found.left[0][1]
    assert found.max_difference == 0


def test_the_domain_around_the_call_is_folded() -> None:
    model = norm.per_domain(ready(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), ["a", "b"], affine="separate")
    kept = model[1].domains["b"]
    with torch.no_grad():
        for tensor in (kept.running_mean, kept.running_var, kept.weight, kept.bias):
            tensor.mul_(3)
    x = random(4, 3)
    with norm.domain("b"):
        found = check(model, x, ["0 -> 1"], [])
    with norm.domain("a"):
        assert (model.eval()(x) - found.model(x)).abs().max() > 0.1


def test_virtual_batch_norm_is_left() -> None:
    """It is no fixed scale and shift."""
    model = norm.virtual(ready(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), random(6, 3))
    assert "reference batch" in check(model, random(4, 3), [], ["1"]).left[0][1]


def test_kinds_are_folded_too() -> None:
    model = ready(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    norm.convert(model, norm_batch=2, micro_batch=4, comm=Solo())
    found = check(model, random(4, 3), ["0 -> 1"], [])
    assert type(model[1]) is norm.GhostBatchNorm
    assert type(found.model[1]) is nn.Identity


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.alias = self.inner[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_layer_with_two_names() -> None:
    """A layer that stands in two places but is called once is replaced in both."""
    found = check(ready(TwoNames()), random(4, 3), ["inner.0 -> inner.1"], [])
    assert found.model.alias is found.model.inner[1]


def test_a_foreign_class_is_left() -> None:
    class Own(nn.BatchNorm1d):
        pass

    found = check(ready(nn.Sequential(nn.Linear(3, 4), Own(4))), random(4, 3), [], ["1"])
    assert "what a Own computes" in found.left[0][1]


def test_the_example_is_not_written_to() -> None:
    x = random(4, 3)
    kept = x.clone()
    fold(ready(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.BatchNorm1d(4))), x)
    assert torch.equal(x, kept)
