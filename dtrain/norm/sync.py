"""Synchronised batch normalisation over any backend: statistics of the samples of all workers.

Batch norm as of Ioffe & Szegedy 2015 (algorithm 1), on the batch that all workers hold together. Torch's own
`SyncBatchNorm` needs CUDA; this one runs wherever the backend does, and is exact for unequal and for empty shares.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.errors import LayoutError, UsageError
from dtrain.norm.gradients import gradient_sums, linear
from dtrain.norm.layer import NormLayer
from dtrain.norm.moments import merge, moments, wide


class SyncBatchNorm(NormLayer):
    """Batch norm whose statistics are those of all samples that a group of workers holds in this forward.

    One message a layer and direction: mean, M2 and count forward; the two sums of the gradient backward. In evaluation
    nothing is sent. Running statistics are those of all workers, whatever the groups, and the same on each;
    `running_var` has Bessel's correction over the merged count, as in torch. Inputs are (N, C, ...); N may differ
    between workers, and be 0. Double backward is not supported.
    """

    own = ("comm", "key", "group_size")
    comm: Backend | None = None
    """None in a copy or in what was unpickled: statistics are then those of the batch alone, until `convert`."""
    key: str = ""
    group_size: int | None = None
    """Workers that share statistics, neighbours by rank; None: all."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the connection."""
        return {**self.__dict__, "comm": None}

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training and self.comm is not None:
            return self._synchronised(x, self.comm)
        return super().forward(x)

    @_disable_dynamo  # torch.compile is not to look into the transfers
    def _synchronised(self, x: Tensor, comm: Backend) -> Tensor:
        size = self.group_size or comm.world_size
        group = slice(comm.rank // size * size, (comm.rank // size + 1) * size)
        means, m2s, counts = self._all_statistics(x, comm)
        mean, m2, count = merge(means[group], m2s[group], counts[group])
        if x.device.type == "cpu" and int(count) < 2:
            raise ValueError(f"expected more than 1 value per channel when training, over its workers ({self.key})")
        variance = m2 / count.clamp(min=1)
        if size == comm.world_size:
            self.update_running(mean, variance, count)
        else:
            everyone, all_m2, total = merge(means, m2s, counts)
            self.update_running(everyone, all_m2 / total.clamp(min=1), total)
        apply: Any = _Normalise.apply
        y: Tensor = apply(x, self.weight, self.bias, mean, variance, count, self.eps, comm, self.key, size)
        return y

    @torch.no_grad()
    def _all_statistics(self, x: Tensor, comm: Backend) -> tuple[Tensor, Tensor, Tensor]:
        """Means and M2 (workers, C) and counts (workers,), float64: the same bits on every worker.

        Looking at what came would stop a CUDA device, so there nothing is looked at.
        """
        mean, m2, count = moments(x.detach())
        channels = mean.numel()
        # A table with one row a worker; the others' rows are zero here, so that the sum hands everyone all rows.
        table = x.new_zeros(comm.world_size, 2 * channels + 2, dtype=torch.float64)
        row = table[comm.rank]
        row[:channels], row[channels:-2], row[-2], row[-1] = mean, m2, count, zlib.crc32(self.key.encode())
        comm.all_reduce(table.view(-1), f"norm/{self.key}").wait()
        if x.device.type == "cpu" and bool((table[:, -1] != row[-1]).any()):
            raise LayoutError(f"worker {comm.rank} is in batch norm {self.key}, and another worker in another layer")
        return table[:, :channels], table[:, channels:-2], table[:, -2]


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; the gradient goes through all workers' statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        comm: Backend,
        key: str,
        group_size: int,
    ) -> Tensor:
        kind = wide(x.dtype)
        ctx.comm, ctx.key, ctx.group_size = comm, key, group_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean.to(kind), (variance + eps).rsqrt().to(kind), count)
        # Statistics stay wide for a half-precision x, and torch wants weight and bias of the same type as they are.
        weight, bias = (None if t is None else t.to(kind) for t in (weight, bias))
        return F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        kind = mean.dtype
        x, dy_wide = x.to(kind), dy.to(kind)
        own_dy_x, own_dy = gradient_sums(dy_wide, x, mean, inverse)
        dx = None
        if ctx.needs_input_grad[0]:
            own = torch.cat([own_dy, own_dy_x])
            # One row a group of workers, as above.
            sums = own.new_zeros(ctx.comm.world_size // ctx.group_size, own.numel(), dtype=torch.float64)
            row = sums[ctx.comm.rank // ctx.group_size].copy_(own)
            ctx.comm.all_reduce(sums.view(-1), f"norm/{ctx.key}.backward").wait()
            mean_dy, mean_dy_x = (row / count.clamp(min=1)).chunk(2)
            scale = inverse.double() if weight is None else inverse.double() * weight
            slope = -scale * inverse * mean_dy_x
            shift = -scale * mean_dy - slope * mean
            dx = linear(x, slope.to(kind), shift.to(kind), dy_wide, scale.to(kind)).to(dy.dtype)
        # Parameters' gradients stay local: they are summed over workers with all the others.
        dw = own_dy_x.to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = own_dy.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, *[None] * 7


def check_comm(found: Mapping[str, _BatchNorm], comm: Backend | None) -> None:
    """Refuse to look at layers of several workers on one of them.

    Args:
        found: layers by path.
        comm: the backend that was given.

    Raises:
        UsageError: none was, and a layer is synchronised.
    """
    for path, layer in found.items():
        if isinstance(layer, SyncBatchNorm) and comm is None and layer.comm is not None and layer.comm.world_size > 1:
            raise UsageError(f"{path} is synchronised over {layer.comm.world_size} workers: give their backend as comm")
