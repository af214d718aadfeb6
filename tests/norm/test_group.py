"""Group norm in the place of batch norm: what is kept, and how channels are divided."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.norm.ghost import GhostBatchNorm
from dtrain.norm.group import replace_with_group_norm
from tests.norm.test_sync import Net, close, data, plain_layer


def by_formula(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each sample and group by its own mean and biased variance."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    parts = x.reshape(len(x), groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    normalised = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    return normalised.view(x.shape) * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm1d, (5, 4, 6)),
        (nn.BatchNorm2d, (5, 4, 3, 2)),
        (nn.BatchNorm3d, (5, 4, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize(("groups", "count"), [(2, 2), (3, 2), ("layer", 1)])
def test_equals_the_formula(kind: type[nn.Module], shape: tuple[int, ...], groups: int | str, count: int) -> None:
    """In training and in evaluation, with the layer's own weight, bias and eps."""
    layer: Any = plain_layer(kind, eps=1e-3)
    new: Any = replace_with_group_norm(layer, groups)
    assert type(new) is nn.GroupNorm
    assert new.weight is layer.weight
    assert new.bias is layer.bias
    wanted = by_formula(data(shape), count, layer.weight, layer.bias, 1e-3)
    close(new(data(shape)), wanted, 1e-12)
    close(new.eval()(data(shape)), wanted, 1e-12)
    alone = new(data(shape)[:1])
    close(alone, wanted[:1], 1e-12)


@pytest.mark.parametrize(
    ("channels", "groups", "count"),
    [(64, 32, 32), (48, 32, 24), (7, 32, 7), (13, 5, 1), (6, 4, 3), (16, "layer", 1), (16, "instance", 16), (8, 1, 1)],
)
def test_groups_divide_the_channels(channels: int, groups: int | str, count: int) -> None:
    """The number asked for, or the largest smaller one that divides."""
    new: Any = replace_with_group_norm(nn.BatchNorm2d(channels), groups)
    assert new.num_groups == count


def test_a_whole_model() -> None:
    """Shared layers stay shared, kinds are replaced too, parameters and the mode stay; an optimizer goes on."""
    model = Net()
    model.inner[1] = GhostBatchNorm.from_plain(model.inner[1], "inner.1", norm_batch=2)  # type: ignore[arg-type]
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.shared.eval()
    assert replace_with_group_norm(model, 2) is model
    assert isinstance(model.shared, nn.GroupNorm)
    assert model.shared is model.again
    assert not model.shared.training
    assert isinstance(model.inner[1], nn.GroupNorm)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not list(model.named_buffers())
    before = copy.deepcopy(model.state_dict())
    model(data((5, 4))).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters() if "inner.0" not in name)


def test_without_affine_and_in_half_precision() -> None:
    """Neither weight nor bias appears; half-precision layers stay so."""
    new: Any = replace_with_group_norm(nn.BatchNorm2d(8, affine=False), 4)
    assert not list(new.parameters())
    assert not new.affine
    close(
        new.double()(data((3, 8, 2, 2))), by_formula(data((3, 8, 2, 2)), 4, torch.ones(8), torch.zeros(8), 1e-5), 1e-12
    )
    half: Any = replace_with_group_norm(nn.BatchNorm2d(8).to(torch.bfloat16), 4)
    assert half(data((3, 8, 2, 2)).to(torch.bfloat16)).dtype is torch.bfloat16


def test_refused() -> None:
    """Words and numbers that cannot be meant, lazy layers, and one channel a group where outputs would be constant."""
    for groups in ("batch", 0, -2, 1.5):
        with pytest.raises(UsageError, match="groups is"):
            replace_with_group_norm(Net(), groups)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 is lazy"):
        replace_with_group_norm(nn.Sequential(nn.LazyBatchNorm2d()))
    ghost = GhostBatchNorm.from_plain(nn.BatchNorm1d(4), "1", norm_batch=2)
    model = nn.Sequential(nn.BatchNorm2d(4), ghost)
    with pytest.raises(UsageError, match="1 is a BatchNorm1d of 4 channels, and groups=32"):
        replace_with_group_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    replace_with_group_norm(model, "instance")
    assert model[1].num_groups == 4
