"""What a server is told of an optimizer: its class by name, the settings of its groups, and which it can step.

No code travels, and nothing is made of what came before every value has been looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import ProtocolError, UsageError
from dtrain.optim import LAMB, LARS

Value = float | int | bool | str | None | tuple[float | None, ...]
Hyper = tuple[dict[str, Value], ...]
"""Hyperparameters of all groups of an optimizer, by the names of its constructor."""

MAX_GROUPS = 2**17

_FUSED: dict[str, Any] = {"fused": True}
_FOREACH: dict[str, Any] = {"foreach": True}
LOOP: dict[str, Any] = {"foreach": False}
"""One tensor after the other."""
CLASSES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    # Fastest of what does not depend on cuts, on a chunk of 1 MiB in one thread: tests/ps/test_update.py compares bits.
    "SGD": (torch.optim.SGD, _FUSED),
    "Adam": (torch.optim.Adam, _FUSED),
    "AdamW": (torch.optim.AdamW, _FUSED),
    "Adagrad": (torch.optim.Adagrad, _FUSED),
    "Adamax": (torch.optim.Adamax, _FOREACH),
    "RAdam": (torch.optim.RAdam, _FOREACH),
    "RMSprop": (torch.optim.RMSprop, _FOREACH),
    "NAdam": (torch.optim.NAdam, LOOP),
    "Rprop": (torch.optim.Rprop, LOOP),
    "Adadelta": (torch.optim.Adadelta, LOOP),
    "ASGD": (torch.optim.ASGD, LOOP),
    "Adafactor": (torch.optim.Adafactor, LOOP),
    "Muon": (torch.optim.Muon, {}),
    "LARS": (LARS, {}),
    "LAMB": (LAMB, {}),
}
"""Those that servers can step, by name, and how it is done."""
WHOLE = frozenset({"Adafactor", "Muon"})
"""Optimizers that look at a whole tensor to update an element of it."""
LAYERWISE = frozenset({"LARS", "LAMB"})
"""Optimizers that update each element by itself, but for a number that depends on the norms of the whole tensor."""
ELEMENTWISE = frozenset(CLASSES) - WHOLE - LAYERWISE
"""Optimizers that update each element by itself."""

_REASONS = {
    "LBFGS": "it computes the loss several times in a step",
    "SparseAdam": "it takes sparse gradients, which are not sent",
}
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")
_CHOICES: dict[str, tuple[Value, ...]] = {
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
    "ns_steps": tuple(range(100)),
    "adapt": (None, False, True),
}
_OR_NONE = frozenset({"max_weight_norm"})
_FIXED = ("amsgrad", "centered", "initial_accumulator_value")


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer without its parameters."""

    name: str
    """Of its class in `torch.optim`, or in `dtrain.optim`."""
    groups: Hyper

    @property
    def whole(self) -> bool:
        """Whether it needs whole tensors."""
        return self.name in WHOLE

    @property
    def layerwise(self) -> bool:
        """Whether it needs norms of whole tensors."""
        return self.name in LAYERWISE


def spec_of(optimizer: Optimizer, who: str = "servers") -> OptimizerSpec:
    """What makes this optimizer again on a server.

    Args:
        who: is to step it, for the words of an error.

    Raises:
        UsageError: an optimizer that servers cannot step, and why.
    """
    name = _name(optimizer, who)
    for g, group in enumerate(optimizer.param_groups):
        for flag in ("differentiable", "capturable"):
            if group.get(flag):
                raise UsageError(f"optimizer has {flag}=True in group {g}: {who} cannot do that; leave it out")
        if group.get("decoupled_weight_decay", True) is not optimizer.defaults.get("decoupled_weight_decay", True):
            raise UsageError(f"decoupled_weight_decay of group {g} is changed: give it to the optimizer's constructor")
    try:
        return _checked(name, hyper(optimizer))
    except ValueError as error:
        raise UsageError(f"optimizer {name}: {error}") from error


def hyper(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The present hyperparameters of all groups, which schedules change, in lists, dicts, numbers, strings and None.

    Raises:
        UsageError: one that is not finite, or of another type than the optimizer documents.
    """
    names = _parameters(_name(optimizer))
    found = []
    for g, group in enumerate(optimizer.param_groups):
        values = {key: _plain(group[key]) for key in names}
        if "initial_accumulator_value" in values:  # torch reads its default, whatever the group says
            values["initial_accumulator_value"] = _plain(optimizer.defaults["initial_accumulator_value"])
        try:
            _group(names, values)
        except ValueError as error:
            raise UsageError(f"group {g} of the optimizer: {error}") from error
        found.append(values)
    return found


def encode_spec(spec: OptimizerSpec) -> list[Any]:
    """The spec in lists, dicts, numbers, strings and None."""
    return [spec.name, [{key: _plain(value) for key, value in group.items()} for group in spec.groups]]


def decode_spec(data: object) -> OptimizerSpec:
    """The spec that `encode_spec` has made this of.

    Raises:
        ProtocolError: anything else, or values that the optimizer refuses.
    """
    if not isinstance(data, list) or len(data) != 2 or not isinstance(data[0], str) or data[0] not in CLASSES:
        raise ProtocolError("an optimizer that is not [name, groups] with the name of one that servers step")
    try:
        return _checked(data[0], data[1])
    except ValueError as error:
        raise ProtocolError(f"optimizer {data[0]}: {error}") from error


def decode_hyper(spec: OptimizerSpec, data: object) -> Hyper:
    """The hyperparameters that `hyper` has made this of, for `ShardOptimizer.step`.

    Raises:
        ProtocolError: anything else, or a change that the state of the optimizer does not allow.
    """
    try:
        groups = _groups(spec.name, data)
        if len(groups) != len(spec.groups):
            raise ValueError(f"{len(groups)} groups, where there were {len(spec.groups)}; make a new optimizer")
        for g, (new, old) in enumerate(zip(groups, spec.groups, strict=True)):
            for key in _FIXED:
                if key in old and new[key] != old[key]:
                    raise ValueError(f"{key} of group {g} was {old[key]} and is {new[key]}; make a new optimizer")
            if spec.name == "RMSprop" and bool(new["momentum"]) != bool(old["momentum"]):
                raise ValueError(
                    f"momentum of group {g} was {old['momentum']} and is {new['momentum']}; begin with > 0"
                )
        return groups
    except ValueError as error:
        raise ProtocolError(f"hyperparameters of {spec.name}: {error}") from error


def _name(optimizer: Optimizer, who: str = "servers") -> str:
    """Of an optimizer that servers can step."""
    name = type(optimizer).__name__
    if name in CLASSES and type(optimizer) is CLASSES[name][0]:
        return name
    reason = _REASONS.get(name, "") if type(optimizer).__module__.startswith("torch.optim.") else ""
    reason = reason or f"it is not a class of torch.optim or dtrain.optim, and {who} make it anew from its name"
    can = ", ".join(sorted(CLASSES))
    raise UsageError(f"optimizer is {name}: {who} cannot step it, because {reason}; give update='worker', or use {can}")


@cache
def _parameters(name: str) -> dict[str, Any]:
    """Hyperparameters of an optimizer, and their defaults."""
    parameters = list(inspect.signature(CLASSES[name][0].__init__).parameters.values())[2:]
    return {p.name: p.default for p in parameters if p.name not in _EXECUTION}


def _plain(value: Any) -> Any:
    """Tensors and numpy's numbers as Python's, tuples as lists; the rest as it is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def _checked(name: str, data: object) -> OptimizerSpec:
    """The spec, after torch has looked at the values too."""
    groups = _groups(name, data)
    for g, group in enumerate(groups):
        if g == 0 or group != groups[g - 1]:
            try:
                cls: Any = CLASSES[name][0]
                cls([torch.zeros(1, 1)], **group)
            except Exception as error:  # whatever torch raises
                raise ValueError(f"group {g}: {error}") from error
    return OptimizerSpec(name, groups)


def _groups(name: str, data: object) -> Hyper:
    if not isinstance(data, list) or not 0 < len(data) <= MAX_GROUPS:
        raise ValueError(f"groups are not a list of 1 to {MAX_GROUPS}")
    names = _parameters(name)
    return tuple(_group(names, values) for values in data)


def _group(names: Mapping[str, Any], values: object) -> dict[str, Value]:
    if not isinstance(values, dict) or values.keys() != names.keys():
        raise ValueError(f"a group does not have exactly {', '.join(names)}")
    return {key: _value(key, default, values[key]) for key, default in names.items()}


def _value(key: str, default: Any, value: Any) -> Value:
    """The value, if it is of the kind of the default; a list becomes a tuple."""
    if key in _CHOICES:
        if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[key]):
            raise ValueError(f"{key} is {value!r}: it is one of {', '.join(map(repr, _CHOICES[key]))}")
        return value  # type: ignore[no-any-return]
    if value is None and key in _OR_NONE:
        return None
    if isinstance(default, tuple):
        if type(value) not in (list, tuple) or len(value) != len(default):
            raise ValueError(f"{key} is {value!r}: it is {len(default)} numbers")
        return tuple(None if d is v is None else _number(key, v) for d, v in zip(default, value, strict=True))
    if isinstance(default, bool):
        if type(value) is not bool:
            raise ValueError(f"{key} is {value!r}: it is True or False")
        return value
    return _number(key, value)


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < (2**53 if type(value) is int else float("inf")):
        raise ValueError(f"{key} is {value!r}: it is a finite number")
    return value  # type: ignore[no-any-return]
