"""The second seam: a backend with a memory, whose servers keep the parameters and make the optimizer's steps.

Workers push gradients and pull parameters; whether and when they wait for each other is a rule of the update, not of
the transfer (Li et al. 2014, "Scaling Distributed Machine Learning with the Parameter Server", section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dtrain.comm.base import Backend
from dtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """Let the servers keep the parameters and step the optimizer: for `replicate(..., update=ServerUpdate(...))`.

    Inexact where a step is not made of all workers' gradients: what a worker pulls may then be of neighbouring
    versions, each server's newest, and over sockets the newest of each part of 1 MiB.
    """

    optimizer: Optimizer
    """Over the model's parameters. It is described to the servers, which step their own; its learning rate and other
    settings are sent with each step, so that schedules work. It keeps no state here. One of torch's, or LARS or LAMB of
    `dtrain.optim`: workers agree on the norms of tensors that several servers have parts of. Where steps are not of all
    workers (staleness, backup workers, lost ones dropped), tensors are not cut for these two."""
    clip_grad_norm: float | None = None
    """Largest norm of the mean gradient, over all servers; of each worker's own gradient, where steps are its own."""
    staleness: int | None = 0
    """0: a step is made of all workers' gradients together. s: each worker's gradient is a step of its own, and nobody
    is more than s steps ahead of the slowest (Ho et al. 2013). None: nobody waits."""
    backup_workers: int = 0
    """With staleness 0: make each step of the gradients that come first, without the last so many (Chen et al.
    2016, "Revisiting Distributed Synchronous SGD")."""
    damping: bool = False
    """With staleness: divide the learning rate by the staleness of the gradient (Zhang et al. 2016)."""
    delay_compensation: float = 0.0
    """With staleness: lambda of DC-ASGD, which corrects a gradient for what others changed (Zheng et al. 2017)."""
    early_forward: bool = False
    """Where each step is made of all workers' gradients: let the next forward begin before all parameters are there.
    Each layer waits for its own, and those that forward needs first travel first; the numbers are the same. When the
    model has returned, all are there; who wants to read parameters before it is called waits by `Replica.settle`."""

    def __post_init__(self) -> None:
        if self.staleness is not None and self.staleness < 0:
            raise UsageError(f"staleness is {self.staleness}: 0 or more, or None for no bound")
        if self.backup_workers < 0 or (self.backup_workers and self.staleness != 0):
            raise UsageError(
                f"backup_workers is {self.backup_workers} with staleness {self.staleness}: backup workers are 0 or "
                "more, and go with staleness=0"
            )
        if self.early_forward and (self.staleness != 0 or self.backup_workers):
            raise UsageError(
                "early_forward with staleness or backup_workers, where parameters do not come one by one: leave one of "
                "them away"
            )
        if not (self.delay_compensation >= 0 and math.isfinite(self.delay_compensation)):
            raise UsageError(f"delay_compensation is {self.delay_compensation}: give 0 or more")
        if self.staleness == 0 and (self.damping or self.delay_compensation):
            raise UsageError("damping and delay_compensation are for stale gradients: give staleness=s or None")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise UsageError(f"clip_grad_norm is {self.clip_grad_norm}: give more than 0")

    @property
    def synchronous(self) -> bool:
        """Whether a step is made of several workers' gradients."""
        return self.staleness == 0


@dataclass(frozen=True)
class HostedBucket:
    """Parameters that travel together, and the flat tensor that their gradients lie in, in this order."""

    gradient: Tensor
    """Has the parameters' type and device; it may be longer than they are together."""
    named: Sequence[tuple[str, Parameter]]

    @property
    def numel(self) -> int:
        """Of the parameters."""
        return sum(p.numel() for _, p in self.named)


@dataclass(frozen=True)
class StepReport:
    """What became of a worker's step."""

    version: int
    """Steps that the servers have made."""
    staleness: int
    """Steps of others between what the gradient was computed from and what it was applied to."""
    counted: int
    """Workers whose gradient the step was made of; 0: this worker came too late, and its gradient was dropped."""


class Hosted(Protocol):
    """Parameters that servers keep. `begin`, `push` each bucket, `finish`, `pull`: one step of one worker.

    Where all workers make each step together, the values may be waited for one by one: `conclude`, then `arrive` of any
    buckets, then `pull`.
    """

    steps: int
    """Steps that this worker has taken part in, or that the servers have made, where they are the same."""

    def begin(self, share: float) -> None:
        """Start a step; `share` is this worker's part of the samples of the global batch."""

    def push(self, bucket: int, present: Sequence[bool]) -> None:
        """Send a bucket's gradient, which must not change before `pull` returns.

        Args:
            present: which of its parameters have a gradient here.
        """

    def finish(self) -> None:
        """All buckets have been pushed."""

    def conclude(self) -> None:
        """Return when the step needs nothing more of this worker. `pull` does it too, where it was not called."""

    def arrive(self, bucket: int) -> None:
        """Return when a bucket's parameters are those after the step."""

    def pull(self) -> StepReport:
        """Return when all parameters are those after the step."""

    def refresh(self) -> None:
        """Get the newest values. All workers call it, none of them in a step; all have the same afterwards."""

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The `state` of the optimizer's state dict, on worker 0; nothing elsewhere. All workers call it, none in a
        step."""

    def restore(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Make worker 0's values and this optimizer state the servers'. All workers call it."""

    def state_bytes(self) -> int:
        """Bytes that are kept for the optimizer, all together. All workers call it."""

    def table(self) -> str:
        """Who keeps what, to be printed."""


@runtime_checkable
class ParameterHost(Backend, Protocol):
    """A Backend whose servers can keep parameters: workers need not meet."""

    def host(
        self, buckets: Sequence[HostedBucket], model: Sequence[tuple[str, Parameter]], update: ServerUpdate
    ) -> Hosted:
        """Hand the parameters to the servers. All workers call it; the values are worker 0's.

        The parameters of a bucket lie side by side in one tensor from then on, where servers write them.

        Args:
            model: all parameters of the model, by name; the optimizer may have some that are not trained.
        """
