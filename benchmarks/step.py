"""A training step against torch's DistributedDataParallel over gloo, and against torch RPC's parameter server: same
model, data and processes, in one run.

    python benchmarks/step.py                                  all-reduce, all cases, ten minutes or more
    python benchmarks/step.py --quick --json F --picture P     one minute
    python benchmarks/step.py --contender server --case mlp --optimizer sgd adam
                                                               parameter servers that update, on shared memory
    python benchmarks/step.py --peers                          against DDP alone
    python benchmarks/step.py --peers --case "resnet18, batch 32" --repeats 20
                                                               one case in so many jobs, for a narrower interval

Contenders: `allreduce` (gloo too), `ps` (servers sum, workers step) and `server` (servers sum and step). Baselines:

    DDP                  left as it comes
    DDP, bucket views    with gradient_as_bucket_view
    torch RPC            gradients to a server that sums and steps, parameters back, as torch's tutorial has it
                         (`peers.py`); to be compared with `server`, which divides the work in the same way

Contender and baseline take turns in the same processes, on the same batch. A step is zero_grad, forward, loss, backward
and an optimizer's step, each written as its documentation says: `loss.backward()` for DDP, `replica.backward(loss,
samples=, total=)` for dtrain. Afterwards the weights of both are compared: they did the same work. A ratio below 1
means that dtrain's step is the shorter one.

Where a model's memory happens to lie changes its step by some percent: two copies that run the same code differ. So
each case is repeated in new processes, and whose model is made first alternates; the median is over all rounds.

With `--device cuda` models and batches are on CUDA, one device for each worker, and DDP's gradients go over NCCL.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import peers
import pictures
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain import recipes
from dtrain.comm import collectives
from dtrain.data import to_device

Step = Callable[[], None]


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
    Case("resnet50, batch 8", {"model": "resnet", "depth": "50", "image": "64"}, 8, 4, 4, 2),
    Case("lstm 19 M, batch 16", {"model": "lstm"}, 16, 2, 4, 2),
    Case("transformer 20 M, batch 8", {"model": "transformer"}, 8, 2, 4, 2),
]
QUICK = [
    Case("mlp 19 M, batch 64", {"model": "mlp"}, 64, 2, 3, 2),
    Case("resnet18, batch 8", {"model": "resnet", "image": "64"}, 8, 2, 3, 2),
]

CONTENDERS = {"allreduce": "dtrain allreduce", "ps": "dtrain ps", "server": "dtrain ps, update on servers"}
OPTIMIZERS: dict[str, peers.MakeOptimizer] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-4),
}


_TOLERANCE = 0.01
"""Orders of summation differ, and small differences grow with each step."""


@dataclass(frozen=True)
class Task:
    """What the workers of one job are told."""

    case: Case
    repeat: int
    contender: str
    optimizer: str
    device: str
    peers: list[str]
    folder: str
    """Where they meet."""


# -- a worker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """One worker, and what all its steps share."""

    comm: dtrain.Backend
    task: Task
    device: torch.device
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.task.optimizer](model.parameters())


@contextlib.contextmanager
def _dtrain(worker: Worker, model: nn.Module) -> Iterator[Step]:
    optimizer = worker.optimizer(model)
    update = dtrain.ServerUpdate(optimizer=optimizer) if worker.task.contender == "server" else "worker"
    replica = dtrain.replicate(model, worker.comm, update=update)
    samples = worker.task.case.batch
    total = samples * worker.comm.world_size

    def step() -> None:
        optimizer.zero_grad()
        replica.backward(worker.loss(model, worker.batch), samples=samples, total=total)
        if replica.updates:
            optimizer.step()
        replica.publish()

    yield step
    replica.close()


@contextlib.contextmanager
def _ddp(worker: Worker, model: nn.Module, *, views: bool) -> Iterator[Step]:
    devices = [worker.device] if worker.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=views)
    optimizer = worker.optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        worker.loss(wrapped, worker.batch).backward()
        optimizer.step()

    yield step


@contextlib.contextmanager
def _rpc(worker: Worker, model: nn.Module) -> Iterator[Step]:
    comm = worker.comm
    with peers.RpcTrainer(model, worker.task.folder, comm.rank, comm.world_size) as trainer:
        collectives.barrier(comm)
        yield lambda: trainer.step(worker.loss(model, worker.batch))


Make = Callable[[Worker, nn.Module], contextlib.AbstractContextManager[Step]]

DDP: dict[str, Make] = {
    "DDP": functools.partial(_ddp, views=False),
    "DDP, bucket views": functools.partial(_ddp, views=True),
}
PEERS: dict[str, Make] = {"rpc": _rpc}


def baselines(names: list[str]) -> dict[str, Make]:
    """DDP, and the peers of these names."""
    return DDP | {peers.NAMES[name]: PEERS[name] for name in names}


def measure(comm: dtrain.Backend, task: Task) -> dict[str, common.Times]:
    """One worker: for each baseline, seconds a step of contender and baseline, by round."""
    device = torch.device(task.device, comm.rank) if task.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = dist.FileStore(f"{task.folder}/store", comm.world_size)
        over = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(over, store=store, rank=comm.rank, world_size=comm.world_size)
    case = task.case
    recipe = recipes.build("synthetic", **case.options)
    batch = recipe.train.batch(torch.arange(case.batch) + case.batch * comm.rank)  # type: ignore[attr-defined]
    worker = Worker(comm, task, device, to_device(batch, device), recipe.loss)
    found = {}
    for name, make in baselines(task.peers).items():
        models = [copy.deepcopy(recipe.model).to(device) for _ in range(2)]
        own, other = models if task.repeat % 2 else models[::-1]
        with _dtrain(worker, own) as step, make(worker, other) as other_step:
            both = (_complete(each, device) for each in (step, other_step))
            times = common.alternate(*both, rounds=case.rounds, steps=case.steps)
            _check(f"{case.name}, {name}", own, other, recipe.model.to(device))
        # A step is over when its slowest worker is done: the mean over workers of their own clocks.
        mean = collectives.sum_numbers(comm, [second / comm.world_size for side in times for second in side])
        found[name] = mean[: case.rounds], mean[case.rounds :]
    return found


def _complete(step: Step, device: torch.device) -> Step:
    """The step, until the device has done it."""

    def complete() -> None:
        step()
        torch.cuda.synchronize(device)

    return complete if device.type == "cuda" else step


def _check(what: str, own: nn.Module, other: nn.Module, start: nn.Module) -> None:
    """Whether both did the same work in equally many steps: near each other, by the way that they have come."""
    apart, way = _distance(own, other), _distance(own, start)
    if not apart < _TOLERANCE * way:
        raise RuntimeError(f"{what}: the weights are {apart:.3g} apart, after a way of {way:.3g}: not the same work")


def _distance(a: nn.Module, b: nn.Module) -> float:
    """Norm of the difference of all weights."""
    with torch.no_grad():
        norms = [torch.norm(p - q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
        return torch.norm(torch.stack(norms)).item()


# -- a job ------------------------------------------------------------------------------------------------------------


def _rows(case: Case, arguments: argparse.Namespace, optimizer: str, names: list[str]) -> list[common.Row]:
    repeats = arguments.repeats or case.repeats
    runs = [_run(case, repeat, arguments, optimizer, names) for repeat in range(repeats)]
    return [
        common.ratio_row(
            f"{case.name}, {optimizer}",
            CONTENDERS[arguments.contender],
            baseline,
            common.join([run[baseline] for run in runs]),
        )
        for baseline in baselines(names)
    ]


def _run(
    case: Case, repeat: int, arguments: argparse.Namespace, optimizer: str, names: list[str]
) -> dict[str, common.Times]:
    """One repeat of a case, in new processes."""
    backend = "allreduce" if arguments.contender == "allreduce" else "ps"
    servers = arguments.servers if backend == "ps" else 1
    with tempfile.TemporaryDirectory(prefix="dtrain-") as folder, contextlib.ExitStack() as stack:
        if "rpc" in names:
            stack.enter_context(peers.rpc_server(folder, arguments.workers, OPTIMIZERS[optimizer]))
        task = Task(case, repeat, arguments.contender, optimizer, arguments.device, names, folder)
        return dtrain.run(measure, task, workers=arguments.workers, backend=backend, servers=servers)[0]


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, default=2)
    flags.add_argument("--contender", choices=CONTENDERS, default="allreduce")
    flags.add_argument("--servers", type=common.count, default=1, help="for ps and server")
    flags.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=["sgd"])
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    flags.add_argument(
        "--peers", choices=peers.NAMES, nargs="*", default=[*peers.NAMES], help="beside DDP (default: all)"
    )
    flags.add_argument(
        "--repeats", type=common.count, metavar="N", help="jobs of each case (default: 2 to 6, by the case)"
    )
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    arguments = flags.parse_args()
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.workers:
        flags.error(f"{arguments.workers} workers, {torch.cuda.device_count()} CUDA devices: NCCL needs one for each")
    absent = {peers.NAMES[name]: why for name in arguments.peers if (why := peers.absent(name))}
    names = [name for name in arguments.peers if peers.NAMES[name] not in absent]
    rows = []
    for case in QUICK if arguments.quick else CASES:
        for optimizer in arguments.optimizer if arguments.case in case.name else []:
            rows += _rows(case, arguments, optimizer, names)
    settings = {name: getattr(arguments, name) for name in ("workers", "servers", "device")}
    common.record(rows, arguments.json, **settings, absent=absent)
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    if rows:
        pictures.save("step", rows, arguments.picture)


if __name__ == "__main__":
    main()
