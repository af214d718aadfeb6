"""A training step over `allreduce` against torch's DistributedDataParallel: same model, data, gloo group, in one run.

    python benchmarks/step.py                     all cases, some minutes
    python benchmarks/step.py --quick --json F    one minute

Both take turns in the same processes, on the same batch; DDP is left as it comes, and beside it with
gradient_as_bucket_view=True. A step is zero_grad, forward, loss, backward and an SGD step, each written as its
documentation says: `loss.backward()` for DDP, `replica.backward(loss, samples=, total=)` for dtrain. A ratio below 1
means that dtrain's step is the shorter one.

Where a model's memory happens to lie changes its step by some percent: two copies that run the same code differ. So
each case is repeated in new processes, and whose model is made first alternates; the median is over all rounds.
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

CONTENDER = "dtrain allreduce"
BASELINES = {"DDP": False, "DDP, bucket views": True}


def measure(comm: dtrain.Backend, case: Case, repeat: int) -> dict[str, common.Times]:
    """One worker: for each baseline, seconds a step of contender and baseline, by round."""
    recipe = recipes.build("synthetic", **case.options)
    batch = recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]
    found = {}
    for baseline, views in BASELINES.items():
        models = [copy.deepcopy(recipe.model) for _ in range(2)]
        own, other = models if repeat % 2 else models[::-1]
        replica = dtrain.replicate(own, comm)
        wrapped = DistributedDataParallel(other, gradient_as_bucket_view=views)
        share = {"samples": case.batch, "total": case.batch * comm.world_size}
        mine = common.alternate(
            _step(own, recipe, batch, lambda loss, replica=replica, share=share: replica.backward(loss, **share)),
            _step(wrapped, recipe, batch, torch.Tensor.backward),
            rounds=case.rounds,
            steps=case.steps,
        )
        if _same(own, other) > 1e-3:
            raise RuntimeError(f"{case.name}: the weights differ by {_same(own, other)}: not the same work")
        replica.close()
        # A step is over when its slowest worker is done: the mean over workers of their own clocks.
        both = collectives.sum_numbers(comm, [second / comm.world_size for side in mine for second in side])
        found[baseline] = both[: case.rounds], both[case.rounds :]
    return found


def _step(
    model: nn.Module, recipe: recipes.Recipe, batch: recipes.Batch, backward: Callable[[torch.Tensor], None]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        backward(recipe.loss(model, batch))
        optimizer.step()

    return step


def _same(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of a weight after equally many steps: both did the same work."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _rows(case: Case, workers: int) -> list[common.Row]:
    runs = [
        dtrain.run(measure, case, repeat, workers=workers, backend="allreduce")[0] for repeat in range(case.repeats)
    ]
    return [
        common.ratio_row(case.name, CONTENDER, baseline, common.join([run[baseline] for run in runs]))
        for baseline in BASELINES
    ]


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = flags.parse_args()
    rows = []
    for case in QUICK if arguments.quick else CASES:
        if arguments.case in case.name:
            rows += _rows(case, arguments.workers)
    common.record(rows, arguments.json, workers=arguments.workers)


if __name__ == "__main__":
    main()
