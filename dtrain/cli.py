"""The commands: train, compare, launch, server, doctor."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from dtrain import __version__, doctor, env, tables
from dtrain.compare import compare, python_m_dtrain
from dtrain.connect import check_backend, connect
from dtrain.errors import DtrainError, UsageError
from dtrain.hooks import finite
from dtrain.jobs import run as run_job
from dtrain.launcher import launch
from dtrain.processes import end_with_launcher, leave_word
from dtrain.ps.server import Server
from dtrain.runs import RunSpec, Task, check, check_place
from dtrain.runs import train as train_run


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
        if not env.in_job():
            check(self.spec(), 1 if backend == "solo" else len(self.devices) or self.workers)
        if backend in ("solo", "threads") or env.in_job():
            return self._work(backend)
        run_dir = self.run_dir or _new_run_dir(self.recipe, backend)
        command = python_m_dtrain(*argv, "--run-dir", run_dir)
        return launch(command, workers=self.workers, backend=backend, timeout_s=self.timeout_s)

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
            comm = connect(backend, timeout_s=self.timeout_s)
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
    norm_batch: Literal["worker", "global"] = "global"
    """Samples that share batch-norm statistics: those of each worker, or those of all."""
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
            sharing = {"global": "synchronised over workers", "worker": "each worker's own"}[self.norm_batch]
            print(f"Batch-norm statistics: {sharing} (--norm-batch {self.norm_batch}).", flush=True)
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
    """Number of servers for ps; one is supported."""
    timeout_s: float = 60.0
    """Longest wait of a worker for another, in seconds."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Processor threads of each worker. Default: the cores, shared out."""

    def run(self, argv: Sequence[str], command: Sequence[str] = ()) -> int:
        if not command:
            raise UsageError("nothing to launch: dtrain launch -n 2 --backend ps script.py")
        check_backend(self.backend)
        if self.workers < 1 or self.servers != 1:
            raise UsageError(f"workers is {self.workers}, servers {self.servers}: one worker or more, and one server")
        if self.backend == "threads":
            raise UsageError("backend is threads, which needs no processes: call dtrain.run(fn, workers=n) in a script")
        if self.backend == "solo" and self.workers > 1:
            raise UsageError(f"backend solo is a world of one, and workers is {self.workers}: give -n 1")
        if command[0].endswith(".py"):
            if not Path(command[0]).is_file():
                raise UsageError(f"{command[0]}: there is no such script in {Path.cwd()}: give its path")
            command = [sys.executable, *command]
        return launch(
            command,
            workers=self.workers,
            backend=self.backend,
            timeout_s=self.timeout_s,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """Run the parameter server by hand: dtrain server --bind tcp://127.0.0.1:5555 --workers 4.

    Workers find it by DTRAIN_SERVERS, or connect(server=...). It ends when all workers have left.
    """

    bind: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """ipc:///path or tcp://host:port; port 0 takes a free one, which is printed. Default: from DMLC_PS_ROOT_URI and
    DMLC_PS_ROOT_PORT."""
    workers: Annotated[int | None, arg(aliases=["-n"], metavar="N", help_behavior_hint="")] = None
    """How many workers take part. Default: from DMLC_NUM_WORKER."""
    timeout_s: float = 60.0
    """How long a round waits for its last worker, in seconds."""
    connect_timeout_s: float = 60.0
    """How long to wait for all workers to join, in seconds."""
    insecure_no_encryption: bool = False
    """Listen beyond this host, where anybody may read and write: for networks that you trust."""

    def run(self, argv: Sequence[str]) -> int:
        place = env.resolve(rank=0, world_size=self.workers, servers=self.bind)
        if place.servers is None:
            raise UsageError(
                "no address: give --bind tcp://127.0.0.1:5555, or set DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT"
            )
        end_with_launcher(place, "server")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `finally`, below
        server = Server(
            place.servers,
            place.world_size,
            job_id=place.job_id,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            insecure_no_encryption=self.insecure_no_encryption,
        )
        if place.launcher_fd is None:
            print(f"listening at {server.address} for {place.world_size} workers", flush=True)
        try:
            server.run()
        except DtrainError as error:
            if place.launcher_fd is None:
                raise
            leave_word(error)  # the workers have been told, and say it
            return error.exit_code
        finally:
            server.close()
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
    "doctor": (Doctor, "what is here, and what would go wrong"),
}

_ABOUT = f"""dtrain {__version__}: data-parallel training on PyTorch, over a parameter server or all-reduce.

Begin with: dtrain compare digits    (two backends, one model)
A command ends with 0, or with: 64 usage, 65 bad data, 69 another process lost, 76 protocol.
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
    lines = [f"  {name:<9}{what}" for name, (_, what) in _COMMANDS.items()]
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
