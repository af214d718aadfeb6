"""Extreme eigenvalues of a symmetric matrix that is known by its products only: Lanczos and power iteration.

Plain arithmetic on vectors (P,), on any device; `product` multiplies by the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

_EXHAUSTED = 100.0  # roundings of the largest eigenvalue, below which what is left of a vector is noise
_FIRST_ROWS = 16  # vectors that memory is taken for at first


@dataclass(frozen=True)
class Tridiagonal:
    """T = Qᵀ H Q of a Krylov space: its eigenvalues (Ritz values) approach those of H, the outermost first."""

    basis: Tensor
    """Q transposed (m, P): orthonormal rows, the first of them the start."""
    diagonal: np.ndarray
    """(m,) float64."""
    beside: np.ndarray
    """(m - 1,) float64."""
    rest: float
    """Norm of what the last product has outside the space."""

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, rising (m,), and eigenvectors of T, in columns (m, m)."""
        values, vectors = np.linalg.eigh(np.diag(self.diagonal) + np.diag(self.beside, 1) + np.diag(self.beside, -1))
        return values, vectors


def tridiagonalise(
    product: Product, start: Tensor, most: int, done: Callable[[Tridiagonal], bool] = lambda _: False
) -> Tridiagonal:
    """Lanczos with full reorthogonalisation (Golub & Van Loan, Matrix Computations, section 10.3.5), without restarts.

    Where the space of `start` is exhausted, it goes on with a random vector outside, so that all eigenvalues come.
    Memory: one vector a product.

    Args:
        start: (P,), not zero.
        most: products at most; P are enough.
        done: whether to stop, asked after each product.
    """
    most = min(most, len(start))
    basis = torch.empty(min(most, _FIRST_ROWS), len(start), dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    diagonal, beside = np.zeros(most), np.zeros(most)
    largest = 0.0
    for m in range(1, most + 1):
        known = basis[:m]
        image = product(known[-1])
        diagonal[m - 1] = float(torch.dot(known[-1], image))
        image = _outside(known, image)
        beside[m - 1] = float(image.norm())
        largest = max(largest, abs(diagonal[m - 1]) + beside[m - 1])
        exhausted = beside[m - 1] <= _EXHAUSTED * torch.finfo(start.dtype).eps * largest
        if exhausted:
            beside[m - 1] = 0.0
        found = Tridiagonal(known, diagonal[:m].copy(), beside[: m - 1].copy(), float(beside[m - 1]))
        if m == most or done(found):
            break
        if exhausted:
            image = _outside(known, random_vector(start, seed=m))
        if m == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])[:most]
        basis[m] = image / image.norm()
    return found


def outermost(
    product: Product, start: Tensor, k: int, order: Callable[[np.ndarray], np.ndarray], tolerance: float, most: int
) -> tuple[np.ndarray, Tensor, float]:
    """By Lanczos: k eigenvalues (k,), the first by `order`, which sorts; eigenvectors in rows (k, P); largest |λ| met.

    Stops when all residuals ||Hv - λv||, as the recurrence tells them, are below `tolerance` times the largest |λ|.
    """

    def done(t: Tridiagonal) -> bool:
        if len(t.diagonal) < k:
            return False
        values, vectors = t.ritz()
        residuals = t.rest * np.abs(vectors[-1, order(values)[:k]])
        return bool((residuals <= tolerance / 2 * np.abs(values).max()).all())  # 2: true residuals are rounded

    t = tridiagonalise(product, start, most, done)
    values, vectors = t.ritz()
    chosen = order(values)[:k]
    return values[chosen], torch.from_numpy(vectors[:, chosen].T).to(t.basis) @ t.basis, float(np.abs(values).max())


def by_power(product: Product, start: Tensor, k: int, tolerance: float, most: int) -> tuple[np.ndarray, Tensor, float]:
    """By power iteration, one after the other: the k eigenvalues of largest |λ| (k,); and the rest as `outermost`.

    Memory: k + 2 vectors. Converges as the ratio of neighbouring eigenvalues: slowly where they are close.
    """
    values, vectors = np.zeros(k), torch.zeros(k, len(start), dtype=start.dtype, device=start.device)
    for i in range(k):
        found = vectors[:i]
        v = _outside(found, random_vector(start, seed=i) if i else start)
        for _ in range(most):
            v = v / v.norm()
            image = product(v)
            values[i] = float(torch.dot(v, image))
            vectors[i] = v
            if float((image - values[i] * v).norm()) <= tolerance / 2 * np.abs(values).max():
                break
            v = _outside(found, image)
    return values, vectors, float(np.abs(values).max())


def random_vector(like: Tensor, seed: int) -> Tensor:
    """Standard normal, the same for one seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def random_signs(like: Tensor, seed: int) -> Tensor:
    """-1 and 1 (Rademacher)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


def _outside(basis: Tensor, vector: Tensor) -> Tensor:
    """What is left of a vector outside the rows of the basis: twice, since the first time leaves some rounding."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
