"""Squared norms of the gradients of one step, piece by piece, as backward brings them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dtrain.errors import UsageError

_ROW = 2**10  # numbers: few enough for float32 to add up
_CHUNK = 2**16  # rows enough, and few enough for a core's cache
_EXACT = (torch.float32, torch.float64)


Square = float | Tensor
"""A sum of squares; where a GPU computes it, a scalar there, which is not waited for yet."""


def square(tensor: Tensor) -> Square:
    """The sum of squares, right to about 1e-6, to 3e-5 where all numbers are one and the same; wherever they lie in
    memory, to the same bits.

    The difference of two that are nearly equal matters, and on a processor torch's norm of 10^7 numbers at once is off
    by 5e-4; a product of BLAS is rounded otherwise at another address.
    """
    if tensor.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(tensor, dtype=None if tensor.dtype in _EXACT else torch.float32)
        return norm.double().square()
    return _square_of(_flat(tensor))


def _square_of(flat: Tensor) -> float:
    """Row by row."""
    whole = flat.numel() // _ROW * _ROW
    rest = torch.linalg.vector_norm(flat[whole:]).item() ** 2 if whole < flat.numel() else 0.0
    if not whole:
        return rest
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    return torch.dot(rows, rows).item() + rest


def squares(tensors: Sequence[Tensor]) -> Sequence[Square]:
    """`square` of each; on a GPU by one call, if all are there."""
    if tensors and all(tensor.is_cuda and tensor.dtype in _EXACT for tensor in tensors):
        return torch._foreach_pow(torch._foreach_norm(list(tensors)), 2)
    return [square(tensor) for tensor in tensors]


def _flat(tensor: Tensor) -> Tensor:
    """In one dimension, in float32 or float64."""
    if not tensor.is_contiguous():  # the order does not matter, so take that of memory
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    flat = tensor.reshape(-1)
    return flat if flat.dtype in _EXACT else flat.float()


class SecondMoments:
    """What Adam divides gradients by, and so do AdamW, NAdam, RAdam and others that keep `exp_avg_sq`."""

    def __init__(self, optimizer: Optimizer) -> None:
        """
        Raises:
            UsageError: an optimizer that keeps no second moments.
        """
        if not all({"betas", "eps"} <= group.keys() for group in optimizer.param_groups):
            kind = type(optimizer).__name__
            raise UsageError(f"optimizer is {kind}, which keeps no second moments: leave it out, or give Adam or AdamW")
        self._state = optimizer.state
        self._group = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._scratch: dict[torch.dtype, Tensor] = {}  # what is allocated anew costs more than the division

    @property
    def known(self) -> bool:
        """Whether there are any yet: the first step makes them."""
        return any("exp_avg_sq" in state for state in self._state.values())

    def square(self, parameter: Tensor, gradient: Tensor) -> Square | None:
        """`square` of the gradient over sqrt(v / (1 - beta2^t)) + eps; None for a parameter without v."""
        state = self._state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return None
        group = self._group[parameter]
        v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        if gradient.is_cuda:
            made = torch.as_tensor(state["step"], dtype=torch.float64)  # on its device, which need not be waited for
            return square(gradient / (v / (1 - group["betas"][1] ** made)).sqrt_().add_(group["eps"]))
        if gradient.stride() != v.stride():
            gradient = gradient.expand_as(v).contiguous()
            v = v.contiguous()
        rest = math.sqrt(1 - group["betas"][1] ** float(state["step"]))
        flat = _flat(v)
        if flat.dtype not in self._scratch:
            self._scratch[flat.dtype] = flat.new_empty(_CHUNK)
        scratch = self._scratch[flat.dtype]
        sums = []  # sqrt(v / rest²) + eps = (sqrt(v) + eps rest) / rest
        for numbers, below in zip(_flat(gradient).split(_CHUNK), flat.split(_CHUNK), strict=True):
            divided = scratch[: below.numel()]
            torch.sqrt(below, out=divided).add_(group["eps"] * rest)
            torch.div(numbers, divided, out=divided)
            sums.append(_square_of(divided))
        return math.fsum(sums) * rest**2


@dataclass
class Piece:
    """Squares of the gradients of one micro-batch. Hooks hold this, and not the model."""

    parameters: Sequence[Parameter]
    second: SecondMoments | None
    squares: dict[int, Square] = field(default_factory=dict)
    """By position of the parameter."""
    twice: bool = False
    """Whether a parameter got two gradients in one backward, whose sum is not known."""

    def see(self, index: int, gradient: Tensor) -> None:
        """A parameter gets this gradient."""
        if index in self.squares:
            self.twice = True
        if gradient.layout is not torch.strided:
            return  # Replica refuses it, with a better word
        if gradient.requires_grad:
            gradient = gradient.detach()
        found = square(gradient) if self.second is None else self.second.square(self.parameters[index], gradient)
        if found is not None:
            self.squares[index] = found

    def see_all(self, gradients: Sequence[Tensor | None]) -> None:
        """Parameters have these gradients."""
        present = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        if self.second is None:
            self.squares = dict(zip(present, squares(list(present.values())), strict=True))
            return
        for index, gradient in present.items():
            self.see(index, gradient)

    def take(self, weight: float) -> list[Weighted]:
        """What was seen since the last time, if it has a weight."""
        seen, self.squares = self.squares, {}
        if not seen or not weight:
            return []
        return [Weighted(weight, list(seen), list(seen.values()))]


@dataclass(frozen=True)
class Weighted:
    """Squares of a piece, or of the mean."""

    weight: float
    members: Sequence[int]
    """Positions of the parameters."""
    squares: Sequence[Square]

    def numbers(self) -> list[float]:
        """The squares, fetched from where they are at once."""
        there = [square for square in self.squares if isinstance(square, Tensor)]
        fetched = iter(torch.stack([square.to(there[0].device) for square in there]).tolist() if there else ())
        return [next(fetched) if isinstance(square, Tensor) else square for square in self.squares]


@dataclass(frozen=True)
class Measured:
    """A step, as this worker saw it."""

    pieces: int
    samples: float
    spoilt: bool
    own: Sequence[Weighted]
    """|g|² of each piece, weighing b."""
    mean: Sequence[Weighted]
    """Of the mean gradient; empty on all workers but one."""

    def row(self, groups: Sequence[int], num_groups: int) -> list[float]:
        """What is added up over workers: pieces, samples, whether it is spoilt, Σ b |g|² by group, |mean|² by group.

        Args:
            groups: each parameter's, from 0.
        """
        sums = [[0.0] * num_groups, [0.0] * num_groups]
        for part, to in ((self.own, sums[0]), (self.mean, sums[1])):
            for seen in part:
                for member, value in zip(seen.members, seen.numbers(), strict=True):
                    to[groups[member]] += seen.weight * value
        return [float(self.pieces), self.samples, float(self.spoilt), *sums[0], *sums[1]]


class Measurement:
    """A step that is being measured, on this worker: hooks are on the parameters until it is finished or closed."""

    def __init__(self, parameters: Sequence[Parameter], *, second: SecondMoments | None, loss_scale: float) -> None:
        """
        Args:
            loss_scale: by what gradients are too large.
        """
        self._parameters = parameters
        self._loss_scale = loss_scale
        self._pieces, self._samples, self._weight = 0, 0.0, 0.0
        self._own: list[Weighted] = []
        # What .grad held before would be in the mean at the end, and in no piece.
        stale = any(bool(p.grad.any()) for p in parameters if p.grad is not None)
        self._spoilt = stale or (second is not None and not second.known)
        self._piece = Piece(parameters, second)
        self._hooks: list[RemovableHandle] = [
            parameter.register_hook(functools.partial(self._piece.see, index))
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def begin(self, factor: float, samples: float) -> None:
        """The backward of a micro-batch begins; its gradients are `factor` times the mean over so many samples."""
        self._own += self._piece.take(self._weight)
        self._weight = samples / (factor * self._loss_scale) ** 2 if samples else 0.0
        self._pieces += samples > 0
        self._samples += samples

    def finish(self, *, takes_mean: bool) -> Measured:
        """The step is over, and `.grad` holds the mean, which one worker alone takes."""
        self._own += self._piece.take(self._weight)
        self.close()
        spoilt = self._spoilt or self._piece.twice or bool(self._pieces and not self._own)
        if takes_mean:
            self._piece.see_all([p.grad for p in self._parameters])
        mean = self._piece.take(self._loss_scale**-2)
        return Measured(self._pieces, self._samples, spoilt, self._own, mean)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
