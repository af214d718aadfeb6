"""What a server that updates parameters is told of them, before the first step: the same on every worker.

A layout is a msgpack list of fixed form; it is compared byte by byte over workers, and checked field by field before
anything is made of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgpack

from dtrain.errors import ProtocolError
from dtrain.optim import BLOCK
from dtrain.ps.optimizers import OptimizerSpec, decode_spec, encode_spec
from dtrain.ps.pieces import Piece
from dtrain.ps.wire import DTYPE_NAMES

MAX_BYTES = 2**20
_MOST = 2**17  # entries of any list
_FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When and how a step is made."""

    staleness: int | None = 0
    """Steps that the fastest worker may be ahead of the slowest; 0: synchronous, None: no bound."""
    agreed: bool = False
    """Whether workers pass on of whom a step is made: with backup workers, or where lost ones are dropped."""
    backup_workers: int = 0
    """Workers that a synchronous step need not wait for."""
    clip: bool = False
    """Whether workers pass on a factor for the mean gradient, from its norm over all servers."""
    ratios: bool = False
    """Whether workers pass on a trust ratio for each parameter, from norms over all servers."""
    damp: bool = False
    """Divide the learning rate by the staleness of the gradient."""
    compensation: float = 0.0
    """Lambda of delay compensation; 0: none."""
    grain: int = 1024
    """Elements of a block, of which sums of squares are told apart."""

    @property
    def synchronous(self) -> bool:
        return self.staleness == 0

    @property
    def early(self) -> bool:
        """Whether a bucket is updated as soon as all workers have sent it."""
        return self.synchronous and not self.agreed and not self.clip and not self.ratios


@dataclass(frozen=True)
class BucketRange:
    """The part of a bucket that one server has."""

    bucket: int
    dtype: str
    flags: int  # parameters in the whole bucket
    pieces: tuple[tuple[int, Piece], ...]  # position of the parameter in the bucket, and the part of it

    @property
    def numel(self) -> int:
        return sum(piece.numel for _, piece in self.pieces)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_NAMES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """All that one server holds."""

    rules: Rules
    optimizer: OptimizerSpec
    ranges: tuple[BucketRange, ...]

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.ranges)

    @property
    def whole(self) -> bool:
        """Whether parameters are not cut: the optimizer needs whole ones, or norms that nobody passes on."""
        return self.optimizer.whole or (self.optimizer.layerwise and not self.rules.ratios)


def encode(layout: Layout) -> bytes:
    """The layout in bytes."""
    rules = layout.rules
    ranges = [
        [
            r.bucket,
            r.dtype,
            r.flags,
            [[m, p.parameter, p.group, p.start, p.numel, p.shape, p.strides] for m, p in r.pieces],
        ]
        for r in layout.ranges
    ]
    staleness = -1 if rules.staleness is None else rules.staleness
    told = [rules.agreed, rules.backup_workers, rules.clip, rules.ratios, rules.damp, rules.compensation, rules.grain]
    packed: bytes = msgpack.packb([[staleness, *told], encode_spec(layout.optimizer), ranges])
    return packed


def decode(data: bytes) -> Layout:
    """The layout of these bytes.

    Raises:
        ProtocolError: anything that is not a layout in every field.
    """
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"a layout of {len(data)} bytes; the limit is {MAX_BYTES}: fewer, larger parameters")
    limits: dict[str, Any] = {"max_array_len": _MOST, "max_map_len": 64, "max_str_len": 64, "max_bin_len": 0}
    try:
        flags, spec, ranges = msgpack.unpackb(data, max_ext_len=0, **limits)
        staleness, agreed, backup, clip, ratios, damp, compensation, grain = flags
        kinds = [type(x) for x in flags]
        if kinds != [int, bool, int, bool, bool, bool, float, int]:
            raise TypeError("rules")
        if not (-1 <= staleness < 2**31 and 0 <= backup < 2**31 and math.isfinite(compensation) and 0 < grain < 2**31):
            raise ValueError("rules")
        rules = Rules(
            staleness=None if staleness < 0 else staleness,
            agreed=agreed,
            backup_workers=backup,
            clip=clip,
            ratios=ratios,
            damp=damp,
            compensation=compensation,
            grain=grain,
        )
        optimizer = decode_spec(spec)
        if ratios and not (optimizer.layerwise and rules.synchronous and not agreed and grain == BLOCK):
            raise ValueError("ratios")
        decoded = tuple(_range(r, len(optimizer.groups)) for r in ranges)
    except ProtocolError:
        raise
    except Exception as error:  # whatever msgpack and a wrong form raise
        raise ProtocolError(f"a layout that cannot be read ({type(error).__name__})") from error
    if [r.bucket for r in decoded] != sorted({r.bucket for r in decoded}):
        raise ProtocolError("a layout with buckets out of order")
    return Layout(rules, optimizer, decoded)


def _range(values: Any, groups: int) -> BucketRange:
    bucket, dtype, flags, pieces = values
    if type(bucket) is not int or not 0 <= bucket < _MOST or dtype not in _FLOATS:
        raise ValueError("bucket")
    if type(flags) is not int or not 0 < flags <= 16 * 1024 or not pieces:
        raise ValueError("flags")
    return BucketRange(bucket, dtype, flags, tuple(_piece(p, groups, flags) for p in pieces))


def _piece(values: Any, groups: int, flags: int) -> tuple[int, Piece]:
    member, parameter, group, start, numel, shape, strides = values
    for number in (member, parameter, group, start, numel, *(shape or ()), *(strides or ())):
        if type(number) is not int or not 0 <= number < 2**40:
            raise ValueError("piece")
    if member >= flags or group >= groups or (shape is not None and math.prod(shape) != numel):
        raise ValueError("piece")
    if strides is not None and (shape is None or len(strides) != len(shape)):
        raise ValueError("strides")
    if strides and numel and sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= numel:
        raise ValueError("strides")
    whole = [None if numbers is None else tuple(numbers) for numbers in (shape, strides)]
    return member, Piece(parameter, group, start, numel, *whole)
