"""A training step on emulated hosts: what of the communication is hidden behind the computation, and what is not.

    python benchmarks/links_step.py                      8 workers at 25 Mbit/s, ten minutes
    python benchmarks/links_step.py --quick              2 workers, half a minute
    python benchmarks/links_step.py --workers 4 --rate 50mbit --mb 4 --compute 0.5 1 2 --json F --picture P

Each worker is one host, with a link of the given rate in each direction (`hosts.py`). The model computes as on an
accelerator that leaves the processor alone: its layers sleep, forward for a third of the time and backward for two, and
then have a gradient. So the links and what is sent when decide how long a step takes, and not this machine's cores.
`--compute`: how long the model computes in a step, in times that its gradient takes over a link.

    DDP                 torch's DistributedDataParallel over gloo, the baseline
    allreduce           dtrain over gloo
    sharded             the same with a ShardedUpdate
    ps N apart          N parameter servers on hosts of their own, which sum
    server N apart      which sum and step (ServerUpdate)
    early               with early_forward: the next forward begins before all parameters are there

Contenders take turns in the same processes, round by round; a round is some steps, after a barrier, until the last
parameter is there, and takes as long as its slowest worker. Buckets have a 16th of the model, for all
(`--buckets`). The bound is
the longer of computing and sending, both at once: for n workers and a model of M bytes over links of B bytes a second,
2(n-1)/n M/B for a ring, M/B for n servers apart. At the end all must have come to the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import pictures
import torch
from hosts import Hosts, Process, available, environment, hosts, server_hosts, start_servers
from links import TIMEOUT_S, ring, run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.comm import collectives
from dtrain.ps.client import ParameterServer
from dtrain.tables import table

LAYERS = 32
RINGS = ["allreduce", "sharded", "sharded early"]
SERVERS = ["ps", "server", "server early"]
WARMUP = 1
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Task:
    """What a worker is told."""

    folder: str
    workers: int
    numel: int
    """Parameters of the model."""
    compute_s: float
    """Of a step."""
    rounds: int
    steps: int
    """In a round."""
    buckets: int
    """That gradients travel in."""
    contenders: list[str]
    addresses: dict[str, list[str]]
    """Of the servers of each contender that has some."""


# -- a model that takes its time --------------------------------------------------------------------------------------


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        ctx.save_for_backward(x, weight)
        time.sleep(seconds)
        return x + weight[:1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        time.sleep(2 * ctx.seconds)
        return gradients[0], torch.full_like(weight, float(gradients[0]) * float(x)), None


class Layer(nn.Module):
    """Sleeps, and has a weight."""

    def __init__(self, numel: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return _Slow.apply(x, self.weight, self._seconds)  # type: ignore[no-any-return]


def model_of(task: Task) -> nn.Sequential:
    return nn.Sequential(*(Layer(task.numel // LAYERS, task.compute_s / 3 / LAYERS) for _ in range(LAYERS)))


# -- contenders -------------------------------------------------------------------------------------------------------

Round = Callable[[], None]
"""The steps of a round."""


def _loss(model: nn.Module, rank: int) -> Tensor:
    return model(torch.ones(1, requires_grad=True) * (rank + 1)).square().sum()  # type: ignore[no-any-return]


def _ddp(task: Task, comm: dtrain.Backend, model: nn.Module) -> Round:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=_bucket_mb(task), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def steps() -> None:
        for _ in range(task.steps):
            optimizer.zero_grad()
            _loss(wrapped, comm.rank).backward()
            optimizer.step()

    return steps


def _dtrain(task: Task, comm: dtrain.Backend, model: nn.Module, kind: str) -> Round:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    early = kind.endswith("early")
    update: Any = "worker"
    if kind.startswith("server"):
        update = dtrain.ServerUpdate(optimizer=optimizer, early_forward=early)
    elif kind.startswith("sharded"):
        update = dtrain.ShardedUpdate(optimizer=optimizer, early_forward=early)
    size = _bucket_mb(task)
    replica = dtrain.replicate(model, comm, update=update, bucket_mb=size, first_bucket_mb=size)

    def steps() -> None:
        for _ in range(task.steps):
            optimizer.zero_grad()
            replica.backward(_loss(model, comm.rank))
            if replica.updates:
                optimizer.step()
            replica.publish()
        replica.settle()

    return steps


def _bucket_mb(task: Task) -> float:
    return task.numel * 4 / task.buckets / 2**20


# -- a worker ---------------------------------------------------------------------------------------------------------


def work(task: Task) -> None:
    """Measure everything, and leave the durations in the job's folder."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:

        def ring_of_its_own() -> dtrain.Backend:
            comm = dtrain.connect("allreduce", timeout_s=TIMEOUT_S)
            stack.callback(comm.close)
            return comm

        comm = ring_of_its_own()
        models = {"DDP": model_of(task)}
        rounds = {"DDP": _ddp(task, comm, models["DDP"])}
        backends = {name: ring_of_its_own() for name in RINGS if name in task.contenders}
        for name, addresses in task.addresses.items():
            server = ParameterServer(addresses, comm.rank, task.workers, timeout_s=TIMEOUT_S, lanes="off")
            stack.callback(server.close)
            backends[name] = server
        for name, backend in backends.items():
            models[name] = model_of(task)
            rounds[name] = _dtrain(task, backend, models[name], name)
        found = _measure(task, comm, rounds)
        for name, model in models.items():
            for own, other in zip(model.parameters(), models["DDP"].parameters(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, msg=f"{name}: other weights than DDP")
        Path(task.folder, f"{comm.rank}.json").write_text(json.dumps(found), encoding="utf-8")
        collectives.barrier(comm)


def _measure(task: Task, comm: dtrain.Backend, rounds: dict[str, Round]) -> dict[str, list[float]]:
    """Seconds a step of each contender, by round."""
    times: dict[str, list[float]] = {name: [] for name in rounds}
    names = list(rounds)
    for number in range(WARMUP + task.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            collectives.barrier(comm)
            start_s = time.perf_counter()
            rounds[name]()
            if number >= WARMUP:
                times[name].append((time.perf_counter() - start_s) / task.steps)
    return times


# -- a job ------------------------------------------------------------------------------------------------------------


def measure(workers: int, rate: str, numel: int, compute: float, arguments: argparse.Namespace) -> Iterator[common.Row]:
    """Rows for one number of workers, one rate and one time of computing."""
    with hosts(2 * workers, rate=rate) as h, tempfile.TemporaryDirectory() as folder:
        alone_s = numel * 4 / h.rate_bytes_per_s
        with h.watch() as use:
            found = _job(h, Path(folder), workers, numel, compute * alone_s, arguments)
        slowest = {name: [max(t) for t in zip(*(worker[name] for worker in found), strict=True)] for name in found[0]}
        for name, times in slowest.items():
            sending = 1.0 if " apart" in name else ring(workers)
            bound_s = max(compute, sending) * alone_s
            median_s = statistics.median(times)
            yield {
                "workers": workers,
                "rate": rate,
                "bytes": numel * 4,
                "compute_ms": compute * alone_s * 1e3,
                "contender": name,
                "median_ms": median_s * 1e3,
                "min_ms": min(times) * 1e3,
                "max_ms": max(times) * 1e3,
                "bound_ms": bound_s * 1e3,
                "of_bound": bound_s / median_s,
                "ratio": statistics.median(d / t for d, t in zip(slowest["DDP"], times, strict=True)),
                "rounds": len(times),
                "steps": arguments.steps,
                "buckets": arguments.buckets,
                **use.figures(),
            }


def _job(
    h: Hosts, folder: Path, workers: int, numel: int, compute_s: float, arguments: argparse.Namespace
) -> list[dict[str, list[float]]]:
    places = server_hosts(len(h), workers=workers, servers=workers, placement="apart")
    addresses: dict[str, list[str]] = {}
    processes: list[Process] = []
    inside = environment({"role": "server", "timeout_s": TIMEOUT_S}, threads=1)
    for kind in SERVERS:
        if kind not in arguments.only:
            continue
        name = " ".join([kind.split()[0], f"{workers} apart", *kind.split()[1:]])
        addresses[name] = binds = [f"tcp://{h.address(host)}:{h.port()}" for host in places]
        processes += start_servers(h, places, binds, workers, inside, of=f" of {name}")
    told = (arguments.rounds, arguments.steps, arguments.buckets, arguments.only)
    task = Task(str(folder), workers, numel, compute_s, *told, addresses)
    return run_workers(h, folder, workers, __file__, asdict(task), processes)


# -- figures ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[common.Row]) -> str:
    """The rows as a table."""
    head = ["workers", "rate", "MB", "contender", "computes ms", "step ms", "bound ms", "of bound", "times DDP's speed"]
    cells = [
        [
            *(str(row["workers"]), row["rate"], f"{row['bytes'] / 1e6:.1f}", row["contender"]),
            *(f"{row['compute_ms']:.0f}", f"{row['median_ms']:.0f}", f"{row['bound_ms']:.0f}"),
            *(f"{row['of_bound']:.0%}", f"{row['ratio']:.2f}"),
        ]
        for row in rows
    ]
    return table(head, cells, left=4)


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, nargs="+", metavar="N")
    flags.add_argument("--rate", nargs="+", help="payload of TCP each way: 25mbit, 1gbit")
    flags.add_argument("--mb", type=float, help="size of the model in 10^6 bytes (default: 4)")
    flags.add_argument("--compute", type=float, nargs="+", help="times of computing (default: 1)")
    flags.add_argument("--buckets", type=common.count, default=16, help="that gradients travel in (default: 16)")
    flags.add_argument("--only", nargs="+", choices=[*RINGS, *SERVERS], default=[*RINGS, *SERVERS], metavar="WAY")
    flags.add_argument("--rounds", type=common.count)
    flags.add_argument("--steps", type=common.count, help="in a round (default: 4)")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    flags.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # this process is a worker
    arguments = flags.parse_args()
    if arguments.work:
        work(Task(**json.loads(arguments.work.read_text(encoding="utf-8"))))
        return
    if (reason := available()) is not None:
        flags.error(reason)
    rows = list(_rows(arguments))
    print("", show(rows), sep="\n")
    if arguments.json:
        common.write(arguments.json, rows)
    pictures.save("links_step", rows, arguments.picture)


def _rows(arguments: argparse.Namespace) -> Iterator[common.Row]:
    quick = arguments.quick
    numel = int((arguments.mb or (1.0 if quick else 4.0)) * 1e6 / 4) // LAYERS * LAYERS
    arguments.rounds = arguments.rounds or (2 if quick else 5)
    arguments.steps = arguments.steps or (2 if quick else 4)
    for rate in arguments.rate or ["50mbit" if quick else "25mbit"]:
        for workers in arguments.workers or ([2] if quick else [8]):
            for compute in arguments.compute or [1.0]:
                rows = list(measure(workers, rate, numel, compute, arguments))
                busy, stolen = rows[0]["busy"], rows[0]["stolen"]
                case = f"{workers} workers at {rate}, computing for {compute:g}"
                print(f"{case}: processors {busy:.0%} busy, {stolen:.0%} stolen", flush=True)
                yield from rows


if __name__ == "__main__":
    main()
