"""Sharpness: how far the loss can rise in a small box around the parameters (Keskar et al. 2017, 1609.04836)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import UsageError
from dtrain.largebatch.curvature import LossSurface, Oracle
from dtrain.largebatch.lanczos import random_vector

_FAR = 1e30  # told to L-BFGS-B for a loss that is not finite, which ends the search


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """How far the loss rises in the box. `str` says it in a sentence."""

    value: float
    """100 · (highest - loss) / (1 + loss), metric 2.1: a rise in percent. A lower bound of what the box has: the search
    is cut off after some iterations, as in the paper."""
    loss: float
    """Where the model stands."""
    highest: float
    """The highest mean loss that was found in the box; infinite, if it was not finite somewhere."""
    epsilon: float
    dimensions: int
    """Of the box."""
    evaluations: int
    """Values and gradients of the loss, over all data, that the search took."""

    def __str__(self) -> str:
        return (
            f"sharpness {self.value:.4g}: the loss, {self.loss:.4g}, rises to {self.highest:.4g} within ε = "
            f"{self.epsilon:g} ({self.dimensions} dimensions, {self.evaluations} evaluations)"
        )


def sharpness(
    surface: LossSurface,
    *,
    epsilon: float = 1e-3,
    dimensions: int | None = None,
    iterations: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Sharpness:
    """Sharpness of the loss around where the model stands, by L-BFGS-B (section 2.2.2, metric 2.1).

        print(sharpness(surface))                      # the whole space
        print(sharpness(surface, dimensions=100))      # a random subspace

    With x the parameters (P,) and a matrix A (P, p), the box is |z_i| <= ε (|(A⁺x)_i| + 1) and the loss is looked at in
    x + Az. In the whole space A is the identity; else its columns are random, here standard normal. Compare at equal
    loss: a run that has not come as far is less sharp for that alone. Rescaling weights so that the function stays
    changes it (Dinh et al. 2017), so compare one architecture.

    The search begins at x, and stays there if the gradient is exactly 0. All workers call it and evaluate the same
    points; worker 0 leads.

    Args:
        epsilon: the paper has 1e-3 and 5e-4.
        dimensions: p; None: the whole space. Memory: P · p numbers on worker 0.
        iterations: of L-BFGS-B; the paper has 10.
        seed: of the subspace.

    Raises:
        UsageError: what cannot be meant, or a loss that is not finite where the model stands; as `LossSurface.value`,
            with LayoutError.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError(f"epsilon is {epsilon}: give the half width of the box, above 0; the paper has 1e-3")
    if dimensions is not None and not 1 <= dimensions <= surface.size:
        raise UsageError(f"dimensions is {dimensions}: 1 to {surface.size}, or None for the whole space")
    if iterations < 1:
        raise UsageError(f"iterations is {iterations}: 1 or more")

    def run(oracle: Oracle) -> dict[str, object]:
        x = surface.point().double()
        directions = None if dimensions is None else _directions(x, dimensions, seed)
        return _search(oracle, x, directions, epsilon, iterations)

    found = surface.led(run, progress="sharpness" if progress else "")
    loss, highest = found["loss"], found["highest"]
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss} where the model stands: nothing can be compared with it")
    return Sharpness(
        value=100.0 * (highest - loss) / (1.0 + loss),
        loss=loss,
        highest=highest,
        epsilon=epsilon,
        dimensions=dimensions or surface.size,
        evaluations=found["evaluations"],
    )


def _search(oracle: Oracle, x: Tensor, directions: Tensor | None, epsilon: float, iterations: int) -> dict[str, object]:
    """Climb from x (P,) float64 within the box; `directions` is A transposed (p, P)."""
    from scipy.optimize import Bounds, minimize  # takes a second

    losses: list[float] = []

    def descent(z: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the loss and its gradient, which L-BFGS-B lowers."""
        step = torch.from_numpy(z).to(x)
        loss, slope = oracle.slope(x + (step if directions is None else step @ directions))
        losses.append(loss)
        slope = slope.double()
        slope = slope if directions is None else directions @ slope
        if not (math.isfinite(loss) and bool(slope.isfinite().all())):
            return _FAR, np.zeros(len(z))
        return -loss, -slope.cpu().numpy()

    inner = x if directions is None else torch.linalg.lstsq(directions.T, x.unsqueeze(1)).solution.squeeze(1)
    half = epsilon * (inner.abs() + 1.0).cpu().numpy()
    minimize(
        descent, np.zeros(len(half)), jac=True, method="L-BFGS-B", bounds=Bounds(-half, half),
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )  # fmt: skip
    highest = max(losses) if all(map(math.isfinite, losses)) else math.inf
    return {"loss": losses[0], "highest": highest, "evaluations": len(losses)}


def _directions(x: Tensor, dimensions: int, seed: int) -> Tensor:
    return random_vector(x.new_empty(dimensions, len(x)), seed)
