"""What optimizers keep: of pieces, as servers have it, and of whole parameters, as torch's state dict has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.errors import ProtocolError, UsageError
from dtrain.optim import in_memory
from dtrain.ps.optimizers import Value
from dtrain.ps.pieces import Piece

State = dict[str, Tensor]
"""What an optimizer keeps of a piece: flat where it has an element for each of the piece's, else as torch has it."""

SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""What optimizers keep one number of for a tensor."""
KEPT: dict[str, tuple[str, str]] = {
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
    "LARS": ("", "momentum_buffer"),
    "LAMB": ("step exp_avg exp_avg_sq", ""),
}
"""What an optimizer always keeps of a tensor, and what it keeps with some settings."""


def conditional(name: str, group: Mapping[str, Value], dim: int) -> list[str]:
    """What an optimizer keeps with these settings, beside what it always keeps."""
    if name == "Adafactor":
        return ["row_var", "col_var"] if dim > 1 else ["variance"]
    asked = {"max_exp_avg_sq": group.get("amsgrad"), "grad_avg": group.get("centered")}
    asked["momentum_buffer"] = name == "RMSprop" and group["momentum"]
    return [key for key, wanted in asked.items() if wanted]


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
    known: dict[int, State] = {}
    found = []
    for piece in pieces:
        number, model = piece.parameter, like[piece.parameter]
        if number not in known:
            kept = {k: v for k, v in state.get(number, {}).items() if v is not None}
            known[number] = {k: _split_value(number, k, v, model) for k, v in kept.items()}
        found.append(
            {
                k: t[piece.start : piece.start + piece.numel] if t.dim() == 1 and t.numel() == model.numel() else t
                for k, t in known[number].items()
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
            merged[key] = shaped(torch.cat(tensors), tuple(like.shape), _strides(like))
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
    if key in SCALARS:
        if t.numel() != 1:
            raise UsageError(f"state {key} of parameter {number} has shape {shape}: it is one number")
        return t.reshape(()).clone()
    t = t.to(like.dtype)
    if t.shape == like.shape:
        return in_memory(t, like)
    if key not in ("row_var", "col_var"):
        where = f"state {key} of parameter {number} has shape {shape}"
        raise UsageError(f"{where}, the parameter {tuple(like.shape)}: it is of another model")
    return t


def is_elements(key: str, state: Tensor, parameter: Tensor) -> bool:
    """Whether it has an element for each of the parameter's."""
    return key not in SCALARS and state.shape == parameter.shape


def restored(key: str, state: Tensor, parameter: Tensor) -> Tensor:
    """A copy as the optimizer keeps it: what has an element for each of the parameter's, in its shape."""
    if key in SCALARS or state.dim() != 1:
        return state.clone()
    return shaped(state.clone(), tuple(parameter.shape), parameter.stride())


def shaped(elements: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Tensor:
    """A view of flat elements as a tensor of that shape; without strides a contiguous one."""
    whole: Tensor = elements.view(shape) if strides is None else elements.as_strided(shape, strides)
    return whole


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """Its own, where they leave no gaps, else those that a copy of it has."""
    strides: tuple[int, ...] = torch.empty_like(parameter, device="meta").stride()
    return strides
