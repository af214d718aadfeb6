"""Parts of parameters: which there are, how a range is cut, and what fits in cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch.nn import Parameter
from torch.optim import Optimizer

from dtrain.errors import UsageError


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


def whole_pieces(
    optimizer: Optimizer,
    buckets: Iterable[Sequence[tuple[str, Parameter]]],
    model: Iterable[tuple[str, Parameter]],
) -> tuple[dict[int, Parameter], list[list[Piece]]]:
    """The optimizer's parameters by number, and the parameters of each bucket, uncut.

    Args:
        buckets: of each, what is trained, by name.
        model: all parameters, by name.

    Raises:
        UsageError: the optimizer lacks a parameter that is trained, or has one that is not the model's.
    """
    model = list(model)
    numbers = numbering(optimizer, model)
    pieces = []
    for named in buckets:
        for name, _ in named:
            if name not in numbers:
                raise UsageError(f"{name} is trained, and the optimizer does not have it: add it, or freeze it")
        pieces.append(
            [
                Piece(*numbers[name], 0, p.numel(), tuple(p.shape), None if p.is_contiguous() else p.stride())
                for name, p in named
            ]
        )
    return {numbers[name][0]: p for name, p in model if name in numbers}, pieces


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
