"""A world of one: the same loop runs alone, without an `if`."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.comm.base import Done, Traffic, Work, check_flat


class Solo:
    """A Backend of one worker: its sum is what it has."""

    name = "solo"
    rank = 0
    world_size = 1
    packs = False

    def __init__(self) -> None:
        self.traffic = Traffic()

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        check_flat(flat, key)
        return Done()

    def close(self) -> None:
        return None
