"""Forward and backward of each kind of batch norm against plain `nn.BatchNorm2d`, at shapes of ResNet layers.

    python benchmarks/norm.py                      shapes of ResNet-18 and ResNet-50, all kinds: some minutes
    python benchmarks/norm.py --quick --json F     two shapes and short turns, half a minute
    python benchmarks/norm.py --kind ghost renorm  only kinds whose name contains one of these

Kinds:

    ghost 8, ghost 16   statistics of groups of 8 and of 16 samples
    frozen              running statistics, as they are; weight and bias as `freeze` leaves them
    renorm              batch renormalisation past its warm-up, so that r and d are computed and clipped
    virtual             by a reference of 32 samples more, which go through forward and backward with every batch: put
                        in front of the input, and taken off again
    sync, 1 worker      the synchronised layer where nobody is to be waited for: what its own computing costs
    group norm          `nn.GroupNorm` of 32 groups, for orientation

A step is a forward and the gradients of the input and of all parameters that are learnt. Contender and baseline take
turns in one process, on one thread and on the same input; a ratio is the median over the turns of contender over
baseline. `goal` is what was aimed at.

Then a synchronised layer over several workers, each with a batch of that size, beside a plain layer on the same batch.
All meet at a barrier before each turn, and a time is the mean over workers. `waiting` is the part of the synchronised
step that workers are blocked in the backend: for each other, and for the transfer.

On a CUDA device, where there is one: each step ends with a synchronisation, and where there are devices enough for
NCCL, `nn.SyncBatchNorm` stands beside. (Not tried yet: there was none.)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dtrain
from dtrain.comm import collectives
from dtrain.measure import Stopwatch, metered
from dtrain.norm import convert, freeze, renorm, replace_with_group_norm, virtual
from dtrain.tables import table

Shape = tuple[int, ...]
"""(N, C, H, W)."""

SHAPES: list[Shape] = [
    (32, 64, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
]
"""Outputs of the stages: ResNet-18, then ResNet-50."""
QUICK: list[Shape] = [(32, 128, 28, 28), (32, 512, 7, 7)]
SHARED: list[Shape] = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)]

REFERENCE = 32
"""Samples of the reference batch of virtual batch norm."""
GROUPS = 32


@dataclass(frozen=True)
class Kind:
    """A layer to be measured."""

    name: str
    make: Callable[[nn.BatchNorm2d, Shape], nn.Module]
    """From a plain layer in training mode, for an input of that shape."""
    goal: float | None = None
    """Largest ratio aimed at."""


def _renorm(layer: nn.BatchNorm2d, _: Shape) -> nn.Module:
    return renorm(layer, warmup=0, r_steps=1, d_steps=1)


def _virtual(layer: nn.BatchNorm2d, shape: Shape) -> nn.Module:
    return virtual(layer, _numbers((REFERENCE, *shape[1:]), seed=2))


KINDS = [
    Kind("ghost 8", lambda layer, shape: convert(layer, norm_batch=8, micro_batch=shape[0]), goal=1.25),
    Kind("ghost 16", lambda layer, shape: convert(layer, norm_batch=16, micro_batch=shape[0]), goal=1.25),
    Kind("frozen", lambda layer, _: freeze(layer), goal=1.0),
    Kind("renorm", _renorm, goal=2.0),
    Kind("virtual", _virtual),
    Kind("sync, 1 worker", lambda layer, _: convert(layer, norm_batch="global")),
    Kind("group norm", lambda layer, _: replace_with_group_norm(layer, GROUPS)),
]


def _numbers(shape: Shape, *, seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def stepper(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward of that layer."""
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(layer(x), inputs, dy)
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def steps_in(turn_s: float, step: Callable[[], None]) -> int:
    """How many steps last about that long."""
    step()
    start_s = time.perf_counter()
    step()
    return max(1, min(200, round(turn_s / (time.perf_counter() - start_s))))


# -- one worker -------------------------------------------------------------------------------------------------------


def alone(shape: Shape, kinds: list[Kind], device: str, *, rounds: int, turn_s: float) -> list[common.Row]:
    """Each kind against the plain layer."""
    x, dy = (_numbers(shape, seed=seed, device=device) for seed in (0, 1))
    x.requires_grad_()
    baseline = stepper(nn.BatchNorm2d(shape[1], device=device), x, dy)
    steps = steps_in(turn_s, baseline)
    rows = []
    for kind in kinds:
        layer = kind.make(nn.BatchNorm2d(shape[1]), shape).to(device)
        times = common.alternate(stepper(layer, x, dy), baseline, rounds=rounds, steps=steps)
        row = common.ratio_row(str(shape), kind.name, "plain", times)
        rows.append({**row, "goal": kind.goal, "steps": steps, "device": device})
    return rows


def show(rows: list[common.Row]) -> str:
    """The rows as a table."""
    head = ["shape", "kind", "plain ms", "ms", "ratio", "min", "max", "goal", "met"]
    return table(head, [[*_cells(row), *_goal(row)] for row in rows], left=2)


def _cells(row: common.Row) -> list[str]:
    times = [f"{row[f'{name}_ms']:.2f}" for name in ("baseline", "contender")]
    return [
        row["case"],
        row["contender"],
        *times,
        *(f"{row[f'ratio_{name}']:.2f}" for name in ("median", "min", "max")),
    ]


def _goal(row: common.Row) -> list[str]:
    if row["goal"] is None:
        return ["-", "-"]
    return [f"{row['goal']:.2f}", "yes" if row["ratio_median"] <= row["goal"] else "no"]


# -- several workers --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a worker measured: seconds a step by round."""

    times_s: dict[str, list[float]] = field(default_factory=dict)
    waiting_s: list[float] = field(default_factory=list)
    """Of the steps of `waits`, what was spent blocked in the backend."""


def together(comm: dtrain.Backend, shape: Shape, rounds: int, steps: int) -> Found:
    """One worker: a plain layer, a synchronised one and, with NCCL, torch's."""
    torch.set_num_threads(1)
    device = f"cuda:{comm.rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    meter = metered(comm)
    x, dy = (_numbers(shape, seed=10 * comm.rank + n, device=device) for n in range(2))
    x.requires_grad_()
    layers = {
        "plain": nn.BatchNorm2d(shape[1], device=device),
        "sync": convert(nn.BatchNorm2d(shape[1], device=device), comm=meter),
    }
    if comm.name == "allreduce" and _nccl(comm.world_size):
        torch.cuda.set_device(device)
        layers["torch"] = nn.SyncBatchNorm.convert_sync_batchnorm(
            nn.BatchNorm2d(shape[1], device=device), dist.group.WORLD
        )
    ready = {name: stepper(layer, x, dy) for name, layer in layers.items()}
    watch = Stopwatch(meter, torch.device(device))
    found = Found({name: [] for name in ready})
    for step in ready.values():
        step()
        step()
    for number in range(rounds):
        for name in list(ready) if number % 2 else list(ready)[::-1]:
            collectives.barrier(comm)
            watch.begin()
            start_s = time.perf_counter()
            for _ in range(steps):
                ready[name]()
            found.times_s[name].append((time.perf_counter() - start_s) / steps)
            watch.end()
            if name == "sync":
                found.waiting_s.append(watch.take()[0].record()["exposed_comm_ms"] / 1e3 / steps)
    return found


def _nccl(workers: int) -> bool:
    """Whether each worker has a device of its own."""
    return torch.cuda.device_count() >= workers and dist.is_nccl_available()


def shared_rows(backend: str, shape: Shape, found: list[Found], steps: int) -> list[common.Row]:
    """Rows of the record; a time is the mean over workers."""
    times_s = {name: _means([worker.times_s[name] for worker in found]) for name in found[0].times_s}
    waiting_s = _means([worker.waiting_s for worker in found])
    contenders = {"sync": f"sync, {len(found)} workers, {backend}", "torch": "nn.SyncBatchNorm, NCCL"}
    rows = []
    for name in [name for name in times_s if name in contenders]:
        row = common.ratio_row(str(shape), contenders[name], "plain", (times_s[name], times_s["plain"]))
        row |= {"goal": None, "steps": steps}
        if name == "sync":
            shares = [w / t for w, t in zip(waiting_s, times_s["sync"], strict=True)]
            row |= {"waiting_ms": statistics.median(waiting_s) * 1e3, "waiting_share": statistics.median(shares)}
        rows.append(row)
    return rows


def _means(workers: list[list[float]]) -> list[float]:
    return [statistics.mean(times) for times in zip(*workers, strict=True)]


def show_shared(rows: list[common.Row]) -> str:
    """The rows as a table."""
    head = ["shape of each worker", "contender", "plain ms", "ms", "ratio", "min", "max", "waiting ms", "of the step"]
    waiting = [
        [f"{row['waiting_ms']:.2f}", f"{row['waiting_share']:.0%}"] if "waiting_ms" in row else ["-", "-"]
        for row in rows
    ]
    return table(head, [[*_cells(row), *more] for row, more in zip(rows, waiting, strict=True)], left=2)


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    flags = common.parser(__doc__ or "")
    names = ", ".join(kind.name for kind in KINDS)
    flags.add_argument("--kind", nargs="*", default=[""], metavar="WORD", help=f"only kinds with it in {names}")
    flags.add_argument("--workers", type=int, default=2, help="of the synchronised layer; 0 leaves that part out")
    flags.add_argument("--rounds", type=common.count, help="turns of each (default 15, with --quick 5)")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    kinds = [kind for kind in KINDS if any(word in kind.name for word in arguments.kind)]
    rows = []
    for shape in QUICK if arguments.quick else SHAPES:
        rows += alone(shape, kinds, device, rounds=rounds, turn_s=0.02 if arguments.quick else 0.1)
    print(show(rows), flush=True)
    shared = _shared(arguments, rounds) if arguments.workers else []
    if shared:
        print("", show_shared(shared), sep="\n")
    if device == "cuda" and arguments.workers and not _nccl(arguments.workers):
        print(f"absent: nn.SyncBatchNorm: NCCL needs {arguments.workers} devices")
    if arguments.json:
        more = {"workers": arguments.workers, "torch_threads": 1, "device": device, "reference": REFERENCE}
        common.write(arguments.json, rows + shared, **more)


def _shared(arguments: argparse.Namespace, rounds: int) -> list[common.Row]:
    rows = []
    for shape in QUICK[:1] if arguments.quick else SHARED:
        steps = 3 if arguments.quick else max(2, round(1e7 / torch.Size(shape).numel()))
        for backend in ("ps", "allreduce"):
            if backend == "allreduce" and torch.cuda.is_available() and not _nccl(arguments.workers):
                continue
            found = dtrain.run(together, shape, rounds, steps, workers=arguments.workers, backend=backend)
            rows += shared_rows(backend, shape, found, steps)
    return rows


if __name__ == "__main__":
    main()
