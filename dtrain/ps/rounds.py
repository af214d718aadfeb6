"""Rounds of a sum over workers: which are open, who is missing. No socket, no thread and no clock.

A round is one part of one transfer: it opens with the first worker's contribution, is kept apart by worker until the
last one has come, and is then summed in worker order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.errors import LayoutError, ProtocolError
from dtrain.ps.wire import Add, AddShared

_Where = tuple[str, int, int]  # key, call, part


@dataclass(frozen=True)
class Part:
    """What a worker brought to a round."""

    rank: int
    seq: int
    payload: Tensor
    shared: bool  # in memory that the worker sees: the sum goes there
    round: tuple[str, int]  # key and call, whose part it is


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

    def add(self, rank: int, add: Add | AddShared, payload: Tensor, now: float) -> _Where:
        """Take a contribution in; the round that it belongs to.

        Raises:
            ProtocolError: the worker has contributed already.
            LayoutError: the others sent another size or type.
        """
        where = (add.key, add.call, add.part)
        round_ = self._open.setdefault(where, _Round(now, add.dtype, payload.numel()))
        if rank in round_.parts:
            raise ProtocolError(f"worker {rank} sent {add.key}, round {add.call}, part {add.part} twice")
        if (add.dtype, payload.numel()) != (round_.dtype, round_.numel):
            raise LayoutError(
                f"{add.key}, round {add.call}: worker {rank} sent {payload.numel()} x {add.dtype}, "
                f"workers {sorted(round_.parts)} sent {round_.numel} x {round_.dtype}"
            )
        round_.parts[rank] = Part(rank, add.seq, payload, isinstance(add, AddShared), (add.key, add.call))
        return where

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
