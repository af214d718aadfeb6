"""Keskar's sharpness where the highest loss in the box is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.lanczos import random_vector
from dtrain.largebatch.sharpness import Sharpness, sharpness
from tests.largebatch.surfaces import Point, direction, quadratic

EPSILON = 1e-2


def linear(at: Tensor, slope: Tensor, seen: list[Tensor] | None = None) -> LossSurface:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if seen is not None:
            seen.append(model.w.detach().clone())
        return 2.0 + slope @ model.w

    return LossSurface(Point(at), loss, [torch.ones(3)])


def test_a_plane_rises_to_a_corner_of_the_box():
    at, slope = direction(6, seed=1), direction(6, seed=2)
    found = sharpness(linear(at, slope), epsilon=EPSILON)
    loss = 2.0 + float(slope @ at)
    rise = float((slope.abs() * EPSILON * (at.abs() + 1)).sum())
    assert found.loss == pytest.approx(loss)
    assert found.highest == pytest.approx(loss + rise, abs=1e-12)
    assert found.value == pytest.approx(100 * rise / (1 + loss))
    assert found.dimensions == 6


def test_a_bowl_rises_to_its_steepest_corner():
    """Along the axes: the highest corner is the one away from the minimum."""
    curvature = torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64)
    at = torch.tensor([0.01, -0.02, 0.03], dtype=torch.float64)
    found = sharpness(quadratic(torch.diag(curvature), at), epsilon=0.1)
    corner = at.abs() + 0.1 * (at.abs() + 1)
    assert found.loss == pytest.approx(float((curvature * at**2).sum() / 2))
    assert found.highest == pytest.approx(float((curvature * corner**2).sum() / 2), rel=1e-9)


def test_a_steeper_bowl_is_sharper():
    at = 0.01 * direction(5)
    by_curvature = [sharpness(quadratic(c * torch.eye(5, dtype=torch.float64), at)).value for c in (1.0, 5.0, 25.0)]
    assert by_curvature == sorted(by_curvature)
    assert by_curvature[2] == pytest.approx(25 * by_curvature[0], rel=0.05)


def test_a_subspace_has_the_box_of_the_pseudo_inverse():
    """A plane again: in x + Az the slope along z is Aᵀc, and the box is ε (|A⁺x| + 1)."""
    at, slope, seen = direction(7, seed=3), direction(7, seed=4), list[Tensor]()
    found = sharpness(linear(at, slope, seen), epsilon=EPSILON, dimensions=3, seed=11)
    columns = random_vector(torch.zeros(3, 7, dtype=torch.float64), 11).T.numpy()  # A (P, p)
    half = EPSILON * (np.abs(np.linalg.pinv(columns) @ at.numpy()) + 1)
    assert found.highest - found.loss == pytest.approx(
        float((np.abs(columns.T @ slope.numpy()) * half).sum()), rel=1e-9
    )
    assert found.dimensions == 3
    for w in seen:
        z = np.linalg.pinv(columns) @ (w - at).numpy()
        assert (np.abs(z) <= half * (1 + 1e-9)).all()
        np.testing.assert_allclose(columns @ z, (w - at).numpy(), atol=1e-12)
    other = sharpness(linear(at, slope), epsilon=EPSILON, dimensions=3, seed=12)
    assert other.highest != found.highest


def test_more_iterations_never_find_less():
    matrix = torch.diag(torch.linspace(-1, 1, 30, dtype=torch.float64))
    coupled = matrix + 0.3 * torch.outer(direction(30), direction(30))
    found = [sharpness(quadratic(coupled, 0.1 * direction(30)), epsilon=0.3, iterations=n) for n in (1, 3, 10, 40)]
    highest = [f.highest for f in found]
    assert highest == sorted(highest)
    assert highest[0] < highest[-1]
    assert found[0].evaluations < found[-1].evaluations


def test_a_loss_that_is_not_finite_somewhere_in_the_box():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return -(1.0 - model.w).log().sum()

    surface = LossSurface(Point(torch.full((3,), 0.9, dtype=torch.float64)), loss, [torch.ones(1)])
    assert math.isfinite(sharpness(surface, epsilon=0.01).value)
    found = sharpness(surface, epsilon=0.2)
    assert found.highest == found.value == math.inf
    assert found.loss == pytest.approx(-3 * math.log(0.1))
    beyond = LossSurface(Point(torch.full((3,), 2.0, dtype=torch.float64)), loss, [torch.ones(1)])
    with pytest.raises(UsageError, match="nan where the model stands"):
        sharpness(beyond)


def test_float32():
    at, slope = direction(6, seed=1), direction(6, seed=2)
    wide, narrow = (sharpness(linear(at.to(t), slope.to(t)), epsilon=EPSILON) for t in (torch.float64, torch.float32))
    assert narrow.value == pytest.approx(wide.value, rel=1e-4)


def test_as_text():
    found = Sharpness(value=12.5, loss=0.2, highest=0.35, epsilon=1e-3, dimensions=40, evaluations=14)
    assert str(found) == (
        "sharpness 12.5: the loss, 0.2, rises to 0.35 within ε = 0.001 (40 dimensions, 14 evaluations)"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"dimensions": 0}, "1 to 3"),
        ({"dimensions": 4}, "1 to 3"),
        ({"iterations": 0}, "iterations is 0"),
    ],
)
def test_what_cannot_be_meant(more, said):
    with pytest.raises(UsageError, match=said):
        sharpness(quadratic(torch.eye(3)), **more)
