"""Stretches of time: joined, and what of one lies in another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""(from, to)."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in intervals that do not touch, in order."""
    found: list[Interval] = []
    for since, to in sorted(intervals):
        if found and since <= found[-1][1]:
            found[-1] = (found[-1][0], max(to, found[-1][1]))
        else:
            found.append((since, to))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of all together; they do not overlap."""
    return sum(to - since for since, to in intervals)


def overlaps(intervals: Sequence[Interval], within: Iterable[Interval]) -> list[float]:
    """How much of the intervals lies in each of `within`. Both are in order, and none overlaps another of its own."""
    found, position = [], 0
    for since, to in within:
        inside = 0.0
        while position < len(intervals) and intervals[position][0] < to:
            a, b = intervals[position]
            inside += max(0.0, min(to, b) - max(since, a))
            if b > to:
                break  # the rest of it may lie in the next one
            position += 1
        found.append(inside)
    return found
