"""Keras's arguments and momentum, against numbers worked out by Keras's definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dtrain.errors import UsageError
from dtrain.norm.keras import keras_batch_norm, momentum
from tests.norm.test_sync import close, data


def test_momentum() -> None:
    assert momentum(keras=0.99) == pytest.approx(0.01)
    assert momentum(keras=0.9) == pytest.approx(nn.BatchNorm1d(1).momentum)
    assert momentum(keras=0.0) == 1.0


@pytest.mark.parametrize("keras", [1.0, -0.1, 1.5, float("nan")])
def test_momentum_refused(keras: float) -> None:
    with pytest.raises(UsageError, match="momentum of Keras"):
        momentum(keras=keras)


def test_moving_averages_as_in_keras() -> None:
    """moving = moving * momentum + batch * (1 - momentum), for the mean; the variance with torch's correction."""
    layer, x = keras_batch_norm(4, dim=2, momentum=0.8).double(), data((5, 4, 3, 2))
    layer(x)
    close(layer.running_mean, 0.8 * torch.zeros(4) + 0.2 * x.mean((0, 2, 3)))  # type: ignore[arg-type]
    close(layer.running_var, 0.8 + 0.2 * x.var((0, 2, 3)))  # type: ignore[arg-type]


def test_defaults_are_those_of_keras() -> None:
    layer = keras_batch_norm(3, dim=1)
    assert layer.eps == 1e-3
    assert layer.momentum == pytest.approx(0.01)
    assert layer.weight.tolist() == [1.0] * 3
    assert layer.bias.tolist() == [0.0] * 3
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


@pytest.mark.parametrize(("dim", "kind"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_dimensions(dim: int, kind: type[nn.Module]) -> None:
    layer = keras_batch_norm(4, dim=dim)
    assert type(layer) is kind
    assert layer(torch.randn(3, 4, *[2] * dim)).shape == (3, 4, *[2] * dim)


@pytest.mark.parametrize(("center", "scale"), [(False, True), (True, False), (False, False)])
def test_center_and_scale(center: bool, scale: bool) -> None:
    """Off: at 0 or 1 whatever the initializer, and not learnt."""
    layer = keras_batch_norm(
        3, dim=1, center=center, scale=scale, beta_initializer="ones", gamma_initializer="zeros", epsilon=0.1
    )
    assert layer.bias.tolist() == [float(center)] * 3
    assert layer.weight.tolist() == [float(not scale)] * 3
    assert layer.bias.requires_grad is center
    assert layer.weight.requires_grad is scale
    assert layer.eps == 0.1


def test_initializers() -> None:
    layer = keras_batch_norm(
        3,
        dim=1,
        gamma_initializer=lambda t: nn.init.constant_(t, 0.5),
        moving_mean_initializer="ones",
        moving_variance_initializer=lambda t: t.fill_(4.0),
    )
    assert layer.weight.tolist() == [0.5] * 3
    assert layer.running_mean.tolist() == [1.0] * 3  # type: ignore[union-attr]
    assert layer.running_var.tolist() == [4.0] * 3  # type: ignore[union-attr]
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"axis": -1}, r"x.movedim\(-1, 1\)"),
        ({"axis": 3}, "axis is 3"),
        ({"dim": 4}, "dim is 4"),
        ({"momentum": 1.0}, "momentum of Keras"),
        ({"beta_initializer": "he_normal"}, "initializer 'he_normal'"),
    ],
)
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        keras_batch_norm(3, **{"dim": 2, **options})
