"""The server's process: a ZeroMQ ROUTER and some threads around `Shard`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket as net
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import zmq
from torch import Tensor

from dtrain.comm.ordered import total
from dtrain.errors import CommError, DtrainError, ProtocolError, UsageError
from dtrain.processes import cores
from dtrain.ps import effects, lanes, metrics, sockets, wire
from dtrain.ps.effects import Effect, Forget, GiveUp, Map, SumUp, Tell
from dtrain.ps.holder import Holder
from dtrain.ps.link import error_of
from dtrain.ps.listener import Listener
from dtrain.ps.members import Send, Session, Terms
from dtrain.ps.placement import in_turn
from dtrain.ps.shard import Shard
from dtrain.ps.spans import Spans
from dtrain.ps.sums import Reduction
from dtrain.ps.tasks import Pool, Task
from dtrain.ps.wire import Done, Sum

log = logging.getLogger(__name__)

_TICK_S = 0.25
_PING_S = 1.0
_LAST_WORDS_S = 2.0
_FLOOD_S = 2.0
"""How long to read on before one that cannot be reached is given up: under a flood there is always more."""
_SLICE_S = 0.002
"""How long the server works on sums between two looks at its socket."""
_AT_ONCE_BYTES = 64 * 2**10
_MOST_AT_ONCE = 256
_SEND_QUEUE = 4096
"""Messages that may wait for a peer that does not read."""


@dataclass
class _Job:
    """Work for the threads, and what follows when it is done."""

    start: Callable[[], Task]
    then: Callable[[], None]
    task: Task | None = None


class Server:
    """One server: adds what workers send, in worker order, and answers with the sum; or updates parameters itself."""

    def __init__(
        self,
        address: str,
        terms: Terms | Callable[[str], Terms],
        *,
        threads: int | None = None,
        keys: Path | None = None,
        insecure_no_encryption: bool = False,
        give_up: Callable[[int, bool], None] | None = None,
    ) -> None:
        """Bind.

        Args:
            address: `ipc:///path` or `tcp://host:port`; port 0 takes a free one, see `address` afterwards.
            terms: what it is told; or what gives them, called with the address at which it listens by then.
            threads: that work on sums; by default all cores that this process may use, shared out between servers.
            keys: directory of CURVE keys, see `dtrain keys`; None: no encryption.
            give_up: called with the pid of a worker that is alive and makes no progress, and True; and with False when
                it has joined again.

        Raises:
            UsageError: the address cannot be used or is taken.
        """
        self._tell = give_up
        self._given_up: set[int] = set()
        self._listener = Listener(
            address,
            keys=keys,
            insecure_no_encryption=insecure_no_encryption,
            send_queue=_SEND_QUEUE,
            servers_too=True,  # a server's host has no worker's key, and asks how it is: `dtrain health`
        )
        self.address = self._listener.address
        if not isinstance(terms, Terms):
            try:
                terms = terms(self.address)
            except BaseException:
                self._listener.close()
                raise
        over_network = self.address.startswith("tcp://")
        self._checksums = over_network
        grace_s = sockets.GRACE_S if over_network else 0.0
        terms = replace(terms, host=net.gethostname(), pid=os.getpid(), grace_s=grace_s)
        self.terms = terms
        self._shard = Shard(terms, time.monotonic())
        self._listener.is_member = lambda session: self._shard.members.get(session) is not None
        self._pool = Pool(threads or max(1, cores() // terms.num_servers))
        self._holder: Holder | None = None
        self._segments: dict[tuple[Session, int], lanes.Segment] = {}
        self._jobs: deque[_Job] = deque()
        self._saved: dict[int, bytes] = {}
        self._spans = Spans()
        self._lives = 0  # epochs that have ended here
        self._unreached: dict[Session, float] = {}  # since when messages could not be sent there
        self._counts: Counter[str] = Counter()
        self._stopped = False

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until all workers have left, or until `stop`.

        Raises:
            DtrainError: the job failed; the workers have been told the same.
        """
        torch.set_num_threads(1)  # the pool's threads each do their own piece
        ping_at = tick_at = 0.0
        end_at = float("inf")
        members = self._shard.members
        while not self._stopped and not members.finished and time.monotonic() < end_at:
            if self._listener.poll(0.0 if self._jobs else _TICK_S):
                self._drain()
            self._work()
            now = time.monotonic()
            if now >= tick_at:
                self._act(self._shard.tick(now))
                self._look_for_the_given_up()
                tick_at = now + _TICK_S
            if now >= ping_at and not members.failed:
                self._act([Send(m.session, wire.Ping()) for m in members.present])
                ping_at = now + _PING_S
            self._look_for_the_unreached(now)
            if members.failed and end_at == float("inf"):
                end_at = now + _LAST_WORDS_S
        if members.failed:
            raise error_of(members.failed.kind, members.failed.text)

    def stop(self) -> None:
        """Make `run` return soon; may be called from another thread, or from a signal's handler."""
        self._stopped = True

    def figures(self) -> dict[str, float]:
        """What `ps.metrics` tells; may be called from another thread."""
        members, held = self._shard.members, self._shard.store
        now = {"workers": len(members.present), "epoch": members.epoch, "waiting_tasks": len(self._jobs)}
        steps = 0 if held is None else held.version
        return {**now, "steps": steps, **{n: self._counts[n] for n in metrics.MEANINGS if n not in (*now, "steps")}}

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._pool.close()
        self._jobs.clear()
        self._segments.clear()
        self._listener.close()

    def _drain(self) -> None:
        """Take what has arrived, up to a bound, so that work and time-outs keep being looked at."""
        deadline = time.monotonic() + _SLICE_S
        for _ in range(_MOST_AT_ONCE):
            if self._jobs and time.monotonic() > deadline:
                return
            if not self._listener.has_one:
                return
            came = self._listener.receive()
            if came is None:
                continue
            if not self._knows(came.session):
                self._listener.refuse(came.route)  # a few times too often: who joins says little before
            if came.error is None:
                self._act(self._handle(came.session, came.frames))
            else:
                self._act(self._refuse(came.session, came.error))

    def _knows(self, session: Session) -> bool:
        return self._shard.members.get(session) is not None and not self._shard.members.failed

    def _handle(self, session: Session, frames: list[zmq.Frame]) -> Sequence[Effect]:
        known = self._knows(session)
        try:
            if not 1 <= len(frames) <= 2:
                raise ProtocolError(f"a message of {len(frames)} frames")
            if len(frames[0]) > wire.MAX_HEADER_BYTES:
                raise ProtocolError(f"a header of {len(frames[0])} bytes")
            message = wire.decode(frames[0].bytes)
            if (len(frames) == 2) != isinstance(message, wire.WITH_PAYLOAD):
                raise ProtocolError(f"{type(message).__name__} with {len(frames) - 1} payloads")
            payload = self._payload(session, message, frames[1].buffer if len(frames) == 2 else None) if known else None
            if isinstance(message, wire.Hello):
                if self._listener.is_servers(frames[0]):
                    raise ProtocolError("a worker that comes with the servers' key: give it the worker's")
                message = replace(message, probe=lanes.answer(message.probe) if message.probe else "")
        except ProtocolError as error:
            return self._refuse(session, error)
        self._count(payload, message)
        self._note(session, message)
        return self._shard.receive(session, message, payload, time.monotonic())

    def _refuse(self, session: Session, error: ProtocolError) -> Sequence[Effect]:
        known = self._knows(session)
        self._counts["refused_messages"] += 1
        self._listener.warn(error, known=known)
        return self._shard.refuse(session, error if known else ProtocolError(str(error)))

    def _count(self, payload: Tensor | None, message: wire.Message) -> None:
        if payload is not None:
            shared = not isinstance(message, wire.WITH_PAYLOAD)
            self._counts["shared_bytes" if shared else "received_bytes"] += payload.nbytes

    def _note(self, session: Session, message: wire.Message) -> None:
        """Remember when the parts of a round came."""
        member = self._shard.members.get(session)
        if member is None:
            return
        if isinstance(message, wire.Add | wire.AddShared):
            self._spans.came(message.key, message.call, member.rank)
        elif isinstance(message, wire.Push | wire.PushShared) and self._shard.meets:
            self._spans.came(f"gradient/{message.bucket}", message.step, member.rank)

    def _payload(self, session: Session, message: wire.Message, data: memoryview | None) -> Tensor | None:
        """The numbers that a message brings, or that lie where it says."""
        if data is not None:
            checksum = getattr(message, "checksum", 0)
            wire.check(data, checksum)
            if isinstance(message, wire.Push):
                return wire.tensor_of(data, self._held_dtype(message.bucket))
            return wire.tensor_of(data, message.dtype if isinstance(message, wire.Add) else "uint8")
        if isinstance(message, wire.AddShared):
            if message.dtype not in wire.DTYPE_NAMES:
                raise ProtocolError(f"a tensor of unknown type {message.dtype!r:.20}")
            dtype = wire.DTYPE_NAMES[message.dtype]
            return self._segment(session, message.segment).view(dtype, message.offset, message.numel)
        if isinstance(message, wire.PushShared):
            return self._shared_view(session, message.bucket, message.segment, message.offset)
        if isinstance(message, wire.PullShared):
            self._shared_view(session, message.bucket, message.segment, message.offset)  # it must exist
        return None

    def _shared_view(self, session: Session, bucket: int, segment: int, offset: int) -> Tensor:
        dtype = wire.DTYPE_NAMES[self._held_dtype(bucket)]
        assert self._shard.store is not None  # noqa: S101
        numel = self._shard.store.nbytes_of(bucket) // dtype.itemsize
        return self._segment(session, segment).view(dtype, offset, numel)

    def _held_dtype(self, bucket: int) -> str:
        if self._shard.store is None:
            raise ProtocolError(f"bucket {bucket}, before the parameters were described")
        return self._shard.store.dtype_of(bucket)

    def _segment(self, session: Session, number: int) -> lanes.Segment:
        found = self._segments.get((session, number))
        if found is None:
            raise ProtocolError(f"segment {number}, which was not shared")
        return found

    # -- what follows -------------------------------------------------------------------------------------------------

    def _act(self, wanted: Sequence[Effect]) -> None:
        life = self._lives
        for effect in wanted:
            if isinstance(effect, Send):
                self._send(effect)
            elif life != self._lives and not isinstance(effect, Forget):
                continue  # one before it has ended the epoch that this belongs to
            elif isinstance(effect, SumUp):
                self._sum_up(effect)
            elif isinstance(effect, Map):
                self._map(effect)
            elif isinstance(effect, Tell):
                told = torch.frombuffer(bytearray(self._spans.encode()), dtype=torch.uint8)
                self._act(self._shard.answer(effect.session, wire.Piece(effect.seq, 1, 0), told))
            elif isinstance(effect, Forget):
                self._forget(effect)
            elif isinstance(effect, GiveUp):
                self._give_up(effect.pid)
            else:
                try:
                    self._hold(effect)
                except _Forgotten:
                    return
                except Exception as error:
                    self._break(error)

    def _give_up(self, pid: int) -> None:
        self._given_up.add(pid)
        if self._tell is not None:
            self._tell(pid, True)

    def _look_for_the_given_up(self) -> None:
        """Say so if one has come again."""
        for pid in self._given_up & {m.hello.pid for m in self._shard.members.present}:
            self._given_up.remove(pid)
            if self._tell is not None:
                self._tell(pid, False)

    def _break(self, error: Exception) -> None:
        """What workers have asked for cannot be done: they are told, and the job is over."""
        if not isinstance(error, DtrainError):
            log.error("this server cannot go on", exc_info=error)
            error = CommError(f"the server (pid {os.getpid()}) failed with {type(error).__name__}: {error}")
        self._act(self._shard.fail(error))

    def _send(self, send: Send) -> None:
        message = send.message
        frames: list[bytes | memoryview] = []
        if send.payload is not None:
            payload = wire.bytes_of(send.payload)
            self._counts["sent_bytes"] += len(payload)
            if self._checksums and isinstance(message, Sum | wire.Piece | wire.Squares) and not message.checksum:
                message = replace(message, checksum=wire.checksum_of(payload))
            frames = [payload]
        if self._listener.send(send.to, [wire.encode(message), *frames]):
            self._shard.back(send.to)
        else:
            self._unreached.setdefault(send.to, time.monotonic())

    def _look_for_the_unreached(self, now: float) -> None:
        """Say who is gone, once all that came from there has been read, its farewell perhaps."""
        if not self._unreached or (self._listener.has_one and now - min(self._unreached.values()) < _FLOOD_S):
            return
        unreached, self._unreached = self._unreached, {}
        for session in unreached:
            if self._listener.send(session, [wire.encode(wire.Ping())]):
                self._shard.back(session)  # by a new connection
            else:
                self._act(self._shard.away(session, now))

    def _map(self, effect: Map) -> None:
        session, request = effect.session, effect.request
        try:
            if isinstance(request, wire.Share):
                known = [s for s in self._segments.values() if (s.name, s.nbytes) == (request.name, request.nbytes)]
                made = known[0] if known else lanes.Segment.open(request.name, request.nbytes)
                self._segments[session, request.segment] = made
            else:
                self._segments.pop((session, request.segment), None)
        except lanes.Gone:
            return  # the worker was told meanwhile, by another server, that the job has failed or is rewound
        except DtrainError as error:
            self._act(self._shard.refuse(session, error))
            return
        self._act(self._shard.answer(session, Done(request.seq)))

    def _forget(self, effect: Forget) -> None:
        """Sessions are over, or all are: an epoch has ended, and with it all that was under way."""
        if not effect.sessions:
            self._lives += 1
            for job in self._jobs:
                if job.task is not None:
                    with contextlib.suppress(Exception):  # nobody wants it any more
                        job.task.finish()
            self._jobs.clear()
            self._segments.clear()
            self._holder = None
            self._saved.clear()
            self._spans = Spans()  # rounds are numbered anew
            return
        for key in [k for k in self._segments if k[0] in effect.sessions]:
            del self._segments[key]

    # -- work for the threads -----------------------------------------------------------------------------------------

    def _add_job(self, start: Callable[[], Task], then: Callable[[], None]) -> None:
        self._jobs.append(_Job(start, then))

    def _work(self) -> None:
        """Go on with the oldest work, for a short while."""
        deadline = time.monotonic() + _SLICE_S
        while self._jobs and (left_s := deadline - time.monotonic()) > 0:
            job = self._jobs[0]
            try:
                if job.task is None:
                    job.task = job.start()
                if not job.task.advance(left_s):
                    return
                self._jobs.popleft()
                job.then()
            except _Forgotten:
                if self._jobs and self._jobs[0] is job:
                    self._jobs.popleft()
            except Exception as error:
                self._break(error)

    def _sum_up(self, effect: SumUp) -> None:
        """Sum in worker order, where the workers see it or into a message; a small tensor at once."""
        parts = [part.payload for _, part in effect.parts]
        shared = [part.payload for _, part in effect.parts if part.shared]
        outputs = shared or [torch.empty_like(parts[0])]

        def answer() -> None:
            self._counts["rounds"] += 1
            self._spans.done(*effect.parts[0][1].round)
            by_socket = len(shared) < len(effect.parts)
            checksum = wire.checksum_of(wire.bytes_of(outputs[0])) if self._checksums and by_socket else 0
            for session, part in in_turn(effect.parts, self.terms.server):
                if part.shared and part.ends_request():
                    self._act(self._shard.answer(session, Done(part.seq)))
                elif not part.shared:
                    payload = outputs[0] if not shared else outputs[0].clone()
                    self._act(self._shard.answer(session, Sum(part.seq, checksum), payload))

        if parts[0].nbytes <= _AT_ONCE_BYTES:
            sum_ = total(parts)
            for output in outputs:
                output.copy_(sum_)
            answer()
        else:
            self._add_job(lambda: Reduction(parts, outputs, pool=self._pool), answer)

    # -- parameters that live here ------------------------------------------------------------------------------------

    def _hold(self, work: effects.StoreWork) -> None:
        if isinstance(work, effects.Reply):
            self._add_job(_nothing, lambda: self._act(self._shard.answer_rank(work.rank, work.answer)))
        elif isinstance(work, effects.Build):
            _check_memory(work.layout.nbytes)
            self._holder = Holder(work.layout, self._pool)
            for rank, seq in work.asked:
                self._act(self._shard.answer_rank(rank, Done(seq)))
        elif isinstance(work, effects.Load):
            data = b"".join(part.numpy().tobytes() for part in work.parts)
            self._held.load(data)
            self._act(self._shard.answer_rank(work.asked[0], Done(work.asked[1])))
        elif isinstance(work, effects.Save):
            self._add_job(_nothing, lambda: self._save(work.rank, work.request))
        elif isinstance(work, effects.Measure):
            self._add_job(lambda: self._held.measure(work.gradients, work.factor), lambda: None)
        elif isinstance(work, effects.Direct):
            self._add_job(lambda: self._held.direct(work), lambda: None)
        elif isinstance(work, effects.TellSquares):
            self._add_job(_nothing, lambda: self._tell_squares(work.asked))
        elif isinstance(work, effects.Update):
            self._update(work)
        else:
            self._add_job(_nothing, lambda: self._give(work.rank, work.request))

    @property
    def _held(self) -> Holder:
        if self._holder is None:
            raise _Forgotten
        return self._holder

    def _update(self, work: effects.Update) -> None:
        present = {member.rank for member in self._shard.members.present}
        shared = [(r, pull) for r, pull in work.pulls if isinstance(pull, wire.PullShared) and r in present]
        others = [(r, pull) for r, pull in work.pulls if isinstance(pull, wire.Pull)]
        places = [self._place(rank, pull) for rank, pull in shared]
        common = len({place.data_ptr() for place in places}) == 1 and len(places) == self.terms.world_size > 1
        outputs = [] if common else places

        def start() -> Task:
            if common:
                self._held.settle(work.bucket, places[0])
            return self._held.update(work, outputs)

        def then() -> None:
            self._spans.done(f"gradient/{work.bucket}")
            for gradient in work.gradients:
                for seq in gradient.asked:
                    self._act(self._shard.answer_rank(gradient.rank, Done(seq)))
            for rank, written in shared:
                self._held.pulled(rank, written.bucket)
                self._act(self._shard.answer_rank(rank, Done(written.seq)))
            for rank, pull in others:
                self._give(rank, pull)

        self._add_job(start, then)

    def _place(self, rank: int, pull: wire.PullShared) -> Tensor:
        return self._shared_view(self._session_of(rank), pull.bucket, pull.segment, pull.offset)

    def _give(self, rank: int, pull: wire.Pull | wire.PullShared) -> None:
        if not self._session_of(rank):
            return  # it has been lost since
        values = self._held.values(pull.bucket)
        self._held.pulled(rank, pull.bucket)
        if isinstance(pull, wire.PullShared):
            place = self._place(rank, pull)
            if place.data_ptr() == values.data_ptr():
                pass  # it reads them where they are
            elif self._is_everyones(rank, pull):
                self._held.settle(pull.bucket, place)
            else:
                place.copy_(values)
            self._act(self._shard.answer_rank(rank, Done(pull.seq)))
            return
        most = wire.PART_BYTES // values.element_size()
        part = values[pull.part * most : (pull.part + 1) * most].clone()
        self._act(self._shard.answer_rank(rank, Sum(pull.seq, 0), part))

    def _is_everyones(self, rank: int, pull: wire.PullShared) -> bool:
        """Whether all workers read the memory that a worker wants to have parameters in."""
        segment = self._segment(self._session_of(rank), pull.segment)
        return sum(other is segment for other in self._segments.values()) == self.terms.world_size > 1

    def _tell_squares(self, asked: effects.Asked) -> None:
        payload = self._held.measured().view(torch.uint8)
        self._act(self._shard.answer_rank(asked[0], wire.Squares(asked[1], 0), payload))

    def _save(self, rank: int, request: wire.Fetch) -> None:
        if request.part == 0:
            self._saved[rank] = self._held.save()
        data = self._saved.get(rank, b"")
        parts = max(1, -(-len(data) // wire.PART_BYTES))
        piece = data[request.part * wire.PART_BYTES : (request.part + 1) * wire.PART_BYTES]
        if not piece:
            self._act(self._shard.refuse(self._session_of(rank), ProtocolError(f"no part {request.part} of {parts}")))
            return
        if request.part == parts - 1:
            self._saved.pop(rank)
        payload = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        self._act(self._shard.answer_rank(rank, wire.Piece(request.seq, parts, 0), payload))

    def _session_of(self, rank: int) -> Session:
        """Of a worker that is here; else empty."""
        member = self._shard.members.of_rank(rank)
        return b"" if member is None or member.left is not None else member.session


def _check_memory(nbytes: int) -> None:
    """Refuse parameters that this host has no memory for: the kernel would end the server when it first uses it."""
    left = psutil.virtual_memory().available
    if nbytes > left:
        raise UsageError(
            f"parameters of {nbytes / 2**20:.0f} MiB for this server, and its host has {left / 2**20:.0f} MiB left: "
            "start more servers, on more hosts"
        )


class _Forgotten(Exception):
    """An epoch ended, because an answer showed that somebody was gone, while what it had asked for was being done."""


def _nothing() -> Task:
    return Task(0, lambda _: None)
