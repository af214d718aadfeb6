"""`launch`: a command as n workers on this host, with the server where one is needed; what failed first is named.

Where a cluster has started this process as one of several, each starts its host's workers: see `Plan.host`.
"""

from __future__ import annotations

import functools
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dtrain import env
from dtrain.errors import CommError, DataError, Preempted, UsageError
from dtrain.processes import (
    Child,
    cores,
    forget_word,
    given_up,
    left_word,
    remove,
    server_addresses,
    server_command,
)
from dtrain.ps import lanes

_FOR_GOOD = (UsageError.exit_code, DataError.exit_code, Preempted.exit_code)
"""Exit codes of processes that would only end with them again."""

_GRACE_S = 5.0
"""How long the others may take to notice a fault by themselves and say what they saw, before they are ended."""

_STUCK_S = 8.0
"""How long a process may be stopped (SIGSTOP) where the job goes on without it: longer than servers take to notice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `launch` starts, and what it does when something ends too early."""

    workers: int
    backend: str
    """`ps` starts servers beside the workers."""
    servers: int = 1
    timeout_s: float = 60.0
    """Longest wait of a worker for another."""
    threads: int | None = None
    """Processor threads for each worker; by default the cores are shared out."""
    on_worker_loss: str = "fail"
    """`fail`: the rest is ended. `wait`: whatever dies, a server too, is started again. `drop`: the others go on."""
    max_restarts: int = 3
    """With `wait`: how many processes may be started again, in all."""
    host: env.Place = field(default_factory=env.Place)
    """This process among those that Slurm, MPI or Kubernetes has started, one on each host. With h of them the job has
    h times as many workers; they meet in its store, and servers are started by the first worker of each host."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.servers < 1:
            raise UsageError(f"workers is {self.workers}, servers {self.servers}: a job has at least one")
        if self.servers != 1 and self.backend != "ps":
            raise UsageError(f"servers is {self.servers}, and backend {self.backend} has none: they go with ps")
        if self.on_worker_loss not in ("fail", "wait", "drop"):
            raise UsageError(f"on_worker_loss is {self.on_worker_loss!r}: it is fail, wait or drop")
        if self.on_worker_loss != "fail" and self.backend != "ps":
            raise UsageError(f"on_worker_loss is {self.on_worker_loss!r} with backend {self.backend}: it needs ps")
        if self.max_restarts < 0:
            raise UsageError(f"max_restarts is {self.max_restarts}: 0 or more")
        if self.hosts > 1:
            self._check_hosts()

    def _check_hosts(self) -> None:
        where = f"this is host {self.host.rank} of {self.hosts} ({self.host.launcher or 'RANK and WORLD_SIZE'})"
        if self.on_worker_loss != "fail":
            raise UsageError(
                f"on_worker_loss is {self.on_worker_loss!r}, and {where}: that needs one host; let the cluster start "
                "the job again, with --auto-resume"
            )
        if self.servers != 1:
            raise UsageError(f"servers is {self.servers}, and {where}: one is started on each; leave --servers out")
        if self.host.store is None and (self.backend != "ps" or not (self.host.servers or self.host.scheduler)):
            raise UsageError(
                f"{where}, and nothing says where they meet: set MASTER_ADDR to a host's name, MASTER_PORT"
            )

    @property
    def hosts(self) -> int:
        return self.host.world_size

    @property
    def world_size(self) -> int:
        """Workers on all hosts."""
        return self.workers * self.hosts


def launch(command: Sequence[str], plan: Plan) -> int:
    """Run a command as each of the plan's workers, with the environment that `dtrain.connect()` reads.

    Worker 0 prints where this process does; the others' lines begin with their name. At the first failure that the plan
    does not mend, the rest has a few seconds to end by itself, then it is ended; what failed first is named on stderr.

    Args:
        command: program and arguments; `sys.executable` and a script, say.

    Returns:
        Exit code: 0, or that of the first failure (69 where a process was killed; 75 where the state was saved at a
        signal; else 130 after Ctrl-C, 143 after SIGTERM).
    """
    lanes.sweep()  # of jobs that were killed before they could
    folder = tempfile.mkdtemp(prefix="dtrain-")
    job = _Job(folder, command, plan)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {n: signal.signal(n, lambda number, _: job.interrupt(number)) for n in numbers}
    try:
        job.start()
        return job.follow()
    except _Signalled as caught:
        print(f"dtrain: {signal.Signals(caught.number).name}: stopping {plan.workers} workers", file=sys.stderr)
        return 128 + caught.number
    finally:
        job.stop()
        lanes.sweep(job.pids)
        remove(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Job:
    """The processes of one launch."""

    def __init__(self, folder: str, command: Sequence[str], plan: Plan) -> None:
        self._folder = folder
        self._command = command
        self._plan = plan
        self._id = secrets.token_hex(16) if plan.hosts == 1 else plan.host.job_id
        own_servers = plan.backend == "ps" and plan.hosts == 1
        self._addresses = server_addresses(folder, plan.servers) if own_servers else []
        self._children: list[Child] = []
        self._starts: dict[str, Callable[[int], Child]] = {}
        self._restarts: Counter[str] = Counter()
        self._used = 0  # of the restarts that are allowed
        self._followed: Counter[str] = Counter()  # restarts of those who ended because another one had
        self._lost: list[Child] = []  # that the others go on without
        self._stuck_s: dict[int, float] = {}  # by pid, since when
        self._looked_s = 0.0
        self._signal = 0
        self._asked_to_save = 0  # by which signal
        self.pids: list[int] = []
        """Of all processes that were started."""

    def interrupt(self, number: int) -> None:
        """At the first signal ask the workers to save their state and end; a program that saves none just ends.

        At a second one make `start` or `follow` end soon: a handler that raised could lose a child just being started.
        """
        if not self._asked_to_save and self._children:
            self._asked_to_save = number
            for child in self._workers:
                if not child.ended():
                    child.signal(signal.SIGTERM)
            return
        self._signal = self._signal or number

    def _look(self) -> None:
        if self._signal:
            raise _Signalled(self._signal)

    @property
    def _workers(self) -> list[Child]:
        return [c for c in self._children if c.name.startswith("worker")]

    def start(self) -> None:
        """Start everything."""
        for number in range(len(self._addresses)):
            name = "server" if self._plan.servers == 1 else f"server {number}"
            self._starts[name] = functools.partial(self._start_server, name, number)
        first = self._plan.host.rank * self._plan.workers
        for rank in range(first, first + self._plan.workers):
            self._starts[f"worker {rank}"] = functools.partial(self._start_worker, f"worker {rank}", rank)
        for begin in self._starts.values():
            self._look()
            self._children.append(begin(0))
            self.pids.append(self._children[-1].process.pid)
            if self._asked_to_save:  # not all are here that would have to save
                raise _Signalled(self._asked_to_save)

    def _start_server(self, name: str, number: int, restart: int) -> Child:
        place = env.Place(role="server", job_id=self._id, job_dir=self._folder, restart=restart)
        argv = server_command(
            self._addresses[number],
            self._plan.workers,
            timeout_s=self._plan.timeout_s,
            server=number,
            num_servers=self._plan.servers,
            on_worker_loss=self._plan.on_worker_loss,
        )
        return Child(name, argv, place)

    def _start_worker(self, name: str, rank: int, restart: int) -> Child:
        plan = self._plan
        place = env.Place(
            backend=plan.backend,
            rank=rank,
            world_size=plan.world_size,
            local_rank=rank % plan.workers,
            local_world_size=plan.workers,
            store=f"file://{self._folder}/store",
            servers=",".join(self._addresses) or None,
            job_id=self._id,
            job_dir=self._folder,
            restart=plan.host.restart + restart,
            timeout_s=plan.timeout_s,
            connect_timeout_s=plan.host.connect_timeout_s,
        )
        if plan.hosts > 1:
            told = ("store", "servers", "scheduler", "num_servers", "keys", "lanes")
            place = replace(place, **{name: getattr(plan.host, name) for name in told})
        threads = plan.threads or max(1, cores() // plan.workers)
        one_host = plan.hosts == 1
        return Child(name, self._command, place, threads=threads, prefix_output=rank > 0, one_host=one_host)

    def follow(self) -> int:
        """Wait for all; the exit code of the job."""
        while True:
            bad = [c for c in self._children if c.ended() and c.process.returncode != 0 and c not in self._lost]
            if bad and not all(self._mend(child) for child in bad):
                return self._explain(bad)
            if all(c.ended() for c in self._children):
                return 0
            if self._plan.on_worker_loss != "fail":
                self._end_stuck(time.monotonic())
            self._look()
            time.sleep(0.05)

    def _end_stuck(self, now: float) -> None:
        """Kill what has been stopped for long, and what the servers have given up: only its end lets it be replaced."""
        if now - self._looked_s < 0.5:
            return
        self._looked_s = now
        stopped = {c.process.pid: c for c in self._children if c.stopped()}
        late = given_up(self._folder)
        stuck = {c.process.pid: c for c in self._workers if c.process.pid in late and not c.ended()} | stopped
        self._stuck_s = {pid: self._stuck_s.get(pid, now) for pid in stuck}
        for pid, child in stuck.items():
            if now - self._stuck_s[pid] >= _STUCK_S:
                why = "has been stopped (SIGSTOP)" if pid in stopped else "makes no progress and was given up"
                self._say(f"{child} {why} for {_STUCK_S:g} s; killing it")
                child.signal(signal.SIGKILL)

    def _mend(self, child: Child) -> bool:
        """Whether the job goes on although this process has ended badly."""
        plan = self._plan
        done = [c for c in self._workers if c.ended() and c.process.returncode == 0]
        if plan.on_worker_loss != "fail" and done:
            self._say(f"{child} {self._how(child)}, after {done[0].name} had finished: nothing is lost")
            self._lost.append(child)
            return True
        if self._asked_to_save or self._code(child) in _FOR_GOOD:
            return False
        if plan.on_worker_loss == "drop" and child in self._workers and len(self._lost) + 1 < plan.workers:
            self._say(f"{child} {self._how(child)}; the others go on without it")
            self._lost.append(child)
            return True
        if plan.on_worker_loss != "wait":
            return False
        word = left_word(self._folder, child.name)
        # Who ends with 69 complains about somebody else, who was lost before: that counts as one fault, not as several.
        follows = self._followed[child.name] < self._used and word is not None and word[0] == CommError.exit_code
        if not follows and self._used >= plan.max_restarts:
            self._say(f"no more than {plan.max_restarts} restarts (--max-restarts)")
            return False
        self._restarts[child.name] += 1
        self._used += not follows
        self._followed[child.name] += follows
        count = "too" if follows else f"({self._used} of {plan.max_restarts})"
        self._say(f"{child} {self._how(child)}; starting it again {count}")
        child.stop(grace_s=0.0)
        lanes.sweep([child.process.pid])
        forget_word(self._folder, child.name)
        again = self._starts[child.name](self._restarts[child.name])
        self._children[self._children.index(child)] = again
        self.pids.append(again.process.pid)
        return True

    def _say(self, text: str) -> None:
        print(f"dtrain: {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End whatever still runs."""
        running = [c for c in self._children if not c.ended()]
        for child in running:
            child.signal(signal.SIGTERM if not child.stopped() else signal.SIGKILL)
        deadline = time.monotonic() + 2.0
        for child in running:
            child.wait(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            child.stop(grace_s=0.0)

    def _explain(self, bad: list[Child]) -> int:
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not all(c.ended() or c.stopped() for c in self._children):
            self._look()
            time.sleep(0.05)
        everyone = [c for c in self._children if c.ended() and c.process.returncode != 0]
        if any(self._code(c) == Preempted.exit_code for c in bad + everyone):  # another host may have been asked
            self._say("state saved; start again with --resume to go on")
            return Preempted.exit_code
        if self._asked_to_save and any(c.process.returncode == -signal.SIGTERM for c in self._workers):
            raise _Signalled(self._asked_to_save)  # it had not begun, or saves nothing
        # Whoever ends with 69 complains about somebody else: look for the one who does not, or who is stopped.
        own = [c for c in bad + everyone if self._code(c) != CommError.exit_code]
        stopped = [c for c in self._children if not c.ended() and c.stopped()]
        early = [c for c in self._children if c.process.returncode == 0]
        culprit = (own or stopped or early or bad)[0]
        rest = len([c for c in self._children if c is not culprit])
        if culprit.ended():
            culprit.wait(0.0)  # for what it still has to say
        how = self._how(culprit)
        if culprit in early:  # what a worker says is on the screen already
            said = (left_word(self._folder, c.name) for c in bad if c not in self._workers)
            how += "".join(f"; {word[1]}" for word in said if word is not None)
        print(
            f"dtrain: {culprit} {how}; stopping the other {rest} process{'' if rest == 1 else 'es'}",
            file=sys.stderr,
            flush=True,
        )
        code = self._code(culprit)
        return code if code > 0 else CommError.exit_code

    def _code(self, child: Child) -> int:
        """Its exit code, or the one that fits the error which ended its script; 0 while it runs."""
        code = child.process.returncode or 0
        word = left_word(self._folder, child.name) if code == 1 else None
        return word[0] if word else code

    def _how(self, child: Child) -> str:
        """How it ended, with the error where it left word of one."""
        code = self._code(child)
        word = left_word(self._folder, child.name) if code > 0 else None
        if word is None:
            return child.how()
        return f"failed with {word[1]}" + (f" (exit code {code})" if code != 1 else "")
