"""Bayesian evidence against closed forms and numerical integrals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.evidence import Evidence, evidence
from tests.largebatch.surfaces import Point, direction

N, P, NOISE = 30, 4, 0.7


def linear_gaussian(precision: float, *, away: float = 0.0) -> tuple[LossSurface, float]:
    """y = Xw + noise at its posterior mode, or so far away from it; and the exact log evidence."""
    x = direction(N * P, seed=1).view(N, P)
    y = x @ direction(P, seed=2) + NOISE * direction(N, seed=3)
    posterior = x.T @ x / NOISE**2 + precision * torch.eye(P, dtype=torch.float64)
    mode = torch.linalg.solve(posterior, x.T @ y / NOISE**2)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rest = batch[1] - batch[0] @ model.w
        return (rest**2 / (2 * NOISE**2)).mean() + 0.5 * math.log(2 * math.pi * NOISE**2)

    covariance = NOISE**2 * np.eye(N) + (x @ x.T).numpy() / precision
    exact = multivariate_normal(np.zeros(N), covariance).logpdf(y.numpy())
    return LossSurface(Point(mode + away), loss, [(x[:7], y[:7]), (x[7:], y[7:])]), float(exact)


@pytest.mark.parametrize("precision", [1e-3, 1.0, 50.0])
def test_exact_for_a_linear_model_with_gaussian_noise(precision):
    surface, exact = linear_gaussian(precision)
    found = evidence(surface, precision=precision)
    assert found.log_evidence == pytest.approx(exact, abs=1e-9)
    assert found.distance == pytest.approx(0.0, abs=1e-12)
    assert found.at_minimum
    assert (found.samples, found.parameters) == (N, P)
    assert math.isnan(found.log_null)


def test_tells_how_far_it_is_from_the_minimum():
    at, _ = linear_gaussian(2.0)
    off, _ = linear_gaussian(2.0, away=0.3)
    best, found = evidence(at, precision=2.0), evidence(off, precision=2.0)
    assert found.distance == pytest.approx(found.cost - best.cost, rel=1e-9)  # exact, as C is quadratic
    assert not found.at_minimum
    assert "not at a minimum" in str(found)
    assert "not at a minimum" not in str(best)


@pytest.mark.parametrize("random_labels", [False, True])
def test_near_the_integral_for_a_logistic_model(random_labels):
    x = direction(60, seed=4)
    labels = (direction(60, seed=5) if random_labels else x + 0.5 * direction(60, seed=6)) > 0
    precision = 0.5

    def cost(w: float) -> float:
        return float(F.binary_cross_entropy_with_logits(w * x, labels.double(), reduction="sum")) + precision / 2 * w**2

    grid = np.linspace(-5, 15, 20001)
    mode = float(grid[np.argmin([cost(w) for w in grid[::20]]) * 20])
    mode = min((mode + d for d in np.linspace(-0.03, 0.03, 6001)), key=cost)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model.w * batch[0], batch[1])

    surface = LossSurface(Point(torch.tensor([mode], dtype=torch.float64)), loss, [(x, labels.double())])
    found = evidence(surface, precision=precision, classes=2)
    integral, _ = quad(lambda w: math.exp(cost(mode) - cost(w)), mode - 10, mode + 20, points=[mode])
    exact = math.log(integral) - cost(mode) + 0.5 * math.log(precision / (2 * math.pi))
    assert found.log_evidence == pytest.approx(exact, abs=0.05)
    assert found.log_null == pytest.approx(-60 * math.log(2))
    assert found.log_ratio == pytest.approx(found.log_null - found.log_evidence)
    assert (found.log_ratio > 0) == random_labels
    assert ("the null model is the likelier" in str(found)) == random_labels


def test_the_occam_factor_is_that_of_the_eigenvalues():
    """Two parameters; λ_i are those of the summed loss, with λ."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (torch.tensor([1.5, 4.0], dtype=torch.float64) * model.w**2).sum() / 2

    surface = LossSurface(Point(torch.zeros(2, dtype=torch.float64)), loss, [torch.ones(10)])
    found = evidence(surface, precision=5.0, classes=3)
    assert found.log_occam == pytest.approx(-0.5 * (math.log(20 / 5) + math.log(45 / 5)))
    assert found.cost == 0.0
    assert found.log_ratio == pytest.approx(-found.log_occam - 10 * math.log(3))


def test_as_text():
    found = Evidence(
        cost=10.0, log_occam=-2.5, distance=0.0, samples=20, parameters=7, precision=0.5, classes=10
    )  # fmt: skip
    lines = str(found).splitlines()
    assert lines[0] == (
        "log evidence -12.50 = log likelihood and prior -10.00, Occam factor -2.50 (λ = 0.5, 7 parameters, 20 samples)"
    )
    assert lines[1] == "against guessing one of 10: E = -33.55, the model is the likelier"
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"precision": 0.0}, "precision is 0"),
        ({"precision": math.nan}, "precision is nan"),
        ({"precision": 1.0, "classes": 1}, "classes is 1"),
        ({"precision": 1.0, "max_parameters": 3}, "4 parameters"),
    ],
)
def test_what_cannot_be_meant(more, said):
    with pytest.raises(UsageError, match=said):
        evidence(linear_gaussian(1.0)[0], **more)


def test_a_saddle_is_no_minimum():
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model.w[0] ** 2 - model.w[1] ** 2

    surface = LossSurface(Point(torch.zeros(2)), loss, [torch.ones(3)])
    with pytest.raises(UsageError, match=r"curves down \(-5 .*no minimum"):
        evidence(surface, precision=1.0)
    found = evidence(surface, precision=7.0)
    assert found.log_occam == pytest.approx(-0.5 * (math.log(13 / 7) + math.log(1 / 7)), rel=1e-6)
