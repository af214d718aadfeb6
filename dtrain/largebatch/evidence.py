"""Bayesian evidence for a model at a minimum, by Laplace's method (Smith & Le 2018, 1710.06451, section 2).

The posterior goes like exp(-C), with the cost C(w) = N f(w) + λ/2 |w|²: the summed loss, each sample's a negative log
likelihood, and a Gaussian prior of precision λ. The evidence is the likelihood averaged over the prior,

    P(y | x, M) = (λ / 2π)^(P/2) ∫ exp(-C(w)) dw  ≈  exp(-C(w₀)) · Π (λ_i / λ)^(-1/2)

where λ_i are the eigenvalues of the Hessian of C at its minimum w₀, λ included. It is exact where C is quadratic. The
second factor is Occam's: the part of the prior's volume that fits the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dtrain.errors import UsageError
from dtrain.largebatch.curvature import LossSurface

_STEEP = 0.1  # of a unit of log evidence: what a Newton step may still gain where a point passes for a minimum


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """How likely the data are under a model, its parameters averaged out. `str` says it in a few lines."""

    cost: float
    """C(w₀): summed loss and the prior's λ/2 |w|²."""
    log_occam: float
    """Logarithm of the Occam factor, -½ Σ ln(λ_i / λ)."""
    distance: float
    """What C is still above its minimum, as a Newton step tells: ½ gᵀ(∇∇C)⁻¹g. Near 0 if w₀ is the minimum."""
    samples: int
    parameters: int
    precision: float
    """λ."""
    classes: int | None
    """n, of the null model that says 1/n for each sample. None: no null model."""

    @property
    def log_evidence(self) -> float:
        """ln P(y | x, M)."""
        return self.log_occam - self.cost

    @property
    def log_null(self) -> float:
        """ln P of the null model, -N ln n; NaN without one."""
        return math.nan if self.classes is None else -self.samples * math.log(self.classes)

    @property
    def log_ratio(self) -> float:
        """E(w₀) = ln P(null) - ln P(M): below 0 the model is the likelier, above 0 the null model. NaN without one."""
        return self.log_null - self.log_evidence

    @property
    def at_minimum(self) -> bool:
        """Whether w₀ is near enough to a minimum of C for the figures to mean what they say."""
        return self.distance <= _STEEP

    def __str__(self) -> str:
        lines = [
            f"log evidence {self.log_evidence:.2f} = log likelihood and prior {-self.cost:.2f}, Occam factor "
            f"{self.log_occam:.2f} (λ = {self.precision:g}, {self.parameters} parameters, {self.samples} samples)"
        ]
        if self.classes is not None:
            likelier = "the model" if self.log_ratio < 0 else "the null model"
            lines.append(
                f"against guessing one of {self.classes}: E = {self.log_ratio:.2f}, {likelier} is the likelier"
            )
        if not self.at_minimum:
            lines.append(f"not at a minimum: C can fall by about {self.distance:.2g}; train on before you trust this")
        return "\n".join(lines)


def evidence(
    surface: LossSurface, *, precision: float, classes: int | None = None, max_parameters: int = 4096
) -> Evidence:
    """The evidence for a model that was trained to a minimum of C, from the full Hessian.

        found = evidence(surface, precision=1.0, classes=10)
        found.log_ratio < 0          # it has learnt something that guessing has not

    The surface's loss is the mean negative log likelihood (in nats: cross-entropy is one) over the training samples,
    without the prior. Of torch's `weight_decay` on that mean, λ is N times as much. Every parameter that requires a
    gradient has the prior. All workers call it.

    Args:
        precision: λ of the Gaussian prior, as for the summed loss.
        classes: n, to compare with the null model that gives each of n classes 1/n.
        max_parameters: refuse larger models: the Hessian has P² numbers, and its eigenvalues take P³ operations.

    Raises:
        UsageError: λ is 0 or less; a curvature of 0 or less, which no minimum has; too many parameters; as
            `LossSurface.value`, with LayoutError.
    """
    if not (precision > 0 and math.isfinite(precision)):
        raise UsageError(f"precision is {precision}: λ of the prior, above 0; without a prior there is no evidence")
    if classes is not None and classes < 2:
        raise UsageError(f"classes is {classes}: 2 or more, or None for no null model")
    matrix = surface.hessian(max_parameters=max_parameters).double().cpu() * surface.samples
    matrix.diagonal().add_(precision)
    values, vectors = torch.linalg.eigh(matrix)
    if not values[0] > 0:
        raise UsageError(
            f"the cost curves down ({values[0].item():.3g} is the smallest curvature): this is no minimum; train on, "
            "or raise the precision"
        )
    point = surface.point().double().cpu()
    slope = surface.samples * surface.gradient().double().cpu() + precision * point
    along = vectors.T @ slope
    return Evidence(
        cost=surface.samples * surface.value() + precision / 2 * float(point @ point),
        log_occam=-0.5 * float((values / precision).log().sum()),
        distance=0.5 * float((along**2 / values).sum()),
        samples=surface.samples,
        parameters=surface.size,
        precision=precision,
        classes=classes,
    )
