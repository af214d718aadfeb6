"""Which server keeps which part of the parameters.

Every server keeps a contiguous range of every large bucket, so that all of them work on each one as it arrives; a small
bucket goes whole to one server, because messages cost time too. A vector kernel computes the last elements of a tensor,
which do not fill a register, with other instructions, and may round them otherwise. So a tensor is cut only at
multiples of a grain from its own start: then the same elements are last, however many servers there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from dtrain.errors import UsageError
from dtrain.tables import table as _columns

SMALL_BYTES = 2**16
"""What is smaller than this is not divided."""

Item = TypeVar("Item")

_LARGE_MODEL = 2**20
_STATELESS_GRAIN = 1024


@dataclass(frozen=True)
class Range:
    """What a server keeps of a bucket: elements of its flat buffer."""

    server: int
    start: int
    stop: int


def grain(total: int) -> int:
    """Elements between places where a tensor may be cut, in a model of `total` elements. A power of two."""
    return 128 if total < _LARGE_MODEL else 1024


def place(
    buckets: Sequence[Sequence[int]],
    itemsizes: Sequence[int],
    num_servers: int,
    *,
    whole: bool = False,
    step: int | None = None,
) -> list[list[Range]]:
    """The ranges of each bucket, by start, without gaps and never empty; bytes are spread evenly over the servers.

    First each small bucket goes to the server that has least; then the large ones, in order, level the servers out.

    Args:
        buckets: numbers of elements of the tensors in each bucket, in the order of the buffer.
        itemsizes: bytes of an element, of each bucket.
        step: elements between places where a tensor may be cut; None: `grain` of all.
        whole: cut between tensors only, for optimizers that need whole ones; the balance is as good as that allows.

    Raises:
        UsageError: no server, or lists that do not fit.
    """
    _check_servers(num_servers)
    if len(itemsizes) != len(buckets):
        raise UsageError(f"itemsizes has {len(itemsizes)} entries for {len(buckets)} buckets; give one for each")
    step = 0 if whole else step or grain(sum(map(sum, buckets)))
    sizes = [sum(tensors) for tensors in buckets]
    small = {b for b, size in enumerate(sizes) if size * itemsizes[b] < SMALL_BYTES}
    loads = [0] * num_servers
    ranges: list[list[Range]] = [[] for _ in buckets]
    for b in [*sorted(small), *(b for b in range(len(buckets)) if b not in small)]:
        if b in small:
            server = loads.index(min(loads))
            bounds = [0] * (server + 1) + [sizes[b]] * (num_servers - server)
        else:
            wanted = accumulate(_level(loads, sizes[b] * itemsizes[b]), initial=0)
            offsets = list(accumulate(buckets[b], initial=0))
            bounds = [_nearest_cut(offsets, nbytes // itemsizes[b], step) for nbytes in wanted]
        ranges[b] = _ranges(bounds)
        for part in ranges[b]:
            loads[part.server] += (part.stop - part.start) * itemsizes[b]
    return ranges


def split_even(numel: int, itemsize: int, num_servers: int, salt: int) -> list[Range]:
    """The ranges of one flat tensor that no server keeps, nearly equal ones; less than 64 KiB goes to one server.

    Args:
        salt: number of the tensor: with which server to begin.

    Raises:
        UsageError: no server.
    """
    _check_servers(num_servers)
    if numel * itemsize < SMALL_BYTES:
        bounds = [0, numel]
    else:
        bounds = [_nearest_cut([0, numel], numel * s // num_servers, _STATELESS_GRAIN) for s in range(num_servers + 1)]
    return [Range((part.server + salt) % num_servers, part.start, part.stop) for part in _ranges(bounds)]


def in_turn(items: Sequence[Item], number: int) -> list[Item]:
    """All of them, beginning with another one for each number: not all workers go to the same server first, and not all
    servers to the same worker."""
    first = number % max(1, len(items))
    return [*items[first:], *items[:first]]


def table(
    names: Sequence[str],
    placement: Sequence[Sequence[Range]],
    buckets: Sequence[Sequence[int]],
    itemsizes: Sequence[int],
) -> str:
    """What each server keeps, as `place` has it: a row for each of `names`."""
    nbytes, whole, partial = ([0] * len(names) for _ in range(3))
    for ranges, tensors, itemsize in zip(placement, buckets, itemsizes, strict=True):
        spans = [span for span in pairwise(accumulate(tensors, initial=0)) if span[0] < span[1]]
        for part in ranges:
            nbytes[part.server] += (part.stop - part.start) * itemsize
            touched = [span for span in spans if span[0] < part.stop and part.start < span[1]]
            inside = sum(part.start <= start and stop <= part.stop for start, stop in touched)
            whole[part.server] += inside
            partial[part.server] += len(touched) - inside
    total = max(1, sum(nbytes))
    rows = [
        [name, f"{nbytes[s] / 1e6:.3f}", f"{100 * nbytes[s] / total:.1f} %", str(whole[s]), str(partial[s])]
        for s, name in enumerate(names)
    ]
    return _columns(["server", "MB", "of all", "whole parameters", "in part"], rows)


def _check_servers(num_servers: int) -> None:
    if num_servers < 1:
        raise UsageError(f"num_servers is {num_servers}; at least 1 server has to keep the parameters")


def _level(loads: Sequence[int], amount: int) -> list[int]:
    """Shares of `amount` that make the loads as equal as they can be without taking any away (water filling)."""
    lowest = sorted(range(len(loads)), key=lambda s: (loads[s], s))
    count, held = 1, loads[lowest[0]]
    while count < len(loads) and (held + amount) > loads[lowest[count]] * count:
        held += loads[lowest[count]]
        count += 1
    level, rest = divmod(held + amount, count)
    shares = [0] * len(loads)
    for place_, server in enumerate(lowest[:count]):
        shares[server] = level - loads[server] + (place_ < rest)
    return shares


def _nearest_cut(offsets: Sequence[int], position: int, step: int) -> int:
    """The permitted cut that is nearest to `position`: start of a tensor plus a multiple of `step`, or (0) none."""
    if position >= offsets[-1]:
        return offsets[-1]
    tensor = bisect_right(offsets, position) - 1
    start, stop = offsets[tensor], offsets[tensor + 1]
    below = start + (position - start) // step * step if step else start
    above = min(below + step, stop) if step else stop
    return below if position - below <= above - position else above


def _ranges(bounds: Sequence[int]) -> list[Range]:
    """Server s has what lies between bounds s and s + 1, if anything."""
    return [Range(server, start, stop) for server, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
