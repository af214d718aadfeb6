"""Eigenvalues, trace and density of matrices that are known, through products alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from dtrain.errors import UsageError
from dtrain.largebatch.lanczos import random_signs, random_vector, tridiagonalise
from dtrain.largebatch.spectrum import Density, spectral_density, top_eigenvalues, trace
from tests.largebatch.surfaces import quadratic, symmetric

ENDS = {"largest": lambda v: -v, "smallest": lambda v: v, "magnitude": lambda v: -np.abs(v)}


def in_order(values, which: str) -> np.ndarray:
    values = np.asarray(values)
    return values[np.argsort(ENDS[which](values))]


spectra = st.lists(st.integers(-20, 20), min_size=1, max_size=12, unique_by=abs)


@settings(max_examples=60, deadline=None)
@given(spectrum=spectra, which=st.sampled_from(list(ENDS)), k=st.integers(1, 3), seed=st.integers(0, 9))
def test_finds_the_outermost_eigenvalues(spectrum, which, k, seed):
    k = min(k, len(spectrum))
    matrix = symmetric(torch.tensor(spectrum), seed)
    expected = in_order(np.linalg.eigvalsh(matrix.numpy()), which)[:k]
    found = top_eigenvalues(quadratic(matrix), k, which=which, tolerance=1e-8, seed=seed)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-7)
    assert found.converged
    for value, residual, v in zip(found.values, found.residuals, found.vectors, strict=True):
        assert float(v.norm()) == pytest.approx(1.0)
        assert float((matrix @ v - value * v).norm()) == pytest.approx(residual, abs=1e-12)
        assert residual <= found.bound


@settings(max_examples=30, deadline=None)
@given(spectrum=st.lists(st.sampled_from([-16, 8, -4, 2, 1]), min_size=1, unique=True), seed=st.integers(0, 9))
def test_power_iteration_finds_the_largest(spectrum, seed):
    matrix, k = symmetric(torch.tensor(spectrum), seed), min(2, len(spectrum))
    found = top_eigenvalues(quadratic(matrix), k, which="magnitude", method="power", tolerance=1e-9, seed=seed)
    np.testing.assert_allclose(found.values, in_order(spectrum, "magnitude")[:k], rtol=1e-9)
    assert found.converged
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(k), atol=1e-7)


def test_a_matrix_of_low_rank():
    """The space of the start is exhausted after three products; it goes on outside."""
    matrix = symmetric(torch.tensor([5.0, -3.0] + [0.0] * 8))
    found = top_eigenvalues(quadratic(matrix), 2, which="magnitude", tolerance=1e-10)
    np.testing.assert_allclose(found.values, [5.0, -3.0], atol=1e-9)
    assert found.products <= 3 + 2
    t = tridiagonalise(lambda v: matrix @ v, random_vector(matrix[0], 0), 10)
    np.testing.assert_allclose(t.ritz()[0], [-3.0, *[0.0] * 8, 5.0], atol=1e-9)
    torch.testing.assert_close(t.basis @ t.basis.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_curvature_at_all():
    surface = quadratic(torch.zeros(4, 4, dtype=torch.float64))
    assert top_eigenvalues(surface).values == (0.0,)
    assert top_eigenvalues(surface, 2, which="magnitude", method="power").values == (0.0, 0.0)
    assert trace(surface).value == 0.0


def test_a_basis_stays_orthogonal_where_plain_lanczos_loses_it():
    values = torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([1000.0])])
    t = tridiagonalise(lambda v: values * v, random_vector(values, 0), 60)
    torch.testing.assert_close(t.basis @ t.basis.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-13)
    projected = (t.basis * values) @ t.basis.T
    expected = np.diag(t.diagonal) + np.diag(t.beside, 1) + np.diag(t.beside, -1)
    np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-10)


def test_what_has_not_converged_says_so():
    matrix = torch.diag(torch.linspace(0, 1, 200, dtype=torch.float64))
    early = top_eigenvalues(quadratic(matrix), max_products=5)
    late = top_eigenvalues(quadratic(matrix), max_products=200)
    assert not early.converged
    assert "raise max_products" in str(early)
    assert abs(early.values[0] - 1.0) <= early.residuals[0]  # the promise of a residual
    assert late.converged
    assert "raise" not in str(late)
    assert late.products < 200
    assert late.values[0] == pytest.approx(1.0, abs=1e-6)


def test_float32():
    matrix = symmetric(torch.tensor([7.0, 3.0, 1.0, -2.0] + [0.1] * 20))
    found = top_eigenvalues(quadratic(matrix.float()), 2)
    assert found.vectors.dtype == torch.float32
    np.testing.assert_allclose(found.values, [7.0, 3.0], rtol=1e-5)


def test_eigenvalues_as_text():
    lines = str(top_eigenvalues(quadratic(torch.diag(torch.tensor([4.0, 0.5]))), 2)).splitlines()
    assert lines[0].split() == ["eigenvalue", "||Hv", "-", "λv||"]
    assert [line.split()[0] for line in lines[2:]] == ["4", "0.5", "4"]
    assert lines[-1] == "4 products"


# --- trace


def test_the_trace_of_a_diagonal_is_exact():
    diagonal = torch.tensor([3.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    found = trace(quadratic(torch.diag(diagonal)), probes=2)
    assert found.value == pytest.approx(9.5, abs=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_the_trace_is_unbiased_and_its_error_is_known():
    matrix = symmetric(torch.linspace(-1, 5, 12))
    off = matrix - torch.diag(matrix.diagonal())
    spread = math.sqrt(2 * float((off**2).sum()))  # of one probe
    found = trace(quadratic(matrix), probes=600)
    assert abs(found.value - float(matrix.trace())) < 4 * spread / math.sqrt(600)
    assert found.standard_error == pytest.approx(spread / math.sqrt(600), rel=0.15)
    estimates = [trace(quadratic(matrix), probes=16, seed=seed) for seed in range(30)]
    within = [abs(e.value - float(matrix.trace())) <= 2 * e.standard_error for e in estimates]
    assert 0.8 <= np.mean(within) <= 1.0
    assert len({e.value for e in estimates}) == 30
    assert str(found).startswith(f"trace {found.value:.6g} ± {found.standard_error:.2g} (600 probes)")


def test_signs():
    signs = random_signs(torch.zeros(1000, dtype=torch.float32), seed=3)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.15


# --- density


def test_the_density_of_a_diagonal_is_exact():
    """Signs weigh all its eigenvectors alike."""
    diagonal = torch.tensor([-2.0, -0.5, 1.0, 3.0, 4.0], dtype=torch.float64)
    found = spectral_density(quadratic(torch.diag(diagonal)), probes=1, steps=5)
    np.testing.assert_allclose(found.nodes, diagonal, atol=1e-10)
    np.testing.assert_allclose(found.weights, [0.2] * 5, atol=1e-10)
    assert found.below(0.0) == pytest.approx(0.4)


def test_the_density_has_the_moments_of_the_spectrum():
    values = torch.linspace(-1, 5, 40, dtype=torch.float64)
    found = spectral_density(quadratic(symmetric(values)), probes=60, steps=4)
    nodes, weights = np.array(found.nodes), np.array(found.weights)
    assert weights.sum() == pytest.approx(1.0)
    for power in (1, 2, 3):
        assert (weights * nodes**power).sum() == pytest.approx(float((values**power).mean()), rel=0.1)
    grid = np.linspace(-4, 8, 400)
    assert trapezoid(found.smooth(grid, 0.3), grid) == pytest.approx(1.0, abs=1e-3)


def test_a_density_as_text():
    found = Density(nodes=(-0.5, 0.002, 0.05, 3.0), weights=(0.1, 0.6, 0.2, 0.1))
    rows = [line.rsplit(maxsplit=2) for line in str(found).splitlines()[2:]]
    assert {row[0]: row[1] for row in rows} == {
        "-0.5 to -0.1": "10.00",
        "-0.1 to -0.01": "0.00",
        "-0.01 to 0.01": "60.00",
        "0.01 to 0.1": "20.00",
        "0.1 to 1": "0.00",
        "1 to 3": "10.00",
    }


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: top_eigenvalues(s, 0), "k is 0"),
        (lambda s: top_eigenvalues(s, 4), "no more than the 3 parameters"),
        (lambda s: top_eigenvalues(s, 3, max_products=2), "2 products"),
        (lambda s: top_eigenvalues(s, which="top"), "largest, smallest, magnitude"),
        (lambda s: top_eigenvalues(s, method="arnoldi"), "lanczos, power"),
        (lambda s: top_eigenvalues(s, method="power"), "which='magnitude'"),
        (lambda s: top_eigenvalues(s, tolerance=0.0), "tolerance"),
        (lambda s: trace(s, probes=1), "probes is 1"),
        (lambda s: spectral_density(s, probes=0), "probes=0"),
        (lambda s: spectral_density(s, steps=0), "steps=0"),
    ],
)
def test_what_cannot_be_meant(call, said):
    with pytest.raises(UsageError, match=said):
        call(quadratic(torch.eye(3)))
