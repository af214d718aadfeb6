"""Large batches: what to set, when to grow them, and what they cost in learning.

Methods: `plan`, `scale` and `warm_up`, `grow`, LARS and LAMB. Measurements: `SGDNoise`, `GradientNoise`, `LossSurface`
with its eigenvalues, `sharpness`, `evidence`. The hooks that use them in a `dtrain.Trainer` are in `dtrain.steering`.
"""

from dtrain.largebatch.advice import Advice, Decision, Rule, advise, decide
from dtrain.largebatch.batches import BatchPlan, plan
from dtrain.largebatch.critical import (
    Fit,
    TradeOff,
    adascale_gain,
    fit,
    optimal_lr,
    sample_efficiency,
    step_efficiency,
    temperature,
)
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.evidence import Evidence, evidence
from dtrain.largebatch.gradient_noise import Estimates, GradientNoise, by_module, one_group
from dtrain.largebatch.growth import Course, Setting, grow, steady, steps, updates
from dtrain.largebatch.noise import SGDNoise, what_keeps_it
from dtrain.largebatch.noise_estimate import Estimate, Sums, estimate, moments
from dtrain.largebatch.part import Part
from dtrain.largebatch.scaling import correct_momentum, parameter_groups, scale, zero_last_norms
from dtrain.largebatch.schedules import Schedule, constant, cosine, decay, polynomial, warm_up
from dtrain.largebatch.sharpness import Sharpness, sharpness
from dtrain.largebatch.spectrum import Density, Eigenvalues, Trace, spectral_density, top_eigenvalues, trace
from dtrain.largebatch.zero import zero_bytes
from dtrain.optim import LAMB, LARS

__all__ = [
    "LAMB",
    "LARS",
    "Advice",
    "BatchPlan",
    "Course",
    "Decision",
    "Density",
    "Eigenvalues",
    "Estimate",
    "Estimates",
    "Evidence",
    "Fit",
    "GradientNoise",
    "LossSurface",
    "Part",
    "Rule",
    "SGDNoise",
    "Schedule",
    "Setting",
    "Sharpness",
    "Sums",
    "Trace",
    "TradeOff",
    "adascale_gain",
    "advise",
    "by_module",
    "constant",
    "correct_momentum",
    "cosine",
    "decay",
    "decide",
    "estimate",
    "evidence",
    "fit",
    "grow",
    "moments",
    "one_group",
    "optimal_lr",
    "parameter_groups",
    "plan",
    "polynomial",
    "sample_efficiency",
    "scale",
    "sharpness",
    "spectral_density",
    "steady",
    "step_efficiency",
    "steps",
    "temperature",
    "top_eigenvalues",
    "trace",
    "updates",
    "warm_up",
    "what_keeps_it",
    "zero_bytes",
    "zero_last_norms",
]
