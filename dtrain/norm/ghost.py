"""Ghost batch norm: statistics of small groups within a worker's batch (Hoffer, Hubara & Soudry 2017, section 4).

A large batch gets the noise of small ones back. Groups are neighbours in the batch, so that a batch of 64 in groups of
32 gives what two batches of 32 would, on one worker or on two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.norm.gradients import composed, gradient_sums, linear
from dtrain.norm.layer import NormLayer
from dtrain.norm.moments import in_rows, merge, row_moments, wide

_LEAST = 64
"""Values in a row, one sample's in one channel, from which rows are quicker than groups."""


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
        if not _dense(x):  # torch's kernel with out= is wrong on other strides
            x = x.contiguous()
        values = x[0, 0].numel()
        if self.norm_batch * values < 2:
            raise ValueError(f"expected more than 1 value per channel in a group of {self.norm_batch} when training")
        weight, bias = self._affine(x)
        sizes = group_sizes(len(x), self.norm_batch, values=values)
        apply: Any = (_Rows if in_rows(x, least=_LEAST) and _same(weight, x) else _Groups).apply
        y, means, variances = apply(x, weight, bias, sizes, self.eps)
        counts = torch.tensor(sizes, dtype=torch.float64, device=x.device) * values
        mean, m2, count = merge(means.double(), variances.double() * counts.unsqueeze(1), counts)
        self.update_running(mean, m2 / count, count)
        out: Tensor = y
        return out

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, both or none; for a half-precision x in float32, as the kernels' statistics then are."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if x.dtype != wide(x.dtype):
            weight = x.new_ones(x.shape[1], dtype=torch.float32) if weight is None else weight.float()
        if weight is None:
            return None, None
        return weight, torch.zeros_like(weight, requires_grad=False) if bias is None else bias.to(weight.dtype)


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
    """Torch's own kernel on each group, where it lies in the batch."""

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
        variances = inverses.double().square().reciprocal().sub_(eps).clamp_(min=0)
        ctx.mark_non_differentiable(means, variances)
        return y, means, variances

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, inverses = ctx.saved_tensors
        if torch.is_grad_enabled():  # a double backward: by torch's own formulas
            return (*composed(x, weight, bias, dy, ctx.sizes, ctx.eps, ctx.needs_input_grad[:3]), None, None)
        needed = [ctx.needs_input_grad[0], weight is not None, weight is not None]
        backward = torch.ops.aten.native_batch_norm_backward
        rows = zip(dy.split(ctx.sizes), x.split(ctx.sizes), means, inverses, strict=True)
        found = [
            backward(out, part, weight, None, None, mean, inverse, True, ctx.eps, needed)
            for out, part, mean, inverse in rows
        ]
        dxs, dws, dbs = zip(*found, strict=True)
        dx = torch.cat(dxs) if needed[0] else None
        dw = torch.stack(dws).sum(0) if ctx.needs_input_grad[1] else None
        db = torch.stack(dbs).sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


class _Rows(torch.autograd.Function):
    """By rows, the values of one sample in one channel: each pass goes over all groups at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: list[int], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples, channels = x.shape[:2]
        values = x[0, 0].numel()
        counts = torch.tensor(sizes, dtype=torch.float64).unsqueeze(1) * values
        row_means, row_m2s = row_moments(x)
        means = _gather(row_means, sizes) * values / counts
        away = (row_means - _spread(means, sizes, x.dtype)).square_().mul_(values)
        variances = _gather(away.add_(row_m2s), sizes) / counts
        y = F.batch_norm(
            x.view(1, samples * channels, values),
            _spread(means, sizes, x.dtype).reshape(-1),
            _spread(variances, sizes, x.dtype).reshape(-1),
            None if weight is None else weight.repeat(samples),
            None if bias is None else bias.repeat(samples),
            eps=eps,
        )
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, weight, bias, means, variances, counts)
        ctx.mark_non_differentiable(means, variances)
        return y.resize_(x.shape), means, variances  # a view could not be changed in place, as by a ReLU

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, variances, counts = ctx.saved_tensors
        sizes, kind = ctx.sizes, x.dtype
        if torch.is_grad_enabled():  # a double backward: by torch's own formulas
            return (*composed(x, weight, bias, dy, sizes, ctx.eps, ctx.needs_input_grad[:3]), None, None)
        samples, channels = x.shape[:2]
        inverses = (variances + ctx.eps).rsqrt()
        mean, inverse = (_spread(t, sizes, kind).reshape(-1) for t in (means, inverses))
        x_rows, dy_rows = (t.reshape(1, samples * channels, -1) for t in (x, dy))
        sums = gradient_sums(dy_rows, x_rows, mean, inverse)
        dy_x, dy_only = (_gather(t.view(samples, channels), sizes) for t in sums)
        dx = None
        if ctx.needs_input_grad[0]:
            scale = inverses if weight is None else inverses * weight
            slope = -scale * inverses * dy_x / counts
            shift = -scale * dy_only / counts - slope * means
            slope, shift, scale = (_spread(t, sizes, kind).reshape(-1) for t in (slope, shift, scale))
            dx = linear(x_rows, slope, shift, dy_rows, scale).view_as(x)
        dw = dy_x.sum(0).to(x.dtype) if ctx.needs_input_grad[1] else None
        db = dy_only.sum(0).to(x.dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def _dense(x: Tensor) -> bool:
    """Whether it lies in memory in one of the orders that torch's kernels know."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def _same(weight: Tensor | None, x: Tensor) -> bool:
    return weight is None or weight.dtype == x.dtype


def _gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """Sums over the samples of each group: (N, C) to (groups, C), float64."""
    if sizes[-1] == sizes[0]:
        return rows.view(len(sizes), sizes[0], -1).sum(1, dtype=torch.float64)
    return torch.stack([part.sum(0, dtype=torch.float64) for part in rows.split(sizes)])


def _spread(groups: Tensor, sizes: list[int], kind: torch.dtype) -> Tensor:
    """What each group has, for each of its samples: (groups, C) to (N, C)."""
    groups = groups.to(kind)
    if sizes[-1] == sizes[0]:
        return groups.unsqueeze(1).expand(-1, sizes[0], -1).reshape(-1, groups.shape[1])
    return groups.repeat_interleave(torch.tensor(sizes), 0)


def _stats(part: Tensor) -> tuple[Tensor, Tensor]:
    kind = wide(part.dtype)
    return part.new_empty(part.shape[1], dtype=kind), part.new_empty(part.shape[1], dtype=kind)
