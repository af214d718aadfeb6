"""A model whose parameters, gradients and optimizer state are all in parts: torch's `fully_shard` in a job of dtrain.

python -m dtrain.examples.fully_sharded [--seed 0] [--workers 2] [--epochs 2]

`update="sharded"` shares out the optimizer's state (ZeRO-1). Where parameters and gradients do not fit a device either,
torch's own `fully_shard` is the tool (ZeRO-3). dtrain then starts the workers, gives each its share of the data, and
weighs by samples; the transfers are torch's. The program trains the same network on the same batches with all three,
on gloo, and prints what each worker keeps, the formulas of ZeRO (Rajbhandari et al. 2020, section 5) beside it, and how
far the weights are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

import dtrain
from dtrain.comm.base import Backend
from dtrain.examples import digits, parsed
from dtrain.largebatch import zero_bytes
from dtrain.measure.memory import tensors
from dtrain.tables import table

STAGES = {"worker": 0, "sharded": 1, "fully sharded": 3}
"""Of ZeRO, by kind of update."""


def network(seed: int) -> nn.Sequential:
    """[n, 64] -> [n, 10] in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)]
        return nn.Sequential(*layers).double()


def train(comm: Backend, kind: str, seed: int, epochs: int) -> tuple[dict[str, Tensor], int]:
    """The weights at the end, and the bytes of parameters and optimizer state that this worker keeps."""
    (images, labels), _ = digits()
    data = TensorDataset(images.flatten(1).double(), labels)
    loader = dtrain.Loader(data, global_batch=100, rank=comm.rank, world_size=comm.world_size, seed=seed)
    model = network(seed)
    if kind == "fully sharded":
        mesh = init_device_mesh("cpu", (comm.world_size,))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    update: Any = dtrain.ShardedUpdate(optimizer=optimizer) if kind == "sharded" else "worker"
    replica = None if kind == "fully sharded" else dtrain.replicate(model, comm, update=update)
    for epoch in range(epochs):
        for (x, y), share in loader.batches(epoch):
            loss = F.cross_entropy(model(x), y)
            if replica is None:  # torch takes the mean over workers, which is to be one over samples
                (loss * (share["samples"] * comm.world_size / share["total"])).backward()
            else:
                replica.backward(loss, **share)
            if replica is None or replica.updates:
                optimizer.step()
            optimizer.zero_grad()
            if replica is not None:
                replica.publish()
    kept = sum(_own(p).nbytes for p in model.parameters()) + _bytes(optimizer.state.values())
    if replica is not None and replica.pushes is not None:
        kept += replica.pushes.state_bytes() // comm.world_size
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items()}, kept


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(states: Iterable[Any]) -> int:
    return sum(_own(t).nbytes for t in tensors(list(states)))


def work(comm: Backend, seed: int, epochs: int) -> list[tuple[dict[str, Tensor], int]]:
    return [train(comm, kind, seed, epochs) for kind in STAGES]


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, float, float]]:
    """By update: bytes that worker 0 keeps, those of the formula, and how far its weights are from the first's."""
    flags = parsed(__doc__ or "", argv, workers=2, epochs=2)
    results = dtrain.run(work, flags.seed, flags.epochs, workers=flags.workers, backend="allreduce")[0]
    first = results[0][0]
    count = sum(p.numel() for p in first.values())
    found = {}
    for (kind, stage), (weights, kept) in zip(STAGES.items(), results, strict=True):
        apart = max(float((weights[n] - p).abs().max()) for n, p in first.items())
        sizes = {"parameter_bytes": 8, "gradient_bytes": 0, "state_bytes": 2 * 8}  # float64; gradients come and go
        found[kind] = kept, zero_bytes(count, workers=flags.workers, stage=stage, **sizes), apart
    rows = [[kind, f"{k / 2**20:.3f}", f"{f / 2**20:.3f}", f"{apart:.0e}"] for kind, (k, f, apart) in found.items()]
    print(table(["update", "MiB kept by worker 0", "formula", "weights apart by"], rows))
    return found


if __name__ == "__main__":
    main()
