"""The eigenvalues of the Hessian over all workers' samples: the outermost, their sum, and how they are spread.

Everything here multiplies the Hessian by vectors, and never holds it. Each product is one pass over the data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import UsageError
from dtrain.largebatch.curvature import LossSurface, Oracle
from dtrain.largebatch.lanczos import by_power, outermost, random_signs, random_vector, tridiagonalise
from dtrain.tables import table

ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "largest": lambda values: np.argsort(-values),
    "smallest": lambda values: np.argsort(values),
    "magnitude": lambda values: np.argsort(-np.abs(values)),
}
"""Which end of the spectrum: what sorts eigenvalues so that the wanted ones come first."""

METHODS = ("lanczos", "power")


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Outermost eigenvalues of the Hessian of the mean loss. `str` gives a table."""

    values: tuple[float, ...]
    """The first as `which` says, then the next."""
    residuals: tuple[float, ...]
    """||Hv - λv|| for the unit vector v that belongs to it: some eigenvalue is no further from λ than this."""
    vectors: Tensor
    """Unit eigenvectors in rows (k, P), on the model's device; `LossSurface.by_name` cuts one into parameters."""
    products: int
    """How often the Hessian was multiplied by a vector."""
    bound: float
    """What the residuals were to come below: the tolerance times the largest |λ| met."""

    @property
    def converged(self) -> bool:
        """Whether all residuals are within the bound."""
        return max(self.residuals) <= self.bound

    def __str__(self) -> str:
        rows = [[f"{v:.6g}", f"{r:.1e}"] for v, r in zip(self.values, self.residuals, strict=True)]
        ended = "" if self.converged else f"; not within {self.bound:.1e} yet: raise max_products"
        return f"{table(['eigenvalue', '||Hv - λv||'], rows, left=0)}\n{self.products} products{ended}"


def top_eigenvalues(
    surface: LossSurface,
    k: int = 1,
    *,
    which: str = "largest",
    method: str = "lanczos",
    tolerance: float = 1e-4,
    max_products: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Eigenvalues:
    """The k outermost eigenvalues of the Hessian, with eigenvectors and what is proved of them.

        print(top_eigenvalues(surface, 2))

    An eigenvalue that occurs several times may be found once. All workers call it; worker 0 leads.

    Args:
        which: "largest", "smallest" (the most negative), "magnitude".
        method: "lanczos" (full reorthogonalisation; keeps one vector a product) or "power" (power iteration; keeps
            k + 2 vectors and needs more products; "magnitude" only).
        tolerance: stop when ||Hv - λv|| is below so many times the largest |λ|. The error of λ is of its square, where
            eigenvalues are apart. In float32, below about 1e-6 it never comes.
        max_products: at most; with "power", for each eigenvalue. k more are made, to measure the residuals.
        seed: of the start.
        progress: show a bar, on worker 0.

    Raises:
        UsageError: what cannot be meant; as `LossSurface.value`, with LayoutError.
    """
    if which not in ORDERS or method not in METHODS:
        raise UsageError(f"which={which!r}, method={method!r}: {', '.join(ORDERS)}; {', '.join(METHODS)}")
    if method == "power" and which != "magnitude":
        raise UsageError(
            f"power iteration finds the largest |λ|: which='magnitude', not {which!r}, or method='lanczos'"
        )
    if not 1 <= k <= min(surface.size, max_products):
        raise UsageError(f"k is {k}: 1 or more, no more than the {surface.size} parameters or {max_products} products")
    if not tolerance > 0:
        raise UsageError(f"tolerance is {tolerance}: give a part of the largest |λ|, above 0")

    def run(oracle: Oracle) -> dict[str, object]:
        products = 0

        def product(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return oracle.product(v)

        start = random_vector(surface.point(), seed)
        if method == "power":
            values, vectors, scale = by_power(product, start, k, tolerance, max_products)
        else:
            values, vectors, scale = outermost(product, start, k, ORDERS[which], tolerance, max_products)
        rest = [float((product(v) - value * v).norm()) for value, v in zip(values.tolist(), vectors, strict=True)]
        return {
            "values": values.tolist(),
            "residuals": rest,
            "vectors": vectors,
            "products": products,
            "bound": tolerance * scale,
        }

    found = surface.led(run, progress="eigenvalues" if progress else "")
    return Eigenvalues(
        values=tuple(found["values"]),
        residuals=tuple(found["residuals"]),
        vectors=found["vectors"].to(surface.device),
        products=found["products"],
        bound=found["bound"],
    )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Sum of the eigenvalues of the Hessian, estimated."""

    value: float
    standard_error: float
    """Of `value`, from the scatter of the probes."""
    probes: int
    size: int
    """P, the number of eigenvalues."""

    def __str__(self) -> str:
        mean = self.value / self.size
        return f"trace {self.value:.6g} ± {self.standard_error:.2g} ({self.probes} probes); mean eigenvalue {mean:.3g}"


def trace(surface: LossSurface, *, probes: int = 32, seed: int = 0, progress: bool = False) -> Trace:
    """Trace of the Hessian by Hutchinson's estimator: the mean of vᵀHv over random signs v. Unbiased.

        print(trace(surface))

    The variance of a probe is twice the sum of squares off the diagonal (Avron & Toledo 2011, section 4; Hutchinson
    1990). All workers call it; worker 0 leads.

    Args:
        probes: products; 2 or more. The standard error falls as their square root.

    Raises:
        UsageError: fewer than 2 probes; as `LossSurface.value`, with LayoutError.
    """
    if probes < 2:
        raise UsageError(f"probes is {probes}: 2 or more, one alone has no standard error")

    def run(oracle: Oracle) -> list[float]:
        signs = (random_signs(surface.point(), seed * probes + i) for i in range(probes))
        return [float(torch.dot(v.double(), oracle.product(v).double())) for v in signs]

    found = np.array(surface.led(run, progress="trace" if progress else ""))
    error = float(found.std(ddof=1)) / math.sqrt(probes)
    return Trace(value=float(found.mean()), standard_error=error, probes=probes, size=surface.size)


@dataclass(frozen=True, kw_only=True)
class Density:
    """How the eigenvalues of the Hessian are spread: points with weights, which add up to 1."""

    nodes: tuple[float, ...]
    """Rising."""
    weights: tuple[float, ...]
    """The part of all eigenvalues that a node stands for."""

    def below(self, bound: float) -> float:
        """The part of the eigenvalues below a bound."""
        return float(sum(w for n, w in zip(self.nodes, self.weights, strict=True) if n < bound))

    def smooth(self, grid: np.ndarray, width: float) -> np.ndarray:
        """The density at each point of a grid, every node a Gaussian of this standard deviation: to be drawn."""
        away = (np.asarray(grid)[:, None] - np.array(self.nodes)) / width
        return np.asarray(np.exp(-(away**2) / 2) @ np.array(self.weights) / (width * math.sqrt(2 * math.pi)))

    def __str__(self) -> str:
        ends = [self.nodes[0], *(sign * 10.0**e for sign, e in _DECADES), self.nodes[-1]]
        bounds = [b for b in ends if self.nodes[0] <= b <= self.nodes[-1]]
        rows = [
            [f"{a:.3g} to {b:.3g}", f"{100 * (self.below(b if b < bounds[-1] else math.inf) - self.below(a)):.2f} %"]
            for a, b in itertools.pairwise(bounds)
        ]
        return table(["eigenvalues", "part"], rows)


_DECADES = [(-1, e) for e in (2, 1, 0, -1, -2)] + [(1, e) for e in (-2, -1, 0, 1, 2)]


def spectral_density(
    surface: LossSurface, *, probes: int = 8, steps: int = 40, seed: int = 0, progress: bool = False
) -> Density:
    """The density of the Hessian's eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017, section 3).

        density = spectral_density(surface)
        print(density.below(0.0))                  # how many are negative

    Each probe, random signs, gives the nodes and weights of a Gaussian quadrature that is exact for polynomials up to
    degree 2 · steps - 1. What lies closer together than the nodes is not told apart. All workers call it.

    Args:
        probes: random vectors, whose quadratures are averaged.
        steps: products for each.

    Raises:
        UsageError: no probe or no step; as `LossSurface.value`, with LayoutError.
    """
    if probes < 1 or steps < 1:
        raise UsageError(f"probes={probes}, steps={steps}: 1 or more of each")

    def run(oracle: Oracle) -> list[list[float]]:
        pairs: list[list[float]] = []
        for i in range(probes):
            start = random_signs(surface.point(), seed * probes + i)
            values, vectors = tridiagonalise(oracle.product, start, steps).ritz()
            pairs += np.stack([values, vectors[0] ** 2 / probes], axis=1).tolist()
        return sorted(pairs)

    nodes, weights = zip(*surface.led(run, progress="density" if progress else ""), strict=True)
    return Density(nodes=nodes, weights=weights)
