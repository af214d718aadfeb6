"""The learning rate of a large batch, and what goes with it (Goyal et al. 2017, "Accurate, Large Minibatch SGD").

Of that paper's remarks (section 3 and 5.1), those that are code:

- *Momentum correction*: torch's SGD keeps the rate out of the momentum buffer (v = m v + g, w -= lr v), so a rate that
  changes needs none. An optimizer whose buffer has the rate in it (v = m v + lr g, w -= v) needs `correct_momentum`.
- *Weight decay is not a part of the loss*: to scale the loss is not to scale the rate. Scale the rate.
- *No weight decay* for the scales and shifts of batch norm, nor for biases: `parameter_groups`.
- *Last batch-norm scale of each residual block at zero*: `zero_last_norms`.
- *Loss normalised by the global batch* and *one shuffle per epoch, cut over the workers*: `dtrain.Replica.backward` and
  `dtrain.Loader` do it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dtrain.errors import UsageError

RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
"""Powers of (batch / base batch) that the learning rate is multiplied by."""


def scale(batch: float, base_batch: float, rule: str = "linear") -> float:
    """What to multiply a learning rate by that was tuned for `base_batch`.

    `linear`: batch / base_batch (Goyal et al. 2017, section 2.1), for SGD while gradients of neighbouring steps are
    alike; it breaks beyond a critical batch. `sqrt`: the root of it (Krizhevsky 2014; Hoffer et al. 2017, section 4;
    You et al. 2020 for LAMB), usual for Adam's kind. `none`: 1.

    Raises:
        UsageError: another rule, or a batch of no samples.
    """
    if rule not in RULES:
        raise UsageError(f"rule is {rule!r}: one of {', '.join(RULES)}")
    if not (batch > 0 and base_batch > 0 and math.isfinite(batch / base_batch)):
        raise UsageError(f"batch is {batch}, base_batch {base_batch}: give numbers of samples above 0")
    return float((batch / base_batch) ** RULES[rule])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what is decayed, and biases and the scales and shifts of norms, which are not.

    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1, momentum=0.9)

    Parameters of at most one dimension are not decayed (Goyal et al. 2017, section 5.1; Jia et al. 2018, section 4.1).
    Parameters that need no gradient are left out, and so is a group without any.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def zero_last_norms(model: nn.Module, block: type[nn.Module] | tuple[type[nn.Module], ...]) -> int:
    """Start each residual block as its shortcut: the scale of its last batch or group norm becomes zero.

    zero_last_norms(model, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck))

    The last one is looked for among the block's own layers, in the order in which they were assigned; only where it has
    none of its own, in its first part that has some. A shortcut's norms, which come in a part of their own after that,
    stay as they are. How many were set is returned.

    Args:
        block: the class, or classes, of the residual blocks.

    Raises:
        UsageError: no block of that kind, or one without a norm that has a scale.
    """
    blocks = [module for module in model.modules() if isinstance(module, block)]
    if not blocks:
        names = ", ".join(c.__name__ for c in (block if isinstance(block, tuple) else (block,)))
        raise UsageError(f"the model has no block of class {names}")
    for module in blocks:
        norms = _scaled_norms(module.children()) or next(
            (found for part in module.children() if (found := _scaled_norms(part.modules()))), []
        )
        if not norms:
            raise UsageError(f"{type(module).__name__} has no batch norm or group norm with a scale")
        nn.init.zeros_(norms[-1].weight)
    return len(blocks)


def _scaled_norms(modules: Any) -> list[Any]:
    return [m for m in modules if isinstance(m, _NormBase | nn.GroupNorm) and m.weight is not None]


@torch.no_grad()
def correct_momentum(optimizer: Optimizer, factor: float) -> None:
    """After a learning rate that is part of the momentum buffer was multiplied by `factor`, do the same to the buffer.

    Goyal et al. 2017, equation 10: v' = m (lr' / lr) v + lr' g. For optimizers that keep v = m v + lr g in a state
    `momentum_buffer`, such as `LARS(lr_in_momentum=True)`; torch's SGD does not, and needs none.

    Raises:
        UsageError: a factor that is not above 0, or an optimizer that is known to need no correction.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise UsageError(f"factor is {factor}: give lr' / lr, above 0")
    apart = any(group.get("lr_in_momentum") is False for group in optimizer.param_groups)
    if apart or isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        raise UsageError(f"{name} keeps the learning rate out of its momentum: it needs no correction")
    for state in optimizer.state.values():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].mul_(factor)
