"""The scheduler: where the servers and workers of one job find one another, and nothing more.

Servers tell it where they listen and are given their numbers; whoever asks is told of all servers when all have come.
No step needs it: when everyone has asked, it may end.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from urllib.parse import urlparse

import zmq

from dtrain.errors import ConnectError, DtrainError, ProtocolError, UsageError
from dtrain.ps import keys as curve
from dtrain.ps import sockets, wire
from dtrain.ps.link import error_of
from dtrain.ps.listener import Listener
from dtrain.ps.members import Send, Session, refusal
from dtrain.ps.visit import visiting
from dtrain.ps.wire import Failed, Hello, Located, Lookup, Message, Numbered, Register

MOST_SERVERS = 1000
_MOST_WAITING = 10_000
_TICK_S = 0.25
_MARGIN_S = 1.0
_MOST_AT_ONCE = 256
_QUEUE = 4096
_PLAIN = re.compile(r"ipc:///[^,\s]+|tcp://(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d+", re.ASCII)


class Roll:
    """Who has registered and who waits. No socket and no clock."""

    def __init__(self, num_servers: int, num_workers: int, *, job_id: str, host_only: bool) -> None:
        self._num_servers = num_servers
        self._num_workers = num_workers
        self._job_id = job_id
        self._host_only = host_only  # whether servers must be on this host
        self._servers: dict[int, str] = {}
        self._waiting: dict[Session, float] = {}  # who has asked -> until when it waits
        self._told: set[Session] = set()

    @property
    def finished(self) -> bool:
        """Whether all servers are here and all workers have asked."""
        return self._complete and len(self._told) >= self._num_workers

    @property
    def missing(self) -> str:
        """Who has not come."""
        here = [f"server {n} at {a}" for n, a in sorted(self._servers.items())]
        if not self._complete:
            absent = ", ".join(str(n) for n in range(self._num_servers) if n not in self._servers)
            there = f"; here: {', '.join(here)}" if here else ""
            return f"{len(here)} of {self._num_servers} servers have registered; missing: server {absent}{there}"
        return f"{len(self._told)} of {self._num_workers} workers have asked for the servers"

    def waits(self, session: Session) -> bool:
        """Whether it is to be told of the servers yet."""
        return session in self._waiting

    @property
    def _complete(self) -> bool:
        return len(self._servers) == self._num_servers

    def receive(self, session: Session, message: Message, now: float, *, is_worker: bool = False) -> list[Send]:
        """What follows from a message.

        Args:
            is_worker: whether its key says that a worker has sent it.

        Raises:
            UsageError: it cannot be granted.
            ProtocolError: it belongs elsewhere.
        """
        if isinstance(message, Register):
            if is_worker:
                raise UsageError("a worker's key cannot register a server: give the server the folder of its own keys")
            return self._register(session, message)
        if isinstance(message, Lookup):
            return self._look_up(session, message, now)
        if isinstance(message, Hello):
            raise UsageError(
                f"this is the job's scheduler, and worker {message.rank} takes it for a server: set DTRAIN_SCHEDULER, "
                f"or DMLC_NUM_SERVER={self._num_servers} beside DMLC_PS_ROOT_URI"
            )
        raise ProtocolError(f"{type(message).__name__}, which nobody sends to a scheduler")

    def late(self, now: float) -> list[Send]:
        """Tell those whose patience is over."""
        tired = [session for session, until_s in self._waiting.items() if now >= until_s]
        return self._give_up(tired, "in the time that it was given")

    def end(self, timeout_s: float) -> tuple[DtrainError, list[Send]]:
        """Not all have come in time: the error, and those that are to be told."""
        within = f"within {timeout_s:g} s"
        return ConnectError(f"{within}, {self.missing}"), self._give_up(list(self._waiting), within)

    def _give_up(self, sessions: Sequence[Session], within: str) -> list[Send]:
        for session in sessions:
            del self._waiting[session]
        return [refusal(session, ConnectError(f"{within}, {self.missing}")) for session in sessions]

    def _register(self, session: Session, asked: Register) -> list[Send]:
        who = f"the server at {asked.address:.200}"
        self._check(who, asked.job_id)
        self._check_address(asked.address)
        number = asked.wanted - 1
        held = next((n for n, address in self._servers.items() if address == asked.address), None)
        if number >= self._num_servers:
            raise UsageError(f"{who} wants to be server {number} of {self._num_servers}: they count from 0")
        if held is not None and number in (-1, held):  # it asks again, or has been started again
            return [Send(session, Numbered(held, self._num_servers))]
        if held is not None:
            raise UsageError(f"{who} wants to be server {number}, and is server {held}: give it one number, or none")
        if number in self._servers:
            raise UsageError(
                f"{who} wants to be server {number}, and so does the one at {self._servers[number]}: give each its own "
                "number, or none"
            )
        if self._complete:
            raise UsageError(
                f"{who} is one too many: all {self._num_servers} have registered; tell the scheduler of more servers "
                "(--servers, DMLC_NUM_SERVER), or start fewer"
            )
        if number < 0:
            number = next(n for n in range(self._num_servers) if n not in self._servers)
        self._servers[number] = asked.address
        sends = [Send(session, Numbered(number, self._num_servers))]
        if self._complete:
            waiting, self._waiting = self._waiting, {}
            sends += [send for other in waiting for send in self._tell(other)]
        return sends

    def _look_up(self, session: Session, asked: Lookup, now: float) -> list[Send]:
        self._check("the one that asks", asked.job_id)
        if self._complete:
            return self._tell(session)
        if len(self._waiting) >= _MOST_WAITING and session not in self._waiting:
            raise UsageError(f"{_MOST_WAITING} wait for the servers already: no room for more")
        self._waiting.setdefault(session, now + asked.patience_ms / 1000)
        return []

    def _tell(self, session: Session) -> list[Send]:
        if len(self._told) < self._num_workers:
            self._told.add(session)
        return [Send(session, Located(n, self._num_servers, a)) for n, a in sorted(self._servers.items())]

    def _check(self, who: str, job_id: str) -> None:
        if self._job_id and job_id and not hmac.compare_digest(job_id.encode(), self._job_id.encode()):
            raise UsageError(f"{who} belongs to another job than this scheduler")

    def _check_address(self, address: str) -> None:
        _check_told(address)
        host = urlparse(address).hostname or "localhost"
        if self._host_only and host != "localhost" and not _is(host, "is_loopback"):  # names are not looked up here
            raise UsageError(
                f"the server at {address} is not on this host, and this scheduler has no keys: give it --keys, or say "
                "--insecure-no-encryption on a network that you trust"
            )


class Scheduler:
    """Listens at an address, for the servers and the workers of one job."""

    def __init__(
        self,
        address: str,
        num_servers: int,
        *,
        num_workers: int = 1,
        keys: Path | None = None,
        insecure_no_encryption: bool = False,
        job_id: str = "",
        timeout_s: float = 60.0,
        idle_s: float = 10.0,
    ) -> None:
        """Bind.

        Args:
            address: `ipc:///path` or `tcp://host:port`; port 0 takes a free one, see `address` afterwards.
            num_workers: how many are to ask before it may end.
            keys: directory of the servers' CURVE keys; None: no encryption.
            job_id: refuse processes of another job; empty: take any.
            timeout_s: longest wait for all servers to register and all workers to ask.
            idle_s: how long it stays after the last message, for those that come again.

        Raises:
            UsageError: the address cannot be used or is taken.
        """
        if not 1 <= num_servers <= MOST_SERVERS or num_workers < 1:
            raise UsageError(f"servers is {num_servers}, workers {num_workers}: 1 to {MOST_SERVERS}, and 1 or more")
        if not (timeout_s > 0 and idle_s >= 0):
            raise UsageError(f"timeout_s is {timeout_s}, idle_s {idle_s}: give seconds, more than 0")
        self._listener = Listener(
            address,
            keys=keys,
            insecure_no_encryption=insecure_no_encryption,
            send_queue=_QUEUE,
            servers_too=True,
        )
        self.address = self._listener.address
        host_only = keys is None and not insecure_no_encryption
        self._roll = Roll(num_servers, num_workers, job_id=job_id, host_only=host_only)
        self._listener.is_member = self._roll.waits
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._stopped = False

    def run(self) -> None:
        """Serve until everyone has asked and nobody comes again, or until `stop`.

        Raises:
            ConnectError: not all came in time; those that wait are told the same.
        """
        began = heard = time.monotonic()
        while not self._stopped:
            came = self._listener.poll(min(_TICK_S, self._idle_s or _TICK_S)) and self._drain()
            now = time.monotonic()
            heard = now if came else heard
            self._send(self._roll.late(now))
            if self._roll.finished:
                if now - heard >= self._idle_s:
                    return
            elif now - began >= self._timeout_s:
                error, sends = self._roll.end(self._timeout_s)
                self._send(sends)
                raise error

    def stop(self) -> None:
        """Make `run` return soon; may be called from another thread, or from a signal's handler."""
        self._stopped = True

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._listener.close()

    def _drain(self) -> bool:
        """Take what has arrived, up to a bound; whether any of it could be meant."""
        meant = False
        for _ in range(_MOST_AT_ONCE):
            if not self._listener.has_one:
                break
            came = self._listener.receive()
            if came is None:
                continue
            try:
                if came.error is not None:
                    raise came.error
                self._send(self._handle(came.session, came.frames))
                meant = True
            except (UsageError, ProtocolError) as error:
                self._listener.warn(error)
                self._listener.refuse(came.route)
                told = ProtocolError(str(error)) if isinstance(error, wire.Damaged) else error
                self._send([refusal(came.session, told)])
        return meant

    def _handle(self, session: Session, frames: list[zmq.Frame]) -> list[Send]:
        if len(frames) != 1:
            raise ProtocolError(f"a message of {len(frames)} frames; a scheduler takes one")
        if len(frames[0]) > wire.MAX_HEADER_BYTES:
            raise ProtocolError(f"a header of {len(frames[0])} bytes")
        is_worker = self._listener.pair is not None and not self._listener.is_servers(frames[0])
        return self._roll.receive(session, wire.decode(frames[0].bytes), time.monotonic(), is_worker=is_worker)

    def _send(self, sends: Sequence[Send]) -> None:
        for send in sends:
            self._listener.send(send.to, [wire.encode(send.message)])  # unless it has gone, or does not read


# -- the other side ---------------------------------------------------------------------------------------------------


def register(
    scheduler: str,
    address: str,
    *,
    wanted: int | None = None,
    job_id: str = "",
    keys: Path | None = None,
    timeout_s: float = 30.0,
) -> tuple[int, int]:
    """Tell the scheduler where this server listens; gives its number and how many servers there are.

    Args:
        wanted: the number that it is to have; None: the next one.
        keys: directory of the servers' CURVE keys; None: no encryption.

    Raises:
        ConnectError: no scheduler answers in time.
        ProtocolError: something else does.
        UsageError: there are enough servers, another has the number, or it is another job's scheduler.
    """
    pair = None if keys is None else curve.among_servers(curve.load(keys, "server"))
    message = Register(job_id, wire.fitting(address), 0 if wanted is None else wanted + 1)
    with contextlib.closing(_answers(scheduler, lambda _: message, pair, timeout_s)) as answers:
        for answer in answers:
            if not isinstance(answer, Numbered) or answer.server >= answer.num_servers:
                raise ProtocolError(f"the scheduler at {scheduler} answered a registration with {answer}")
            return answer.server, answer.num_servers
    raise AssertionError("answers do not end")


def lookup(scheduler: str, *, job_id: str = "", keys: Path | None = None, timeout_s: float = 30.0) -> list[str]:
    """Where the servers listen, in the order of their numbers; waits until all have registered.

    Args:
        keys: directory of the workers' CURVE keys; None: no encryption.

    Raises:
        ConnectError: no scheduler answers, or some servers have not registered in time.
        ProtocolError: something else answers.
        KeyRefused: the keys do not fit together.
        UsageError: it is another job's scheduler.
    """
    pair = None if keys is None else curve.load(keys, "worker")
    found: dict[int, str] = {}

    def message(left_s: float) -> Message:
        return Lookup(job_id, int(min(max(left_s, 0.0), 1e6) * 1000))

    with contextlib.closing(_answers(scheduler, message, pair, timeout_s)) as answers:
        for answer in answers:
            if not isinstance(answer, Located) or not answer.server < answer.num_servers <= MOST_SERVERS:
                raise ProtocolError(f"the scheduler at {scheduler} answered a look-up with {answer}")
            try:
                _check_told(answer.address)
            except UsageError as error:
                raise ProtocolError(f"the scheduler at {scheduler} names server {answer.server}: {error}") from error
            found[answer.server] = answer.address
            if len(found) == answer.num_servers:
                break
    return [address for _, address in sorted(found.items())]


def _answers(
    scheduler: str, message: Callable[[float], Message], pair: curve.Keys | None, timeout_s: float
) -> Generator[Message]:
    """What the scheduler says to a message, which is told how many seconds are left; without end."""
    sockets.check_address(scheduler, insecure_no_encryption=True)
    if scheduler.startswith("tcp://") and scheduler.endswith(":0"):
        raise UsageError(f"scheduler is {scheduler!r}: give the port that it says it listens at")
    who = f"the scheduler at {scheduler}"
    deadline = time.monotonic() + timeout_s
    with visiting(scheduler, pair, "scheduler") as visit:
        socket, watch = visit.socket, visit.watch
        watch.await_handshake(timeout_s)
        visit.say(message(deadline - time.monotonic()))
        grace_s = sockets.GRACE_S if scheduler.startswith("tcp://") else 0.0
        away_s: float | None = None
        while (now := time.monotonic()) < deadline + _MARGIN_S:
            if socket.poll(50):
                yield _read(socket.recv_multipart(), who, scheduler)
                continue
            for event in watch.look():
                if event == "back":
                    away_s = None
                    visit.say(message(deadline - now))
                elif away_s is None:
                    away_s = now
            if away_s is not None and now - away_s >= grace_s and not socket.poll(0):
                raise ConnectError(f"{who} is gone, before it has told of all servers: start the job again")
        raise ConnectError(f"{who} said nothing for {timeout_s + _MARGIN_S:g} s: is it the job's scheduler?")


def _read(frames: list[bytes], who: str, scheduler: str) -> Message:
    try:
        if len(frames) != 1:
            raise ProtocolError(f"a message of {len(frames)} frames")
        answer = wire.decode(frames[0])
    except ProtocolError as error:
        raise ProtocolError(f"{who} sent {error}") from error
    if isinstance(answer, Failed):
        if answer.kind == "StateLost":  # only servers say that
            raise UsageError(f"{scheduler} is a server and no scheduler: name it as DTRAIN_SERVERS, or server=")
        raise error_of(answer.kind, f"{who}: {answer.text}")
    return answer


def _check_told(address: str) -> None:
    """Refuse an address that others cannot connect to."""
    sockets.check_address(address, insecure_no_encryption=True)
    url = urlparse(address)
    nowhere = url.scheme == "tcp" and (not url.port or _is(url.hostname or "", "is_unspecified"))
    if nowhere or not _PLAIN.fullmatch(address):
        raise UsageError(f"server address is {address!r:.200}, where nobody can connect: give tcp://host:port")


def _is(host: str, what: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host), what))
    except ValueError:
        return False
