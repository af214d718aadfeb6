"""Time to sum a gradient of N float32 numbers in place over n workers of one host: the parameter server's transports
and `allreduce` against torch's gloo.

    python benchmarks/sync.py                     1 KB and 105 MB over 2 and 4 workers, two minutes or more
    python benchmarks/sync.py --quick --json F    1 KB and 10 MB over 2 workers, some seconds

Contenders:

    ps shm      parameter server at tcp:// addresses of this host, as it comes: through shared memory, as both ends see
                the same; the gradient lies in what comm.empty() gave
    ps ipc      parameter server, ipc:// socket, shared memory turned off
    ps tcp      parameter server, tcp:// socket on the loopback interface, with checksums, shared memory turned off
    allreduce   dtrain over gloo
    gloo        torch.distributed.all_reduce, the baseline
    echo        no sum: plain TCP sockets to a server that sends back what came; what "ps tcp" costs at the very least
    memory      no sum: all workers at once change the sign of each number of their gradient; a sum in place reads and
                writes as much at the very least, so this is what the host's memory leaves for "ps shm"
    MPI         mpi4py's Allreduce with IN_PLACE, where mpi4py and mpiexec are found (they start the workers then)
    DeepSpeed   its shared-memory all-reduce, where deepspeed is found and can build it

Each worker is one process that holds all of them at once. They take turns, round by round, and who begins rotates. All
workers meet at a barrier before each turn, and after it: else those that are done would fill and check their gradients
on the cores that the others' sums still need. A turn is one sum; of a small gradient (up to 64 KB) it is 50 sums, one
by one, and their mean counts, with what it takes to write the gradient anew before each: workers leave a barrier as far
apart as a small sum is long. After the turn the sum is checked: every number in the first rounds and the last, some in
the others. A round takes as long as its slowest worker. "times gloo's speed" is gloo's median over this one's: above 1
is faster than gloo. GB/s is the size of the gradient over the median, whatever the transport moves for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import common
import pictures
import torch
import torch.distributed as dist
from echo import Echo
from torch import Tensor

import dtrain
from dtrain import env
from dtrain.comm import collectives
from dtrain.launcher import Plan, launch
from dtrain.processes import cores, remove, server_command
from dtrain.ps.client import ParameterServer
from dtrain.tables import table

LANES = ("shm", "ipc", "tcp")
BASELINE = "gloo"
MPI = "MPI"
DEEPSPEED = "DeepSpeed"
ECHO = "echo"
MEMORY = "memory"
TIMEOUT_S = 60.0

SMALL_BYTES = 64 * 10**3
SMALL_CALLS = 50
"""Sums in a turn of a gradient up to that size."""

_STRIDE = 61
"""Which numbers are looked at in most rounds: to read all takes as long as to sum them."""

Call = Callable[[], object]
"""Sums the flat that it was made with, in place."""


@dataclass(frozen=True)
class Task:
    """What the workers of one job are told."""

    folder: str
    workers: int
    threads: int
    numels: list[int]
    rounds: int | None
    quick: bool
    servers: dict[str, list[str]]
    """Transport -> addresses of its servers."""
    peers: list[str]
    absent: dict[str, str] = field(default_factory=dict)
    """Contender -> why it is not measured."""


@dataclass(frozen=True)
class Contender:
    """One way to sum."""

    name: str
    prepare: Callable[[int], tuple[Tensor, Call]]
    """A flat of that many numbers, and what sums it."""
    close: Callable[[], None] = lambda: None
    sums: bool = True
    """Whether it does, and is to be checked."""


# -- a worker ---------------------------------------------------------------------------------------------------------


def work(task: Task) -> None:
    """One worker's process: measure everything, and leave the durations in the job's folder."""
    os.dup2(2, 1)  # what libraries print is no part of the table
    torch.set_num_threads(task.threads)
    comm = _join(task)
    contenders, absent = _contenders(task, comm)
    try:
        sizes = [_measure(task, comm, contenders, numel) for numel in task.numels]
        result = {"sizes": sizes, "absent": absent}
        Path(task.folder, f"{comm.rank}.json").write_text(json.dumps(result), encoding="utf-8")
        collectives.barrier(comm)
    finally:
        for contender in contenders:
            contender.close()
        comm.close()


def _join(task: Task) -> dtrain.Backend:
    """The gloo group of all workers. mpiexec starts processes too, but gives them no place that dtrain would know."""
    if MPI not in task.peers:
        return dtrain.connect("allreduce")
    from mpi4py import MPI as mpi

    env.set_default("GLOO_SOCKET_IFNAME", env.LOOPBACK)
    store = f"file://{task.folder}/store"
    return dtrain.connect("allreduce", rank=mpi.COMM_WORLD.rank, world_size=task.workers, store=store)


def _contenders(task: Task, comm: dtrain.Backend) -> tuple[list[Contender], dict[str, str]]:
    """Those that are usable on all workers, and why the others are not."""
    found, absent = [], dict(task.absent)
    for lane, addresses in task.servers.items():
        if lane == ECHO:
            continue
        used = "auto" if lane == "shm" else "off"
        server = ParameterServer(addresses, comm.rank, task.workers, timeout_s=TIMEOUT_S, lanes=used)
        found.append(_of_dtrain(f"ps {lane}", server))
    if ECHO in task.servers:
        found.append(_echo(task.servers[ECHO][0]))
    found += [_of_dtrain("allreduce", comm, close=False), Contender(BASELINE, _gloo)]
    found.append(Contender(MEMORY, _negated, sums=False))
    for name, make in ((MPI, _mpi), (DEEPSPEED, _deepspeed)):
        if name not in task.peers:
            continue
        peer, trouble = None, ""
        try:
            peer = make(task, comm)
        except Exception as error:  # whatever a foreign library raises when it cannot work here
            trouble = f"{type(error).__name__}: {error}".splitlines()[0]
        said = [text.decode() for text in collectives.gather_bytes(comm, trouble.encode())]
        if peer is not None and not any(said):
            found.append(peer)
        else:
            absent[name] = next(text for text in said if text)
    return found, absent


def _of_dtrain(name: str, comm: dtrain.Backend, *, close: bool = True) -> Contender:
    def prepare(numel: int) -> tuple[Tensor, Call]:
        key = f"gradient/{numel}"
        flat = comm.empty(numel, torch.float32, key)
        return flat, lambda: comm.all_reduce(flat, key).wait()

    return Contender(name, prepare, *((comm.close,) if close else ()))


def _echo(address: str) -> Contender:
    connection = Echo(address)

    def prepare(numel: int) -> tuple[Tensor, Call]:
        flat, back = torch.empty(numel), torch.empty(numel)
        return flat, lambda: connection.exchange(flat, back)

    return Contender(ECHO, prepare, connection.close, sums=False)


def _negated(numel: int) -> tuple[Tensor, Call]:
    flat = torch.empty(numel)
    return flat, flat.neg_


def _gloo(numel: int) -> tuple[Tensor, Call]:
    flat = torch.empty(numel)
    return flat, lambda: dist.all_reduce(flat)


def _mpi(task: Task, comm: dtrain.Backend) -> Contender:
    from mpi4py import MPI as mpi

    if mpi.COMM_WORLD.size != task.workers:
        raise RuntimeError(f"mpiexec made {mpi.COMM_WORLD.size} workers of {task.workers}")

    def prepare(numel: int) -> tuple[Tensor, Call]:
        flat = torch.empty(numel)
        buffer = flat.numpy()
        return flat, lambda: mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, buffer, op=mpi.SUM)

    return Contender(MPI, prepare)


def _deepspeed(task: Task, comm: dtrain.Backend) -> Contender:
    """It names its memory by MASTER_ADDR and MASTER_PORT, and wants to know that all workers are on this host."""
    settings = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(collectives.gather_numbers(comm, [os.getpid()])[0][0]),  # no port: a name of this job
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(task.workers),
        "LOCAL_RANK": str(comm.rank),
        "LOCAL_SIZE": str(task.workers),
        "DS_ACCELERATOR": "cpu",
    }
    os.environ.update(settings)
    import deepspeed.comm

    deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)
    if not hasattr(torch.ops.deepspeed, "inference_all_reduce_"):
        raise RuntimeError("its shared-memory all-reduce could not be built")

    def prepare(numel: int) -> tuple[Tensor, Call]:
        flat = torch.empty(numel)
        return flat, lambda: torch.ops.deepspeed.inference_all_reduce_(flat)

    def close() -> None:  # it leaves its memory behind
        name = "_".join(settings[variable] for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
        for file in Path("/dev/shm").glob(f"deepspeed_*_{name}"):  # noqa: S108  (where the system has it)
            file.unlink(missing_ok=True)

    return Contender(DEEPSPEED, prepare, close)


def _measure(task: Task, comm: dtrain.Backend, contenders: Sequence[Contender], numel: int) -> dict[str, object]:
    """One size: seconds of this worker by contender, round by round."""
    rounds = task.rounds or default_rounds(numel, quick=task.quick)
    warmup = max(2, rounds // 20)
    calls = SMALL_CALLS if numel * 4 <= SMALL_BYTES else 1
    pattern = (torch.arange(numel) % 1000).float()
    ready = [(contender, *contender.prepare(numel)) for contender in contenders]
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start_s = time.perf_counter()
    for number in range(warmup + rounds):
        first = number % len(ready)
        for contender, flat, call in ready[first:] + ready[:first]:
            if calls == 1:
                torch.add(pattern, comm.rank + number % 100, out=flat)
            collectives.barrier(comm)
            called_s = time.perf_counter()
            for _ in range(calls):
                if calls > 1:
                    torch.add(pattern, comm.rank + number % 100, out=flat)
                call()
            taken_s = (time.perf_counter() - called_s) / calls
            collectives.barrier(comm)
            stride = 1 if number < warmup or number == warmup + rounds - 1 else _STRIDE
            if contender.sums:
                _check(contender.name, flat[::stride], pattern[::stride], task.workers, number % 100)
            if number >= warmup:
                times[contender.name].append(taken_s)
    if comm.rank == 0:
        what = f"{task.workers} workers, {_size(numel * 4)}: {rounds} rounds of {len(ready)} contenders"
        _say(f"{what} in {time.perf_counter() - start_s:.1f} s")
    shared = [contender.name for contender, flat, _ in ready if _is_shared(flat)]
    return {"numel": numel, "rounds": rounds, "calls": calls, "times_s": times, "shared": shared}


def _check(name: str, flat: Tensor, pattern: Tensor, workers: int, number: int) -> None:
    """Whether each number is the sum over workers of pattern + rank + number: small whole numbers, so exactly."""
    rest = workers * (workers - 1) // 2 + workers * number
    low, high = flat.sub_(pattern, alpha=workers).aminmax()
    if not (low.item() == high.item() == rest):
        raise RuntimeError(f"{name}: wrong sum of {len(flat)} numbers: {low.item()} to {high.item()}, not {rest}")


def _is_shared(flat: Tensor) -> bool:
    """Whether it lies in memory that this process shares with another one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= flat.data_ptr() < high:
                return mode[3] == "s"
    return False


def default_rounds(numel: int, *, quick: bool) -> int:
    """As many as give a stable median."""
    fewest, most, moved_bytes = (5, 20, 2**27) if quick else (15, 40, 2**30)
    return max(fewest, min(most, moved_bytes // (numel * 4)))


# -- a job ------------------------------------------------------------------------------------------------------------


def peers() -> tuple[list[str], dict[str, str]]:
    """Peers that are installed, and why the others are absent."""
    found, absent = [], {}
    for name, module in ((MPI, "mpi4py"), (DEEPSPEED, "deepspeed")):
        if importlib.util.find_spec(module) is None:
            absent[name] = f"{module} is not installed"
        elif name == MPI and _mpiexec() is None:
            absent[name] = "mpi4py is installed, but there is no mpiexec"
        else:
            found.append(name)
    return found, absent


def _mpiexec() -> str | None:
    return shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath])) or (
        shutil.which("mpiexec")
    )


def job(arguments: argparse.Namespace, workers: int) -> list[dict[str, object]]:
    """Measure with that many workers: what each of them found."""
    found, absent = peers()
    lanes = list(arguments.lanes)
    folder = tempfile.mkdtemp(prefix="dtrain-")
    try:
        with servers(lanes, arguments.servers, workers, folder) as addresses:
            task = Task(
                folder=folder,
                workers=workers,
                threads=max(1, cores() // workers),
                numels=arguments.numel,
                rounds=arguments.rounds,
                quick=arguments.quick,
                servers=addresses,
                peers=found,
                absent=absent,
            )
            _say(f"{workers} workers, {len(lanes) * arguments.servers} servers: starting")
            _start(task)
        return [json.loads(Path(folder, f"{r}.json").read_text(encoding="utf-8")) for r in range(workers)]
    finally:
        remove(folder)


def _start(task: Task) -> None:
    """Run the workers. MPI's must be started by mpiexec, and then all contenders are measured there."""
    file = Path(task.folder, "task.json")
    file.write_text(json.dumps(asdict(task)), encoding="utf-8")
    command = [sys.executable, __file__, "--work", str(file)]
    if MPI in task.peers:
        argv = [_mpiexec() or "mpiexec", "-n", str(task.workers), "--bind-to", "none", *command]
        code = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, env=_mpi_environment(task)).returncode
    else:
        plan = Plan(workers=task.workers, backend="allreduce", timeout_s=TIMEOUT_S, threads=task.threads)
        code = launch(command, plan)
    if code:
        sys.exit(code)


def _mpi_environment(task: Task) -> dict[str, str]:
    """Open MPI refuses root, and more workers than cores, unless told."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    allowed["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    allowed["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    return {**allowed, **env.for_child(env.Place(), threads=task.threads, loopback=env.LOOPBACK)}


@contextlib.contextmanager
def servers(lanes: Sequence[str], count: int, workers: int, folder: str) -> Iterator[dict[str, list[str]]]:
    """`count` servers for each transport, each a process, and an echo beside tcp; their addresses. They end when all
    workers have left."""
    processes: list[subprocess.Popen[str]] = []
    commands = []
    for lane in lanes:
        for number in range(count):
            bind = f"ipc://{folder}/{lane}{number}" if lane == "ipc" else "tcp://127.0.0.1:0"
            told = {"server": number, "num_servers": count}
            commands.append((lane, server_command(bind, workers, timeout_s=TIMEOUT_S, **told)))
    if "tcp" in lanes:
        commands.append((ECHO, [sys.executable, str(Path(__file__).with_name("echo.py")), str(workers)]))
    addresses: dict[str, list[str]] = {lane: [] for lane, _ in commands}
    try:
        for _, command in commands:
            processes.append(
                subprocess.Popen(
                    command,
                    env=env.for_child(env.Place(role="server"), threads=1, loopback=None),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process, (lane, _) in zip(processes, commands, strict=True):
            said = process.stdout.readline() if process.stdout else ""
            if not said.startswith("listening at "):
                raise RuntimeError(f"the server of ps {lane} did not start: {said}")
            addresses[lane].append(said.split()[2])
        yield addresses
    finally:
        deadline = time.monotonic() + 3.0
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- figures ----------------------------------------------------------------------------------------------------------


def rows_of(workers: int, found: Sequence[dict[str, object]]) -> list[common.Row]:
    """Rows of the record: a round takes as long as its slowest worker."""
    rows = []
    for sizes in zip(*(worker["sizes"] for worker in found), strict=True):  # type: ignore[call-overload]
        numel, shared = sizes[0]["numel"], sizes[0]["shared"]
        slowest = {
            name: [max(times) for times in zip(*(size["times_s"][name] for size in sizes), strict=True)]
            for name in sizes[0]["times_s"]
        }
        for name, times in slowest.items():
            median_s = statistics.median(times)
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
            rows.append(
                {
                    "workers": workers,
                    "bytes": numel * 4,
                    "contender": name,
                    "median_ms": median_s * 1e3,
                    "min_ms": min(times) * 1e3,
                    "quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3],
                    "ratio": statistics.median(slowest[BASELINE]) / median_s,
                    "gb_s": numel * 4 / median_s / 1e9,
                    "rounds": len(times),
                    "calls": sizes[0]["calls"],
                    "shared_memory": name in shared,
                }
            )
    return rows


def show(rows: Sequence[common.Row]) -> str:
    """The rows as a table."""
    head = ["workers", "bytes", "contender", "median ms", "min ms", "times gloo's speed", "GB/s"]
    cells = [
        [
            *(str(row["workers"]), str(row["bytes"]), row["contender"]),
            *(f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['ratio']:.2f}", f"{row['gb_s']:.2g}"),
        ]
        for row in rows
    ]
    return table(head, cells, left=3)


def write(rows: Sequence[common.Row], file: Path, **more: object) -> None:
    """The record: the rows, and what is needed to run them again."""
    versions = common.versions()
    for package in ("mpi4py", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = version(package)
    contents = {
        "command": " ".join(["python", *sys.argv]),
        "commit": common.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        **more,
        "rows": list(rows),
    }
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def _size(nbytes: int) -> str:
    for unit, name in ((10**6, "MB"), (10**3, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"


# -- the command ------------------------------------------------------------------------------------------------------


def _flags() -> argparse.ArgumentParser:
    flags = common.parser(__doc__ or "")
    number = {"type": common.count, "metavar": "N"}
    several = {**number, "nargs": "+"}
    flags.add_argument("--numel", **several, help="float32 numbers in the gradient (default 256 26214400)")
    flags.add_argument("--workers", **several, help="how many workers (default 2 4)")
    flags.add_argument(
        "--lanes", nargs="*", choices=LANES, default=LANES, help="transports of the parameter server (default: all)"
    )
    flags.add_argument("--servers", **number, default=1, help="servers for each transport (default 1)")
    flags.add_argument(
        "--rounds", **number, help="timed rounds of each size (default 15 for 70 MB up to 40 below 26 MB)"
    )
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    flags.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # this process is a worker
    return flags


def _work(file: Path) -> None:
    task = Task(**json.loads(file.read_text(encoding="utf-8")))
    try:
        work(task)
    except BaseException:
        if MPI not in task.peers:
            raise
        from mpi4py import MPI as mpi

        traceback.print_exc()
        mpi.COMM_WORLD.Abort(1)  # else the others would be waited for at the end


def main() -> None:
    flags = _flags()
    arguments = flags.parse_args()
    if arguments.work:
        return _work(arguments.work)
    arguments.numel = arguments.numel or ([256, 2621440] if arguments.quick else [256, 26214400])
    arguments.workers = arguments.workers or ([2] if arguments.quick else [2, 4])
    arguments.lanes = [lane for lane in LANES if lane in arguments.lanes]
    hardware = common.hardware()
    rows, absent = [], {}
    for workers in arguments.workers:
        found = job(arguments, workers)
        rows += rows_of(workers, found)
        absent |= found[0]["absent"]
    print(show(rows))
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    private = sorted({f"{row['workers']} workers, {row['bytes']} bytes" for row in rows if _not_as_asked(row)})
    if private:
        print(f"ps shm: the gradient was in no shared memory: {'; '.join(private)}")
    if arguments.json:
        threads = {str(n): max(1, cores() // n) for n in arguments.workers}
        write(
            rows,
            arguments.json,
            hardware=hardware,
            servers=arguments.servers,
            torch_threads_per_worker=threads,
            torch_threads_per_server=1,
            started_by="mpiexec" if MPI in peers()[0] else "dtrain launch",
            absent=absent,
        )
    pictures.save("sync", rows, arguments.picture)
    return None


def _not_as_asked(row: common.Row) -> bool:
    return row["contender"] == "ps shm" and not row["shared_memory"]


if __name__ == "__main__":
    main()
