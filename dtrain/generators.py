"""Random generators of a worker: torch's, Python's and NumPy's, as one state that can be kept and given back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

State = dict[str, Any]
"""A tree as `dtrain.trees` stores it."""


def state() -> State:
    """The state of the generators; of the current CUDA device's too, once CUDA is in use."""
    kept: State = {"torch": torch.get_rng_state(), "python": random.getstate()}
    # The legacy generator is the one that transforms use.
    name, key, *rest = np.random.get_state(legacy=True)
    kept["numpy"] = (name, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        kept["cuda"] = torch.cuda.get_rng_state()
    return kept


def set_state(kept: State) -> None:
    """The inverse of `state`."""
    torch.set_rng_state(kept["torch"])
    random.setstate(kept["python"])
    name, key, *rest = kept["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    if "cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["cuda"])


def seed_all(seed: int) -> None:
    """Seed all of them; from a number of any size."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)
