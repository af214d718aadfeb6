"""The sum in worker order, whatever the order of arrival.

Floating-point addition is not associative: a server that adds what comes first gives another result each time. Here
worker 0's tensor comes first, then worker 1's, and so on. The result is the same bits for any timing, and for any cut
of the tensor into parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
"""Types that are added in float32."""


def total(parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Sum of one tensor over workers, in their order. Half precision is added in float32 and rounded once, at the end.

    Args:
        parts: each worker's, of one size and type; a sole one is returned as it is.
        out: memory for the sum of several, of their size and type; not used for halves.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    sum_ = first.float().add_(parts[1]) if first.dtype in HALVES else torch.add(first, parts[1], out=out)
    for part in parts[2:]:
        sum_.add_(part)
    return sum_.to(first.dtype)
