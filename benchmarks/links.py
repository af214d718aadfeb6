"""Sums of a gradient on emulated hosts: ring all-reduce against parameter servers, each as a fraction of its bound.

    python benchmarks/links.py                      8 workers at 200 Mbit/s, ten minutes
    python benchmarks/links.py --quick              2 workers, half a minute
    python benchmarks/links.py --workers 4 8 --rate 50mbit --mb 16 --servers 1 8 --json F --picture P

Each worker is one host, with a link of the given rate in each direction (`hosts.py`: network namespaces, real
processes, real sockets). Contenders take turns in the same processes, round by round, after a barrier; a round takes as
long as its slowest worker.

    gloo           torch.distributed.all_reduce, the baseline
    allreduce      dtrain over gloo
    ps K apart     K parameter servers, on hosts of their own
    ps N together  a server beside each worker, which share the host's link

Bounds, for n workers, a gradient of M bytes and links of B bytes a second each way, with nothing but the links:
ring 2(n-1)/n M/B (Patarasuk and Yuan 2009); K servers apart max(1, n/K) M/B, results travelling while gradients still
come in; a server beside each worker 2(n-1)/n M/B (Jiang et al., OSDI 2020, section 2). "of bound" is the bound over the
median: 100 % is perfect. All hosts share this machine's processors, which every message needs. Where they
were busy, it is they that are measured and not the links: the line above the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import pictures
import torch
import torch.distributed as dist
from hosts import Hosts, Process, available, environment, finish, hosts, server_hosts, start_servers

import dtrain
from dtrain.comm import collectives
from dtrain.ps.client import ParameterServer
from dtrain.tables import table

TIMEOUT_S = 120.0
WARMUP = 1
GOALS = {"ps N apart, of bound": 0.90, "ps N apart, times gloo's speed": 1.5, "ps N together, of bound": 0.90}


@dataclass(frozen=True)
class Wiring:
    """Where servers are."""

    servers: int
    placement: str

    def name(self) -> str:
        return f"ps {self.servers} {self.placement}"

    def bound(self, workers: int) -> float:
        """In times that the gradient takes over a link."""
        return max(1.0, workers / self.servers) if self.placement == "apart" else ring(workers)


def ring(workers: int) -> float:
    return 2 * (workers - 1) / workers


@dataclass(frozen=True)
class Task:
    """What a worker is told."""

    folder: str
    workers: int
    numels: list[int]
    rounds: int
    addresses: dict[str, list[str]]
    """Of the servers of each wiring."""


# -- a worker ---------------------------------------------------------------------------------------------------------


def work(task: Task) -> None:
    """Measure everything, and leave the durations in the job's folder."""
    torch.set_num_threads(1)
    comm = dtrain.connect("allreduce", timeout_s=TIMEOUT_S)
    servers = {
        name: ParameterServer(addresses, comm.rank, task.workers, timeout_s=TIMEOUT_S, lanes="off")
        for name, addresses in task.addresses.items()
    }
    try:
        found = [_measure(task, comm, servers, numel) for numel in task.numels]
        Path(task.folder, f"{comm.rank}.json").write_text(json.dumps(found), encoding="utf-8")
        collectives.barrier(comm)
    finally:
        for server in servers.values():
            server.close()
        comm.close()


def _measure(
    task: Task, comm: dtrain.Backend, servers: dict[str, ParameterServer], numel: int
) -> dict[str, list[float]]:
    """Seconds of each contender, by round."""
    flat = torch.empty(numel)
    pattern = torch.arange(numel, dtype=torch.float32) % 1000
    calls: dict[str, Callable[[], None]] = {"gloo": lambda: dist.all_reduce(flat)}
    calls["allreduce"] = lambda: comm.all_reduce(flat, "gradient/sum").wait()
    for name, server in servers.items():
        calls[name] = lambda server=server: server.all_reduce(flat, "gradient/sum").wait()  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(WARMUP + task.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            torch.add(pattern, comm.rank + number, out=flat)
            collectives.barrier(comm)
            start_s = time.perf_counter()
            calls[name]()
            taken_s = time.perf_counter() - start_s
            rest = task.workers * (task.workers - 1) // 2 + task.workers * number
            low, high = flat.sub_(pattern, alpha=task.workers).aminmax()
            if not low.item() == high.item() == rest:
                raise RuntimeError(f"{name}: wrong sum: {low.item()} to {high.item()}, not {rest}")
            if number >= WARMUP:
                times[name].append(taken_s)
    return times


# -- a job ------------------------------------------------------------------------------------------------------------


def measure(
    workers: int, rate: str, numels: Sequence[int], wirings: Sequence[Wiring], rounds: int, tcp: Mapping[str, str]
) -> Iterator[common.Row]:
    """Rows for one number of workers and one rate."""
    count = max([workers, *(workers + w.servers for w in wirings if w.placement == "apart")])
    with hosts(count, rate=rate, tcp=tcp) as h, tempfile.TemporaryDirectory() as folder:
        with h.watch() as use:
            found = _job(h, Path(folder), workers, numels, wirings, rounds)
        carried = statistics.fmean(h.throughput([(i, (i + 1) % workers) for i in range(workers)], seconds=2.0))
        congestion = h.congestion_control()
        for index, numel in enumerate(numels):
            slowest = {
                name: [max(times) for times in zip(*(worker[index][name] for worker in found), strict=True)]
                for name in found[0][index]
            }
            for name, times in slowest.items():
                factor = next((w.bound(workers) for w in wirings if w.name() == name), ring(workers))
                bound_s = factor * numel * 4 / h.rate_bytes_per_s
                median_s = statistics.median(times)
                yield {
                    "workers": workers,
                    "rate": rate,
                    "bytes": numel * 4,
                    "contender": name,
                    "median_ms": median_s * 1e3,
                    "min_ms": min(times) * 1e3,
                    "max_ms": max(times) * 1e3,
                    "bound_ms": bound_s * 1e3,
                    "of_bound": bound_s / median_s,
                    "ratio": statistics.median(g / t for g, t in zip(slowest["gloo"], times, strict=True)),
                    "rounds": len(times),
                    "carried": carried / h.rate_bytes_per_s,
                    "congestion": congestion,
                    **use.figures(),
                }


def _job(
    h: Hosts, folder: Path, workers: int, numels: Sequence[int], wirings: Sequence[Wiring], rounds: int
) -> list[list[dict[str, list[float]]]]:
    addresses: dict[str, list[str]] = {}
    processes: list[Process] = []
    for wiring in wirings:
        places = server_hosts(
            len(h),
            workers=workers,
            servers=wiring.servers,
            placement=wiring.placement,  # type: ignore[arg-type]
        )
        addresses[wiring.name()] = binds = [f"tcp://{h.address(host)}:{h.port()}" for host in places]
        inside = environment({"role": "server", "timeout_s": TIMEOUT_S}, threads=1)
        processes += start_servers(h, places, binds, workers, inside, of=f" of {wiring.name()}")
    task = Task(str(folder), workers, list(numels), rounds, addresses)
    return run_workers(h, folder, workers, __file__, asdict(task), processes)


def run_workers(
    h: Hosts, folder: Path, workers: int, script: str, task: dict[str, Any], servers: Sequence[Process]
) -> list[Any]:
    """Run a script's `--work` on the first hosts, beside servers that were started; what each worker has left."""
    file = folder / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    store = f"tcp://{h.address(0)}:{h.port()}"
    processes = [*servers]
    for rank in range(workers):
        place = {"backend": "allreduce", "rank": rank, "world_size": workers, "store": store, "job_id": "links"}
        inside = environment({**place, "timeout_s": TIMEOUT_S}, threads=1)
        processes.append(h.start(rank, [sys.executable, script, "--work", str(file)], inside, name=f"worker {rank}"))
    finish(processes, timeout_s=1800.0)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]


def wirings_of(workers: int, servers: Sequence[int] | None, *, together: bool) -> list[Wiring]:
    """Of those that were asked for; by default all."""
    counts = sorted({k for k in (1, 2, 4, workers) if k <= workers}) if servers is None else servers
    return [*(Wiring(k, "apart") for k in counts), *([Wiring(workers, "together")] if together else [])]


# -- figures ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[common.Row]) -> str:
    """The rows as a table."""
    head = ["workers", "rate", "MB", "contender", "median ms", "min ms", "bound ms", "of bound", "times gloo's speed"]
    cells = [
        [
            *(str(row["workers"]), row["rate"], f"{row['bytes'] / 1e6:.1f}", row["contender"]),
            *(f"{row['median_ms']:.0f}", f"{row['min_ms']:.0f}", f"{row['bound_ms']:.0f}"),
            *(f"{row['of_bound']:.0%}", f"{row['ratio']:.2f}"),
        ]
        for row in rows
    ]
    return table(head, cells, left=4)


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, nargs="+", metavar="N")
    flags.add_argument("--rate", nargs="+", help="payload of TCP each way: 200mbit, 1gbit")
    flags.add_argument("--mb", type=float, nargs="+", help="size of the gradient in 10^6 bytes")
    flags.add_argument("--servers", type=common.count, nargs="*", metavar="K", help="apart (default: 1, 2, 4, and N)")
    flags.add_argument("--not-together", action="store_true", help="without a server beside each worker")
    flags.add_argument("--rounds", type=common.count)
    flags.add_argument(
        "--tcp",
        type=_setting,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="of all hosts, in net.ipv4: tcp_slow_start_after_idle=0",
    )
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
        common.write(arguments.json, rows, goals=GOALS, tcp=dict(arguments.tcp))
    pictures.save("links", rows, arguments.picture)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=VALUE")
    return name, value


def _rows(arguments: argparse.Namespace) -> Iterator[common.Row]:
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 7)
    numels = [int(mb * 1e6 / 4) for mb in arguments.mb or ([2.0] if quick else [10.0, 40.0])]
    for rate in arguments.rate or ["50mbit" if quick else "200mbit"]:
        for workers in arguments.workers or ([2] if quick else [8]):
            wirings = wirings_of(workers, arguments.servers, together=not arguments.not_together)
            rows = list(measure(workers, rate, numels, wirings, rounds, dict(arguments.tcp)))
            first = rows[0]
            print(
                f"{workers} workers at {rate}: processors {first['busy']:.0%} busy, {first['stolen']:.0%} stolen; the "
                f"links carried {first['carried']:.0%} of the rate",
                flush=True,
            )
            yield from rows


if __name__ == "__main__":
    main()
