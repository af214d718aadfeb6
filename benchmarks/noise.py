"""What it costs to measure the gradient noise scale while training.

    python benchmarks/noise.py                     all cases, a quarter of an hour
    python benchmarks/noise.py --quick --json F    half a minute

Two copies of a model are trained in the same processes by `replica.backward` and SGD; one is observed by a
`dtrain.largebatch.GradientNoise`, and all workers ask it for the noise scale every hundred steps. They take turns; a
ratio is the median over the turns of observed over plain, with the interval that holds it 95 times in 100.

Percents are at the edge of what such a ratio can tell on a machine that is shared. So of the observed loop alone, steps
that are measured are also compared with those between them, and the estimate is timed: their medians give the cost too,
as a part of a plain step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from dataclasses import dataclass

import common
import torch
from torch import nn

import dtrain
from dtrain import recipes
from dtrain.comm import collectives
from dtrain.largebatch import GradientNoise
from dtrain.tables import table

ASK = 100
"""Steps between two estimates."""


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    name: str
    options: dict[str, str]
    batch: int
    """Samples of a worker."""
    every: int
    rounds: int
    steps: int
    """In a turn; a multiple of `every`."""
    adam: bool = False
    """Whether gradients are preconditioned for Adam."""
    goal: float | None = None
    """Largest ratio aimed at."""


RESNET = {"model": "resnet", "image": "64"}
MLP = {"model": "mlp", "hidden": "256"}
CASES = [
    Case("mlp of a 10 ms step", MLP, 128, 20, 60, 20, goal=1.01),
    Case("mlp of a 10 ms step, Adam's", MLP, 128, 20, 60, 20, adam=True, goal=1.01),
    Case("resnet18, batch 32", RESNET, 32, 20, 4, 20, goal=1.01),
    Case("resnet18, batch 32", RESNET, 32, 1, 8, 4),
    Case("resnet18, batch 32, Adam's", RESNET, 32, 20, 4, 20, adam=True, goal=1.01),
]
QUICK = [Case("mlp of a 10 ms step", MLP, 128, 20, 6, 20, goal=1.01)]


class Loop:
    """A model that is trained on one batch, observed or not."""

    def __init__(self, comm: dtrain.Backend, case: Case, model: nn.Module, *, observed: bool) -> None:
        recipe = recipes.build("synthetic", **case.options)
        self._loss, self._model = recipe.loss, model
        self._batch = recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]
        self._share = {"samples": case.batch, "total": case.batch * comm.world_size}
        kind = torch.optim.Adam if case.adam else torch.optim.SGD
        self._optimizer = kind(model.parameters(), lr=1e-5)
        self._replica = dtrain.replicate(model, comm)
        moments = self._optimizer if case.adam else None
        self.noise = GradientNoise(model, comm, every=case.every, optimizer=moments)
        if observed:
            self._replica.observe(self.noise)

    def step(self) -> None:
        self._replica.backward(self._loss(self._model, self._batch), **self._share)
        self._optimizer.step()
        self._optimizer.zero_grad()


def model_of(case: Case) -> nn.Module:
    return recipes.build("synthetic", **case.options).model


def cost(comm: dtrain.Backend, case: Case, repeat: int) -> common.Times:
    """One worker: seconds a step, observed and plain, by round; the mean over workers."""
    torch.set_num_threads(1)
    model = model_of(case)
    models = [model, copy.deepcopy(model)]
    ours, theirs = models if repeat % 2 else models[::-1]  # where a model lies in memory changes its step
    observed, plain = Loop(comm, case, ours, observed=True), Loop(comm, case, theirs, observed=False)
    _import_scipy()
    ask = itertools.cycle([*[lambda: None] * (ASK - 1), observed.noise.estimate])

    def step() -> None:
        observed.step()
        next(ask)()

    times = common.alternate(step, plain.step, rounds=case.rounds, steps=case.steps, warmup=case.every)
    both = collectives.sum_numbers(comm, [second / comm.world_size for side in times for second in side])
    return both[: case.rounds], both[case.rounds :]


def steps_of(comm: dtrain.Backend, case: Case, steps: int) -> dict[str, list[float]]:
    """One worker: seconds of steps that were measured, of others, and of estimates."""
    torch.set_num_threads(1)
    _import_scipy()
    loop = Loop(comm, case, model_of(case), observed=True)
    for _ in range(case.every):
        loop.step()
    found: dict[str, list[float]] = {"measured": [], "other": [], "estimate": []}
    for number in range(1, steps + 1):
        start_s = time.perf_counter()
        loop.step()
        found["other" if number % case.every else "measured"].append(time.perf_counter() - start_s)
        if number % ASK == 0 or number == steps:
            start_s = time.perf_counter()
            loop.noise.estimate()
            found["estimate"].append(time.perf_counter() - start_s)
    return found


def _import_scipy() -> None:
    from scipy import special  # noqa: F401  (half a second, at the first estimate)


# -- the command ------------------------------------------------------------------------------------------------------


def measure(case: Case, backend: str, workers: int, repeats: int) -> common.Row:
    """A row of the record."""
    found = [dtrain.run(cost, case, repeat, workers=workers, backend=backend)[0] for repeat in range(repeats)]
    row = common.ratio_row(f"{case.name}, {backend}", f"every {case.every}", "plain", common.join(found))
    if case.every == 1:
        return {**row, "goal": case.goal, "every": 1}
    seconds = dtrain.run(steps_of, case, case.rounds * case.steps, workers=workers, backend=backend)[0]
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}

    def part(measured_ms: float) -> float:
        return ((measured_ms - ms["other"]) / case.every + ms["estimate"] / ASK) / ms["other"]

    low, high = (part(1e3 * second) for second in common.median_interval(seconds["measured"]))
    parts = {"part": part(ms["measured"]), "part_low": low, "part_high": high}
    return {**row, "goal": case.goal, "every": case.every, "steps_ms": ms, **parts}


def show(rows: list[common.Row]) -> str:
    """The rows as a table."""
    head = ["case", "observed", "step ms", "ratio", "95 %", "goal", "measured ms", "other", "estimate", "cost", "95 %"]
    cells = []
    for row in rows:
        ratios = [f"{row['ratio_median']:.3f}", f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"]
        goal = "-" if row["goal"] is None else f"{row['goal']:.2f}"
        apart = ["-"] * 5
        if "steps_ms" in row:
            apart = [f"{row['steps_ms'][name]:.2f}" for name in ("measured", "other", "estimate")]
            apart += [f"{100 * row['part']:.2f} %", f"{100 * row['part_low']:.2f} to {100 * row['part_high']:.2f}"]
        cells.append([row["case"], row["contender"], f"{row['baseline_ms']:.1f}", *ratios, goal, *apart])
    return table(head, cells, left=2)


def _arguments() -> argparse.Namespace:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, default=2)
    flags.add_argument("--case", default="", metavar="WORD", help="only cases whose name contains this")
    flags.add_argument("--backend", nargs="*", choices=("ps", "allreduce"), help="default: ps allreduce")
    flags.add_argument("--repeats", type=common.count, help="times in new processes (default 2, with --quick 1)")
    arguments = flags.parse_args()
    arguments.cases = [case for case in (QUICK if arguments.quick else CASES) if arguments.case in case.name]
    if not arguments.cases:
        flags.error(f"--case {arguments.case}: there are {', '.join(case.name for case in CASES)}")
    return arguments


def main() -> None:
    arguments = _arguments()
    repeats = arguments.repeats or (1 if arguments.quick else 2)
    rows = []
    for case in arguments.cases:
        for backend in arguments.backend or ("ps", "allreduce"):
            rows.append(measure(case, backend, arguments.workers, repeats))
            print(show(rows[-1:]), flush=True)
    print("", show(rows), sep="\n")
    if arguments.json:
        common.write(arguments.json, rows, workers=arguments.workers, torch_threads=1)


if __name__ == "__main__":
    main()
