"""Virtual batch norm: each example by the statistics of a fixed reference batch (Salimans et al. 2016, section 3.5).

What comes out for an example does not depend on the others in its batch, which steadies the generator of a GAN. It
costs the forward and backward of the reference batch, in every step.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.norm.layer import NormLayer, recomputing, swap
from dtrain.norm.moments import mean_variance, wide


class Reference:
    """A model's reference batch, and the two hooks that take it through the model in front of every input.

    They do nothing in a model that has no layer of this reference left: `revert` and other conversions need not know of
    them. They are removed by the next `virtual`.
    """

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples
        self.handles: list[Any] = []
        """Of the hooks. In a copy, they are those of the copy's hooks."""

    def attach(self, model: nn.Module) -> None:
        # Hooks of the user see what the user gives and gets, where they were there before.
        self.handles = [
            model.register_forward_pre_hook(self.put_in_front, with_kwargs=True),
            model.register_forward_hook(self.take_off, prepend=True, always_call=True),
        ]

    def put_in_front(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with (R + N, ...) in the place of (N, ...)."""
        if not any(isinstance(m, VirtualBatchNorm) and m.reference is self for m in model.modules()):
            return None
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise UsageError(
                "virtual batch norm puts its reference batch in front of the input: the model must be called with one "
                "tensor, and nothing else. Convert the part of the model that is"
            )
        x = args[0]
        if x.shape[1:] != self.samples.shape[1:]:
            raise UsageError(
                f"an input of shape {tuple(x.shape)} does not go with a reference batch of shape "
                f"{tuple(self.samples.shape)}: only the number of samples may differ"
            )
        self.samples = self.samples.to(x.device)
        _active.set((*_active.get(), (self, len(self.samples) + len(x))))
        return (torch.cat([self.samples.to(x.dtype), x]),), {}

    def take_off(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """The output for the N; `out` is None where the forward raised."""
        active = _active.get()
        if not active or active[-1][0] is not self:
            return None
        _active.set(active[:-1])
        if out is None:
            return None
        if not isinstance(out, Tensor) or out.dim() < 1 or len(out) != len(args[0]):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(
                f"virtual batch norm takes the reference batch off the output, and {shape} has no row for each "
                f"of {len(args[0])} samples, reference batch included: convert the part of the model whose output does"
            )
        return out[len(self.samples) :]


_active: ContextVar[tuple[tuple[Reference, int], ...]] = ContextVar("dtrain.norm.virtual", default=())
"""Reference batches, and samples with those of the batch, of the forwards that this thread is in, innermost last."""


class VirtualBatchNorm(NormLayer):
    """Normalises the reference batch, the first R samples, by itself, and every example after it by the reference
    batch, with the example itself as one more sample if `include`.

    The same in training and in evaluation. Gradients go through the statistics. Running statistics are left alone.
    """

    own = ("reference", "include")
    reference: Reference
    include: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """(R + N, C, ...) to the same shape."""
        self._check_input_dim(x)
        if not recomputing():  # which is in backward, when the model's forward is long over
            self._check_model(len(x))
        # Each sample and channel as a channel of its own, so that torch's kernels for batch norm can be used.
        rows = x.to(wide(x.dtype)).reshape(1, x.shape[0] * x.shape[1], -1)
        apply: Any = _Moments.apply
        mean, variance = self._statistics(*(t.view(x.shape[:2]) for t in apply(rows)))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        # The kernel subtracts the mean as a constant; this term is 0, and is there for the mean's gradient.
        shift = (mean.detach() - mean) * scale
        if self.bias is not None:
            shift = shift + self.bias
        constant = mean.detach().reshape(-1)
        y = F.batch_norm(rows, constant, torch.ones_like(constant), scale.reshape(-1), shift.reshape(-1), eps=0.0)
        return y.view(x.shape).to(x.dtype)

    def _check_model(self, samples: int) -> None:
        active = _active.get()
        if not active or active[-1][0] is not self.reference:
            raise UsageError("a layer of virtual batch norm is called without its model, which has the reference batch")
        if samples != active[-1][1]:
            raise UsageError(
                f"a layer of virtual batch norm is given {samples} rows, where the model has {active[-1][1]} samples, "
                "reference batch included: which rows are the reference's is not known. Keep samples in dimension 0"
            )

    def _statistics(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance to normalise each sample by, from those of each by itself; all (R + N, C)."""
        r = len(self.reference.samples)
        mean = means[:r].mean(0)
        variance = variances[:r].mean(0) + (means[:r] - mean).square().mean(0)
        if not self.include:
            return mean.expand_as(means), variance.expand_as(means)
        # Chan's merge of r samples and one.
        apart = means[r:] - mean
        merged = (r * variance + variances[r:]) / (r + 1) + apart.square() * (r / (r + 1) ** 2)
        return (
            torch.cat([mean.expand(r, -1), mean + apart / (r + 1)]),
            torch.cat([variance.expand(r, -1), merged]),
        )


class _Moments(torch.autograd.Function):
    """Mean and biased variance (K,) of rows (1, K, L). A third of the time of var_mean, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = mean_variance(rows)
        ctx.save_for_backward(rows, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Tensor:
        rows, mean = ctx.saved_tensors
        count = rows.shape[2]
        return torch.addcmul(
            (d_mean / count).view(1, -1, 1), rows - mean.view(1, -1, 1), (d_variance * (2 / count)).view(1, -1, 1)
        )


def virtual(model: nn.Module, reference: Tensor, *, include: bool = True) -> nn.Module:
    """Let every batch-norm layer normalise by a reference batch; in place. State-dict keys stay as they are.

    The reference batch goes through the model in front of every input, and its rows are taken off the output. It is not
    in the state dict, but copies and pickles of the model have it. Running statistics are neither used nor changed.

    Args:
        model: called with one tensor, one sample a row, and returning one, one sample a row. One that is itself a
            batch-norm layer is replaced, so use what is returned.
        reference: (R, ...) inputs of the model, at least 2; chosen once, at random. Follows inputs to their device.
        include: an example counts as one more sample in its own statistics, as in the paper.

    Returns:
        The model.

    Raises:
        UsageError: less than 2 reference samples, or a lazy or foreign class; in a forward: inputs or outputs that are
            not as above, or a layer that is called without the model.
    """
    if reference.dim() < 2 or len(reference) < 2:
        raise UsageError(
            f"a reference batch of shape {tuple(reference.shape)}: at least 2 samples, (R, ...), are needed"
        )
    kept = Reference(reference.detach().clone())
    converted = swap(
        model, lambda layer, path: VirtualBatchNorm.from_plain(layer, path, reference=kept, include=include)
    )
    for handle in [handle for module in converted.modules() for handle in _handles(module)]:
        handle.remove()
    kept.attach(converted)
    return converted


def _handles(module: nn.Module) -> list[Any]:
    """Of the hooks that an earlier `virtual` put there."""
    found = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [handle for old in found if isinstance(old, Reference) for handle in old.handles]


__all__ = ["VirtualBatchNorm", "virtual"]
