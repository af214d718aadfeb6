"""A worker's connection to one server: numbered requests, each answered once, sent again when the network lost them.

libzmq's own threads send and receive while the worker computes. What has arrived is taken when somebody waits, or by
the client's pump where links are networks.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket as net
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from torch import Tensor

from dtrain import errors
from dtrain.comm.base import dtype_name
from dtrain.errors import CommError, DtrainError, ProtocolError, Rewound, StateLost
from dtrain.ps import keys, lanes, sockets, wire
from dtrain.ps.wire import Answer, Message

log = logging.getLogger(__name__)

Take = Callable[[Answer, memoryview | None], None]
"""Gets the answer to a request, and its payload where the kind has one."""

_MOST_DAMAGED = 100
_NUDGE_S = 5.0
"""How long to wait for an answer over a network until the oldest request is sent again; the next time twice as long."""
_SUSPICIOUS_S = 1.0
"""An answer that comes so soon after that was perhaps lost before, and others with it."""


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What a worker says of itself to each server."""

    job_id: str
    rank: int
    world_size: int
    num_servers: int
    incarnation: int
    connect_timeout_s: float
    lanes: bool
    """Whether shared memory is wanted."""
    keys: Path | None
    """Directory of keys; None: no encryption."""


@dataclass
class _Asked:
    message: wire.Request
    payload: memoryview | None
    take: Take


class Link:
    """One connection, in one epoch of the job."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        server: int,
        joining: Joining,
        *,
        rewinds_to: int = 0,
    ) -> None:
        """Connect; `say_hello` goes on.

        Args:
            rewinds_to: the epoch after this one, where a lost server is replaced; else 0.

        Raises:
            ConnectError: nobody answers at the address.
            ProtocolError: something else answers.
            KeyRefused: it does not accept this side's key, or this side not its.
        """
        self.address = address
        self.server = server
        self.shares = False
        """Whether both ends see the same shared memory."""
        self.welcome: wire.Welcome | None = None
        self.damaged = 0
        """How many messages could not be read."""
        self._name = wire.new_name()
        self._joining = joining
        self.rewinds_to = rewinds_to
        self._who = f"the server at {address}"
        self.over_network = address.startswith("tcp://")
        """Whether the connection may break and come again."""
        self.far = sockets.is_far(address)
        """Whether it leads to another host, so that little should be under way at a time."""
        self.unread = True
        """Whether something may have come that `receive` has not taken: it was rung for, or has sent since."""
        self.unanswered_bytes = 0
        """Payloads of what was asked and is not answered."""
        self._asked: dict[int, _Asked] = {}
        self._next = 0
        self._window: deque[tuple[int, int]] = deque()  # (seq, bytes) that the server may still hold for us
        self._window_bytes = 0
        self._allowed_bytes = 0
        self._away_s: float | None = None
        self._failure: DtrainError | None = None
        self._probe: lanes.Probe | None = None
        self._hello: wire.Hello | None = None
        self._quiet_since = 0.0  # while requests are unanswered: the last answer, or the first request
        self._nudge_s = _NUDGE_S
        self._nudged: tuple[int, float] | None = None  # the request that was sent again, and when
        self.socket = sockets.make(context, zmq.DEALER)
        if joining.keys is not None:
            keys.secure(self.socket, keys.load(joining.keys, "worker"), "worker")
        self.watch = sockets.Watch(self.socket, address)
        self.socket.connect(address)

    def __str__(self) -> str:
        return self._who

    @property
    def failed(self) -> bool:
        """Whether this connection has ended."""
        return self._failure is not None

    def lost(self, error: DtrainError) -> DtrainError:
        """What the loss of a server means: the job is rewound, where losses are mended."""
        mended = type(error) in (CommError, StateLost) and self.rewinds_to
        return Rewound(f"the job is rewound: {error}", self.rewinds_to) if mended else error

    # -- joining ------------------------------------------------------------------------------------------------------

    def say_hello(self, epoch: int) -> None:
        """Wait for the connection, and ask to take part."""
        joining = self._joining
        self.watch.await_handshake(joining.connect_timeout_s)
        if joining.lanes and lanes.available():
            try:
                self._probe = lanes.Probe()
            except lanes.NoRoom as error:
                log.warning("%s", error)
        self._hello = wire.Hello(
            joining.job_id,
            joining.rank,
            joining.world_size,
            net.gethostname(),
            os.getpid(),
            int(min(joining.connect_timeout_s, 1e6) * 1000),
            epoch,
            joining.incarnation,
            self.server,
            joining.num_servers,
            self._probe.name if self._probe else "",
        )
        self._quiet_since = time.monotonic()
        self._put(self._hello, None)

    def _be_welcome(self, welcome: wire.Welcome) -> None:
        self.welcome = welcome
        self._who = f"the server at {self.address} (pid {welcome.pid} on {welcome.host})"
        if self._probe is not None:
            self.shares = self._probe.confirmed(welcome.token)
        self._end_probe()

    def _end_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def low(self) -> int:
        """All answers before this one have come."""
        return next(iter(self._asked), self._next)

    @property
    def has_credit(self) -> bool:
        """Whether more may be sent; else something has to be answered first."""
        limit = self._allowed_bytes + (0 if self.welcome is None else self.welcome.credit)
        return self._window_bytes + 2 * wire.PART_BYTES <= limit

    @property
    def made(self) -> int:
        """How many requests were made."""
        return self._next

    def unanswered_of(self, first: int) -> int:
        """Of `unanswered_bytes`, those of so many first requests."""
        if first <= self.low:
            return 0
        earlier = itertools.takewhile(lambda seq: seq < first, self._asked)
        payloads = (self._asked[seq].payload for seq in earlier)
        return sum(len(payload) for payload in payloads if payload is not None)

    def allow(self, nbytes: int) -> None:
        """More may be under way: the server has made room for so many bytes of parameters."""
        self._allowed_bytes += nbytes

    def ask(
        self, kind: Callable[..., wire.Request], *fields: object, take: Take, payload: Tensor | None = None
    ) -> None:
        """Send a request; `take` gets its answer, once, from a later call of `receive`.

        Args:
            kind: of `wire`'s requests; made of its number, what is answered, `fields`, and the payload's checksum.
            payload: flat; it must not change before the answer has come.
        """
        seq, self._next = self._next, self._next + 1
        data = None if payload is None else wire.bytes_of(payload)
        checksum: tuple[int, ...] = ()
        if data is not None:
            checksum = (wire.checksum_of(data) if self.over_network else 0,)
            self._window.append((seq, len(data)))
            self._window_bytes += len(data)
            self.unanswered_bytes += len(data)
        if not self._asked:
            self._quiet_since = time.monotonic()
        message = kind(seq, next(iter(self._asked), seq), *fields, *checksum)
        self._asked[seq] = _Asked(message, data, take)
        self._put(message, data)

    def _put(self, message: Message, payload: memoryview | None) -> None:
        self.unread = True
        sockets.say(self.socket, self._name, message, payload)  # where it cannot, `look` finds that the server is gone

    def _put_again(self) -> None:
        """Send everything that is unanswered once more; the server counts nothing twice."""
        if self.welcome is None and self._hello is not None:
            self._put(self._hello, None)
        for asked in list(self._asked.values()):
            self._put(asked.message, asked.payload)

    # -- what comes ---------------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take everything that has arrived; whether anything had.

        Raises:
            DtrainError: the server said that the job has failed, or something that it should not.
        """
        if self._failure is not None:
            raise self._failure
        found = False
        while sockets.has_one(self.socket):
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            found = True
            try:
                self._handle(frames)
            except wire.Damaged as error:
                self.damaged += 1
                if self.damaged > _MOST_DAMAGED:
                    self.fail(ProtocolError(f"{self._who} sent {error}, for the {self.damaged}th time"))
                self._put_again()
            except ProtocolError as error:
                self.fail(error if error is self._failure else ProtocolError(f"{self._who} sent {error}"))
        self.unread = False
        return found

    def notice(self, now: float) -> None:
        """Take note of what has become of the connection. The server knows a new one by what it hears there."""
        for event in self.watch.look():
            if event == "back":
                self._away_s = None
                if self.welcome is not None:
                    self._put(wire.Ping(), None)
                self._put_again()
            elif self._away_s is None:
                self._away_s = now

    def look(self, now: float, waits_for: str) -> None:
        """See what has become of the connection.

        Raises:
            CommError: it is gone for good.
        """
        self.notice(now)
        if self._away_s is None:
            self._nudge(now)
            return
        grace_s = sockets.GRACE_S if self.over_network else 0.0
        if now - self._away_s >= grace_s:
            self.receive()  # what came before the end, the reason for it perhaps
            text = f"worker {self._joining.rank}: {self._who} is gone while this worker waited for {waits_for}"
            self.fail(self.lost(CommError(text)))

    def _nudge(self, now: float) -> None:
        """Send the oldest request again after a long silence: a message can be lost though the connection is not."""
        if not self.over_network or now - self._quiet_since <= self._nudge_s:
            return
        if self._asked:
            seq, oldest = next(iter(self._asked.items()))
            self._put(oldest.message, oldest.payload)
            self._nudged = (seq, now)
        elif self.welcome is None and self._hello is not None:
            self._put(self._hello, None)
        else:
            return
        self._quiet_since = now
        self._nudge_s *= 2

    def fail(self, error: DtrainError) -> None:
        """Remember what has ended this connection, and raise it."""
        self._failure = error
        self.unread = True  # whoever takes what came next is to hear of it
        raise error

    def _handle(self, frames: list[zmq.Frame]) -> None:
        message = wire.decode(frames[0].bytes)
        payload = frames[1].buffer if len(frames) == 2 else None
        if isinstance(message, Answer):
            self._take(message, payload)
        elif isinstance(message, wire.Failed):
            says = f"{self._who}: " if self.welcome is None else ""
            self.fail(self.lost(error_of(message.kind, f"worker {self._joining.rank}: {says}{message.text}")))
        elif isinstance(message, wire.Welcome):
            self._be_welcome(message)
        elif isinstance(message, wire.Rewind):
            self.fail(Rewound(f"the job is rewound: {message.reason}", message.epoch))
        elif isinstance(message, wire.Again):
            self._put_again()
        elif not isinstance(message, wire.Ping):
            raise ProtocolError(f"{type(message).__name__} with {len(frames) - 1} payloads")

    def _take(self, answer: Answer, payload: memoryview | None) -> None:
        asked = self._asked.get(answer.seq)
        if asked is None:
            if answer.seq < self._next:
                return  # a second answer to what was sent twice
            raise ProtocolError(f"an answer to request {answer.seq}, which was not made")
        if payload is not None and isinstance(answer, wire.Sum | wire.Piece | wire.Squares):
            wire.check(payload, answer.checksum)
        elif isinstance(answer, wire.WITH_PAYLOAD):
            raise wire.Damaged(f"{type(answer).__name__} without its payload")
        asked.take(answer, payload)
        del self._asked[answer.seq]
        self.unanswered_bytes -= 0 if asked.payload is None else len(asked.payload)
        nudged, self._nudged = self._nudged, None
        self._quiet_since, self._nudge_s = time.monotonic(), _NUDGE_S
        if nudged is not None and nudged[0] == answer.seq and self._quiet_since - nudged[1] < _SUSPICIOUS_S:
            self._put_again()
        low = self.low
        while self._window and self._window[0][0] < low:
            self._window_bytes -= self._window.popleft()[1]

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self, bye: str | None) -> None:
        """Leave.

        Args:
            bye: what to say, "" being that all is well; None: nothing.
        """
        says = bye is not None and self._failure is None and self.watch.connected
        if says:
            try:
                says = sockets.say(self.socket, self._name, wire.Bye(wire.fitting(bye or "", 1000)))
            except zmq.ZMQError:
                says = False
        self._end_probe()
        self.watch.close()
        self.socket.close(linger=1000 if says else 0)
        self._asked.clear()


def copy_into(part: Tensor, answer: Answer, payload: memoryview | None, what: str) -> None:
    """Take the numbers that came with an answer.

    Raises:
        ProtocolError: there are none, or not as many.
    """
    if payload is None:
        raise ProtocolError(f"{type(answer).__name__} for {what}, without its payload")
    came = wire.tensor_of(payload, dtype_name(part.dtype))
    if came.numel() != part.numel():
        raise ProtocolError(f"{came.numel()} numbers for {what}, not {part.numel()}")
    part.copy_(came)


def error_of(kind: str, text: str) -> DtrainError:
    """The error that was told by its name; a CommError if this side does not know the name."""
    known = getattr(errors, kind, None) if kind in _TOLD else None
    made: DtrainError = known(text) if known is not None else CommError(text)
    return made


_TOLD = (
    *("ConnectError", "DataError", "Fenced", "Finished"),
    *("LayoutError", "ProtocolError", "StateLost", "UsageError"),
)
