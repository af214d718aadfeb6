"""The gradient noise scale of a training that runs: each worker's gradients are looked at before they are summed.

    noise = dtrain.largebatch.GradientNoise(model, comm)
    replica.observe(noise)
    ...                                   # the loop, with replica.backward(loss, **share)
    print(noise.estimate())               # on all workers, whenever it is wanted

Every twentieth step, hooks take the squared norm of each gradient that a backward brings to a parameter, before it is
added to `.grad`; at the end of the step, worker 0 takes that of the mean. Nothing is sent until the figures are asked
for. What follows from them is in `noise_estimate`.

One worker with one micro-batch a step gives one sample of the gradient, from which the noise scale is not identifiable.
The difference of two steps' gradients is no second sample: its square also holds that of the change of the true
gradient in between, which is as unknown as the noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.comm.base import Backend
from dtrain.errors import DataError, UsageError
from dtrain.largebatch.gradient_squares import Measured, Measurement, SecondMoments
from dtrain.largebatch.noise_estimate import Estimate, estimate_table


def by_module(name: str) -> str:
    """A parameter's group: the top-level module that it belongs to."""
    return name.partition(".")[0]


def one_group(_: str) -> str:
    """All parameters in one group."""
    return "all"


def check_window(every: int, window: int) -> None:
    """
    Raises:
        UsageError: they are no numbers of steps.
    """
    if every < 1 or window < 1:
        raise UsageError(f"every is {every}, window {window}: numbers of steps, 1 or more")


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Noise scales over the same steps."""

    whole: Estimate
    """Of the whole model."""
    groups: Mapping[str, Estimate]
    """Of groups of parameters, by name."""
    skipped: int
    """Measured steps that were left out: a gradient was not finite, or not this step's alone, or Adam had no v yet."""

    def __str__(self) -> str:
        return str(self.whole)


class GradientNoise:
    """Measures the gradient noise scale; a `Replica` is to observe with it."""

    def __init__(
        self,
        model: nn.Module,
        comm: Backend,
        *,
        every: int = 20,
        window: int = 100,
        group: Callable[[str], str] = by_module,
        optimizer: Optimizer | None = None,
        samples: float | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """
        Args:
            every: measure each step whose number is a multiple of this.
            window: how many measured steps are kept; an estimate is over all that are.
            group: a parameter's name -> the name of its group.
            optimizer: Adam or one like it: gradients are then divided by sqrt(v) + eps, as its step divides them, with
                v from before the step. The noise scale is that of the preconditioned gradient. A step that finds no v
                is left out.
            samples: of each micro-batch, where `Replica.backward` is not told. All are of one size then.
            loss_scale: by what the loss is multiplied, `GradScaler.get_scale`, say; it may change from step to step.

        Raises:
            UsageError: numbers that cannot be meant, a model without parameters, an optimizer without second moments.
        """
        check_window(every, window)
        if samples is not None and not samples > 0:
            raise UsageError(f"samples is {samples}: above 0, or None if backward is told")
        self._comm = comm
        self._every = every
        self._samples = samples
        self._loss_scale = loss_scale
        named = [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]  # without torch.compile's
        if not named:
            raise UsageError("the model has no parameters: there is no gradient to look at")
        self._parameters = [p for _, p in named]
        self._names = list(dict.fromkeys(group(name) for name, _ in named))
        self._groups = [self._names.index(group(name)) for name, _ in named]
        self._second = None if optimizer is None else SecondMoments(optimizer)
        self._count = 0
        self._in_step = False
        self._step: Measurement | None = None
        self._pending: deque[Measured] = deque(maxlen=window)  # this worker's own, not sent yet
        self._rows: deque[list[float]] = deque(maxlen=window)  # of all workers, see `Measured.row`
        self._skipped = 0

    # -- what a Replica calls -----------------------------------------------------------------------------------------

    def begin(self, factor: float, samples: float | None) -> None:
        """See `dtrain.replica.Observer`."""
        if not self._in_step:
            self._in_step = True
            if (self._count + 1) % self._every == 0:
                self._measure()
        elif self._step is not None and all(p.grad is None for p in self._parameters):
            self._measure()  # what was begun has failed, or was thrown away by zero_grad()
        if self._step is None:
            return
        if samples is None:
            samples = self._samples
            if samples is None:
                self._forget()
                raise UsageError(
                    "the noise scale is in samples: call backward(samples=, total=), or give samples= to GradientNoise"
                )
        self._step.begin(factor, samples)

    def end(self) -> None:
        """See `dtrain.replica.Observer`."""
        if self._step is not None:
            self._pending.append(self._step.finish(takes_mean=self._comm.rank == 0))
        self._forget()
        self._count += 1

    # -- what users call ----------------------------------------------------------------------------------------------

    def estimate(self, *, confidence: float = 0.95, population: float | None = None) -> Estimates:
        """The noise scale over the measured steps of the window; the same on all workers, which all call it.

        Args:
            confidence: of the intervals.
            population: see `noise_estimate.estimate`.

        Raises:
            CommError: another process is gone, late or silent.
        """
        self._agree()
        rows = np.array(self._rows).reshape(len(self._rows), _HEAD + 2 * len(self._names))
        head, own, mean = np.split(rows, [_HEAD, _HEAD + len(self._names)], axis=1)
        pieces, samples = head[:, _PIECES], head[:, _SAMPLES]
        parts = [*zip(own.T, mean.T, strict=True), (own.sum(1), mean.sum(1))]
        tables = [np.stack([pieces, samples, of_pieces / samples, of_mean], axis=1) for of_pieces, of_mean in parts]
        found = [estimate_table(table, confidence=confidence, population=population) for table in tables]
        groups = dict(zip(self._names, found[:-1], strict=True))
        return Estimates(whole=found[-1], groups=groups, skipped=self._skipped)

    def reset(self) -> None:
        """Forget what was measured: after a change of the learning rate, say. All workers call it at the same step."""
        self._forget()
        self._pending.clear()
        self._rows.clear()
        self._skipped = 0

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on: numbers, lists and names; the same on all workers, which all call it."""
        self._agree()
        return {
            "count": self._count,
            "skipped": self._skipped,
            "groups": list(self._names),
            "rows": [list(row) for row in self._rows],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of workers; a step that has begun is forgotten.

        Raises:
            DataError: it is of other groups.
        """
        if list(state["groups"]) != self._names:
            raise DataError(f"the noise scale was saved with groups {state['groups']}, and here they are {self._names}")
        self.reset()
        self._count, self._skipped = int(state["count"]), int(state["skipped"])
        self._rows.extend([float(x) for x in row] for row in state["rows"])

    # -- within -------------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        if self._step is not None:
            self._step.close()
        scale = 1.0 if self._loss_scale is None else self._loss_scale()
        self._step = Measurement(self._parameters, second=self._second, loss_scale=scale)

    def _forget(self) -> None:
        if self._step is not None:
            self._step.close()
        self._step, self._in_step = None, False

    def _agree(self) -> None:
        """Sum over workers what was not yet; workers have measured the same steps.

        Each by itself: in what order a ring adds depends on the size of the message, and a run that stopped in between,
        to be resumed, asks after other steps.
        """
        rows = [torch.tensor(step.row(self._groups, len(self._names)), dtype=torch.float64) for step in self._pending]
        self._pending.clear()
        for work in [self._comm.all_reduce(row, "metric/noise") for row in rows]:
            work.wait()
        for row in [row.tolist() for row in rows]:
            if row[_SPOILT] or not row[_SAMPLES] or not all(map(math.isfinite, row)):
                self._skipped += 1
            else:
                self._rows.append(row)


_PIECES, _SAMPLES, _SPOILT, _HEAD = range(4)
