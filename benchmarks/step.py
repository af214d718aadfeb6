"""A training step over `allreduce` against torch's DistributedDataParallel: same model, data, gloo group, in one run.

    python benchmarks/step.py                     all cases, some minutes
    python benchmarks/step.py --quick --json F    one minute

Both take turns in the same processes, on the same batch; DDP is left as it comes, and beside it with
gradient_as_bucket_view=True. A step is zero_grad, forward, loss, backward and an SGD step. A ratio below 1 means that
dtrain's step is the shorter one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain import recipes
from dtrain.comm import collectives


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    name: str
    options: dict[str, str]
    batch: int
    rounds: int
    steps: int


CASES = [
    Case("mlp 19 M, batch 64", {"model": "mlp"}, 64, 20, 4),
    Case("resnet18, batch 8", {"model": "resnet", "image": "64"}, 8, 20, 4),
    Case("resnet18, batch 32", {"model": "resnet", "image": "64"}, 32, 10, 2),
    Case("lstm 19 M, batch 16", {"model": "lstm"}, 16, 10, 2),
    Case("transformer 20 M, batch 8", {"model": "transformer"}, 8, 10, 2),
]
QUICK = [
    Case("mlp 19 M, batch 64", {"model": "mlp"}, 64, 6, 3),
    Case("resnet18, batch 8", {"model": "resnet", "image": "64"}, 8, 5, 2),
]

CONTENDER = "dtrain allreduce"
BASELINES = {"DDP": False, "DDP, bucket views": True}


def measure(comm: dtrain.Backend, case: Case) -> list[common.Row]:
    """One worker: a row for each baseline."""
    recipe = recipes.build("synthetic", **case.options)
    batch = recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]
    rows = []
    for baseline, views in BASELINES.items():
        own, other = copy.deepcopy(recipe.model), copy.deepcopy(recipe.model)
        replica = dtrain.replicate(own, comm)
        wrapped = DistributedDataParallel(other, gradient_as_bucket_view=views)
        mine = common.alternate(
            _step(own, recipe, batch), _step(wrapped, recipe, batch), rounds=case.rounds, steps=case.steps
        )
        worst = _same(own, other)
        replica.close()
        # A step is over when its slowest worker is done: the mean over workers of their own clocks.
        flat = [second / comm.world_size for side in mine for second in side]
        both = collectives.sum_numbers(comm, flat)
        times = both[: case.rounds], both[case.rounds :]
        rows.append(common.ratio_row(case.name, CONTENDER, baseline, times) | {"max_abs_weight_diff": worst})
    return rows


def _step(model: nn.Module, recipe: recipes.Recipe, batch: recipes.Batch) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        recipe.loss(model, batch).backward()
        optimizer.step()

    return step


def _same(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of a weight after equally many steps: both did the same work."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = flags.parse_args()
    rows = []
    for case in QUICK if arguments.quick else CASES:
        if arguments.case in case.name:
            rows += dtrain.run(measure, case, workers=arguments.workers, backend="allreduce")[0]
    common.record(rows, arguments.json, workers=arguments.workers)


if __name__ == "__main__":
    main()
