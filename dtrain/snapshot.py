"""What a worker has to itself: random generators and batch-norm averages. Gathered for a checkpoint, given back after.

A worker's part travels to worker 0 as bytes of safetensors, with numbers as tensors, so that nothing is pickled.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dtrain.comm import collectives
from dtrain.comm.base import Backend


def random_state() -> dict[str, Tensor]:
    """The state of this worker's generators: torch's (and the current CUDA device's), Python's and NumPy's."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # the legacy generator is the one that transforms use
    inner: Any = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
        "numpy_position": torch.tensor([inner["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy_gauss"][0])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed torch, Python and NumPy; from a number of any size."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def gather_own(model: nn.Module, comm: Backend) -> list[dict[str, dict[str, Tensor]]]:
    """Each worker's random state and buffers, in worker order; on worker 0, an empty list elsewhere."""
    parts = {f"random/{k}": v for k, v in random_state().items()}
    parts |= {f"buffer/{k}": v.detach().cpu().clone().contiguous() for k, v in model.named_buffers()}
    everyone = collectives.gather_bytes(comm, safetensors.torch.save(parts), "metric/snapshot")
    return [_split(safetensors.torch.load(data)) for data in everyone] if comm.rank == 0 else []


@torch.no_grad()
def restore_own(own: dict[str, dict[str, Tensor]], model: nn.Module) -> None:
    """Give one worker back what `gather_own` took."""
    set_random_state(own["random"])
    buffers = dict(model.named_buffers())
    for name, value in own["buffer"].items():
        buffers[name].copy_(value)


def _split(parts: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    own: dict[str, dict[str, Tensor]] = {"random": {}, "buffer": {}}
    for name, tensor in parts.items():
        kind, _, rest = name.partition("/")
        own[kind][rest] = tensor
    return own
