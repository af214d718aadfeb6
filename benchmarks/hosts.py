"""Emulated hosts on one machine: real processes, sockets and libraries, with links as slow as one asks for.

    with hosts(4, rate="200mbit") as h:
        process = h.start(0, ["iperf3", "-s"])
        print(h.run(1, ["ping", "-c1", h.address(0)]).stdout)

    python benchmarks/hosts.py --hosts 4 --rate 50mbit 200mbit      what the links here really carry

A host is a set of Linux namespaces: its own network with one link, process numbers, host name (host0, host1, ..., which
all know), and /dev/shm. So shared memory joins the processes of one host and no others, as it should be. Hosts hang on
a bridge, which is a switch; both directions of each link are held to the rate by token buckets (tc tbf). Files are
those of this machine, as on hosts that share a network file system. There is no added latency, and all hosts share this
machine's processors:
`Hosts.watch` tells whether those, or the links, were the bottleneck.

`rate` is the payload of TCP: what a program can send. The wire carries 1514 bytes for 1448 of it. After a pause a link
passes 2 ms worth of bytes (16 KiB at least) at once, so small messages seem faster than on a real link; then 1.03 times
the rate until 30 ms worth of the pause are made up for. Where the machine is held up for longer, as virtual machines
are, less than the rate comes by: `Hosts.throughput` measures what does.

It needs Linux, iproute2 and util-linux; root, or user namespaces. Nothing has a name outside the namespaces and nothing
needs to be tidied up: they are held by a process on each host that ends when this process does, however it ends, and
the kernel then ends all processes on that host and takes its network apart.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil
from watching import SAMPLE_S, Use, look

_PAYLOAD = 1448  # bytes of TCP's, with time stamps, in an Ethernet frame
_WIRE = 1514 / _PAYLOAD
_PEAK = 1.03
_BURST_S = 0.002
_CATCH_UP_S = 0.030
_QUEUE_S = 0.050
_MOST = 250  # hosts
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
_NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
_HOLD = "trap '' CHLD; echo ready; exec cat"  # ends when its stdin closes; as process 1, it keeps no dead children
_READY_S = 10.0
_IPV4 = "/proc/sys/net/ipv4"
_FEWER_PACKETS = f"echo 16 2>/dev/null > {_IPV4}/tcp_min_tso_segs"
"""A slow connection hands its data on in pieces of two frames, each of which costs the processors as much as a large
one: links of some hundred Mbit/s would wait for them. Where it is not permitted, it stays so."""
_CONGESTION = f"for name in cubic reno; do echo $name 2>/dev/null > {_IPV4}/tcp_congestion_control && break; done"
"""Linux's default, or what a namespace may always have, whatever this machine prefers: with BBR, which gives way for
0.2 s now and then, sums over many connections took a tenth longer."""


class HostsError(Exception):
    """Hosts cannot be emulated here, or a process on one of them failed."""


def bytes_per_s(rate: str) -> float:
    """`200mbit`, `1.5gbit`, `25MB/s` in bytes a second.

    Raises:
        ValueError: something else, or nothing above zero.
    """
    match = re.fullmatch(r"([0-9.]+) ?([kmg]?)(bit|bit/s|b/s)", rate.strip().lower())
    with contextlib.suppress(ValueError):
        if match and (amount := float(match[1])) > 0:
            return amount * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] / (1 if match[3] == "b/s" else 8)
    raise ValueError(f"rate is {rate!r}: give bits a second as 200mbit or 1gbit, or bytes as 25MB/s")


def available() -> str | None:
    """Why hosts cannot be emulated here, in words; None if they can. Tries it."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"emulated hosts need Linux, iproute2 and util-linux; missing: {', '.join(missing) or 'Linux'}"
    try:
        with hosts(1, rate="100mbit"):
            return None
    except HostsError as error:
        return str(error)


@contextlib.contextmanager
def hosts(
    count: int, *, rate: str, user_namespace: bool | None = None, tcp: Mapping[str, str] | None = None
) -> Iterator[Hosts]:
    """So many hosts, with links of that rate each way; gone, with all that runs on them, at the end.

    Args:
        rate: payload of TCP in bits a second, `200mbit`, or bytes, `25MB/s`.
        user_namespace: do it without root's powers. Default: where this process is not root.
        tcp: settings of all hosts, by their names in net.ipv4: `{"tcp_slow_start_after_idle": "0"}`.

    Raises:
        HostsError: the system does not let us; says what it said.
    """
    if not 1 <= count <= _MOST:
        raise ValueError(f"count is {count}: give 1 to {_MOST} hosts")
    unprivileged = os.geteuid() != 0 if user_namespace is None else user_namespace
    made = Hosts(bytes_per_s(rate), user_namespace=unprivileged, tcp=tcp or {})
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        made.close()


class Process:
    """A process on a host. Signals go to it and to all of its process group."""

    def __init__(self, popen: subprocess.Popen[bytes], name: str, output: IO[bytes]) -> None:
        self.popen = popen
        self.name = name
        self._output = output  # without a name: it goes with this process
        self._said = ""

    def said(self) -> str:
        """What it printed so far, on either stream."""
        if not self._output.closed:
            fd = self._output.fileno()
            self._said = os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
        return self._said

    def forget(self) -> None:
        """Let its output go; what it has said stays."""
        self.said()
        self._output.close()

    def wait(self, timeout_s: float) -> int:
        """Its exit code; -N when signal N ended it."""
        return self.popen.wait(timeout_s)

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def kill(self) -> None:
        self.signal(9)
        self.popen.wait(10.0)


class Hosts:
    """Hosts, numbered from 0, and what runs on them. Made by `hosts`."""

    def __init__(self, rate_bytes_per_s: float, *, user_namespace: bool, tcp: Mapping[str, str]) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self._tcp = tcp
        self.user_namespace = user_namespace
        self._holders: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []  # of process 1 on each host, as seen from here
        self._processes: list[Process] = []
        self._places: list[int] = []  # the host of each
        self._ports = itertools.count(20000)
        own = ("--user", "--map-root-user") if user_namespace else ()
        bridge = "ip link add switch type bridge && ip link set switch up && "
        try:
            self._switch = self._hold(["unshare", *own, "--net", "sh", "-c", bridge + _HOLD])
        except HostsError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._pids)

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def name(self, host: int) -> str:
        """By which all hosts find it."""
        return f"host{host}"

    def port(self) -> int:
        """A number that no call has given before."""
        return next(self._ports)

    def add(self) -> None:
        """One more host."""
        number = len(self._pids)
        known = [f"{self.address(host)} {self.name(host)}" for host in range(_MOST)]
        write = f"printf '%s\\n' '127.0.0.1 localhost' {' '.join(map(shlex.quote, known))} > /dev/shm/names"
        names = f"{write} && mount --bind /dev/shm/names /etc/hosts && rm /dev/shm/names"
        tcp = f"{_FEWER_PACKETS}; {_CONGESTION}"
        private = f"mount -t tmpfs tmpfs /dev/shm && {names} && hostname {self.name(number)} && {tcp}; "
        unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", private + _HOLD]
        holder = self._hold([*self._enter(self._switch.pid, "--net"), *unshare])
        pid = _child(holder.pid)
        rate, gso = self._shaping()
        self._do(
            self._enter(self._switch.pid, "--net"),
            f"ip link add port{number} type veth peer name eth0 netns {pid}",
            f"ip link set port{number} master switch {gso} up",
            f"tc qdisc add dev port{number} root tbf {rate}",
        )
        self._do(
            self._enter(pid, "--net"),
            f"ip addr add {self.address(number)}/24 dev eth0",
            f"ip link set eth0 {gso} up",
            "ip link set lo up",
            f"tc qdisc add dev eth0 root tbf {rate}",
            *(f"echo {shlex.quote(value)} > {_IPV4}/{shlex.quote(name)}" for name, value in self._tcp.items()),
        )
        self._pids.append(pid)

    def start(
        self, host: int, command: Sequence[object], env: Mapping[str, str] | None = None, *, name: str = ""
    ) -> Process:
        """Start a command there, in this process's working directory; `env` is added to its environment."""
        words = [str(word) for word in command]
        # Entering a host's mounts leads to their root.
        there = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *words]
        output = tempfile.TemporaryFile()  # noqa: SIM115  (Process keeps it)
        popen = subprocess.Popen(
            [*self._enter(self._pids[host], *_NAMESPACES), *there],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process = Process(popen, name or f"{words[0]} on host {host}", output)
        self._processes.append(process)
        self._places.append(host)
        return process

    def on(self, host: int) -> list[Process]:
        """What was started on a host and still runs."""
        return [p for p, place in zip(self._processes, self._places, strict=True) if place == host and not p.ended]

    def set_link(self, host: int, *, up: bool) -> None:
        """Join a host's link to the switch, or take it off."""
        self._do(self._enter(self._switch.pid, "--net"), f"ip link set port{host} {'up' if up else 'down'}")

    def run(
        self, host: int, command: Sequence[object], env: Mapping[str, str] | None = None, *, timeout_s: float = 60.0
    ) -> str:
        """Run a command there to its end; what it printed.

        Raises:
            HostsError: it failed, or was too late.
        """
        process = self.start(host, command, env)
        finish([process], timeout_s=timeout_s)
        return process.said()

    def congestion_control(self) -> str:
        """TCP's, on all hosts."""
        return self.run(0, ["cat", f"{_IPV4}/tcp_congestion_control"]).strip()

    def throughput(self, pairs: Sequence[tuple[int, int]], *, seconds: float = 1.0) -> list[float]:
        """Bytes a second of payload that arrive for each pair of hosts (from, to), all pairs at once."""
        ports = [self.port() for _ in pairs]
        receivers = [
            self.start(to, [sys.executable, "-c", _RECEIVE, port, seconds])
            for (_, to), port in zip(pairs, ports, strict=True)
        ]
        senders = [
            self.start(by, [sys.executable, "-c", _SEND, self.address(to), port])
            for (by, to), port in zip(pairs, ports, strict=True)
        ]
        finish(receivers, timeout_s=seconds + 30.0)
        finish(senders, timeout_s=30.0)
        return [float(receiver.said()) for receiver in receivers]

    @contextlib.contextmanager
    def watch(self) -> Iterator[Use]:
        """Keep an eye on processors and links; `Use` has the figures afterwards."""
        use, over = Use(rate_bytes_per_s=self.rate_bytes_per_s), threading.Event()
        samples = [look(self._pids)]

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                samples.append(look(self._pids))

        thread = threading.Thread(target=sample, daemon=True, name="hosts-watch")
        thread.start()
        try:
            yield use
        finally:
            over.set()
            thread.join()
            samples.append(look(self._pids))
            use.fill(samples)

    def close(self) -> None:
        """End all processes and take the network apart."""
        for process in self._processes:
            process.signal(9)
        for holder in reversed(self._holders):
            for pipe in (holder.stdin, holder.stdout):
                if pipe is not None:
                    pipe.close()
        for popen in [*self._holders, *(process.popen for process in self._processes)]:
            try:
                popen.wait(_READY_S)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait(_READY_S)
        for process in self._processes:
            process.forget()

    def _shaping(self) -> tuple[str, str]:
        """Arguments of tbf, and of the largest packet that TCP may hand it before it is cut into frames."""
        wire = self.rate_bytes_per_s * _WIRE
        burst = max(16384, math.ceil(wire * _BURST_S))
        catch_up = max(2 * burst, math.ceil(wire * _CATCH_UP_S))
        queue = max(262144, math.ceil(wire * _QUEUE_S))
        text = f"rate {wire * 8:.0f}bit burst {catch_up} peakrate {wire * 8 * _PEAK:.0f}bit mtu {burst} limit {queue}"
        # With the headers of all its frames within the burst, or tbf would cut it into frames, each with its own cost.
        largest = min(65536, int((burst - 1024) / _WIRE))
        return text, f"gso_max_size {largest} gso_max_segs {largest // _PAYLOAD}"

    def _enter(self, pid: int, *namespaces: str) -> list[str]:
        user = ("--user", "--preserve-credentials") if self.user_namespace else ()
        return ["nsenter", "--target", str(pid), *user, *namespaces]

    def _hold(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process that holds namespaces, and wait until it does.

        Python closes our ends of the pipes in every program that it starts, so they close when this process ends.
        """
        with tempfile.TemporaryFile() as complaint:
            holder = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaint,
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._holders.append(holder)
            assert holder.stdout is not None  # noqa: S101  (a pipe)
            if holder.stdout.readline() != b"ready\n":
                complaint.seek(0)
                raise HostsError(_refused(complaint, command[0]))
        return holder

    def _do(self, enter: Sequence[str], *commands: str) -> None:
        done = subprocess.run(
            [*enter, "sh", "-c", " && ".join(commands)], capture_output=True, text=True, timeout=30.0, check=False
        )
        if done.returncode:
            raise HostsError(f"cannot emulate hosts here: {' '.join(done.stderr.split()) or commands}")


def _refused(complaint: IO[bytes], command: str) -> str:
    text = " ".join(complaint.read().decode(errors="replace").split())
    return f"cannot emulate hosts here: {text or f'{command} ended'}; it needs root, or user namespaces"


def _child(pid: int) -> int:
    """The process that `unshare --fork`, started by way of `nsenter`, has made."""
    children = psutil.Process(pid).children()
    if len(children) != 1:
        raise HostsError(f"process {pid} has {len(children)} children: one was expected, which holds a host")
    return int(children[0].pid)


_RECEIVE = """
import socket, sys, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
link = socket.create_server(("0.0.0.0", port)).accept()[0]
space, got = bytearray(1 << 20), 0
until = time.perf_counter() + 0.3  # the start, with what the buckets had saved
while time.perf_counter() < until:
    link.recv_into(space)
start = time.perf_counter()
while time.perf_counter() < start + seconds:
    got += link.recv_into(space)
print(got / (time.perf_counter() - start))
"""

_SEND = """
import contextlib, socket, sys, time
for _ in range(400):
    with contextlib.suppress(ConnectionRefusedError):
        link = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        break
    time.sleep(0.05)
with contextlib.suppress(ConnectionError):
    while True:
        link.sendall(bytes(1 << 20))
"""


def finish(processes: Sequence[Process], *, timeout_s: float) -> None:
    """Wait for all; when one fails or time is up, end the others.

    Raises:
        HostsError: names who failed, with its last words.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        codes = [process.popen.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline_s:
            break
        time.sleep(0.02)
    late = [process for process, code in zip(processes, codes, strict=True) if code is None]
    failed = [process for process, code in zip(processes, codes, strict=True) if code]
    for process in late:
        process.kill()
    for process in failed or late:
        how = f"ended with {process.popen.returncode}" if failed else f"still ran after {timeout_s:g} s"
        raise HostsError(f"{process.name} {how}: {process.said()[-2000:]}")


# --- a job of dtrain over the hosts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job left."""

    run_dir: Path
    summary: dict[str, Any]
    """summary.json of `dtrain train`; empty for scripts."""
    use: Use
    outputs: dict[str, str]
    """Name of a process -> what it printed."""


Placement = Literal["apart", "together"]


def job(
    h: Hosts,
    command: Sequence[str],
    *,
    backend: str,
    workers: int,
    run_dir: Path,
    servers: int = 1,
    placement: Placement = "apart",
    lanes: Literal["auto", "off"] = "off",
    threads: int = 1,
    timeout_s: float = 300.0,
) -> Outcome:
    """Run a job, worker i on host i; to the end of all its processes.

    Args:
        command: arguments of `dtrain` (`["train", "digits", "--steps", "30"]`, to which backend and run directory are
            added), or a script of one's own with its arguments (`["script.py"]`).
        servers: for backend `ps`: how many.
        placement: `apart`: servers on hosts of their own, after the workers'; `together`: server i on host i.
        lanes: `off`: sockets only, so that all workers send alike; `auto`: a server and a worker on one host share
            memory, as they would on real ones.
        threads: processor threads of each process.

    Raises:
        HostsError: too few hosts; a process that failed, with its last words.
    """
    servers = servers if backend == "ps" else 0
    places = server_hosts(len(h), workers=workers, servers=servers, placement=placement)
    binds = [f"tcp://{h.address(host)}:{h.port()}" for host in places]
    place = {"job_id": f"hosts-{h.port()}", "timeout_s": 60.0, "lanes": lanes}
    processes = []
    with h.watch() as use:
        processes += start_servers(h, places, binds, workers, environment({**place, "role": "server"}, threads))
        training = _worker_command(command, backend, lanes, run_dir)
        meeting = {"servers": ",".join(binds)} if servers else {"store": f"tcp://{h.address(0)}:{h.port()}"}
        for rank in range(workers):
            told = {**place, **meeting, "backend": backend, "rank": rank, "world_size": workers}
            processes.append(h.start(rank, training, environment(told, threads), name=f"worker {rank}"))
        finish(processes, timeout_s=timeout_s)
    return Outcome(
        run_dir=run_dir,
        summary=_summary(run_dir),
        use=use,
        outputs={process.name: process.said() for process in processes},
    )


def start_servers(
    h: Hosts, places: Sequence[int], binds: Sequence[str], workers: int, env: Mapping[str, str], *, of: str = ""
) -> list[Process]:
    """The servers of one job, each at its address on its host.

    Args:
        of: which job, for their names.
    """
    started = []
    for number, (host, bind) in enumerate(zip(places, binds, strict=True)):
        flags = ["--workers", workers, "--server", number, "--servers", len(places), "--bind", bind]
        words = [sys.executable, "-m", "dtrain", "server", *flags, "--insecure-no-encryption"]
        started.append(h.start(host, words, env, name=f"server {number}{of}"))
    return started


def server_hosts(count: int, *, workers: int, servers: int, placement: Placement) -> list[int]:
    """Host of each server.

    Raises:
        HostsError: too few hosts.
    """
    needed = workers + servers if placement == "apart" else max(workers, servers)
    if count < needed:
        raise HostsError(f"{workers} workers and {servers} servers {placement} need {needed} hosts; there are {count}")
    first = workers if placement == "apart" else 0
    return list(range(first, first + servers))


def _worker_command(command: Sequence[str], backend: str, lanes: str, run_dir: Path) -> list[str]:
    if command[0].endswith(".py"):
        return [sys.executable, *command]
    more = ["--backend", backend, "--lanes", lanes, "--run-dir", str(run_dir), "--no-progress"]
    return [sys.executable, "-m", "dtrain", *command, *more]


def environment(place: Mapping[str, Any], threads: int) -> dict[str, str]:
    """What a process finds: its place, and the interface that gloo is to use."""
    from dtrain import env  # not for those who want hosts alone: it brings no torch, but dtrain does

    own = env.for_child(env.Place(**place), threads=threads, loopback="eth0")
    return {**own, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": str(threads)}


def _summary(run_dir: Path) -> dict[str, Any]:
    import json

    file = run_dir / "summary.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def main() -> None:
    import common

    flags = common.parser(__doc__ or "")
    flags.add_argument("--hosts", type=int, default=4)
    flags.add_argument("--rate", nargs="+", default=["200mbit"], help="payload of TCP, each way")
    arguments = flags.parse_args()
    if arguments.hosts < 2:
        flags.error(f"--hosts is {arguments.hosts}: give 2 or more")
    rows = [row for rate in arguments.rate for row in _carried(arguments.hosts, rate, 1.0 if arguments.quick else 4.0)]
    if arguments.json:
        common.write(arguments.json, rows, hosts=arguments.hosts, quick=arguments.quick)


def _carried(count: int, rate: str, seconds: float) -> Iterator[dict[str, Any]]:
    """What arrives between hosts, by pattern; where one link is shared, of all its transfers together."""
    cases = {
        "one to one": [(1, 0)],
        "both ways": [(1, 0), (0, 1)],
        "ring": [(i, (i + 1) % count) for i in range(count)],
        "all to one": [(i, 0) for i in range(1, count)],
        "one to all": [(0, i) for i in range(1, count)],
    }
    with hosts(count, rate=rate) as h:
        for case, pairs in cases.items():
            with h.watch() as use:
                got = h.throughput(pairs, seconds=seconds)
            of_rate = sum(got) / (1 if case in ("all to one", "one to all") else len(got)) / h.rate_bytes_per_s
            print(f"{rate:<8}  {case:<11}{of_rate:>7.1%} of the rate; {use}", flush=True)
            yield {"rate": rate, "case": case, "of_rate": of_rate, "bytes_per_s": got, **use.figures()}


if __name__ == "__main__":
    main()
