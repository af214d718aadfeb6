"""One slow worker: how long until a fixed loss, when all wait for it, and when they do not.

    python benchmarks/stragglers.py                   4 workers, one 4 times as slow, some minutes
    python benchmarks/stragglers.py --quick --json F

Trains `digits` with the update on the servers. A worker's step takes a fixed time, which it spends asleep, beside its
small computation; the slow one's is `--factor` times as long. So the processors are no bottleneck, and times are those
of a job in which each worker has a device of its own. The learning rate is divided by the number of workers where each
gradient is a step of its own. The loss is that of the held-out digits, which worker 0 looks at every few steps, with
the clock stopped.

Ways: synchronous; backup workers (the slowest gradient of each step is dropped); SSP (nobody is more than s steps
ahead); asynchronous, plain and with the learning rate divided by the staleness; beside them all-reduce.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import pictures
import torch

import dtrain
from dtrain import recipes
from dtrain.comm import collectives
from dtrain.tables import table


@dataclass(frozen=True)
class Way:
    """How workers wait for each other."""

    name: str
    backend: str = "ps"
    staleness: int | None = 0
    backup_workers: int = 0
    damping: bool = False


WAYS = [
    Way("all-reduce", backend="allreduce"),
    Way("synchronous"),
    Way("1 backup worker", backup_workers=1),
    Way("SSP, s = 3", staleness=3),
    Way("SSP, s = 16", staleness=16),
    Way("asynchronous", staleness=None),
    Way("asynchronous, damped", staleness=None, damping=True),
]


def measure(comm: dtrain.Backend, way: Way, arguments: dict[str, Any]) -> dict[str, Any]:
    """One worker's run: seconds to the loss (NaN if never), its steps, the staleness of its gradients."""
    recipe = recipes.build("digits", seed=arguments["seed"])
    model, alone = recipe.model, way.staleness != 0
    lr = arguments["lr"] / (comm.world_size if alone else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.0 if alone else 0.9)
    if not alone:
        optimizer.param_groups[0]["lr"] = lr * 0.1  # momentum 0.9 makes each step ten times as long
    update: Any = "worker"
    if way.backend == "ps":
        update = dtrain.ServerUpdate(
            optimizer=optimizer,
            staleness=way.staleness,
            backup_workers=way.backup_workers,
            damping=way.damping,
        )
    replica = dtrain.replicate(model, comm, update=update)
    nap_s = arguments["step_ms"] / 1e3 * (arguments["factor"] if comm.rank == comm.world_size - 1 else 1)
    generator = torch.Generator().manual_seed(1000 * arguments["seed"] + comm.rank)
    reached_s, losses, stopped_s, steps = float("nan"), [], 0.0, 0
    collectives.barrier(comm)
    start_s = time.perf_counter()
    while time.perf_counter() - start_s - stopped_s < arguments["limit_s"]:
        chosen = torch.randint(len(recipe.train), (arguments["batch"],), generator=generator)  # type: ignore[arg-type]
        batch = torch.utils.data.default_collate([recipe.train[int(i)] for i in chosen])
        optimizer.zero_grad()
        time.sleep(nap_s)
        share = {"samples": len(chosen), "total": len(chosen) * comm.world_size}
        replica.backward(recipe.loss(model, batch), **share)
        if replica.updates:
            optimizer.step()
        replica.publish()
        steps += 1
        if comm.rank == 0 and steps % 5 == 0:
            look_s = time.perf_counter()
            losses.append((look_s - start_s - stopped_s, _loss(recipe)))
            stopped_s += time.perf_counter() - look_s
        if _enough(comm, replica, losses, way, arguments):
            break
    if losses:
        reached_s = next((at for at, loss in losses if loss <= arguments["loss"]), float("nan"))
    staleness = dict(replica.pushes.staleness) if replica.pushes else {0: steps}
    return {
        "seconds": reached_s,
        "steps": steps,
        "staleness": staleness,
        "dropped": _dropped(replica),
        "losses": losses,
    }


def _loss(recipe: recipes.Recipe) -> float:
    recipe.model.eval()
    with torch.no_grad():
        batch = torch.utils.data.default_collate([recipe.test[i] for i in range(len(recipe.test))])  # type: ignore[arg-type, index]
        loss = float(recipe.loss(recipe.model, batch))
    recipe.model.train()
    return loss


def _enough(
    comm: dtrain.Backend,
    replica: dtrain.Replica,
    losses: list[tuple[float, float]],
    way: Way,
    arguments: dict[str, Any],
) -> bool:
    """Whether to stop. Where workers do not step together, worker 0 leaves word of the step to stop at."""
    reached = bool(losses) and losses[-1][1] <= arguments["loss"]
    if way.staleness == 0 and not way.backup_workers:
        return collectives.sum_numbers(comm, [float(reached)], "metric/enough")[0] > 0
    assert replica.pushes is not None  # noqa: S101  (all other ways have it)
    word = Path(arguments["folder"], f"stop-{way.name}-{arguments['seed']}")
    if reached and not word.exists():
        made = word.with_suffix(".made")
        made.write_text(str(replica.pushes.steps + 20 if way.backup_workers else 0))
        made.rename(word)
    return word.exists() and replica.pushes.steps >= int(word.read_text())


def _dropped(replica: dtrain.Replica) -> int:
    return replica.pushes.dropped if replica.pushes else 0


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, default=4)
    flags.add_argument("--factor", type=float, default=4.0, help="how much longer the slow worker's step is")
    flags.add_argument("--step-ms", type=float, default=100.0, help="time of the others' step")
    flags.add_argument("--loss", type=float, default=0.3, help="the loss to be reached")
    flags.add_argument("--limit-s", type=float, default=25.0, help="longest time of a run")
    flags.add_argument("--seeds", type=common.count, default=3)
    flags.add_argument("--lr", type=float, default=0.5)
    flags.add_argument("--batch", type=common.count, default=16, help="samples of a worker's step")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    arguments = flags.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.step_ms, arguments.limit_s = 1, 40.0, 8.0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            runs = []
            for seed in range(arguments.seeds):
                told = {**vars(arguments), "seed": seed, "folder": folder, "json": None, "picture": None}
                runs.append(dtrain.run(measure, way, told, workers=arguments.workers, backend=way.backend))
            rows.append(_row(way, runs))
            print(f"{way.name}: {rows[-1]['seconds']} s", flush=True)
    print(_table(rows))
    if arguments.json:
        more = {k: v for k, v in vars(arguments).items() if k not in ("json", "picture")}
        common.write(arguments.json, rows, **more)
    pictures.save("stragglers", rows, arguments.picture)


def _row(way: Way, runs: list[list[dict[str, Any]]]) -> common.Row:
    seconds = sorted(run[0]["seconds"] for run in runs)
    staleness: list[Counter[int]] = [Counter() for _ in runs[0]]
    for run in runs:
        for total, worker in zip(staleness, run, strict=True):
            total.update(worker["staleness"])
    return {
        "way": way.name,
        "seconds": [round(s, 2) for s in seconds],
        "median_s": seconds[len(seconds) // 2],
        "steps": [[worker["steps"] for worker in run] for run in runs],
        "dropped": [[worker["dropped"] for worker in run] for run in runs],
        "staleness": [dict(sorted(total.items())) for total in staleness],
    }


def _table(rows: list[common.Row]) -> str:
    base = next(row["median_s"] for row in rows if row["way"] == "synchronous")
    head = ["way", "seconds to the loss", "of synchronous", "staleness, fast worker", "slow worker", "dropped, slow"]
    body = []
    for row in rows:
        fast, slow = (_mean(row["staleness"][which]) for which in (0, -1))
        dropped = sum(run[-1] for run in row["dropped"])
        ratio = f"{row['median_s'] / base:.2f}"
        body.append([row["way"], f"{row['median_s']:.2f}", ratio, f"{fast:.1f}", f"{slow:.1f}", str(dropped)])
    return table(head, body)


def _mean(histogram: dict[int, int]) -> float:
    return sum(k * n for k, n in histogram.items()) / max(1, sum(histogram.values()))


if __name__ == "__main__":
    main()
