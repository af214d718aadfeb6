"""Synchronised batch normalisation over any backend: statistics of the samples of all workers.

Batch norm as of Ioffe & Szegedy 2015 (algorithm 1), on the batch that all workers hold together. Torch's own
`SyncBatchNorm` needs CUDA; this one runs wherever the backend does, and is exact for unequal and for empty shares.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.errors import LayoutError, UsageError
from dtrain.norm.moments import merge, moments


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of all workers' samples of this forward.

    One message a layer and direction: mean, M2 and count forward; the two sums of the gradient backward. In evaluation
    nothing is sent. `running_var` has Bessel's correction over the merged count, as in torch. Inputs are (N, C, ...);
    N may differ between workers, and be 0. Double backward is not supported.
    """

    comm: Backend | None = None
    """None in a copy or in what was unpickled: statistics are then those of the batch alone, until `convert`."""
    key: str = ""
    original: type[_BatchNorm] = _BatchNorm

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the connection."""
        return {**self.__dict__, "comm": None}

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm takes (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training and self.comm is not None:
            return self._synchronised(x)
        return super().forward(x)

    @_disable_dynamo  # torch.compile is not to look into the transfers
    def _synchronised(self, x: Tensor) -> Tensor:
        mean, variance, count = self._global_statistics(x)
        self._update_running(mean, variance, count)
        apply: Any = _Normalise.apply
        y: Tensor = apply(x, self.weight, self.bias, mean, variance, count, self.eps, self.comm, self.key)
        return y

    @torch.no_grad()
    def _global_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance (C,) and count () over all workers, float64: the same bits on every worker."""
        assert self.comm is not None  # noqa: S101
        mean, m2, count = moments(x.detach())
        channels = mean.numel()
        # A table with one row a worker; the others' rows are zero here, so that the sum hands everyone all rows.
        table = x.new_zeros(self.comm.world_size, 2 * channels + 2, dtype=torch.float64)
        row = table[self.comm.rank]
        row[:channels], row[channels:-2], row[-2], row[-1] = mean, m2, count, zlib.crc32(self.key.encode())
        self.comm.all_reduce(table.view(-1), f"norm/{self.key}").wait()
        if bool((table[:, -1] != row[-1]).any()):
            raise LayoutError(
                f"worker {self.comm.rank} is in batch norm {self.key}, and another worker in another layer"
            )
        mean, m2, total = merge(table[:, :channels], table[:, channels:-2], table[:, -2])
        return mean, m2 / total.clamp(min=1), total

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if int(count) < 2:
            raise ValueError(f"expected more than 1 value per channel when training, over all workers ({self.key})")
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


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
    ) -> Tensor:
        kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        ctx.comm, ctx.key = comm, key
        ctx.save_for_backward(x, weight, mean.to(kind), (variance + eps).rsqrt().to(kind), count)
        # Statistics stay wide for a half-precision x, and torch wants weight and bias of the same type as they are.
        weight, bias = (None if t is None else t.to(kind) for t in (weight, bias))
        return F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = dy.to(mean.dtype)
        centred = x.to(mean.dtype) - mean.view(shape)
        # Over this worker's samples: the sum of dy, and of dy times the normalised input.
        own = torch.cat([wide.sum(dims), (wide * centred).sum(dims) * inverse])
        own_dy, own_dy_x = own.chunk(2)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = own.to(torch.float64, copy=True)
            ctx.comm.all_reduce(sums, f"norm/{ctx.key}.backward").wait()
            mean_dy, mean_dy_x = (sums / count.clamp(min=1)).to(mean.dtype).chunk(2)
            scale = inverse if weight is None else inverse * weight.to(mean.dtype)
            centred.mul_((inverse * mean_dy_x).view(shape)).neg_().add_(wide).sub_(mean_dy.view(shape))
            dx = centred.mul_(scale.view(shape)).to(dy.dtype)
        # Parameters' gradients stay local: they are summed over workers with all the others.
        dw = None if weight is None else own_dy_x.to(weight.dtype)
        db = None if weight is None else own_dy.to(weight.dtype)
        return dx, dw, db, None, None, None, None, None, None


def from_plain(layer: _BatchNorm, comm: Backend, key: str) -> SyncBatchNorm:
    """A synchronised layer with the parameters and buffers of `layer`: the same objects, under the same names."""
    if layer.__class__ not in PLAIN:
        raise UsageError(
            f"{key} is a {type(layer).__name__}: only {', '.join(c.__name__ for c in PLAIN)} are converted"
        )
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    new.__dict__.update(layer.__dict__)
    new.comm, new.key, new.original = comm, key, type(layer)
    return new


def to_plain(layer: SyncBatchNorm) -> _BatchNorm:
    """The layer that `from_plain` was given, again with the same parameters and buffers."""
    plain: _BatchNorm = layer.original.__new__(layer.original)
    plain.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in ("comm", "key", "original")})
    return plain


PLAIN: tuple[type[_BatchNorm], ...] = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
