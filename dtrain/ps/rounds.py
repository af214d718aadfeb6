"""Rounds of a sum over workers: which are open, who is missing. No socket, no thread and no clock.

A round is one part of one transfer: it opens with the first worker's contribution, is kept apart by worker until the
last one has come, and is then summed in worker order. A tensor in shared memory is one part, unless a worker that has
no room there sends the same in several: then it is cut as that one has cut it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from dtrain.errors import LayoutError, ProtocolError
from dtrain.ps.wire import Add, AddShared, parts_of

_Where = tuple[str, int, int]  # key, call, part


@dataclass
class _Request:
    """What brought several parts."""

    left: int


@dataclass(frozen=True)
class Part:
    """What a worker brought to a round."""

    rank: int
    seq: int
    payload: Tensor
    shared: bool  # in memory that the worker sees: the sum goes there
    round: tuple[str, int]  # key and call, whose part it is
    number: int = 0  # of those that its request was cut into
    of: _Request | None = None  # all of them

    def ends_request(self) -> bool:
        """It has been summed; whether all that its request brought has been."""
        if self.of is not None:
            self.of.left -= 1
        return self.of is None or not self.of.left


@dataclass
class _Round:
    since_s: float
    dtype: str
    numel: int
    parts: dict[int, Part] = field(default_factory=dict)


class Rounds:
    """Synchronous sums."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open: dict[_Where, _Round] = {}

    def add(self, rank: int, add: Add | AddShared, payload: Tensor, now: float) -> list[_Where]:
        """Take a contribution in; the rounds that it belongs to.

        Raises:
            ProtocolError: the worker has contributed already.
            LayoutError: the others sent another size or type.
        """
        key, call = add.key, add.call
        brought = [Part(rank, add.seq, payload, isinstance(add, AddShared), (key, call))]
        first = self._open.get((key, call, 0))
        if first is not None and first.numel != payload.numel():
            uncut = all(part.shared and not part.of for part in first.parts.values())
            if isinstance(add, AddShared) and not uncut:
                brought = _cut(brought[0])
            elif isinstance(add, Add) and uncut and add.part == 0:
                del self._open[key, call, 0]
                for part in (piece for whole in first.parts.values() for piece in _cut(whole)):
                    self._put((key, call, part.number), part, first.dtype, first.since_s)
        wheres = [(key, call, add.part + part.number) for part in brought]
        for where, part in zip(wheres, brought, strict=True):
            self._put(where, part, add.dtype, now)
        return wheres

    def _put(self, where: _Where, part: Part, dtype: str, now: float) -> None:
        key, call, number = where
        numel = part.payload.numel()
        round_ = self._open.setdefault(where, _Round(now, dtype, numel))
        if part.rank in round_.parts:
            raise ProtocolError(f"worker {part.rank} sent {key}, round {call}, part {number} twice")
        if (dtype, numel) != (round_.dtype, round_.numel):
            raise LayoutError(
                f"{key}, round {call}: worker {part.rank} sent {numel} x {dtype}, "
                f"workers {sorted(round_.parts)} sent {round_.numel} x {round_.dtype}"
            )
        round_.parts[part.rank] = part

    def close(self, where: _Where, expected: Iterable[int]) -> list[Part] | None:
        """The round's parts in worker order, once all that are expected have come; it is open no more."""
        round_ = self._open[where]
        if any(rank not in round_.parts for rank in expected):
            return None
        del self._open[where]
        return [part for _, part in sorted(round_.parts.items())]

    def drop(self, rank: int, expected: Iterable[int]) -> list[list[Part]]:
        """A worker is gone for good: what it brought to open rounds is forgotten; the rounds that are complete now."""
        wanted = list(expected)
        closed = []
        for where, round_ in list(self._open.items()):
            round_.parts.pop(rank, None)
            if not round_.parts:
                del self._open[where]
            elif parts := self.close(where, wanted):
                closed.append(parts)
        return closed

    def clear(self) -> None:
        """Forget all."""
        self._open.clear()

    def waits_for(self, rank: int, only: str = "") -> str:
        """The first open round (of the key `only`, if given) without this worker, in words; empty if there is none."""
        for (key, call, _), round_ in self._open.items():
            if rank not in round_.parts and only in ("", key):
                return f"{key}, round {call}"
        return ""

    def late(self, expected: Iterable[int], now: float) -> tuple[list[int], str] | None:
        """(ranks, what) of the first round that has been open for too long."""
        for (key, call, _), round_ in self._open.items():
            if now - round_.since_s > self._timeout_s:
                return [r for r in expected if r not in round_.parts], f"{key}, round {call}"
        return None


def _cut(part: Part) -> list[Part]:
    """As workers cut what they send by sockets."""
    pieces = parts_of(part.payload)
    request = _Request(len(pieces))
    return [replace(part, payload=piece, number=i, of=request) for i, piece in enumerate(pieces)]
