"""A training step against torch's DistributedDataParallel over gloo: same model, data and processes, in one run.

    python benchmarks/step.py                                  all-reduce, all cases, some minutes
    python benchmarks/step.py --quick --json F                 one minute
    python benchmarks/step.py --contender server --case mlp --optimizer sgd adam
                                                               parameter servers that update, on shared memory

Contenders: `allreduce` (gloo too), `ps` (servers sum, workers step) and `server` (servers sum and step). Both sides
take turns in the same processes, on the same batch; DDP is left as it comes, and beside it with bucket views.
A step is zero_grad, forward, loss, backward and an optimizer's step, each written as its documentation says:
`loss.backward()` for DDP, `replica.backward(loss, samples=, total=)` for dtrain. A ratio below 1 means that dtrain's
step is the shorter one.

Where a model's memory happens to lie changes its step by some percent: two copies that run the same code differ. So
each case is repeated in new processes, and whose model is made first alternates; the median is over all rounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import dtrain
from dtrain import recipes
from dtrain.comm import collectives


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    name: str
    options: dict[str, str]
    batch: int
    repeats: int
    """Times in new processes."""
    rounds: int
    """Turns in each."""
    steps: int


CASES = [
    Case("mlp 19 M, batch 64", {"model": "mlp"}, 64, 6, 5, 3),
    Case("resnet18, batch 8", {"model": "resnet", "image": "64"}, 8, 6, 5, 3),
    Case("resnet18, batch 32", {"model": "resnet", "image": "64"}, 32, 4, 4, 2),
    Case("lstm 19 M, batch 16", {"model": "lstm"}, 16, 2, 4, 2),
    Case("transformer 20 M, batch 8", {"model": "transformer"}, 8, 2, 4, 2),
]
QUICK = [
    Case("mlp 19 M, batch 64", {"model": "mlp"}, 64, 2, 4, 3),
    Case("resnet18, batch 8", {"model": "resnet", "image": "64"}, 8, 2, 4, 3),
]

CONTENDERS = {"allreduce": "dtrain allreduce", "ps": "dtrain ps", "server": "dtrain ps, update on servers"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-4),
}
BASELINES = {"DDP": False, "DDP, bucket views": True}


def measure(
    comm: dtrain.Backend, case: Case, repeat: int, contender: str, optimizer: str, folder: str
) -> dict[str, common.Times]:
    """One worker: for each baseline, seconds a step of contender and baseline, by round."""
    if not dist.is_initialized():
        store = dist.FileStore(f"{folder}/store", comm.world_size)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.world_size)
    recipe = recipes.build("synthetic", **case.options)
    batch = recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]
    share = {"samples": case.batch, "total": case.batch * comm.world_size}
    found = {}
    for baseline, views in BASELINES.items():
        models = [copy.deepcopy(recipe.model) for _ in range(2)]
        own, other = models if repeat % 2 else models[::-1]
        mine, theirs = (OPTIMIZERS[optimizer](model.parameters()) for model in (own, other))
        update = dtrain.ServerUpdate(optimizer=mine) if contender == "server" else "worker"
        replica = dtrain.replicate(own, comm, update=update)
        wrapped = DistributedDataParallel(other, gradient_as_bucket_view=views)

        def step(replica: dtrain.Replica = replica, model: nn.Module = own, optimizer: Optimizer = mine) -> None:
            optimizer.zero_grad()
            replica.backward(recipe.loss(model, batch), **share)
            if replica.updates:
                optimizer.step()
            replica.publish()

        def ddp_step(model: nn.Module = wrapped, optimizer: Optimizer = theirs) -> None:
            optimizer.zero_grad()
            recipe.loss(model, batch).backward()
            optimizer.step()

        times = common.alternate(step, ddp_step, rounds=case.rounds, steps=case.steps)
        if _same(own, other) > 1e-3:
            raise RuntimeError(f"{case.name}: the weights differ by {_same(own, other)}: not the same work")
        replica.close()
        # A step is over when its slowest worker is done: the mean over workers of their own clocks.
        both = collectives.sum_numbers(comm, [second / comm.world_size for side in times for second in side])
        found[baseline] = both[: case.rounds], both[case.rounds :]
    return found


def _same(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of a weight after equally many steps: both did the same work."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _rows(case: Case, arguments: argparse.Namespace, optimizer: str) -> list[common.Row]:
    backend = "allreduce" if arguments.contender == "allreduce" else "ps"
    runs = []
    for repeat in range(case.repeats):
        with tempfile.TemporaryDirectory() as folder:
            what = (case, repeat, arguments.contender, optimizer, folder)
            servers = arguments.servers if backend == "ps" else 1
            runs.append(dtrain.run(measure, *what, workers=arguments.workers, backend=backend, servers=servers)[0])
    return [
        common.ratio_row(
            f"{case.name}, {optimizer}",
            CONTENDERS[arguments.contender],
            baseline,
            common.join([run[baseline] for run in runs]),
        )
        for baseline in BASELINES
    ]


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--contender", choices=CONTENDERS, default="allreduce")
    flags.add_argument("--servers", type=int, default=1, help="for ps and server")
    flags.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=["sgd"])
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = flags.parse_args()
    rows = []
    for case in QUICK if arguments.quick else CASES:
        for optimizer in arguments.optimizer if arguments.case in case.name else []:
            rows += _rows(case, arguments, optimizer)
    common.record(rows, arguments.json, workers=arguments.workers, servers=arguments.servers)


if __name__ == "__main__":
    main()
