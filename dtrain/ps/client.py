"""The worker's end of the parameter server: a Backend whose tensors are summed by servers, each a part of them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import zmq
from torch import Tensor
from torch.nn import Parameter

from dtrain.comm import collectives, parts
from dtrain.comm.base import Span, Traffic, Work, check_flat, dtype_name
from dtrain.comm.hosts import HostedBucket, ServerUpdate
from dtrain.errors import CommError, ConnectError, Preempted, ProtocolError, Rewound, UsageError
from dtrain.ps import board, sockets, spans, wire
from dtrain.ps import lanes as lanes_
from dtrain.ps.bells import Bells
from dtrain.ps.hosting import Hosting
from dtrain.ps.link import Joining, Link, copy_into
from dtrain.ps.memory import Buffers, Common, Place, Staging, bytes_as, size_class
from dtrain.ps.outbox import Outbox, learn_part_bytes, window_bytes
from dtrain.ps.placement import Range, in_turn, split_even
from dtrain.ps.pump import Pump
from dtrain.ps.staging import DeviceCopy, pinned
from dtrain.ps.wire import Answer

log = logging.getLogger(__name__)

_MARGIN_S = 5.0
_EAGER_LOOKS = 200
_PATIENCE_S = 0.1
"""How long a worker waits at the board before it tells a server, who then sees to it that somebody comes."""
_AGAIN_S = 0.5
"""How long until it tells so again."""
_STAGED_BYTES = 16 * 2**10
"""From this size on, a tensor that lies elsewhere is copied into shared memory rather than sent."""


class ParameterServer:
    """A Backend over parameter servers. Sums are added in worker order: bitwise repeatable, for any number of servers.

    On one host the bytes go through shared memory, and `empty` gives tensors that need no copy.
    """

    name = "ps"
    packs = True

    def __init__(
        self,
        addresses: str | Sequence[str],
        rank: int,
        world_size: int,
        *,
        job_id: str = "",
        incarnation: int = 0,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 30.0,
        lanes: str = "auto",
        keys: Path | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Join the job; returns when all workers have.

        Args:
            addresses: where the servers listen, in the order of their numbers; one, or several with commas between.
            incarnation: how often this worker has been started again.
            timeout_s: longest wait for another worker, as the servers were told too.
            connect_timeout_s: longest wait for the servers and the other workers here.
            lanes: `auto`: shared memory where both ends see the same; `off`: sockets only.
            keys: directory of CURVE keys, see `dtrain keys`.
            on_close: what else is to be ended with this connection.

        Raises:
            ConnectError: nobody answers at an address, or some workers have not come in time.
            ProtocolError: something else answers.
            KeyRefused: the keys do not fit together.
            UsageError: a server was started for another world size, or the rank is taken.
        """
        if lanes not in ("auto", "off"):
            raise UsageError(f"lanes is {lanes!r}: `auto` or `off`")
        self.rank = rank
        self.world_size = world_size
        self.incarnation = incarnation
        self.traffic = Traffic()
        self.addresses = addresses.split(",") if isinstance(addresses, str) else list(addresses)
        for address in self.addresses:
            sockets.check_address(address, insecure_no_encryption=True)
            if address.startswith("tcp://") and address.endswith(":0"):
                raise UsageError(f"server address is {address!r}: give the port that the server says it listens at")
        # The servers look after late workers and name them; this side's limit is for a server that has gone silent.
        self._timeout_s = timeout_s + _MARGIN_S
        self._joining = Joining(
            job_id=job_id,
            rank=rank,
            world_size=world_size,
            num_servers=len(self.addresses),
            incarnation=incarnation,
            connect_timeout_s=connect_timeout_s,
            lanes=lanes == "auto",
            keys=keys,
        )
        self.lock = threading.RLock()
        """Held by who uses the links: the program's thread, the engine's (hooks of CUDA models), or the pump."""
        self._on_close = on_close
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._closed = False
        self._cuts: dict[tuple[str, int, int], list[Range]] = {}
        self.links: list[Link] = []
        self.outboxes: list[Outbox] = []
        """What waits to be sent, by server."""
        self._pump: Pump[Link] | None = None
        self._part_bytes = wire.PART_BYTES  # of a tensor that travels over a network
        self._board: board.Board | None = None
        self.epoch = 0
        self._mended = False  # whether a lost server is replaced, as servers have said
        self._reset()
        atexit.register(self._close_at_exit)
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    # -- the seam -----------------------------------------------------------------------------------------------------

    @property
    def shares(self) -> bool:
        """Whether tensors reach all servers through shared memory."""
        return all(link.shares for link in self.links)

    @property
    def on_loss(self) -> str:
        """What the servers do when a worker is lost."""
        welcome = self.links[0].welcome
        return "fail" if welcome is None else welcome.on_loss

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        device = torch.device(device)
        if device.type == "cpu" and numel:
            with self.lock:
                self.check()
                made = self.shared_bytes(numel * dtype.itemsize)
            if made is not None:
                return bytes_as(made, dtype, numel)
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        check_flat(flat, key)
        with self.lock:
            self.check()
            if key.startswith("gradient/") and self.on_loss == "drop" and self.world_size > 1:
                raise UsageError(
                    "a plain sum of gradients, and the servers drop workers that are lost: only servers that step know "
                    "whose gradients count; give replicate() a dtrain.ServerUpdate, or start the servers with "
                    "--on-worker-loss fail or wait"
                )
            if self._board is not None and flat.nbytes <= board.MOST_BYTES and flat.device.type == "cpu" and len(flat):
                return self._show(self._board, flat, key)
            call, self._calls[key] = self._calls[key], self._calls[key] + 1
            transfer = _Transfer(self, key)
            if flat.device.type != "cpu":
                self._start_from_device(flat, key, call, transfer)
            else:
                self._start(flat, key, call, transfer)
            self.take_what_came()
            return transfer

    def close(self) -> None:
        """Tell the servers and leave. An error that ends the program is passed on to the other workers."""
        self._leave(sys.exc_info()[1])

    def rejoin(self, epoch: int = 0) -> None:
        """Come again after `Rewound`, in that epoch or a later one; returns when all workers have.

        What `empty` gave before still works, but is copied; take new buffers.
        """
        with self.lock:
            self._drop_links(bye=None)
            self._reset()
            self.epoch = max(epoch, self.epoch)
            self._join()

    def server_spans(self) -> list[list[Span]]:
        """See `TellsSpans`."""
        found: list[list[Span]] = []
        with self.lock:
            self.check()
            for link in self.links:
                asked_s, told = time.monotonic(), _Told()
                link.ask(wire.Recall, take=told)
                self.progress(lambda told=told: told.data is not None, "a server's latest rounds")  # type: ignore[misc]
                try:
                    found.append(spans.decode(told.data or b"", asked_s, time.monotonic()))
                except (ValueError, KeyError, TypeError) as error:
                    raise ProtocolError(f"{link} told of its rounds what cannot be read: {error}") from error
        return found

    # -- for what is built on it --------------------------------------------------------------------------------------

    def take_what_came(self) -> bool:
        """Take the answers that have arrived, and send what waited for them; whether there were any.

        Whoever has sent calls this before it lets go of the lock: libzmq tells of a message once, and perhaps in the
        midst of a call that sends.
        """
        found = False
        while True:
            self._push_device_copies()
            unread = [pair for pair in zip(self.links, self.outboxes, strict=True) if pair[0].unread]
            if not unread:
                return found
            for link, box in unread:
                found = link.receive() or found
                box.feed()

    def shared_bytes(self, nbytes: int) -> Tensor | None:
        """New shared memory that all servers have mapped; None where there is none."""
        if any(link.failed for link in self.links):
            return None  # somebody would be asked to map what is gone before it is mapped
        self._free_unused()
        if not self.shares or (made := self._buffers.make(nbytes)) is None:
            return None
        number, segment, data = made
        try:
            self._tell_of(number, segment)
        finally:
            segment.unlink()
        return data

    def common(self, numel: int, dtype: torch.dtype) -> Common | None:
        """Memory that servers share with all workers; None, on all workers, where one of them has none.

        All workers call it; what they write there is theirs alone, and what servers write is everyone's.

        Args:
            numel: 0: this worker wants none.
        """
        if not self.shares or self.on_loss == "drop":
            return None
        with self.lock:
            self.check()
            with self._memory_of_all(numel * dtype.itemsize, "metric/common", private=True) as made:
                if made is None:
                    return None
                number = self._buffers.number(made)
                self._tell_of(number, made)
                collectives.barrier(self)  # then all servers have it, from all workers, and its name may go
        return Common(number, made, bytes_as(made.bytes, dtype, numel))

    def find(self, flat: Tensor) -> Place | None:
        """Where a flat tensor lies in shared memory, if it does."""
        return self._buffers.find(flat)

    def on_host(self, flat: Tensor, key: str, then: Callable[[Tensor], None]) -> DeviceCopy | None:
        """Call `then` with the tensor as the host has it: at once, or when a device has copied it, by what is given."""
        with self.lock:
            self.check()
            if flat.device.type == "cpu":
                then(flat)
                return None
            copy = DeviceCopy(flat, host := self.host_twin(flat, key))
            self._device_copies.append((copy, lambda: then(host)))
            self._push_device_copies()
            return copy

    def host_twin(self, flat: Tensor, key: str) -> Tensor:
        """The tensor itself, or for one of a device its twin in the host's memory, always the same."""
        if flat.device.type == "cpu":
            return flat
        known = (key, flat.numel(), flat.dtype)
        host = self._host_twins.get(known)
        if host is None:
            host = self._host_twins[known] = pinned(self.empty(flat.numel(), flat.dtype, key))
        return host

    def flush(self) -> None:
        """Send everything that devices still copy."""
        self.progress(lambda: not self._device_copies, "a device's copies")

    def host(
        self, buckets: Sequence[HostedBucket], model: Sequence[tuple[str, Parameter]], update: ServerUpdate
    ) -> Hosting:
        return Hosting(self, buckets, model, update)

    def await_credit(self, link: Link, what: str) -> None:
        """Return when the server takes more from this worker."""
        if not link.has_credit:
            self.progress(lambda: link.has_credit, what)

    def progress(self, done: Callable[[], bool], what: str) -> None:
        """Take what comes until `done`.

        Raises:
            DtrainError: the job has failed, or a server is gone or silent.
        """
        if self._closed:
            self.check()
        deadline = time.monotonic() + self._timeout_s
        with self.lock:
            while not done():
                if self.take_what_came():
                    deadline = time.monotonic() + self._timeout_s
                elif not done() and not self._block(deadline, what):
                    silent = f"{', '.join(map(str, self.links))} silent for {self._timeout_s:g} s ({what})"
                    self.links[0].fail(CommError(f"worker {self.rank}: {silent}"))

    def check(self) -> None:
        """Raise if this backend was closed."""
        if self._closed:
            raise CommError(f"worker {self.rank}: this backend was closed")

    # -- small sums, without a server ---------------------------------------------------------------------------------

    def _share_with_all_or_none(self) -> None:
        """Leave shared memory with a server that some worker reaches by sockets alone.

        A server sums where the first worker's gradient lies, and that worker goes on when it has the sum; what is still
        on its way to others would change under them. And parts of sockets are not the parts of shared memory.
        """
        seen = collectives.gather_numbers(self, [link.shares for link in self.links], "metric/lanes")
        for link, by_worker in zip(self.links, zip(*seen, strict=True), strict=True):
            link.shares = all(by_worker)

    def _set_up_board(self) -> None:
        """Share a board with all workers, if they all see the same memory; it goes when the last of them does."""
        wanted = self.shares and board.possible() and self.on_loss != "drop" and self.world_size > 1
        size = board.nbytes(self.world_size) if wanted else 0
        with self._memory_of_all(size, "metric/board") as made:
            if made is not None:
                self._board = board.Board(made.bytes, self.rank, self.world_size)

    @contextlib.contextmanager
    def _memory_of_all(self, nbytes: int, key: str, *, private: bool = False) -> Iterator[lanes_.Segment | None]:
        """A segment that worker 0 makes and all workers map; its name goes afterwards. None, on all, if one cannot.

        Args:
            nbytes: 0: this worker wants none.
            private: what a worker writes there is its own.
        """
        made = mapped = None
        if self.rank == 0 and nbytes:
            with contextlib.suppress(lanes_.NoRoom):
                made = mapped = lanes_.Segment.create(nbytes)
        try:
            name = collectives.gather_bytes(self, made.name.encode() if made else b"", key)[0].decode()
            if name and nbytes and (self.rank > 0 or private):
                with contextlib.suppress(ProtocolError):
                    mapped = lanes_.Segment.open(name, nbytes, private=private)
            seen = collectives.gather_numbers(self, [mapped is not None], key)
            yield mapped if all(row[0] for row in seen) else None
        finally:
            if made is not None:
                made.unlink()

    def _show(self, on: board.Board, flat: Tensor, key: str) -> Work:
        if not on.has_room(key):
            self._watch_board(lambda: on.has_room(key), key, 0, list)
        self.traffic.count(key, flat.nbytes, flat.nbytes)
        return _Shown(self, on, on.post(flat, key))

    def finish_shown(self, on: board.Board, post: board.Post) -> None:
        """Return when a tensor on the board has been summed."""
        self._watch_board(lambda: on.advance(post), post.key, post.number, lambda: on.missing(post))

    def _watch_board(self, done: Callable[[], bool], key: str, call: int, missing: Callable[[], list[int]]) -> None:
        """Look at the board until `done`, often at first; and at the servers, who know of what goes wrong."""
        start = time.monotonic()
        told: _Answered | None = None
        told_s = 0.0
        looks = 0
        with self.lock:
            self.check()
            while True:
                answered = told is not None and told.came  # before the look: what is missing then is to be told again
                if done():
                    break
                looks += 1
                if looks <= _EAGER_LOOKS:
                    os.sched_yield()
                    continue
                waited_s = time.monotonic() - start
                if waited_s > _PATIENCE_S if told is None else answered and waited_s > told_s + _AGAIN_S:
                    told, told_s = _Answered(), waited_s
                    self.links[0].ask(wire.Await, key, call, wire.pack_ranks(missing()), take=told)
                time.sleep(0.0 if waited_s < 0.0005 else min(0.001, waited_s / 20))
                if looks % 16 == 0:
                    now = time.monotonic()
                    for link in self.links:
                        link.receive()
                        link.look(now, key)
            if told is not None:
                self.links[0].ask(wire.Resume, take=_ignore)

    # -- transfers ----------------------------------------------------------------------------------------------------

    def _tell_of(self, number: int, segment: lanes_.Segment) -> None:
        """Have all servers map a segment."""
        waiting = set(range(len(self.links)))
        for link in self.links:
            link.ask(wire.Share, number, segment.name, segment.nbytes, take=_Countdown(waiting, link.server))
        self.progress(lambda: not waiting, "shared memory")

    def _start(self, flat: Tensor, key: str, call: int, transfer: _Transfer) -> None:
        """Send a tensor of the processor's memory on its way; the sum comes back into it."""
        place = self._buffers.find(flat)
        source = flat
        if place is None and self.shares and flat.nbytes >= _STAGED_BYTES:
            staged = self._stage(flat)
            if staged is not None:
                data, source = staged
                place = self._buffers.find(source)
                transfer.staged = (data, source, flat)
        dtype = dtype_name(flat.dtype)
        itemsize = flat.element_size()
        boxes: list[Outbox] = []
        for range_ in in_turn(self._cut(flat, key), self.rank):
            link = self.links[range_.server]
            part = source[range_.start : range_.stop]
            transfer.missing += 1
            if place is not None and link.shares:
                where = (place.segment, place.offset + range_.start * itemsize, part.numel())
                link.ask(wire.AddShared, key, call, 0, dtype, *where, take=transfer.is_done)
                continue
            most = self._part_bytes if link.far else wire.PART_BYTES
            pieces = wire.parts_of(part, most)
            transfer.missing += len(pieces) - 1
            paced = link.far and part.nbytes > parts.LEAST_BYTES  # statistics need not wait behind gradients
            boxes.append(box := self.outboxes[range_.server])
            window = window_bytes(most) if paced else 0
            for number, piece in enumerate(pieces):
                send = functools.partial(link.ask, wire.Add, key, call, number, dtype)
                box.put(piece.nbytes, window, functools.partial(send, take=_Into(piece, transfer), payload=piece))
        while sum(box.feed(most=1) for box in boxes):
            pass  # the first part to each server, then the second: a server has a part sooner from all workers
        self.traffic.count(key, flat.nbytes, flat.nbytes)

    def _start_from_device(self, flat: Tensor, key: str, call: int, transfer: _Transfer) -> None:
        """The same for a tensor of a device: it is copied to pinned memory while the device computes on."""
        transfer.missing += 1  # until it has been sent

        def go(host: Tensor) -> None:
            self._start(host, key, call, transfer)
            transfer.missing -= 1

        transfer.device = self.on_host(flat, key, go)

    def _push_device_copies(self) -> None:
        """Send what devices have finished copying, in order."""
        while self._device_copies and self._device_copies[0][0].arrived():
            self._device_copies.popleft()[1]()

    def _stage(self, flat: Tensor) -> tuple[Tensor, Tensor] | None:
        """(buffer, the tensor's copy in it), if there is room."""
        data = self._staging.take(flat.nbytes)
        if data is None:
            data = self.shared_bytes(size_class(flat.nbytes))
        if data is None:
            return None
        copy = bytes_as(data, flat.dtype, flat.numel())
        copy.copy_(flat)
        return data, copy

    def give_back(self, data: Tensor) -> None:
        """A staging buffer is free again."""
        self._staging.give_back(data)

    def _cut(self, flat: Tensor, key: str) -> list[Range]:
        """Which server sums which part."""
        known = (key, flat.numel(), flat.element_size())
        cut = self._cuts.get(known)
        if cut is None:
            cut = split_even(flat.numel(), flat.element_size(), len(self.links), zlib.crc32(key.encode()))
            self._cuts[known] = cut
        return cut

    # -- the connections ----------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._board = None
        self._calls: Counter[str] = Counter()
        self._buffers = Buffers()
        self._staging = Staging()
        self._host_twins: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._device_copies: deque[tuple[DeviceCopy, Callable[[], None]]] = deque()

    def _join(self) -> None:
        """Say Hello to all servers, in the newest epoch that any of them knows, until all workers are there."""
        deadline = time.monotonic() + self._joining.connect_timeout_s + _MARGIN_S
        while True:
            try:
                self._join_once(deadline)
                return
            except Rewound as rewound:
                if time.monotonic() > deadline:
                    raise
                self.epoch = max(self.epoch, rewound.epoch)
                self._drop_links(bye=None)
                self._reset()

    def _join_once(self, deadline: float) -> None:
        self._context = zmq.Context(io_threads=min(4, len(self.addresses)))
        for server, address in enumerate(self.addresses):
            next_epoch = self.epoch + 1 if self._mended else 0
            self.links.append(link := Link(self._context, address, server, self._joining, rewinds_to=next_epoch))
        self._bells = _bells(self.links, self.links)
        for link in self.links:
            link.say_hello(self.epoch)
        while not all(link.welcome for link in self.links):
            came = [link.receive() for link in self.links]
            if not any(came) and not self._block(deadline, "the other workers"):
                for link in self.links:
                    if link.welcome is None and link.damaged:
                        raise ProtocolError(f"{link} is not dtrain's, or the network damages all: no answer is legible")
                silent = [str(link) for link in self.links if link.welcome is None]
                waited = f"{self._joining.connect_timeout_s + _MARGIN_S:g} s"
                raise ConnectError(f"worker {self.rank}: {', '.join(silent)} said nothing for {waited}")
        self._mended = self.on_loss == "wait"
        if self._mended:
            for link in self.links:
                link.rewinds_to = self.epoch + 1
        self.outboxes = [Outbox(link) for link in self.links]
        self._settle()

    def _settle(self) -> None:
        """What workers find out together once all are there: how they reach the servers, and how fast."""
        self._share_with_all_or_none()
        self._set_up_board()
        self._part_bytes = wire.PART_BYTES
        watched = [link for link in self.links if link.over_network]
        if any(link.far and not link.shares for link in self.links):
            self._part_bytes = learn_part_bytes(self, len(self.links))
            self._pump = Pump(self.lock, _bells(self.links, watched), self._pump_in)
        elif watched:
            self._pump = Pump(self.lock, _bells([], watched), self._notice)
        self._calls.clear()
        self.traffic.sent.clear()
        self.traffic.received.clear()

    def _block(self, deadline: float, what: str) -> bool:
        """Wait for a message or for trouble; whether there was still time."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        wait_s = 0.0005 if self._device_copies else min(left_s, 0.5)
        if _heard(self._bells.wait(wait_s)):
            return True
        now = time.monotonic()
        for link in self.links:
            link.look(now, what)
        return True

    def _notice(self, rung: Sequence[Link | None]) -> None:
        """A server has to hear of a new connection while the program computes."""
        if rung and all(rung):
            return
        now = time.monotonic()
        for link in self.links:
            link.notice(now)

    def _pump_in(self, rung: Sequence[Link | None]) -> None:
        """The same, and answers are taken as they come."""
        self._notice(rung)
        _heard(rung or self.links)
        self.take_what_came()

    def _free_unused(self) -> None:
        for number in self._buffers.unused():
            for link in self.links:
                if link.shares:
                    link.ask(wire.Unshare, number, take=_ignore)

    def _close_at_exit(self) -> None:
        self._leave(getattr(sys, "last_value", None))  # what ended the program, if an error did

    def _leave(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        bye = "" if error is None or isinstance(error, SystemExit | Preempted) else f"{type(error).__name__}: {error}"
        self._drop_links(bye)
        self._reset()
        if self._on_close is not None:
            self._on_close()

    def _drop_links(self, bye: str | None) -> None:
        if self._pump is not None:
            self._pump.stop()
            self._pump = None
        links, self.links, self.outboxes = self.links, [], []
        context, self._context = self._context, None
        for link in links:
            link.close(bye)
        if context is not None:
            context.term()


def _bells(heard: Sequence[Link], watched: Sequence[Link]) -> Bells[Link | None]:
    """For links that are heard it rings with their name, when something has come; for those that are watched with none,
    when something has become of their connection."""
    bells: Bells[Link | None] = Bells()
    for link in heard:
        bells.add(link.socket, link)
    for link in watched:
        bells.add(link.watch.monitor, None)
    return bells


def _heard(rung: Sequence[Link | None]) -> bool:
    """Links that rang are to be read; whether any did."""
    links = [link for link in rung if link is not None]
    for link in links:
        link.unread = True
    return bool(links)


class _Answered:
    """Whether the answer to a request has come."""

    came = False

    def __call__(self, answer: Answer, payload: memoryview | None) -> None:
        self.came = True


class _Shown:
    """A small tensor on the board."""

    def __init__(self, comm: ParameterServer, on: board.Board, post: board.Post) -> None:
        self._comm = comm
        self._on = on
        self._post = post

    def wait(self) -> None:
        if not self._post.done:
            self._comm.finish_shown(self._on, self._post)


class _Transfer:
    """One tensor under way; done when no part is missing."""

    def __init__(self, comm: ParameterServer, key: str) -> None:
        self._comm = comm
        self.key = key
        self.missing = 0
        self.staged: tuple[Tensor, Tensor, Tensor] | None = None  # buffer, copy in it, where the sum belongs
        self.device: DeviceCopy | None = None
        self._callback: Callable[[], None] | None = None

    def when_done(self, callback: Callable[[], None]) -> None:
        """See `Announces`. It is called when the worker next takes what has come, or its pump does."""
        if self.missing:
            self._callback = callback
        else:
            callback()

    def wait(self) -> None:
        if self.missing:
            self._comm.progress(lambda: not self.missing, self.key)
        if self.device is not None:
            self.device.bring_back()
            self.device = None

    def is_done(self, answer: Answer, payload: memoryview | None) -> None:
        """A part of it has been summed."""
        if self.missing == 1 and self.staged is not None:
            data, copy, flat = self.staged
            self.staged = None
            flat.copy_(copy)
            self._comm.give_back(data)
        self.missing -= 1  # last: who waits may look without the lock
        if not self.missing and self._callback is not None:
            self._callback()


class _Into:
    """Takes a sum that came by the socket."""

    def __init__(self, part: Tensor, transfer: _Transfer) -> None:
        self._part = part
        self._transfer = transfer

    def __call__(self, answer: Answer, payload: memoryview | None) -> None:
        copy_into(self._part, answer, payload, self._transfer.key)
        self._transfer.is_done(answer, None)


class _Countdown:
    """Crosses a server off."""

    def __init__(self, waiting: set[int], server: int) -> None:
        self._waiting = waiting
        self._server = server

    def __call__(self, answer: Answer, payload: memoryview | None) -> None:
        self._waiting.discard(self._server)


class _Told:
    """Keeps what came with an answer."""

    data: bytes | None = None

    def __call__(self, answer: Answer, payload: memoryview | None) -> None:
        self.data = bytes(payload or b"")


def _ignore(answer: Answer, payload: memoryview | None) -> None:
    """The answer says nothing new."""
