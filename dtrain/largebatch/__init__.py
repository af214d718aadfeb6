"""Large batches: what to set, when to grow them, and what they cost in learning."""

from dtrain.largebatch.batches import BatchPlan, plan
from dtrain.largebatch.growth import Course, Setting, grow, steady, steps, updates
from dtrain.largebatch.scaling import correct_momentum, parameter_groups, scale, zero_last_norms
from dtrain.largebatch.schedules import Schedule, constant, cosine, decay, polynomial, warm_up

__all__ = [
    "BatchPlan",
    "Course",
    "Schedule",
    "Setting",
    "constant",
    "correct_momentum",
    "cosine",
    "decay",
    "grow",
    "parameter_groups",
    "plan",
    "polynomial",
    "scale",
    "steady",
    "steps",
    "updates",
    "warm_up",
    "zero_last_norms",
]
