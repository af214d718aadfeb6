"""LARS and LAMB: the step of each tensor is scaled by the norm of its weights over that of its update.

Both are optimizers of torch: groups, schedules, closures and state dicts are as usual. A step has two halves, so that a
server which has only a part of a tensor can make it too: `direct` says what the norm of the weights is compared with,
`ratio` makes a number of the two norms, and `move` uses it.

Norms are added up in blocks of `BLOCK` elements, in the order of memory, and the blocks' sums as a tree: the result is
the same bits for any number of threads, and for any cut at a multiple of `BLOCK`. On a GPU, torch adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import UsageError

BLOCK = 1024
"""Elements of a block, whose squares are added up first."""

Group = Mapping[str, Any]
"""Settings of a group of parameters, by the names of the optimizer's constructor."""


# -- norms ------------------------------------------------------------------------------------------------------------


def squares(flat: Tensor, sizes: Sequence[int], block: int = BLOCK) -> Tensor:
    """Sums of squares of blocks of a flat tensor: float64, of shape (blocks,).

    A block's sum is taken in float64 for float64, else in float32: halves do not hold the squares of gradients (Jia et
    al. 2018, 1807.11205, section 3.1). float32 is accurate to 1e-6, and as fast as reading the tensor.

    Args:
        sizes: elements of the tensors that lie side by side in it. Each begins a block; its last one may be short.
    """
    kind = torch.float64 if flat.dtype == torch.float64 else torch.float32
    found = []
    for part in flat.split(list(sizes)) if len(sizes) > 1 else (flat,):
        whole = part.numel() // block * block
        if whole:
            found.append(torch.linalg.vector_norm(part[:whole].view(-1, block), dim=1, dtype=kind))
        if whole < part.numel():
            found.append(torch.linalg.vector_norm(part[whole:], dim=0, keepdim=True, dtype=kind))
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat(found).double().square_()


def total_norm(sums: Sequence[Tensor]) -> float:
    """The 2-norm from what `squares` gave of parts, in order, however it was cut; 0 of nothing."""
    total = np.concatenate([np.zeros(1), *(part.numpy() for part in sums)])  # on few numbers NumPy is faster
    while total.size > 1:
        half = total.size // 2
        head = total[:half] + total[half : 2 * half]
        total = np.concatenate([head, total[2 * half :]]) if total.size % 2 else head
    return math.sqrt(total[0])


def in_memory(tensor: Tensor, like: Tensor) -> Tensor:
    """Its elements, flat, in the order in which those of `like` lie in memory; a view where that is possible."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor.view(-1)
    strides = torch.empty_like(like, device="meta").stride()  # its own, where it has no gaps
    if tensor.stride() != strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


# -- what both are ----------------------------------------------------------------------------------------------------


class Layerwise(Optimizer):
    """An optimizer whose step of a tensor depends on the norms of the whole tensor."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch has it.

        Raises:
            UsageError: settings that cannot be meant, or complex parameters.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check(group)
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise UsageError(f"a parameter is {parameter.dtype}: {type(self).__name__} takes real floating point")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients anew; its loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _turns([p for p in group["params"] if p.grad is not None]):
                updates = [self.direct(p, _dense(p.grad), group) for p in parameters]
                for p, update, ratio in zip(parameters, updates, self._ratios(group, parameters, updates), strict=True):
                    self.move(p, update, group, ratio)
        return loss

    # -- the halves of a step ------------------------------------------------------------------------------------------

    def direct(self, parameter: Tensor, gradient: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
        """What the norm of the weights is compared with, of the parameter's shape; moments are brought up to date.

        Args:
            out: memory for it, of the gradient's shape and type; it may be the gradient.
        """
        raise NotImplementedError

    @staticmethod
    def ratio(group: Group, weights: float, update: float) -> float:
        """The trust ratio of the norms of the weights and of what `direct` gave; 1 where one of them is 0."""
        raise NotImplementedError

    def move(self, parameter: Tensor, update: Tensor, group: Group, ratio: float) -> None:
        """Change the parameter in place, given what `direct` gave."""
        raise NotImplementedError

    @staticmethod
    def adapts(group: Group, ndim: int) -> bool:
        """Whether a parameter of so many dimensions has a trust ratio; else it is 1."""
        return ndim > 1 if group["adapt"] is None else bool(group["adapt"])

    def _ratios(self, group: Group, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> list[float]:
        ratios = [1.0] * len(parameters)
        adapted = [i for i, p in enumerate(parameters) if self.adapts(group, p.dim())]
        weights = _norms([in_memory(parameters[i], parameters[i]) for i in adapted])
        moves = _norms([in_memory(updates[i], parameters[i]) for i in adapted])
        for i, weight, move in zip(adapted, weights, moves, strict=True):
            ratios[i] = self.ratio(group, weight, move)
        return ratios

    def _check(self, group: Group) -> None:
        """Raise UsageError for settings that cannot be meant."""
        raise NotImplementedError


class LARS(Layerwise):
    """SGD with a learning rate for each layer (You et al. 2017, 1708.03888, section 3 and algorithm 1).

    lam = trust_coefficient · ‖w‖ / (‖g‖ + weight_decay · ‖w‖ + eps)
    v ← momentum · v + lam · (g + weight_decay · w)
    w ← w − lr · v

    In the paper lr stands in the second line, so that old gradients keep the rate at which they came, also after it has
    changed. Here v is free of it, as in torch's SGD, and momentum needs no correction when the rate changes (Goyal et
    al. 2017, 1706.02677, section 3, remark 2); while the rate stays, both are one function. `lr_in_momentum=True` is
    the paper's form. The paper has no `eps`.

    Where `lam` would be 0/0, or the weights are 0, it is 1. Rates are larger than those of SGD: without momentum a step
    changes a tensor by about lr · trust_coefficient of its norm, whatever the gradient. Parameters without a ratio step
    by lr as it is, and may diverge: with a `trust_coefficient` of 0.1 it is of SGD's size (benchmarks/claims/lars.py).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        lr_in_momentum: bool = False,
        adapt: bool | None = None,
    ) -> None:
        """
        Args:
            params: parameters, or groups of them; a group may have any of the following of its own.
            weight_decay: beta; of a parameter without a ratio too. Batch norm and biases want a group with 0.
            trust_coefficient: eta of the paper.
            nesterov: step by lam · (g + weight_decay · w) + momentum · v.
            lr_in_momentum: the paper's form, without momentum correction.
            adapt: whether parameters have a ratio; those without make the step of SGD. None: those of two dimensions
                or more have, and scales and biases have not, as is usual. True: the paper's algorithm as it is written.

        Raises:
            UsageError: settings that cannot be meant.
        """
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "adapt": adapt,
        }
        super().__init__(params, settings)

    def direct(self, parameter: Tensor, gradient: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
        return gradient if out is None or out is gradient else out.copy_(gradient)

    @staticmethod
    def ratio(group: Group, weights: float, update: float) -> float:
        decayed = update + group["weight_decay"] * weights
        if weights == 0 or decayed == 0:
            return 1.0
        return float(group["trust_coefficient"] * weights / (decayed + group["eps"]))

    def move(self, parameter: Tensor, update: Tensor, group: Group, ratio: float) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        inside, outside = (lr, 1.0) if group["lr_in_momentum"] else (1.0, lr)
        scale = inside * ratio
        velocity = None
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            velocity = state["momentum_buffer"].mul_(momentum).add_(update, alpha=scale)
            if decay:
                velocity.add_(parameter, alpha=scale * decay)
            if not group["nesterov"]:
                parameter.add_(velocity, alpha=-outside)
                return
        if decay:
            parameter.mul_(1.0 - outside * scale * decay)
        parameter.add_(update, alpha=-outside * scale)
        if velocity is not None:
            parameter.add_(velocity, alpha=-outside * momentum)

    def _check(self, group: Group) -> None:
        for key in ("lr", "weight_decay", "trust_coefficient", "eps"):
            _at_least_0(key, group[key])
        _below_1("momentum", group["momentum"])
        if group["nesterov"] and not group["momentum"]:
            raise UsageError("nesterov is True with momentum 0: give a momentum, or leave nesterov out")


class LAMB(Layerwise):
    """Adam with a learning rate for each layer (You et al. 2020, 1904.00962, algorithm 2).

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
    r = m̂ / (√v̂ + eps) + weight_decay · w
    w ← w − lr · φ(‖w‖) / ‖r‖ · r,  with φ(z) = min(z, max_weight_norm)

    Where ‖w‖ or ‖r‖ is 0, the ratio is 1. Common forms differ: pytorch_optimizer takes m and v for m̂ and v̂ and divides
    the rate by 1 − β₁ᵗ, clamps ‖w‖ at 10, divides by ‖r‖ + eps, and decays weights before the step unless told
    otherwise. Some scale the gradient to a norm of 1 at most first: clip it, with 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        max_weight_norm: float | None = None,
        adapt: bool | None = None,
    ) -> None:
        """
        Args:
            params: parameters, or groups of them; a group may have any of the following of its own.
            weight_decay: lambda, decoupled from the moments; of a parameter without a ratio too.
            bias_correction: use m̂ and v̂, else m and v as they are.
            max_weight_norm: γ_u, above which a larger norm of the weights makes no larger step; None: no limit.
            adapt: whether parameters have a ratio; those without make the step of AdamW. None: those of two dimensions
                or more have, and scales and biases have not, as is usual. True: the paper's algorithm as it is written.

        Raises:
            UsageError: settings that cannot be meant.
        """
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_weight_norm": max_weight_norm,
            "adapt": adapt,
        }
        super().__init__(params, settings)

    def direct(self, parameter: Tensor, gradient: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, root = (1 - beta1**step, math.sqrt(1 - beta2**step)) if group["bias_correction"] else (1.0, 1.0)
        update = torch.sqrt(square, out=out).add_(group["eps"] * root)
        torch.div(mean, update, out=update)
        if root != first:
            update.mul_(root / first)  # m̂ / (√v̂ + eps) = m / (√v + eps · root) · root / first
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        return update

    @staticmethod
    def ratio(group: Group, weights: float, update: float) -> float:
        if weights == 0 or update == 0:
            return 1.0
        limit = group["max_weight_norm"]
        return (weights if limit is None else min(weights, limit)) / update

    def move(self, parameter: Tensor, update: Tensor, group: Group, ratio: float) -> None:
        parameter.add_(update, alpha=-float(group["lr"]) * ratio)

    def _check(self, group: Group) -> None:
        for key in ("lr", "weight_decay", "eps"):
            _at_least_0(key, group[key])
        for beta in group["betas"]:
            _below_1("betas", beta)
        if group["max_weight_norm"] is not None and not group["max_weight_norm"] > 0:
            raise UsageError(f"max_weight_norm is {group['max_weight_norm']}: more than 0, or None for no limit")


def _turns(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """What is worked on together: on the processor one by one, in cache; else all of a device, to wait for it once."""
    found: dict[object, list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        found.setdefault(number if parameter.device.type == "cpu" else parameter.device, []).append(parameter)
    return list(found.values())


def _norms(flats: Sequence[Tensor]) -> list[float]:
    """Of flat tensors of one device."""
    if flats and flats[0].device.type != "cpu":
        return _norms_at_once(flats)
    return [total_norm([squares(flat, [flat.numel()])]) for flat in flats]


def _norms_at_once(flats: Sequence[Tensor]) -> list[float]:
    """As torch adds them up; the device is waited for once."""
    kinds = [torch.float64 if flat.dtype == torch.float64 else torch.float32 for flat in flats]
    norms = [torch.linalg.vector_norm(flat, dtype=kind).double() for flat, kind in zip(flats, kinds, strict=True)]
    found: list[float] = torch.stack(norms).tolist()
    return found


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None  # noqa: S101
    if gradient.layout != torch.strided:
        raise UsageError("a gradient is sparse, and its norm is wanted: make the embedding with sparse=False")
    return gradient


def _at_least_0(key: str, value: Any) -> None:
    if not 0 <= float(value) < math.inf:
        raise UsageError(f"{key} is {value}: give 0 or more")


def _below_1(key: str, value: Any) -> None:
    if not 0 <= float(value) < 1:
        raise UsageError(f"{key} has {value}: give 0 or more, and less than 1")
