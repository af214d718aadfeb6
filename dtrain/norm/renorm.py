"""Batch renormalisation: the network trains on what it is evaluated with (Ioffe 2017, arXiv 1702.03275, algorithm 1).

For small batches, and for batches whose samples are not independent: there, statistics of the batch are noisy or
one-sided, and those that evaluation uses are neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError
from dtrain.norm.gradients import composed
from dtrain.norm.layer import NormLayer, recomputing, swap
from dtrain.norm.moments import mean_variance


class BatchRenorm(NormLayer):
    """y = ((x - mean_B) / sigma_B * r + d) * weight + bias, corrected towards the running averages.

    r = sigma_B / sigma within [1 / r_max, r_max] and d = (mean_B - mean) / sigma within [-d_max, d_max]: where neither
    limit is met, y is what evaluation would compute. They count as constants in the gradient, which goes through mean_B
    and sigma_B. The averages are those before this batch, which is taken in afterwards.

    sigma_B is sqrt(biased variance of the batch + eps), sigma is sqrt(running_var + eps). The running averages are
    torch's: of the variance, with Bessel's correction, where the paper averages sigma. At very few values a channel,
    r is therefore below 1 on average: by sqrt((n - 1) / n) for n values.

    The limits depend on `num_batches_tracked`, which state dicts hold: a run that goes on, goes on with its schedule.
    """

    own = ("r_max", "d_max", "warmup", "r_steps", "d_steps")
    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000
    r_steps: int = 40000
    d_steps: int = 25000

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or x.numel() <= x.shape[1]:  # no variance: torch refuses, or lets nothing through
            return super().forward(x)
        mean, variance = mean_variance(x.detach())
        if recomputing() and int(self.num_batches_tracked or 0) > self.warmup:
            raise UsageError(
                "batch renormalisation is computed again in backward (gradient checkpointing), and its averages have "
                "moved on since: leave its layers out of the checkpointed part"
            )
        r, d = self.correction(mean, variance)
        weight = r if self.weight is None else r * self.weight
        bias = d if self.weight is None else d * self.weight
        if self.bias is not None:
            bias = bias + self.bias
        apply: Any = _Normalise.apply
        y: Tensor = apply(x, weight, bias, mean, variance, self.eps)
        self.update_running(mean, variance, x.numel() // x.shape[1])
        return y

    @_disable_dynamo  # which would compute r and d again in backward, from averages that have moved on
    @torch.no_grad()
    def correction(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (C,), for a batch of that mean and biased variance."""
        assert self.running_mean is not None  # noqa: S101 - `renorm` sees to it
        assert self.running_var is not None  # noqa: S101
        r_max, d_max = self.limits()
        sigma = (self.running_var.to(mean.dtype) + self.eps).sqrt()
        r = ((variance + self.eps).sqrt() / sigma).clamp(r_max.reciprocal(), r_max)
        d = ((mean - self.running_mean.to(mean.dtype)) / sigma).clamp(-d_max, d_max)
        return r, d

    def limits(self) -> tuple[Tensor, Tensor]:
        """r_max and d_max, float64 scalars, of the next update; tensors, so that a GPU is not waited for."""
        assert self.num_batches_tracked is not None  # noqa: S101
        past = self.num_batches_tracked.double() + 1 - self.warmup
        r_share, d_share = ((past / max(1, steps - self.warmup)).clamp(0, 1) for steps in (self.r_steps, self.d_steps))
        return 1 + (self.r_max - 1) * r_share, self.d_max * d_share


class _Normalise(torch.autograd.Function):
    """Batch norm with statistics that are there already: r and d must be known before. One pass, as torch's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a double backward: by torch's own formulas
            return (*composed(x, weight, bias, dy, [len(x)], ctx.eps, needed), None, None, None)
        backward = torch.ops.aten.native_batch_norm_backward
        return (*backward(dy, x, weight, None, None, mean, inverse, True, ctx.eps, list(needed)), None, None, None)


def renorm(
    model: nn.Module,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    warmup: int = 5000,
    r_steps: int = 40000,
    d_steps: int = 25000,
) -> nn.Module:
    """Let every batch-norm layer renormalise; in place. Parameters, buffers and state-dict keys stay as they are.

    The first `warmup` updates are plain batch norm; then the limits grow linearly, from r = 1 and d = 0. The defaults
    are the paper's, for runs of more than 100 000 updates: in shorter ones, nothing but plain batch norm may be left.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        r_max: largest scale, and 1 over the smallest; at least 1.
        d_max: largest shift, in standard deviations; at least 0.
        warmup: updates of plain batch norm. Averages must be worth something before they are used.
        r_steps: the update at which `r_max` is reached, counted from the first; not before `warmup`.
        d_steps: the same for `d_max`.

    Returns:
        The model.

    Raises:
        UsageError: limits or steps that cannot be meant, a layer without running averages, a lazy or foreign class.
    """
    if r_max < 1 or d_max < 0:
        raise UsageError(f"r_max is {r_max} and d_max {d_max}: r_max is at least 1, d_max at least 0")
    if not 0 <= warmup <= min(r_steps, d_steps):
        raise UsageError(
            f"warmup is {warmup}, r_steps {r_steps} and d_steps {d_steps}: all count from the first update, and "
            "the limits grow after the warm-up; so none is negative, and warmup is the smallest"
        )

    def make(layer: _BatchNorm, path: str) -> BatchRenorm:
        if layer.running_mean is None or layer.num_batches_tracked is None:
            raise UsageError(
                f"{path} keeps no running averages, towards which renormalisation corrects: "
                "make it with track_running_stats=True"
            )
        return BatchRenorm.from_plain(
            layer, path, r_max=r_max, d_max=d_max, warmup=warmup, r_steps=r_steps, d_steps=d_steps
        )

    return swap(model, make)


__all__ = ["BatchRenorm", "renorm"]
