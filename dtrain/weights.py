"""How much each worker's loss weighs in a step: by samples, over workers and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.errors import UsageError

_MIXED = "give samples= and total= with every backward of a step, or with none"


class StepWeights:
    """What the micro-batches of a step have said so far, and what follows for the next one."""

    def __init__(self, comm: Backend, parameters: Sequence[nn.Parameter]) -> None:
        self._comm = comm
        self._parameters = parameters
        self._given: tuple[bool, bool] | None = None  # whether this step's micro-batches had samples= and total=
        self._fresh = True  # whether the step began without gradients
        self._samples = 0.0  # of this step's micro-batches, total unknown
        self.share: float | None = None
        """This worker's part of the step's samples so far, where `total` is known."""

    def of(self, samples: float | None, total: float | None, *, sync: bool) -> tuple[float, float]:
        """(factor on the loss, scale on the gradient as it is sent), for the arguments of `Replica.backward`.

        The factor is the same multiple of `samples` on all workers, or batch-norm messages would not add up. A global
        gradient that `.grad` already holds survives a mean over workers, but no other scale; where there is none, the
        loss takes the whole weight and gradients need no pass to be scaled.
        """
        world = self._comm.world_size
        if samples is None and total is not None:
            raise UsageError(f"total is {total} and samples is not given: give both")
        limit = math.inf if total is None else total
        if samples is not None and not (0 <= samples <= limit and limit > 0 and math.isfinite(samples)):
            raise UsageError(f"samples is {samples}, total {total}: samples run from 0 to total, and total is above 0")
        self.go_on((samples is not None, total is not None), sync=sync)
        if samples is None:
            return 1.0, 1.0 / world
        if total is None and not sync:
            self._samples += samples
            return float(samples), 1.0
        if total is None:
            total = collectives.sum_numbers(self._comm, [self._samples + samples], "metric/samples")[0]
            if total <= 0:
                raise UsageError("samples is 0 on every worker: a step needs at least one sample")
            if self._given is not None:
                return float(samples), 1.0 / total
            return (samples / total, 1.0) if self._fresh else (world * samples / total, 1.0 / world)
        self.share = (self.share or 0.0) + samples / total
        return (samples / total, 1.0) if self._fresh else (world * samples / total, 1.0 / world)

    def go_on(self, given: tuple[bool, bool], *, sync: bool) -> None:
        """Make sure that this backward can be added to those before it in the step."""
        fresh = all(p.grad is None for p in self._parameters)
        if fresh:  # whatever was begun before zero_grad() is forgotten
            self.reset()
        self.refuse_mixture(given)
        if self._given is None:
            self._fresh = fresh
        if sync:
            return
        unknown = given == (True, False) and self._given is None
        if unknown and not fresh and any(p.grad.any() for p in self._parameters if p.grad is not None):
            raise UsageError(
                "backward(samples=, sync=False) on top of earlier gradients: call zero_grad() first, or give total="
            )
        self._given = given

    def refuse_mixture(self, given: tuple[bool, bool]) -> None:
        """Raise if the step has begun with other arguments than these."""
        if self._given not in (None, given):
            raise UsageError(_MIXED)

    def reset(self) -> None:
        """The step is over."""
        self._given, self._samples, self.share = None, 0.0, None
