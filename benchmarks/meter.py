"""What the meter costs, and whether it tells the truth: against steps without it, and against torch's own instruments.

    python benchmarks/meter.py                     all cases, a quarter of an hour
    python benchmarks/meter.py --quick --json F    half a minute

Cost: two copies of a model are trained in the same processes, one by a plain backend and one by a metered one, with
phases timed and all workers' times exchanged every ten steps, as the Trainer does. Both send one small message every
ten steps for the loss. They take turns; a ratio is the median over the turns of metered over plain. Beside the time
that passes there is that of the processors which the workers use: it does not count what other programs take.

Truth: of the metered steps, the time that gradients were under way is compared with what torch's profiler saw of the
same transfers (`gloo:all_reduce`); and the times of forward, backward and communication with what
DistributedDataParallel logs of its own steps with the same model, batch and bucket size, which take turns with the
metered ones.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import common
import pictures
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import dtrain
from dtrain import recipes
from dtrain.comm import collectives
from dtrain.measure import Ledger, StepTimes, Stopwatch, metered, summarise
from dtrain.tables import table

EXCHANGE = 10
"""Steps between two exchanges of times."""
CPU = torch.device("cpu")
PROCESSOR = ("ratio_median", "ratio_low", "ratio_high", "contender_ms", "baseline_ms")
"""What is kept of the processors' time."""


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    name: str
    options: dict[str, str]
    batch: int
    rounds: int
    steps: int
    goal: float
    """Largest ratio aimed at."""


CASES = [
    Case("resnet18, batch 32", {"model": "resnet", "image": "64"}, 32, 16, EXCHANGE, 1.01),
    Case("mlp of a 5 ms step", {"model": "mlp", "hidden": "256"}, 64, 300, EXCHANGE, 1.03),
]
QUICK = [Case("mlp of a 5 ms step", {"model": "mlp", "hidden": "256"}, 64, 6, EXCHANGE, 1.03)]


@dataclass
class Side:
    """One copy of the model, and its step."""

    model: nn.Module
    step: Callable[[], None]


class Metered:
    """A loop with everything that the Trainer measures."""

    def __init__(self, comm: dtrain.Backend, case: Case, model: nn.Module, batch: object) -> None:
        self.comm = metered(comm)
        self.watch = Stopwatch(self.comm, CPU)
        self.ledger = Ledger(comm.rank, comm.world_size)
        self.steps: list[StepTimes] = []
        self.records: list[dict[str, float]] = []
        self._recipe = recipes.build("synthetic", **case.options)
        self._model, self._batch = model, batch
        self._replica = dtrain.replicate(model, self.comm)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        self._share = {"samples": case.batch, "total": case.batch * comm.world_size}
        self._count = 0

    def step(self) -> None:
        watch = self.watch
        watch.begin()
        with watch.phase("forward"):
            loss = self._recipe.loss(self._model, self._batch)
        with watch.phase("backward"):
            self._replica.backward(loss, **self._share)
        with watch.phase("optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._count += 1
        watch.end(self._count)
        if self._count % EXCHANGE == 0:
            self._exchange()

    def _exchange(self) -> None:
        steps = self.watch.take()
        flat = self.ledger.pack(steps, [step.record() for step in steps])
        self.comm.all_reduce(torch.cat([torch.zeros(3, dtype=torch.float64), flat]), "metric/record").wait()
        found = self.ledger.unpack(flat)
        self.steps += steps
        self.records += [r for everyone in found for r in everyone if r["worker"] == self.comm.rank]


def plain_step(comm: dtrain.Backend, case: Case, model: nn.Module, batch: object) -> Callable[[], None]:
    """The same loop without a meter."""
    recipe = recipes.build("synthetic", **case.options)
    replica = dtrain.replicate(model, comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    share = {"samples": case.batch, "total": case.batch * comm.world_size}
    count = 0

    def step() -> None:
        nonlocal count
        replica.backward(recipe.loss(model, batch), **share)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        if count % EXCHANGE == 0:
            collectives.sum_numbers(comm, [0.0, 1.0, 0.0], "metric/loss")

    return step


def _model_and_batch(comm: dtrain.Backend, case: Case) -> tuple[nn.Module, object]:
    recipe = recipes.build("synthetic", **case.options)
    return recipe.model, recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]


class Counting:
    """A step, and the seconds of processors that it has used here, call by call."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._spent_s: list[float] = []

    def __call__(self) -> None:
        start_s = time.process_time()
        self._step()
        self._spent_s.append(time.process_time() - start_s)

    def by_round(self, rounds: int, steps: int) -> list[float]:
        """Means of the last calls, `steps` in each round."""
        last = self._spent_s[-rounds * steps :]
        return [statistics.mean(last[i : i + steps]) for i in range(0, len(last), steps)]


def cost(comm: dtrain.Backend, case: Case, repeat: int) -> tuple[common.Times, common.Times]:
    """One worker: seconds a step, metered and plain, by round, and those of processors; the mean over workers."""
    torch.set_num_threads(1)
    model, batch = _model_and_batch(comm, case)
    models = [model, copy.deepcopy(model)]
    ours, theirs = models if repeat % 2 else models[::-1]  # where a model lies in memory changes its step
    sides = Counting(Metered(comm, case, ours, batch).step), Counting(plain_step(comm, case, theirs, batch))
    times = common.alternate(*sides, rounds=case.rounds, steps=case.steps, warmup=EXCHANGE)
    rounds = [*times, *(side.by_round(case.rounds, case.steps) for side in sides)]
    flat = collectives.sum_numbers(comm, [second / comm.world_size for side in rounds for second in side])
    passed, other, used, used_other = (flat[i : i + case.rounds] for i in range(0, len(flat), case.rounds))
    return (passed, other), (used, used_other)


def profiled(comm: dtrain.Backend, case: Case) -> list[tuple[float, float]]:
    """For each step: ms that gradients were under way, as the meter and as torch's profiler saw them."""
    torch.set_num_threads(1)
    model, batch = _model_and_batch(comm, case)
    loop = Metered(comm, case, model, batch)
    for _ in range(EXCHANGE):
        loop.step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(EXCHANGE):
            loop.step()
    events = sorted((e for e in seen.events() if e.name == "gloo:all_reduce"), key=lambda e: e.time_range.start)
    steps = loop.steps[EXCHANGE:]
    pairs, position = [], 0
    for step in steps:
        mine = [t for t in step.sent if t.key.startswith("gradient/")]
        theirs = events[position : position + len(mine)]
        position += len(mine)
        own_ms = sum(t.arrived_s - t.called_s for t in mine) * 1e3
        pairs.append((own_ms, sum(e.time_range.end - e.time_range.start for e in theirs) / 1e3))
    return pairs


def logged(comm: dtrain.Backend, case: Case, folder: str) -> dict[str, tuple[float, float]]:
    """Means in ms by the meter and as DistributedDataParallel logs them: of forward, backward, communication."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        store = dist.FileStore(f"{folder}/store", comm.world_size)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.world_size)
    model, batch = _model_and_batch(comm, case)
    recipe = recipes.build("synthetic", **case.options)
    other = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=8)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-4)
    loop = Metered(comm, case, model, batch)

    def ddp_step() -> None:
        optimizer.zero_grad()
        recipe.loss(other, batch).backward()
        optimizer.step()

    common.alternate(loop.step, ddp_step, rounds=case.rounds, steps=case.steps, warmup=EXCHANGE)
    data = other._get_ddp_logging_data()
    typical = summarise(loop.records)
    sent = [sum(t.arrived_s - t.called_s for t in s.sent if t.key.startswith("gradient/")) for s in loop.steps]
    return {
        "forward": (typical["forward_ms"], data["avg_forward_compute_time"] / 1e6),
        "backward, without what blocked": (typical["backward_ms"], data["avg_backward_compute_time"] / 1e6),
        "gradients under way": (statistics.median(sent) * 1e3, data["avg_backward_comm_time"] / 1e6),
    }


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, default=2)
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    flags.add_argument("--repeats", type=common.count, help="times in new processes (default 2, with --quick 1)")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    arguments = flags.parse_args()
    cases = [case for case in (QUICK if arguments.quick else CASES) if arguments.case in case.name]
    if not cases:
        flags.error(f"--case {arguments.case}: there are {', '.join(case.name for case in CASES)}")
    run = functools.partial(dtrain.run, workers=arguments.workers)
    rows = [_cost_row(case, backend, arguments, run) for case in cases for backend in ("ps", "allreduce")]
    print(common.show(rows), show_processors(rows), sep="\n", flush=True)
    truth = []
    for case in cases:
        pairs = run(profiled, case, backend="allreduce")[0]
        own, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
        truth.append(
            {"case": case.name, "what": "gradients under way", "by": "profiler", "meter_ms": own, "ms": theirs}
        )
        with tempfile.TemporaryDirectory() as folder:
            for what, (own, theirs) in run(logged, case, folder, backend="allreduce")[0].items():
                truth.append({"case": case.name, "what": what, "by": "DDP's log", "meter_ms": own, "ms": theirs})
    print("", show_truth(truth), sep="\n")
    if arguments.json:
        common.write(arguments.json, rows, workers=arguments.workers, torch_threads=1, truth=truth)
    pictures.save("meter", rows, arguments.picture)


def _cost_row(
    case: Case, backend: str, arguments: argparse.Namespace, run: Callable[..., list[tuple[common.Times, common.Times]]]
) -> common.Row:
    repeats = arguments.repeats or (1 if arguments.quick else 2)
    runs = [run(cost, case, repeat, backend=backend)[0] for repeat in range(repeats)]
    passed, used = (
        common.ratio_row(f"{case.name}, {backend}", "metered", "plain", common.join([one[i] for one in runs]))
        for i in range(2)
    )
    return {**passed, "goal": case.goal, **{f"processor_{name}": used[name] for name in PROCESSOR}}


def show_processors(rows: list[common.Row]) -> str:
    """Of the rows, what of the processors' time was seen; older records have none."""
    return "\n".join(
        f"{r['case']}: processors' time of the workers {r['processor_ratio_median']:.4f} times "
        f"({r['processor_ratio_low']:.4f} to {r['processor_ratio_high']:.4f}) that of plain steps"
        for r in rows
        if "processor_ratio_median" in r
    )


def show_truth(rows: list[common.Row]) -> str:
    """The rows as a table."""
    head = ["case", "what", "other instrument", "meter ms", "its ms", "meter / it"]
    cells = [
        [r["case"], r["what"], r["by"], f"{r['meter_ms']:.2f}", f"{r['ms']:.2f}", f"{r['meter_ms'] / r['ms']:.2f}"]
        for r in rows
    ]
    return table(head, cells, left=3)


if __name__ == "__main__":
    main()
