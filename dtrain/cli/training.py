"""The commands that train: train, compare, launch."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from dtrain import env, tables
from dtrain.cli.files import check_json, write_json
from dtrain.compare import compare, python_m_dtrain
from dtrain.connect import check_backend, connect
from dtrain.errors import Finished, UsageError
from dtrain.jobs import run as run_job
from dtrain.launcher import Plan, launch
from dtrain.processes import end_with_launcher
from dtrain.resuming import check_place
from dtrain.runs import check, stop_at_signals
from dtrain.runs import train as train_run
from dtrain.spec import RunSpec, Task


@dataclass(frozen=True, kw_only=True)
class _Run(Task):
    """What `train` and `compare` share beside the task."""

    timeout_s: float = 60.0
    """Longest wait of a worker for another, in seconds, before the job fails with the name of the late one."""
    quiet: bool = False
    """Print no table at the end."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the figures to this file."""

    def spec(self, **more: Any) -> RunSpec:
        names = {f.name for f in dataclasses.fields(RunSpec)} & {f.name for f in dataclasses.fields(self)} - set(more)
        return RunSpec(**{n: getattr(self, n) for n in names}, **more)


@dataclass(frozen=True, kw_only=True)
class Train(RunSpec, _Run):
    """Train a recipe over one backend.

    Starts the workers (and the server) on this host, or joins the job when run under torchrun or `dtrain launch`.
    Leaves config.json, metrics.jsonl, summary.json, model.safetensors and checkpoints in its run directory.
    """

    backend: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """ps (parameter server), allreduce (gloo or NCCL), threads (workers in one process), solo (one worker). Default:
    DTRAIN_BACKEND, else ps."""
    workers: Annotated[int, arg(aliases=["-n"])] = 2
    """Number of workers; inside a job, the job's."""
    servers: int = 1
    """For ps: number of servers, which share every large tensor."""
    lanes: Annotated[Literal["auto", "off"] | None, arg(help_behavior_hint="")] = None
    """For ps: auto sends through shared memory on one host; off through sockets only. Default: DTRAIN_LANES, else
    auto."""
    max_restarts: int = 3
    """With --on-worker-loss wait: how many processes may be started again, in all."""
    devices: Annotated[tuple[str, ...], arg(metavar="DEVICE ...", help_behavior_hint="")] = ()
    """For threads: a device for each worker (cuda:0 cuda:1). Gradients are gathered and the update is made on the first
    one, and parameters are handed out from there, as in DataParallel."""

    def run(self, argv: Sequence[str]) -> int:
        backend = self.backend or env.resolve().backend or "ps"
        check_backend(backend)
        check_json(self.json)
        if self.workers < 1:
            raise UsageError(f"workers is {self.workers}: a job has at least one")
        if self.devices and backend != "threads":
            raise UsageError(f"--devices goes with --backend threads, not {backend}; see --device")
        if self.devices and self.update != "worker":
            raise UsageError(f"update is {self.update} with --devices, where the first device steps: leave one away")
        self.spec().check_loss(backend)
        plan = Plan(
            workers=self.workers,
            backend=backend,
            servers=self.servers,
            timeout_s=self.timeout_s,
            on_worker_loss=self.on_worker_loss,
            max_restarts=self.max_restarts,
        )
        if not env.in_job():
            check(self.spec(), 1 if backend == "solo" else len(self.devices) or self.workers)
        if backend in ("solo", "threads") or env.in_job():
            return self._work(backend)
        run_dir = self.run_dir or _new_run_dir(self.recipe, backend)
        return launch(python_m_dtrain(*argv, "--run-dir", run_dir), plan)

    def _work(self, backend: str) -> int:
        """Train, as one worker or as all of them in this process."""
        here = backend in ("solo", "threads")
        if self.run_dir is None:
            check_place(self.spec())  # what goes on from a checkpoint says from where
        run_dir = self.run_dir or _new_run_dir(self.recipe, backend, alone=here)
        spec = self.spec(run_dir=run_dir)
        if here:
            end_with_launcher(env.resolve(), "worker 0")
            if self.checkpoint_every != "never":
                stop_at_signals()
            workers = 1 if backend == "solo" else len(self.devices) or self.workers
            summary = run_job(
                train_run,
                spec,
                workers=workers,
                backend=backend,
                devices=self.devices or None,
                timeout_s=self.timeout_s,
            )[0]
            first = True
        else:
            try:
                comm = connect(backend, lanes=self.lanes, timeout_s=self.timeout_s)
            except Finished as over:
                print(f"dtrain: {over}", file=sys.stderr)
                return 0
            try:
                summary = train_run(comm, spec)
            finally:
                comm.close()
            first = summary.get("written_by", 0) == comm.rank
        if first and not self.quiet:
            print(f"{tables.run(summary)}\nRun directory: {run_dir}", flush=True)
        if first:
            write_json(self.json, summary)
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare(_Run):
    """Train a recipe over several backends from one seed: do they train the same model, how fast, at what cost?

    Prints a table and the largest difference of any weight between two runs. Batch norm is synchronised over workers
    unless --norm-batch says otherwise: only then can n workers equal one. --json writes: recipe, workers, dtype, steps,
    max_abs_weight_diff (over all pairs of runs and all parameters, at the end), pairs, bitwise, and runs: for each
    backend step_ms, compute_ms, exposed_comm_ms, bytes_sent_per_step, loss, accuracy and more.
    """

    backends: str = "ps,allreduce"
    """Names with commas between: solo, threads, ps, allreduce."""
    workers: Annotated[int | None, arg(aliases=["-n"], metavar="N", help_behavior_hint="")] = None
    """Number of workers. Default: 2, or those of the job."""
    norm_batch: str = "global"
    """Samples that share batch-norm statistics: a number of them, or `worker`: each worker's micro-batch by itself, or
    `global`: all workers'."""
    run_dir: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """Where the runs' files go, a directory for each backend. Default: runs/compare-RECIPE-TIME."""

    def run(self, argv: Sequence[str]) -> int:
        inside = env.in_job()
        workers = self.workers or (env.resolve().world_size if inside else 2)
        if self.workers is not None and inside and self.workers != env.resolve().world_size:
            raise UsageError(f"--workers is {self.workers}, and this job has {env.resolve().world_size}: leave it out")
        backends = [b.strip() for b in self.backends.split(",") if b.strip()]
        for backend in backends:
            check_backend(backend)
        check_json(self.json)
        if len(backends) > 1 and not inside:
            check(self.spec(), workers)
        folder = Path(self.run_dir or _new_run_dir(f"compare-{self.recipe}", ""))
        if not inside or env.resolve().rank == 0:
            of = {"global": "all workers", "worker": "each worker by itself"}.get(self.norm_batch, "that many samples")
            print(f"Batch-norm statistics: of {of} (--norm-batch {self.norm_batch}).", flush=True)
        result = compare(
            self.spec(),
            backends,
            workers,
            folder,
            lambda backend, spec: self._command(backend, workers, spec),
            timeout_s=self.timeout_s,
        )
        if result is not None and not self.quiet:
            print(f"\n{tables.comparison(result)}\nRun directories: {folder}", flush=True)
        if result is not None:
            write_json(self.json, result)
        return 0

    def _command(self, backend: str, workers: int, spec: RunSpec) -> list[str]:
        """The `dtrain train` that makes one of the runs."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Run) if f.name not in ("recipe", "json")}
        fields["option"] = fields.pop("options")
        fields |= {"micro_batch": spec.micro_batch, "norm_batch": self.norm_batch, "run_dir": spec.run_dir}
        fields |= {"backend": backend, "workers": workers, "checkpoint_every": "never", "quiet": True}
        return python_m_dtrain("train", self.recipe, *flags(fields))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """dtrain launch [OPTIONS] SCRIPT [ARGS]: run a script of your own as n workers on this host.

    For example: dtrain launch -n 4 --backend ps script.py --its-own --flags

    The script calls dtrain.connect(). Worker 0 prints here, the others with their name before each line. When one
    fails, the rest is ended and the one that failed first is named; nothing stays behind on Ctrl-C. Where Slurm, MPI or
    Kubernetes has started it once on each of several hosts, it starts that host's share of one job.
    """

    workers: Annotated[int, arg(aliases=["-n"])] = 2
    """Number of workers on this host."""
    backend: str = "allreduce"
    """What dtrain.connect() takes by default; ps starts a server beside the workers."""
    servers: int = 1
    """For ps: number of servers, which share every large tensor."""
    on_worker_loss: Literal["fail", "wait", "drop"] = "fail"
    """For ps, when a process dies. fail: the rest is ended. wait: it is started again, and its dtrain.connect() finds
    the job; the others' calls raise Rewound, and a Trainer with rewind_to goes back to its last checkpoint. drop: the
    others go on."""
    max_restarts: int = 3
    """With --on-worker-loss wait: how many processes may be started again, in all."""
    timeout_s: float = 60.0
    """Longest wait of a worker for another, in seconds."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Processor threads of each worker. Default: the cores, shared out."""

    def run(self, argv: Sequence[str], command: Sequence[str] = ()) -> int:
        if not command:
            raise UsageError("nothing to launch: dtrain launch -n 2 --backend ps script.py")
        check_backend(self.backend)
        if self.backend == "threads":
            raise UsageError("backend is threads, which needs no processes: call dtrain.run(fn, workers=n) in a script")
        if self.backend == "solo" and self.workers > 1:
            raise UsageError(f"backend solo is a world of one, and workers is {self.workers}: give -n 1")
        plan = Plan(
            workers=self.workers,
            backend=self.backend,
            servers=self.servers,
            timeout_s=self.timeout_s,
            threads=self.threads,
            on_worker_loss=self.on_worker_loss,
            max_restarts=self.max_restarts,
            host=_host(),
        )
        if command[0].endswith(".py"):
            if not Path(command[0]).is_file():
                raise UsageError(f"{command[0]}: there is no such script in {Path.cwd()}: give its path")
            command = [sys.executable, *command]
        return launch(command, plan)


def _host() -> env.Place:
    """This process among those that a cluster has started to start workers.

    Raises:
        UsageError: it is a worker itself.
    """
    if not env.in_job():
        return env.Place()
    place = env.resolve()
    if place.launcher in ("torchrun", "dtrain launch"):
        raise UsageError(
            f"this process is worker {place.rank} of {place.launcher}'s job: run the script, without launch"
        )
    return place


def flags(fields: dict[str, Any]) -> list[str]:
    """A command line from values; None is left out."""
    words: list[str] = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if value is None or value == ():
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def _new_run_dir(what: str, backend: str, *, alone: bool = False) -> str:
    """A directory of this run's own. Worker 0 writes for all: elsewhere it is a name, and is not made.

    Args:
        alone: whether all workers are in this process, whatever its place in a job is.
    """
    if not alone and env.in_job() and env.resolve().rank > 0:
        return "runs/worker-0-only"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = "-".join(part for part in (what, backend, stamp) if part)
    Path("runs").mkdir(exist_ok=True)
    return tempfile.mkdtemp(prefix=f"{name}-", dir="runs")
