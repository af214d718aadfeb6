"""In parts of what size a tensor travels to a parameter server, and how many of them at a time."""

from __future__ import annotations

LEAST_BYTES = 16 * 2**10
MOST_BYTES = 2**20
PART_S = 0.003
"""A part is what is summed in this time: large enough for what a message costs (0.3 ms here), small enough that results
travel while gradients still come."""
SLOW_PART_BYTES = 160 * 2**10
SLOW_PART_S = 0.006
"""Over slow links a part is larger than that, up to those bytes and this time: where many processes share a processor a
message costs more, and before the first part has come from all workers, links to them are idle. Found with 8 workers
and servers on 2 cores at 50, 100 and 200 Mbit/s; figures in benchmarks/README.md."""
UNDER_WAY = 4
"""Parts that a worker may have unanswered at a server over a network."""


def part_bytes(bytes_per_s: float) -> int:
    """Size of a part, whole pages, where so much of a tensor is summed in a second, at each server."""
    wanted = max(bytes_per_s * PART_S, min(bytes_per_s * SLOW_PART_S, SLOW_PART_BYTES))
    return min(MOST_BYTES, max(LEAST_BYTES, int(wanted) & -4096))
