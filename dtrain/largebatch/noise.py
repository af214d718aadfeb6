"""The noise scale of SGD: how strongly the choice of batches shakes the parameters (Smith & Le 2018, 1710.06451).

SGD with learning rate ε, momentum m and batches of B out of N samples behaves like a differential equation whose random
force has strength g = ε / (1 − m) · (N / B − 1) (sections 4 and 5; for N ≫ B: ε N / (B (1 − m))). Runs with the same g
and small enough ε end alike: what changes one of ε, B, m, N can be made up for by another.

That is of batches drawn independently. With one shuffle per epoch, as a `Loader` has it, the noise of the batches of an
epoch cancels: around a minimum that is well determined it shakes much less (benchmarks/claims/noise_scale.py).

Not to be confused with the gradient noise scale, which is a property of model and data and says how large a batch pays
(`dtrain.largebatch.GradientNoise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from dtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SGDNoise:
    """What decides the noise scale of SGD."""

    lr: float
    """Learning rate, above 0."""
    batch: float
    """Samples in one optimizer step, over all workers; from 1 to `num_samples`."""
    num_samples: float
    """Samples of the training set."""
    momentum: float = 0.0
    """From 0, to below 1; Nesterov's too."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UsageError(f"lr is {self.lr}: a learning rate is above 0")
        if not 1 <= self.batch <= self.num_samples:
            raise UsageError(f"batch is {self.batch}: from 1 to the number of samples, {self.num_samples}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}: from 0 to below 1")

    @property
    def scale(self) -> float:
        """g = ε / (1 − m) · (N / B − 1); 0 where a batch is the whole training set."""
        return self.lr / (1 - self.momentum) * (self.num_samples / self.batch - 1)

    def keep(self, free: str, **changed: float) -> SGDNoise:
        """The setting with some fields changed, and `free` such that the noise scale stays what it is.

            SGDNoise(lr=0.1, batch=128, num_samples=50_000, momentum=0.9).keep("lr", batch=1024)

        Args:
            free: `lr`, `batch`, `num_samples` or `momentum`: the one that makes up for the others. A batch or a number
                of samples need not come out whole.
            changed: new values of others.

        Raises:
            UsageError: a field that there is not, or no value of `free` keeps the scale.
        """
        wrong = sorted({free, *changed} - set(_KEEPS))
        if wrong or free in changed:
            raise UsageError(
                f"keep({free!r}) with {', '.join(changed) or 'nothing'} changed: name one of {', '.join(_KEEPS)} to be "
                "found, and new values of others"
            )
        if self.scale == 0:
            raise UsageError(
                f"batch is all {self.num_samples:g} samples: without noise there is no noise scale to keep"
            )
        new = replace(self, **changed)
        if free in ("lr", "momentum") and new.scale == 0:
            raise UsageError(
                f"batch is all {new.num_samples:g} samples: no {free} gives the noise scale {self.scale:g}"
            )
        value = _KEEPS[free](self.scale, new)
        try:
            return replace(new, **{free: value})
        except UsageError as error:
            raise UsageError(f"no {free} keeps the noise scale {self.scale:g}: it would be {value:.4g}") from error

    def __str__(self) -> str:
        return (
            f"SGD noise scale {self.scale:.4g} = lr {self.lr:g} / (1 - momentum {self.momentum:g}) x "
            f"(samples {self.num_samples:g} / batch {self.batch:g} - 1)"
        )


_KEEPS: Mapping[str, Callable[[float, SGDNoise], float]] = MappingProxyType(
    {
        "lr": lambda g, s: g * (1 - s.momentum) / (s.num_samples / s.batch - 1),
        "batch": lambda g, s: s.num_samples / (1 + g * (1 - s.momentum) / s.lr),
        "num_samples": lambda g, s: s.batch * (1 + g * (1 - s.momentum) / s.lr),
        "momentum": lambda g, s: 1 - s.lr * (s.num_samples / s.batch - 1) / g,
    }
)
"""The equation for g, solved for each of its fields."""


def what_keeps_it(setting: SGDNoise, factor: float = 2.0) -> str:
    """The noise scale and, a line for each field that is made larger by `factor`, which value of another one keeps it.

    Momentum is made "larger" by dividing 1 − m. What cannot be is left out.
    """
    lines = [f"{setting}."]
    for name in _KEEPS:
        value = getattr(setting, name) * factor if name != "momentum" else 1 - (1 - setting.momentum) / factor
        ways = [way for free in _KEEPS if free != name and (way := _way(setting, free, name, value))]
        if ways:
            lines.append(f"  {name} {value:g}: kept by {', or '.join(ways)}")
    return "\n".join(lines)


def _way(setting: SGDNoise, free: str, name: str, value: float) -> str:
    try:
        kept = setting.keep(free, **{name: value})
    except UsageError:
        return ""
    found = getattr(kept, free)
    return f"{free} {found:.4g}" if found < 1000 else f"{free} {found:.0f}"
