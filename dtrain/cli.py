"""The commands: train, compare, launch, server, scheduler, keys, doctor."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from dtrain import __version__, doctor, env, tables
from dtrain.compare import compare, python_m_dtrain
from dtrain.connect import check_backend, connect
from dtrain.errors import DtrainError, Finished, UsageError
from dtrain.hooks import finite
from dtrain.jobs import run as run_job
from dtrain.launcher import Plan, launch
from dtrain.processes import end_with_launcher, give_up, leave_word
from dtrain.ps import keys
from dtrain.ps.members import Terms
from dtrain.ps.metrics import Metrics
from dtrain.ps.scheduler import Scheduler, register
from dtrain.ps.server import Server
from dtrain.runs import RunSpec, Task, check, check_place
from dtrain.runs import train as train_run
from dtrain.serving import bind_towards, leave_address, seen_from


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
    lanes: Literal["auto", "off"] = "auto"
    """For ps: auto sends through shared memory on one host; off through sockets only."""
    max_restarts: int = 3
    """With --on-worker-loss wait: how many processes may be started again, in all."""
    devices: Annotated[tuple[str, ...], arg(metavar="DEVICE ...", help_behavior_hint="")] = ()
    """For threads: a device for each worker (cuda:0 cuda:1). Gradients are gathered and the update is made on the first
    one, and parameters are handed out from there, as in DataParallel."""

    def run(self, argv: Sequence[str]) -> int:
        backend = self.backend or env.resolve().backend or "ps"
        check_backend(backend)
        _check_json(self.json)
        if self.workers < 1:
            raise UsageError(f"workers is {self.workers}: a job has at least one")
        if self.devices and backend != "threads":
            raise UsageError(f"--devices goes with --backend threads, not {backend}; see --device")
        self.spec().check_loss(backend)
        plan = Plan(
            workers=self.workers,
            backend=backend,
            servers=self.servers,
            timeout_s=self.timeout_s,
            on_worker_loss=self.on_worker_loss,
            max_restarts=self.max_restarts,
            preemptible=self.checkpoint_every != "never",
        )
        if not env.in_job():
            check(self.spec(), 1 if backend == "solo" else len(self.devices) or self.workers)
        if backend in ("solo", "threads") or env.in_job():
            return self._work(backend)
        run_dir = self.run_dir or _new_run_dir(self.recipe, backend)
        return launch(python_m_dtrain(*argv, "--run-dir", run_dir), plan)

    def _work(self, backend: str) -> int:
        """Train, as one worker or as all of them in this process."""
        check_place(self.spec())
        run_dir = self.run_dir or _new_run_dir(self.recipe, backend)
        spec = self.spec(run_dir=run_dir)
        if backend in ("solo", "threads"):
            end_with_launcher(env.resolve(), "worker 0")
            workers = 1 if backend == "solo" else len(self.devices) or self.workers
            summary = run_job(
                train_run,
                spec,
                workers=workers,
                backend=backend,
                devices=self.devices or None,
                timeout_s=self.timeout_s,
            )[0]
            first = env.resolve().rank == 0
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
            first = comm.rank == 0
        if first and not self.quiet:
            print(f"{tables.run(summary)}\nRun directory: {run_dir}", flush=True)
        if first:
            _write_json(self.json, summary)
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
        _check_json(self.json)
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
            _write_json(self.json, result)
        return 0

    def _command(self, backend: str, workers: int, spec: RunSpec) -> list[str]:
        """The `dtrain train` that makes one of the runs."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Run) if f.name not in ("recipe", "json")}
        fields["option"] = fields.pop("options")
        fields |= {"micro_batch": spec.micro_batch, "norm_batch": self.norm_batch, "run_dir": spec.run_dir}
        fields |= {"backend": backend, "workers": workers, "checkpoint_every": "never", "quiet": True}
        return python_m_dtrain("train", self.recipe, *_flags(fields))


@dataclass(frozen=True, kw_only=True)
class Launch:
    """dtrain launch [OPTIONS] SCRIPT [ARGS]: run a script of your own as n workers on this host.

    For example: dtrain launch -n 4 --backend ps script.py --its-own --flags

    The script calls dtrain.connect(). Worker 0 prints here, the others with their name before each line. When one
    fails, the rest is ended and the one that failed first is named; nothing stays behind on Ctrl-C.
    """

    workers: Annotated[int, arg(aliases=["-n"])] = 2
    """Number of workers."""
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
        )
        if command[0].endswith(".py"):
            if not Path(command[0]).is_file():
                raise UsageError(f"{command[0]}: there is no such script in {Path.cwd()}: give its path")
            command = [sys.executable, *command]
        return launch(command, plan)


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """Run the parameter server by hand: dtrain server --bind tcp://127.0.0.1:5555 --workers 4.

    Workers find it by DTRAIN_SERVERS, or connect(server=...); several servers, also by a scheduler. It ends when all
    workers have left.
    """

    bind: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """ipc:///path or tcp://host:port; port 0 takes a free one, which is printed. Default: from DMLC_PS_ROOT_URI and
    DMLC_PS_ROOT_PORT; with a scheduler, a free port at the address by which that sees this host."""
    scheduler: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Register there, see `dtrain scheduler`. Default: DTRAIN_SCHEDULER; or, with DMLC_NUM_SERVER of 2 or more, from
    DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT."""
    workers: Annotated[int | None, arg(aliases=["-n"], metavar="N", help_behavior_hint="")] = None
    """How many workers take part. Default: from DMLC_NUM_WORKER."""
    server: Annotated[int | None, arg(metavar="I", help_behavior_hint="")] = None
    """Which of the servers this is, from 0; workers name them in this order. Default: 0, or what the scheduler says."""
    servers: Annotated[int | None, arg(metavar="S", help_behavior_hint="")] = None
    """How many servers the job has; each sums and keeps a part of every large tensor. Default: 1, or what the scheduler
    says."""
    timeout_s: float = 60.0
    """How long a round waits for its last worker, in seconds."""
    connect_timeout_s: float = 60.0
    """How long to wait for all workers to join, in seconds; also for those that come back after a loss."""
    on_worker_loss: Literal["fail", "wait", "drop"] = "fail"
    """fail ends the job; wait rewinds it to its last commit when a replacement has come; drop goes on without it."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Threads that work on sums. Default: the cores, shared out between the servers."""
    credit_mb: float = 1024.0
    """Most that one worker may have under way through the socket, in MiB."""
    keys: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Directory of CURVE keys, made by `dtrain keys DIR`: needed beyond this host. Default: DTRAIN_KEYS."""
    metrics_port: Annotated[int | None, arg(metavar="PORT", help_behavior_hint="")] = None
    """Tell figures to Prometheus at http://127.0.0.1:PORT/metrics (extra dtrain[metrics]); 0 takes a free port."""
    insecure_no_encryption: bool = False
    """Listen beyond this host without keys, where anybody may read and write: for networks that you trust."""

    def run(self, argv: Sequence[str]) -> int:
        given: dict[str, Any] = {"servers": self.bind, "scheduler": self.scheduler, "keys": self.keys}
        place = env.resolve(role="server", rank=0, world_size=self.workers, **given)
        bind = place.servers
        if bind is None and place.scheduler is not None:
            bind = bind_towards(place.scheduler)
        if bind is None:
            raise UsageError(
                "no address: give --bind tcp://127.0.0.1:5555, or set DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT"
            )
        number, servers = self.server or 0, self._told_servers(place)
        most = number + 1 if servers is None else servers
        if not 0 <= number < most or (self.threads is not None and self.threads < 1):
            raise UsageError(f"server is {number} of {servers}, threads {self.threads}: servers count from 0")
        end_with_launcher(place, self._name(place))
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `finally`, below
        server = Server(
            bind,
            lambda address: self._terms(place, address),
            threads=self.threads,
            keys=None if place.keys is None else Path(place.keys),
            insecure_no_encryption=self.insecure_no_encryption,
            give_up=None if place.job_dir is None else functools.partial(give_up, place.job_dir),
        )
        leave_address(place.job_dir, server.address)
        metrics = None
        if self.metrics_port is not None:
            metrics = Metrics(self.metrics_port, server.terms.server, server.figures)
            print(f"metrics at http://127.0.0.1:{metrics.port}/metrics", flush=True)
        if place.launcher_fd is None:
            which = f", as server {server.terms.server} of {server.terms.num_servers}" if place.scheduler else ""
            print(f"listening at {server.address} for {place.world_size} workers{which}", flush=True)
        try:
            return _serve(server)
        except DtrainError as error:
            if place.launcher_fd is None:
                raise
            leave_word(error)  # the workers have been told, and say it
            return error.exit_code
        finally:
            if metrics is not None:
                metrics.close()
            server.close()

    def _told_servers(self, place: env.Place) -> int | None:
        """How many servers there are; None if the scheduler alone knows."""
        told = place.num_servers if self.servers is None else self.servers
        return 1 if told is None and place.scheduler is None else told

    def _terms(self, place: env.Place, address: str) -> Terms:
        """What this server, which listens at the address, is to do; with the number that the scheduler gives it."""
        number, told = self.server or 0, self._told_servers(place)
        servers = told or 1
        if place.scheduler is not None:
            number, servers = register(
                place.scheduler,
                seen_from(place.scheduler, address),
                wanted=self.server,
                job_id=place.job_id,
                keys=None if place.keys is None else Path(place.keys),
                timeout_s=self.connect_timeout_s,
            )
            if told not in (None, servers):
                raise UsageError(
                    f"servers is {told}, and {servers} at the scheduler, {place.scheduler}: start all alike"
                )
        return Terms(
            world_size=place.world_size,
            job_id=place.job_id,
            server=number,
            num_servers=servers,
            on_loss=self.on_worker_loss,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            credit_bytes=int(self.credit_mb * 2**20),
        )

    def _name(self, place: env.Place) -> str:
        return "server" if self.servers in (None, 1) else f"server {self.server or 0}"


@dataclass(frozen=True, kw_only=True)
class SchedulerCommand:
    """Tell servers and workers of each other: dtrain scheduler --bind tcp://127.0.0.1:5555 --servers 2 --workers 4.

    Servers and workers find it by DTRAIN_SCHEDULER, `dtrain server --scheduler`, connect(scheduler=...), or ps-lite's
    DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT with DMLC_NUM_SERVER of 2 or more. No step needs it: it ends when everyone
    has asked.
    """

    bind: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """ipc:///path or tcp://host:port; port 0 takes a free one, which is printed. Default: DTRAIN_SCHEDULER, or from
    DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT."""
    servers: Annotated[int | None, arg(metavar="S", help_behavior_hint="")] = None
    """How many servers the job has. Default: DMLC_NUM_SERVER."""
    workers: Annotated[int | None, arg(aliases=["-n"], metavar="N", help_behavior_hint="")] = None
    """How many workers are to ask before it ends. Default: from DMLC_NUM_WORKER, or 1."""
    timeout_s: float = 60.0
    """How long to wait for all servers to register and all workers to ask, in seconds."""
    idle_s: float = 10.0
    """How long to stay after the last message when all have asked, in seconds."""
    keys: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Directory of CURVE keys, made by `dtrain keys DIR`: needed beyond this host. Default: DTRAIN_KEYS."""
    insecure_no_encryption: bool = False
    """Listen beyond this host without keys, where anybody may read and write: for networks that you trust."""

    def run(self, argv: Sequence[str]) -> int:
        given: dict[str, Any] = {"scheduler": self.bind, "keys": self.keys}
        place = env.resolve(role="scheduler", rank=0, world_size=self.workers, **given)
        servers = place.num_servers if self.servers is None else self.servers
        if place.scheduler is None and place.servers is not None and servers == 1:
            print(f"one server, which listens at {place.servers} itself: no scheduler is needed", flush=True)
            return 0
        if place.scheduler is None:
            raise UsageError(
                "no address: give --bind tcp://127.0.0.1:5555, or set DTRAIN_SCHEDULER, or DMLC_PS_ROOT_URI and "
                "DMLC_PS_ROOT_PORT"
            )
        if servers is None:
            raise UsageError("servers is not given: say --servers 2, or set DMLC_NUM_SERVER")
        end_with_launcher(place, "scheduler")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `finally`, below
        scheduler = Scheduler(
            place.scheduler,
            servers,
            num_workers=place.world_size,
            keys=None if place.keys is None else Path(place.keys),
            insecure_no_encryption=self.insecure_no_encryption,
            job_id=place.job_id,
            timeout_s=self.timeout_s,
            idle_s=self.idle_s,
        )
        try:
            print(f"listening at {scheduler.address} for {servers} servers, {place.world_size} workers", flush=True)
            return _serve(scheduler)
        finally:
            scheduler.close()


@dataclass(frozen=True, kw_only=True)
class KeysCommand:
    """Make the keys that servers and workers need beyond one host: dtrain keys DIR.

    Writes server.public, server.secret, worker.public and worker.secret (CURVE). Copy the directory to every host by a
    way that you trust, and give it with --keys DIR or DTRAIN_KEYS; a worker needs no server.secret.
    """

    folder: Annotated[Path, Positional, arg(metavar="DIR")]
    """Directory to make them in; only its owner may read it."""

    def run(self, argv: Sequence[str]) -> int:
        keys.make(self.folder)
        print(f"keys are in {self.folder}: give it to `dtrain server --keys`, and to workers as DTRAIN_KEYS")
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What is here (torch, gloo, NCCL, shared memory, cores, interfaces), and what would go wrong."""

    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the facts to this file."""

    def run(self, argv: Sequence[str]) -> int:
        facts = doctor.examine()
        print(doctor.text(facts))
        _write_json(self.json, facts)
        return 0


_COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (Train, "train a recipe over one backend"),
    "compare": (
        Compare,
        "train a recipe over several backends, and compare weights, speed and communication",
    ),
    "launch": (Launch, "run a script of your own as n workers on this host"),
    "server": (ServerCommand, "run the parameter server by hand"),
    "scheduler": (SchedulerCommand, "tell several servers and their workers of each other"),
    "keys": (KeysCommand, "make the keys that the parameter server needs beyond one host"),
    "doctor": (Doctor, "what is here, and what would go wrong"),
}

_ABOUT = f"""dtrain {__version__}: data-parallel training on PyTorch, over a parameter server or all-reduce.

Begin with: dtrain compare digits    (two backends, one model)
A command ends with 0, or with: 64 usage, 65 bad data, 69 another process lost, 75 asked to stop
and saved, 76 protocol, 77 key refused.
DTRAIN_DEBUG=1 shows tracebacks, DTRAIN_LOG_LEVEL=info the place in the job.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the command's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(_guarded(lambda: _dispatch(arguments)))


def _dispatch(arguments: list[str]) -> int:
    logging.basicConfig(level=env.log_level(), format="dtrain: %(message)s")
    if arguments[:1] == ["--version"]:
        print(f"dtrain {__version__}")
        return 0
    own, rest = _split_launch(arguments)
    try:
        if own[:1] and own[0] in _COMMANDS:
            command = tyro.cli(_COMMANDS[own[0]][0], args=own[1:], prog=f"dtrain {own[0]}")
        else:
            return _overview(own)
    except SystemExit as stop:  # tyro has said what is wrong
        return UsageError.exit_code if stop.code == 2 else int(stop.code or 0)
    if isinstance(command, Launch):
        return command.run(own, rest)
    code: int = command.run(own)
    return code


def _overview(arguments: list[str]) -> int:
    """What the commands are, and whether that was asked for."""
    lines = [f"  {name:<11}{what}" for name, (_, what) in _COMMANDS.items()]
    text = "\n".join([_ABOUT, "commands:", *lines, "", "dtrain COMMAND --help explains one of them."])
    if arguments[:1] in (["-h"], ["--help"], ["help"]):
        print(text)
        return 0
    close = difflib.get_close_matches(arguments[0], _COMMANDS, n=1) if arguments else []
    hint = f": did you mean {close[0]!r}?" if close else ""
    wrong = f"there is no command {arguments[0]!r}{hint}\n" if arguments else ""
    print(f"{wrong}{text}", file=sys.stderr)
    return UsageError.exit_code


def _split_launch(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The part that is ours, and the command that `launch` is to run with flags of its own."""
    if arguments[:1] != ["launch"]:
        return arguments, []
    position = 1
    while position < len(arguments) and arguments[position].startswith("-"):
        flag = arguments[position]
        if flag == "--":
            return arguments[:position], arguments[position + 1 :]
        position += 1 if "=" in flag or flag in ("-h", "--help") else 2
    return arguments[:position], arguments[position:]


def _serve(service: Server | Scheduler) -> int:
    """Run it to its end, or to a signal; the exit code.

    A handler that raised would be lost where the interpreter cannot let an exception through, in a destructor for one.
    """
    caught: list[int] = []

    def stop(number: int, _: object) -> None:
        if caught:
            os._exit(128 + number)  # it did not end after the first one
        caught.append(number)
        service.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    service.run()
    return 128 + caught[0] if caught else 0


def _guarded(work: Callable[[], int]) -> int:
    """Turn our errors into one line and an exit code."""
    try:
        return work()
    except DtrainError as error:
        if env.debug():
            raise
        leave_word(error)
        print(f"dtrain: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def _flags(fields: dict[str, Any]) -> list[str]:
    """A command line from values; None is left out."""
    flags: list[str] = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if value is None or value == ():
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _new_run_dir(what: str, backend: str) -> str:
    """A directory of this run's own. Worker 0 writes for all: elsewhere it is a name, and is not made."""
    if env.in_job() and env.resolve().rank > 0:
        return "runs/worker-0-only"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = "-".join(part for part in (what, backend, stamp) if part)
    Path("runs").mkdir(exist_ok=True)
    return tempfile.mkdtemp(prefix=f"{name}-", dir="runs")


def _check_json(file: str | None) -> None:
    """Say before a long run that its figures cannot be written."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise UsageError(f"--json {file}: no file can be made there; its directory must exist")


def _write_json(file: str | None, record: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        text = json.dumps(finite(record), indent=1, allow_nan=False)
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error
