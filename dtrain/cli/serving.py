"""The commands of the parameter server: server, scheduler, keys."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dtrain import env
from dtrain.errors import DtrainError, UsageError
from dtrain.processes import end_with_launcher, give_up, leave_word
from dtrain.ps import keys
from dtrain.ps import metrics as figures
from dtrain.ps.members import Terms
from dtrain.ps.scheduler import Scheduler, register
from dtrain.ps.server import Server
from dtrain.serving import bind_towards, leave_address, seen_from


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
        metrics = None
        try:
            leave_address(place.job_dir, server.address)
            if self.metrics_port is not None:
                metrics = figures.serve(self.metrics_port, server.terms.server, server.figures)
                print(f"metrics at http://127.0.0.1:{metrics.port}/metrics", flush=True)
            if place.launcher_fd is None:
                which = f", as server {server.terms.server} of {server.terms.num_servers}" if place.scheduler else ""
                print(f"listening at {server.address} for {place.world_size} workers{which}", flush=True)
            return _serve(server, quiet=place.launcher_fd is not None)
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


_PATIENCE_S = 30.0
"""How long a server that was asked to stop goes on, so that the workers of its job can save their state."""


def _serve(service: Server | Scheduler, *, quiet: bool = False) -> int:
    """Run it to its end, or to a signal; the exit code.

    Who stops a whole job signals all of its processes at once: a server goes on until its workers have left, for which
    they have half a minute. A second signal ends it at once. SIGUSR1, by which Slurm asks for checkpoints, is for
    workers. A handler that raised would be lost where the interpreter cannot let an exception through, in a destructor
    for one.
    """
    asked: list[int] = []
    ended: list[int] = []

    def end(number: int) -> None:
        ended.append(number)
        service.stop()

    def stop(number: int, _: object) -> None:
        if asked:
            os._exit(128 + number)  # it did not end after the first one
        asked.append(number)
        workers = int(service.figures()["workers"]) if isinstance(service, Server) else 0
        if number != signal.SIGTERM or not workers:
            return end(number)
        if not quiet:
            text = f"dtrain: asked to stop; waiting until {workers} workers have left, {_PATIENCE_S:g} s at most\n"
            os.write(2, text.encode())
        timer = threading.Timer(_PATIENCE_S, end, [number])
        timer.daemon = True
        timer.start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    service.run()
    return 128 + ended[0] if ended else 0
