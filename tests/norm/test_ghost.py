"""Ghost batch norm: each group as torch's layer has it by itself, and running statistics of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.norm.convert import convert
from dtrain.norm.ghost import GhostBatchNorm, group_sizes
from dtrain.norm.layer import revert
from tests.norm.test_sync import OPTIONS, SHAPES, close, data, plain_layer, run


def ghost(layer: nn.Module, norm_batch: int) -> nn.Module:
    return convert(layer, norm_batch=norm_batch, micro_batch=1000)


@pytest.mark.parametrize("norm_batch", [2, 3, 4, 10, 11])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_each_group_is_a_batch_of_its_own(
    kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], norm_batch: int
) -> None:
    """Outputs and all gradients are those of torch's layer on each group; the running statistics are those that it
    keeps of the whole batch. In float64, to 1e-12."""
    make, shape = kind
    reference, layer = plain_layer(make, **options), ghost(plain_layer(make, **options), norm_batch)
    assert isinstance(layer, GhostBatchNorm)
    whole = plain_layer(make, **options)
    weights = data(shape, 9)
    for seed in range(2):
        x = data(shape, seed)
        sizes = group_sizes(len(x), norm_batch, values=x[0, 0].numel())
        parts = [run(reference, a, b) for a, b in zip(x.split(sizes), weights.split(sizes), strict=True)]
        y, dx = run(layer, x, weights)
        whole(x)
        close(y, torch.cat([p[0] for p in parts]), 1e-12)
        close(dx, torch.cat([p[1] for p in parts]), 1e-12)
    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad, 1e-11)
    for a, b in zip(layer.buffers(), whole.buffers(), strict=True):
        close(a.double(), b.double(), 1e-12)


@pytest.mark.parametrize("least", [1, 10**9], ids=["by rows", "by groups"])
@pytest.mark.parametrize("norm_batch", [3, 10, "global"])
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_a_relu_may_work_in_place_on_what_comes_out(
    kind: tuple[type[nn.Module], tuple[int, ...]], norm_batch: int | str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.norm.ghost._LEAST", least)
    make, shape = kind
    layer, x = convert(plain_layer(make), norm_batch=norm_batch, micro_batch=1000), data(shape, 0)  # type: ignore[arg-type]
    (y, dx), (y_wanted, dx_wanted) = (
        run(nn.Sequential(layer, nn.ReLU(inplace=inplace)), x, torch.ones_like(x)) for inplace in (True, False)
    )
    close(y, y_wanted, 0)
    close(dx, dx_wanted, 0)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 9]))
def test_groups(samples: int, norm_batch: int, values: int) -> None:
    sizes = group_sizes(samples, norm_batch, values=values)
    assert sum(sizes) == samples
    assert all(size == norm_batch for size in sizes[:-1])
    assert len(sizes) == 1 or sizes[-1] * values >= min(2, norm_batch * values)


def test_a_last_group_of_one_value_joins_the_one_before() -> None:
    assert group_sizes(9, 4) == [4, 4, 1]
    assert group_sizes(9, 4, values=1) == [4, 5]


def test_evaluation_and_small_batches_are_plain() -> None:
    layer, plain = ghost(plain_layer(nn.BatchNorm2d), 8), plain_layer(nn.BatchNorm2d)
    x = data((8, 4, 3, 2))
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(data((11, 4, 3, 2))), plain.eval()(data((11, 4, 3, 2))))


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_both_orders(affine: bool) -> None:
    layer = ghost(plain_layer(nn.BatchNorm1d, affine=affine, track_running_stats=False), 3)
    x = data((7, 4, 2)).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    layer = ghost(plain_layer(nn.BatchNorm2d), 4)
    x = data((8, 4, 3, 2))
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    y = layer(x.requires_grad_())
    y.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_wide_parameters(dtype: torch.dtype) -> None:
    layer, reference = ghost(plain_layer(nn.BatchNorm2d, torch.float32), 4), plain_layer(nn.BatchNorm2d, torch.float32)
    x = data((8, 4, 5, 5)).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    parts = torch.cat([reference(part.float()) for part in x.detach().split(4)])
    close(y.detach().float(), parts, 0.05)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


def test_a_channels_last_batch() -> None:
    x = data((8, 4, 3, 2)).to(memory_format=torch.channels_last)
    layer, same = ghost(plain_layer(nn.BatchNorm2d), 4), ghost(plain_layer(nn.BatchNorm2d), 4)
    weights = data((8, 4, 3, 2), 1)
    for a, b in zip(run(layer, x, weights), run(same, x.contiguous(), weights), strict=True):
        close(a, b, 1e-12)


def test_a_large_mean_loses_nothing() -> None:
    """Mean 1000, standard deviation 0.1, in float32: the running variance is right, and not negative."""
    x = (torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 1000).float()
    layer = ghost(nn.BatchNorm2d(4, momentum=1.0), 8)
    layer(x)
    wanted = x.double().var((0, 2, 3))
    assert isinstance(layer.running_var, Tensor)
    assert ((layer.running_var.double() - wanted).abs() / wanted).max() < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_any_sizes(samples: int, norm_batch: int, seed: int) -> None:
    x = data((samples, 4, 3), seed)
    y = ghost(nn.BatchNorm1d(4).double(), norm_batch)(x)
    sizes = group_sizes(samples, norm_batch, values=3)
    close(y.detach(), torch.cat([F.batch_norm(p, None, None, training=True) for p in x.split(sizes)]), 1e-11)


def test_copies_and_back_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    convert(model, norm_batch=4, micro_batch=8)
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin[1], GhostBatchNorm)
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    assert type(revert(model)[1]) is nn.BatchNorm2d  # type: ignore[index]


LAYOUTS: dict[str, Any] = {
    "transposed": lambda: data((4, 12)).t(),
    "every second": lambda: data((24, 4, 3))[::2],
    "channels cut": lambda: data((12, 8, 9, 9))[:, ::2],
    "sides swapped": lambda: data((12, 4, 9, 8)).transpose(2, 3),
    "channels last": lambda: data((12, 4, 9, 9)).to(memory_format=torch.channels_last),
    "channels last, 3-D": lambda: data((12, 4, 5, 5, 3)).to(memory_format=torch.channels_last_3d),
    "expanded": lambda: data((12, 4, 1, 1)).expand(12, 4, 9, 9),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_any_layout_in_memory(layout: Any) -> None:
    """Of the input and of the gradient that comes back."""
    x = layout()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    layer, same = ghost(plain_layer(kind), 5), ghost(plain_layer(kind), 5)
    wanted = run(same, x.contiguous(), weights)
    for found, right in zip(run(layer, x, weights), wanted, strict=True):
        close(found, right, 1e-11)
    swapped = weights.transpose(0, 1).contiguous().transpose(0, 1)
    for found, right in zip(run(ghost(plain_layer(kind), 5), x, swapped), wanted, strict=True):
        close(found, right, 1e-11)
    reference = plain_layer(kind)
    parts = [run(reference, a, b) for a, b in zip(x.split(5), weights.split(5), strict=True)]
    close(wanted[0], torch.cat([p[0] for p in parts]), 1e-11)
    close(wanted[1], torch.cat([p[1] for p in parts]), 1e-11)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype, affine: bool) -> None:
    """Parameters of the same type as the input, or none."""
    layer = ghost(nn.BatchNorm2d(4, affine=affine), 4).to(dtype)
    x = data((8, 4, 5, 5)).to(dtype).requires_grad_()
    y = layer(x)
    parts = [F.batch_norm(p, None, None, training=True) for p in x.detach().double().split(4)]
    close(y.detach().double(), torch.cat(parts), 0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


def test_weight_without_bias() -> None:
    layer, reference = ghost(plain_layer(nn.BatchNorm2d, bias=False), 4), plain_layer(nn.BatchNorm2d, bias=False)
    for shape in ((8, 4, 2, 2), (8, 4, 9, 9)):
        x, weights = data(shape), data(shape, 1)
        parts = [run(reference, a, b) for a, b in zip(x.split(4), weights.split(4), strict=True)]
        for found, wanted in zip(run(layer, x, weights), zip(*parts, strict=True), strict=True):
            close(found, torch.cat(wanted), 1e-11)


def test_groups_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel in a group of 1"):
        ghost(nn.BatchNorm1d(4).double(), 1)(data((8, 4)))
    ghost(nn.BatchNorm2d(4).double(), 1)(data((8, 4, 2, 2)))
