"""In parts of what size a tensor travels to a parameter server, and how many of them at a time."""

from __future__ import annotations

LEAST_BYTES = 64 * 2**10
MOST_BYTES = 2**20
PART_S = 0.002
"""A part is what is summed in this time: large enough for what a message costs (0.3 ms here), small enough that results
travel while gradients still come."""
UNDER_WAY = 4
"""Parts that a worker may have unanswered at a server over a network."""


def part_bytes(bytes_per_s: float) -> int:
    """Size of a part, whole pages, where so much of a tensor is summed in a second, at each server."""
    return min(MOST_BYTES, max(LEAST_BYTES, int(bytes_per_s * PART_S) & -4096))
