"""Ghost batch norm: statistics of small groups within a worker's batch (Hoffer, Hubara & Soudry 2017, section 4).

A large batch gets the noise of small ones back. Groups are neighbours in the batch, so that a batch of 64 in groups of
32 gives what two batches of 32 would, on one worker or on two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.norm.layer import NormLayer
from dtrain.norm.moments import merge


class GhostBatchNorm(NormLayer):
    """Batch norm over groups of `norm_batch` samples. The last group is smaller where the batch does not divide.

    Running statistics are those of the whole batch, merged over the groups: the same whatever the size of a group, and
    right where the groups are not alike.
    """

    own = ("norm_batch",)
    norm_batch: int = 0
    """Samples in a group."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or len(x) <= self.norm_batch:
            return super().forward(x)
        sizes = group_sizes(len(x), self.norm_batch, values=x[0, 0].numel())
        apply: Any = _Groups.apply
        y, means, inverses = apply(x, self.weight, self.bias, sizes, self.eps)
        self._take_in(means, inverses, [size * x[0, 0].numel() for size in sizes])
        out: Tensor = y
        return out

    @torch.no_grad()
    def _take_in(self, means: Tensor, inverses: Tensor, counts: list[int]) -> None:
        sizes = torch.tensor(counts, dtype=torch.float64, device=means.device)
        variances = inverses.double().square().reciprocal().sub_(self.eps).clamp_(min=0)
        mean, m2, count = merge(means.double(), variances * sizes.unsqueeze(1), sizes)
        self.update_running(mean, m2 / count, count)


def group_sizes(samples: int, norm_batch: int, *, values: int = 2) -> list[int]:
    """Samples of each group. A last group of one value a channel has no variance, and joins the one before.

    Args:
        values: that a sample has in each channel.
    """
    full, rest = divmod(samples, norm_batch)
    sizes = [norm_batch] * full + ([rest] if rest else [])
    if len(sizes) > 1 and sizes[-1] * values < 2:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


class _Groups(torch.autograd.Function):
    """Torch's own kernel on each group, which reads and writes where the batch lies: nothing is copied together."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: list[int], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        kept = [
            torch.native_batch_norm(part, weight, bias, None, None, True, 0.0, eps, out=(out, *_stats(part)))[1:]
            for part, out in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        means, inverses = (torch.stack(rows) for rows in zip(*kept, strict=True))
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, weight, bias, means, inverses)
        ctx.mark_non_differentiable(means, inverses)
        return y, means, inverses

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, inverses = ctx.saved_tensors
        if torch.is_grad_enabled():  # a double backward: by torch's own formulas
            return (*_composed(x, weight, bias, dy, ctx.sizes, ctx.eps, ctx.needs_input_grad[:3]), None, None)
        needed = [ctx.needs_input_grad[0], weight is not None, weight is not None]
        backward = torch.ops.aten.native_batch_norm_backward
        rows = zip(dy.split(ctx.sizes), x.split(ctx.sizes), means, inverses, strict=True)
        found = [
            backward(out, part, weight, None, None, mean, inverse, True, ctx.eps, needed)
            for out, part, mean, inverse in rows
        ]
        dxs, dws, dbs = zip(*found, strict=True)
        dx = torch.cat(dxs) if needed[0] else None
        if weight is None:
            return dx, None, None, None, None
        return dx, torch.stack(dws).sum(0), torch.stack(dbs).sum(0), None, None


def _stats(part: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.float32 if part.dtype in (torch.float16, torch.bfloat16) else part.dtype
    return part.new_empty(part.shape[1], dtype=kind), part.new_empty(part.shape[1], dtype=kind)


def _composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    sizes: list[int],
    eps: float,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients as a graph of their own."""
    with torch.enable_grad():
        y = torch.cat([F.batch_norm(p, None, None, weight, bias, True, 0.0, eps) for p in x.split(sizes)])
        inputs = [t for t, wanted in zip((x, weight, bias), needed, strict=True) if wanted and t is not None]
        found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [
        next(found) if wanted and t is not None else None for t, wanted in zip((x, weight, bias), needed, strict=True)
    ]
