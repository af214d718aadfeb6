"""torch's optimizers on ranges of a model's parameters: what they are told, what they keep, how a norm is added up.

A server steps an optimizer of `torch.optim` on its pieces of tensors. Where every element is updated by itself, that
gives the same bits however the tensors are cut, as long as cuts are at multiples of `placement.grain` from a tensor's
start and torch uses one thread for an operation, which the server sees to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dtrain.comm.ordered import HALVES
from dtrain.errors import ProtocolError, UsageError

Value = float | int | bool | str | None | tuple[float | None, ...]
Hyper = tuple[dict[str, Value], ...]
"""Hyperparameters of all groups of an optimizer, by the names of its constructor."""
State = dict[str, Tensor]
"""What an optimizer keeps of a piece: flat where it has an element for each of the piece's, else as torch has it."""

MAX_GROUPS = 2**17

_FUSED: dict[str, Any] = {"fused": True}
_FOREACH: dict[str, Any] = {"foreach": True}
_LOOP: dict[str, Any] = {"foreach": False}
_CLASSES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    # Fastest of what does not depend on cuts, on a chunk of 1 MiB in one thread: tests/ps/test_update.py compares bits.
    "SGD": (torch.optim.SGD, _FUSED),
    "Adam": (torch.optim.Adam, _FUSED),
    "AdamW": (torch.optim.AdamW, _FUSED),
    "Adagrad": (torch.optim.Adagrad, _FUSED),
    "Adamax": (torch.optim.Adamax, _FOREACH),
    "RAdam": (torch.optim.RAdam, _FOREACH),
    "RMSprop": (torch.optim.RMSprop, _FOREACH),
    "NAdam": (torch.optim.NAdam, _LOOP),
    "Rprop": (torch.optim.Rprop, _LOOP),
    "Adadelta": (torch.optim.Adadelta, _LOOP),
    "ASGD": (torch.optim.ASGD, _LOOP),
    "Adafactor": (torch.optim.Adafactor, _LOOP),
    "Muon": (torch.optim.Muon, {}),
}
WHOLE = frozenset({"Adafactor", "Muon"})
"""Optimizers that look at a whole tensor to update an element of it."""
ELEMENTWISE = frozenset(_CLASSES) - WHOLE
"""Optimizers that update each element by itself."""

_REASONS = {
    "LBFGS": "it computes the loss several times in a step",
    "SparseAdam": "it takes sparse gradients, which are not sent",
}
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")
_CHOICES = {"adjust_lr_fn": (None, "original", "match_rms_adamw"), "ns_steps": tuple(range(100))}
_FIXED = ("amsgrad", "centered", "initial_accumulator_value")
_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
_STATE: dict[str, tuple[str, str]] = {  # what it always keeps, and what it keeps with some settings
    "SGD": ("", "momentum_buffer"),
    "Adam": ("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("step exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "Adagrad": ("step sum", ""),
    "Adamax": ("step exp_avg exp_inf", ""),
    "RAdam": ("step exp_avg exp_avg_sq", ""),
    "RMSprop": ("step square_avg", "momentum_buffer grad_avg"),
    "NAdam": ("step mu_product exp_avg exp_avg_sq", ""),
    "Rprop": ("step prev step_size", ""),
    "Adadelta": ("step square_avg acc_delta", ""),
    "ASGD": ("step eta mu ax", ""),
    "Adafactor": ("step", "variance row_var col_var"),
    "Muon": ("momentum_buffer", ""),
}


# -- what a server is told of an optimizer ----------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer without its parameters."""

    name: str
    """Of its class in `torch.optim`."""
    groups: Hyper

    @property
    def whole(self) -> bool:
        """Whether it needs whole tensors."""
        return self.name in WHOLE


def spec_of(optimizer: Optimizer) -> OptimizerSpec:
    """What makes this optimizer again on a server.

    Raises:
        UsageError: an optimizer that servers cannot step, and why.
    """
    name = _name(optimizer)
    for g, group in enumerate(optimizer.param_groups):
        for flag in ("differentiable", "capturable"):
            if group.get(flag):
                raise UsageError(f"optimizer has {flag}=True in group {g}: servers cannot do that; leave it out")
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
    if not isinstance(data, list) or len(data) != 2 or not isinstance(data[0], str) or data[0] not in _CLASSES:
        raise ProtocolError("an optimizer that is not [name, groups] with a name of torch.optim that servers step")
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


def _name(optimizer: Optimizer) -> str:
    """Of an optimizer that servers can step."""
    name = type(optimizer).__name__
    if name in _CLASSES and type(optimizer) is _CLASSES[name][0]:
        return name
    reason = _REASONS.get(name, "") if type(optimizer).__module__.startswith("torch.optim.") else ""
    reason = reason or "it is not a class of torch.optim, and servers run no code of workers"
    can = ", ".join(sorted(_CLASSES))
    raise UsageError(
        f"optimizer is {name}: servers cannot step it, because {reason}; let workers step it, or use {can}"
    )


@cache
def _parameters(name: str) -> dict[str, Any]:
    """Hyperparameters of an optimizer, and their defaults."""
    parameters = list(inspect.signature(_CLASSES[name][0].__init__).parameters.values())[2:]
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
                cls: Any = _CLASSES[name][0]
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
        if type(value) not in (str, int, type(None)) or value not in _CHOICES[key]:
            raise ValueError(f"{key} is {value!r}: it is one of {', '.join(map(repr, _CHOICES[key]))}")
        return value  # type: ignore[no-any-return]
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


# -- pieces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, in the order of memory."""

    parameter: int
    """Number of the parameter, as the state dict of the optimizer counts them."""
    group: int
    start: int
    """First element."""
    numel: int
    shape: tuple[int, ...] | None = None
    """Of the parameter, if the piece is all of it."""
    strides: tuple[int, ...] | None = None
    """Of the parameter, where they are not those of a contiguous tensor; only with a shape."""


@dataclass(frozen=True)
class Chunk:
    """A part of a range that fits in cache: elements of the range, and the pieces that lie there."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def numbering(optimizer: Optimizer, named: Iterable[tuple[str, Parameter]]) -> dict[str, tuple[int, int]]:
    """(number in the optimizer's state dict, group) of each parameter, by name; without those it does not have.

    Raises:
        UsageError: the optimizer has a parameter that is not among these.
    """
    names = {id(parameter): name for name, parameter in named}
    found: dict[str, tuple[int, int]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                shape = tuple(p.shape)
                raise UsageError(f"group {g} of the optimizer has a parameter {shape} that the model does not train")
            found[names[id(p)]] = (len(found), g)
    return found


def cut(pieces: Iterable[Piece], start: int, stop: int) -> list[Piece]:
    """What lies between two places, in elements, of pieces laid side by side; nothing empty."""
    found, offset = [], 0
    for piece in pieces:
        first, last = max(start - offset, 0), min(stop - offset, piece.numel)
        if first < last:
            part = replace(piece, start=piece.start + first, numel=last - first, shape=None, strides=None)
            found.append(piece if last - first == piece.numel else part)
        offset += piece.numel
    return found


def chunks(pieces: Sequence[Piece], limit_elements: int, grain: int, *, whole: bool = False) -> list[Chunk]:
    """A range in parts of at most `limit_elements`, cut where `placement.place` may cut; with `whole`, between pieces.

    Raises:
        UsageError: a limit below the grain.
    """
    if limit_elements < grain:
        raise UsageError(f"limit_elements is {limit_elements}: it is at least the grain, {grain}")
    bounds, offset = [0], 0
    for piece in pieces:
        taken = 0
        while offset + piece.numel - bounds[-1] > limit_elements:
            fits = 0 if whole else max(bounds[-1] + limit_elements - offset - taken, 0) // grain * grain
            if offset + taken + fits == bounds[-1]:
                break  # a whole piece that is larger than the limit
            taken += fits
            bounds.append(offset + taken)
        offset += piece.numel
    bounds = [*bounds, offset] if offset > bounds[-1] else bounds
    return [Chunk(a, b, tuple(cut(pieces, a, b))) for a, b in pairwise(bounds)]


# -- steps ------------------------------------------------------------------------------------------------------------


class ShardOptimizer:
    """An optimizer of some pieces, which lie side by side in one flat tensor."""

    def __init__(self, spec: OptimizerSpec, pieces: Sequence[Piece], values: Tensor) -> None:
        """
        Args:
            values: the parameters, flat and on the CPU; updated in place.

        Raises:
            UsageError: pieces that do not fit the tensor or the optimizer.
        """
        if values.dim() != 1 or values.numel() != sum(p.numel for p in pieces) or not pieces:
            raise UsageError(
                f"values have shape {tuple(values.shape)}: give a flat tensor as long as all pieces, not 0"
            )
        if any(not 0 <= p.group < len(spec.groups) or (spec.whole and p.shape is None) for p in pieces):
            need = "; it needs whole tensors, with shapes" if spec.whole else ""
            raise UsageError(f"a piece does not fit {spec.name} with {len(spec.groups)} groups{need}")
        self.spec = spec
        self.pieces = tuple(pieces)
        self._sizes = [p.numel for p in pieces]
        self._params = self._views(values)
        self._present = sorted({p.group for p in pieces})
        groups: list[dict[str, Any]] = [
            {**spec.groups[g], "params": [t for t, p in zip(self._params, pieces, strict=True) if p.group == g]}
            for g in self._present
        ]
        cls, flags = _CLASSES[spec.name]
        if spec.name == "SGD" and values.dtype in HALVES:
            flags = _LOOP  # torch 2.13: the fused kernel leaves most elements of halves as they are
        defaults: dict[str, Any] = {**spec.groups[0], **flags}
        self._optimizer = cls(groups, **defaults)
        self._hyper = spec.groups

    @torch.no_grad()
    def step(self, gradient: Tensor, used: Sequence[bool], hyper: Hyper | None = None) -> None:
        """One step. Pieces that are not used stay as they are, with their state, as with torch where `.grad` is None.

        Args:
            gradient: flat, as long as the values and of their type; not kept.
            used: of each piece.
            hyper: from `decode_hyper`; None: as before.
        """
        if hyper is not None and hyper is not self._hyper:
            if hyper != self._hyper:
                for group, g in zip(self._optimizer.param_groups, self._present, strict=True):
                    group.update(hyper[g])
            self._hyper = hyper
        pairs = zip(self._params, self._views(gradient), strict=True)
        turn = [pair for pair, u in zip(pairs, used, strict=True) if u]
        if self.spec.name == "SGD" and len(turn) > 1:  # the fused kernel takes momentum of all tensors, or of none
            kept = self._optimizer.state
            known = [pair for pair in turn if kept.get(pair[0])]
            if 0 < len(known) < len(turn):
                self._turn([pair for pair in turn if not kept.get(pair[0])])
                turn = known
        self._turn(turn)

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps beside the parameters; those of most optimizers begin with the first step."""
        return sum(t.nbytes for state in self._optimizer.state.values() for t in state.values())

    def state(self) -> list[State]:
        """What the optimizer keeps of each piece; nothing before its first step. The next step changes it in place."""
        return [
            {k: _flat(t, p) if _is_elements(k, t, p) else t for k, t in self._optimizer.state.get(p, {}).items()}
            for p in self._params
        ]

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what `state` has given, or `split_state`; it is copied.

        Raises:
            ProtocolError: not what this optimizer keeps of these pieces.
        """
        if len(states) != len(self.pieces):
            raise ProtocolError(f"optimizer states of {len(states)} pieces, where there are {len(self.pieces)}")
        for piece, parameter, state in zip(self.pieces, self._params, states, strict=True):
            self._check_state(piece, parameter, state)
        for parameter, state in zip(self._params, states, strict=True):
            self._optimizer.state.pop(parameter, None)
            if state:
                self._optimizer.state[parameter] = {k: _restored(k, t, parameter) for k, t in state.items()}

    def _turn(self, turn: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not turn:
            return
        for parameter, gradient in turn:
            parameter.grad = gradient
        self._optimizer.step()
        for parameter, _ in turn:
            parameter.grad = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes) if len(self._sizes) > 1 else (flat.view(-1),)
        if not self.spec.whole:
            return list(parts)
        return [_shaped(part, piece.shape or (), piece.strides) for part, piece in zip(parts, self.pieces, strict=True)]

    def _check_state(self, piece: Piece, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        where = f"state of parameter {piece.parameter}"
        always, optional = (names.split() for names in _STATE[self.spec.name])
        needed = [*always, *_conditional(self.spec.name, self._hyper[piece.group], parameter.dim())]
        allowed = {*needed, *(() if self.spec.whole else optional)}
        if state and not set(needed) <= state.keys() <= allowed:
            raise ProtocolError(
                f"{where} is {', '.join(state)}; {self.spec.name} keeps {', '.join(needed or optional)}"
            )
        for key, t in state.items():
            shape: tuple[int, ...] = (piece.numel,)
            if key in _SCALARS:
                shape = ()
            elif key in ("row_var", "col_var"):
                *outer, rows, columns = parameter.shape
                reduced = (*outer, rows, 1) if key == "row_var" else (*outer, 1, columns)
                shape = shape if reduced == parameter.shape else reduced
            dtypes = (torch.float32, torch.float64, parameter.dtype) if key in _SCALARS else (parameter.dtype,)
            if tuple(t.shape) != shape or t.dtype not in dtypes:
                raise ProtocolError(f"{where}: {key} is {tuple(t.shape)} {t.dtype}, not {shape} {dtypes[-1]}")


def _conditional(name: str, group: Mapping[str, Value], dim: int) -> list[str]:
    """What an optimizer keeps with these settings, beside what it always keeps."""
    if name == "Adafactor":
        return ["row_var", "col_var"] if dim > 1 else ["variance"]
    asked = {"max_exp_avg_sq": group.get("amsgrad"), "grad_avg": group.get("centered")}
    asked["momentum_buffer"] = name == "RMSprop" and group["momentum"]
    return [key for key, wanted in asked.items() if wanted]


# -- states: of pieces, and of whole parameters -----------------------------------------------------------------------


def merge_states(
    parts: Iterable[tuple[Piece, Mapping[str, Tensor]]], like: Mapping[int, Tensor]
) -> dict[int, dict[str, Any]]:
    """The `state` of the optimizer's state dict, from what servers keep of all pieces, in any order.

    Args:
        like: parameters by number, for shapes and strides; they may be on the meta device.

    Raises:
        ProtocolError: pieces that do not make up a parameter, or do not agree.
    """
    found: dict[int, list[tuple[Piece, Mapping[str, Tensor]]]] = {}
    for piece, state in parts:
        found.setdefault(piece.parameter, []).append((piece, state))
    merged = {n: _merge(n, sorted(found[n], key=lambda part: part[0].start), like[n]) for n in sorted(found)}
    return {number: state for number, state in merged.items() if state}


def split_state(
    state: Mapping[int, Mapping[str, Any]], pieces: Iterable[Piece], like: Mapping[int, Tensor]
) -> list[State]:
    """What each piece has of the `state` of an optimizer's state dict: the reverse of `merge_states`.

    Raises:
        UsageError: a state that is not of this parameter.
    """
    flat: dict[int, State] = {}
    found = []
    for piece in pieces:
        number, model = piece.parameter, like[piece.parameter]
        if number not in flat:
            kept = {k: v for k, v in state.get(number, {}).items() if v is not None}
            flat[number] = {k: _split_value(number, k, v, model) for k, v in kept.items()}
        found.append(
            {
                k: t[piece.start : piece.start + piece.numel] if t.dim() == 1 and t.numel() == model.numel() else t
                for k, t in flat[number].items()
            }
        )
    return found


def _merge(number: int, parts: Sequence[tuple[Piece, Mapping[str, Tensor]]], like: Tensor) -> dict[str, Any]:
    stop, first = 0, parts[0][1]
    for piece, state in parts:
        if piece.start != stop:
            raise ProtocolError(f"states of parameter {number}: a piece begins at {piece.start}, not at {stop}")
        if state.keys() != first.keys():
            raise ProtocolError(f"states of parameter {number} differ: {', '.join(first)} and {', '.join(state)}")
        stop += piece.numel
    if stop != like.numel():
        raise ProtocolError(f"states of parameter {number} have {stop} elements of {like.numel()}")
    merged: dict[str, Any] = {}
    for key, t in first.items():
        tensors = [state[key] for _, state in parts]
        if all(s.dim() == 1 and s.numel() == p.numel for s, (p, _) in zip(tensors, parts, strict=True)):
            merged[key] = _shaped(torch.cat(tensors), tuple(like.shape), _strides(like))
        elif all(torch.equal(t, other) for other in tensors):
            merged[key] = t.clone()
        else:
            raise ProtocolError(f"states of parameter {number} differ in {key}: servers have made other steps")
    return merged


def _split_value(number: int, key: str, value: Any, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value))  # as torch's optimizers did before 1.12
    t: Tensor = value.detach().cpu()
    shape = tuple(t.shape)
    if key in _SCALARS:
        if t.numel() != 1:
            raise UsageError(f"state {key} of parameter {number} has shape {shape}: it is one number")
        return t.reshape(()).clone()
    t = t.to(like.dtype)
    if t.shape == like.shape:
        return _flat(t, torch.empty_strided(like.shape, _strides(like), dtype=like.dtype, device="meta"))
    if key not in ("row_var", "col_var"):
        where = f"state {key} of parameter {number} has shape {shape}"
        raise UsageError(f"{where}, the parameter {tuple(like.shape)}: it is of another model")
    return t


def _is_elements(key: str, state: Tensor, parameter: Tensor) -> bool:
    return key not in _SCALARS and state.shape == parameter.shape


def _restored(key: str, state: Tensor, parameter: Tensor) -> Tensor:
    """A copy as the optimizer keeps it: what has an element for each of the parameter's, in its shape."""
    if key in _SCALARS or state.dim() != 1:
        return state.clone()
    return _shaped(state.clone(), tuple(parameter.shape), parameter.stride())


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements in the order in which they lie in `like`, a tensor without gaps; a view where it can be one."""
    if tensor.stride() != like.stride():
        ordered = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype)
        tensor = ordered.copy_(tensor)
    flat: Tensor = tensor.as_strided((tensor.numel(),), (1,))
    return flat


def _shaped(flat: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Tensor:
    shaped: Tensor = flat.view(shape) if strides is None else flat.as_strided(shape, strides)
    return shaped


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """Its own, where they leave no gaps, else those that a copy of it has."""
    strides: tuple[int, ...] = torch.empty_like(parameter, device="meta").stride()
    return strides


# -- norms ------------------------------------------------------------------------------------------------------------


def squares(gradient: Tensor, pieces: Sequence[Piece], grain: int) -> Tensor:
    """Sums of squares, in float64, of blocks of `grain` elements, of each piece in order; its last block may be short.

    Pieces begin at multiples of the grain from the start of their tensor, so the blocks are the same for any servers.
    """
    blocks = [-(-p.numel // grain) for p in pieces]
    if sum(blocks) * grain == gradient.numel():
        padded = gradient.double() if gradient.dtype != torch.float64 else gradient.clone()
    else:
        padded = torch.zeros(sum(blocks) * grain, dtype=torch.float64)
        parts = gradient.split([p.numel for p in pieces])
        for target, part in zip(padded.split([n * grain for n in blocks]), parts, strict=True):
            target[: part.numel()].copy_(part)
    return padded.square_().view(-1, grain).sum(1)


def total_norm(sums: Sequence[Tensor]) -> float:
    """The 2-norm of a gradient from the sums of its blocks, which come in the order of the model, cut anyhow."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), *sums])
    while len(total) > 1:
        half = len(total) // 2
        total = torch.cat([total[:half] + total[half : 2 * half], total[2 * half :]])
    return float(total.sqrt())
