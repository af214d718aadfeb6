"""Ring all-reduce by `torch.distributed`: gloo on the processor, NCCL on CUDA.

One process group per lane. Where the program has not made a default group, one is made here, on a store of our own;
where it has, new groups are made beside it and the default group is left alone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm import collectives
from dtrain.comm.base import LANES, Traffic, Work, check_flat, lane_of
from dtrain.comm.ordered import HALVES
from dtrain.comm.partwise import HalfSum, PartSum, gather
from dtrain.comm.peers import Board, Peer, suspects
from dtrain.errors import CommError, ConnectError

_LOOK_S = 1.5
"""How long to look for the one to blame before an error is raised without it."""


class AllReduce:
    """A Backend over torch's process groups.

    Traffic is by formula, not measured: a ring moves 2(n-1)/n of the bytes in each direction (Patarasuk & Yuan 2009).
    Half precision is added in float32, see `dtrain.comm.partwise`.
    """

    name = "allreduce"
    packs = False

    def __init__(self, rank: int, world_size: int, *, store: dist.Store | None, timeout_s: float) -> None:
        """Meet the others.

        Args:
            store: where to meet, when the program has no default process group yet.
            timeout_s: longest wait for another worker, in seconds, in every later call too.

        Raises:
            ConnectError: the groups could not be made within the time.
        """
        self.rank = rank
        self.world_size = world_size
        self.traffic = Traffic()
        self._board = Board(store)
        self._owns_default = not dist.is_initialized()
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._seconds: dict[str, dist.ProcessGroup] = {}  # for the second messages of sums of halves
        self._halves: dict[str, HalfSum] = {}  # the last of them
        self._watched: list[_Transfer] = []  # whose end somebody wants to know of
        self._pending: set[_Transfer] = set()  # begun, and not waited for
        self._on_cuda = False
        self._closed = False
        atexit.register(self._at_exit)
        timeout = timedelta(seconds=timeout_s)
        try:
            if self._owns_default:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
                    store=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                )
            for lane in LANES:
                self._groups[lane] = dist.new_group(timeout=timeout)
                self._seconds[lane] = dist.new_group(timeout=timeout)
        except (RuntimeError, ValueError) as error:
            self.close()
            raise ConnectError(f"worker {rank} could not join the process group: {_first_line(error)}") from error
        mine = Peer(socket.gethostname(), os.getpid())
        self.peers: list[Peer] = []
        try:
            self.peers = [Peer.decode(data) for data in collectives.gather_bytes(self, mine.encode())]
        except CommError:
            self.close()
            raise

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        return self._begin(self._sum, flat, key, messages=2)

    def reduce_scatter(self, flat: Tensor, key: str) -> Work:
        return self._begin(lambda f, lane: PartSum(f, self._groups[lane]), flat, key)

    def all_gather(self, flat: Tensor, key: str) -> Work:
        return self._begin(lambda f, lane: gather(f, self._groups[lane]), flat, key)

    def _begin(
        self, start: Callable[[Tensor, str], dist.Work | HalfSum | PartSum], flat: Tensor, key: str, messages: int = 1
    ) -> Work:
        check_flat(flat, key)
        self._look()
        nbytes = flat.numel() * flat.element_size() * messages * (self.world_size - 1) // self.world_size
        self.traffic.count(key, nbytes, nbytes)
        try:
            work = start(flat, lane_of(key))
        except RuntimeError as error:
            raise self._explain(error, key) from error
        self._on_cuda |= flat.is_cuda
        transfer = _Transfer(self, work, key)
        self._pending.add(transfer)
        return transfer

    def _sum(self, flat: Tensor, lane: str) -> dist.Work | HalfSum:
        if flat.dtype in HALVES and self.world_size > 1:
            self._halves[lane] = HalfSum(flat, self._groups[lane], self._seconds[lane], self._halves.get(lane))
            return self._halves[lane]
        work: dist.Work = dist.all_reduce(flat, group=self._groups[lane], async_op=True)
        return work

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._say_goodbye(sys.exc_info()[1])
        self._take_apart()

    def _take_apart(self) -> None:
        """Give the groups back; their threads have ended then."""
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if self._owns_default and dist.is_initialized():
                dist.destroy_process_group()
            elif not self._owns_default:
                for group in (*self._groups.values(), *self._seconds.values()):
                    dist.destroy_process_group(group)
        self._groups, self._seconds, self._halves = {}, {}, {}

    def _at_exit(self) -> None:
        """Leave no thread of gloo's that could be the last to hold a tensor.

        Whoever lets go of one takes Python's lock, and a thread that asks for it while Python ends aborts the process
        (torch 2.13, `c10::TensorImpl::decref_pyobject`). Where nothing is under way the threads end at once, with
        their groups. Otherwise that could wait for other workers, who may be in trouble: what is under way is kept
        for ever.
        """
        self._say_goodbye(getattr(sys, "last_value", None))
        for transfer in self._pending:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(transfer))
        if not self._pending and not self._on_cuda:
            self._take_apart()

    def _say_goodbye(self, error: BaseException | None) -> None:
        """Tell the others that this worker has left, and why if an error made it."""
        atexit.unregister(self._at_exit)
        ended = error is None or isinstance(error, SystemExit)
        reason = "has left" if ended else f"failed with {type(error).__name__}: {error}"
        self._board.note("left", self.rank, reason[:1000])

    def watch(self, transfer: _Transfer) -> None:
        """Tell of its end when this worker next comes here.

        Never from the library's thread: one that comes to Python while the program ends would abort the process.
        """
        self._watched.append(transfer)

    def _look(self) -> None:
        if self._watched:
            self._watched = [transfer for transfer in self._watched if not transfer.tell()]

    def _explain(self, error: RuntimeError, key: str) -> CommError:
        """The library says which address closed; find out which worker that was, and tell the others first."""
        text = self._culprit() or f"a worker does not answer ({_first_line(error)})"
        return CommError(f"worker {self.rank}, all-reduce of {key}: {self._board.first(text)}")

    def _culprit(self) -> str:
        """Who is dead, stopped, has left, or is late. A process that ends closes its connections a while before."""
        self._board.note("waits", self.rank)
        others = [r for r in range(self.world_size) if r != self.rank]
        until = time.monotonic() + _LOOK_S
        while True:
            left = self._board.noted("left", self.world_size)
            named = suspects(self.peers, self.rank)
            if any(r in left for r in others):
                return "; ".join(f"{self._name(r)} {left[r]}; others waited for it" for r in others if r in left)
            if named or time.monotonic() > until:
                break
            time.sleep(0.05)
        waits = self._board.noted("waits", self.world_size)
        late = [] if named or self.rank not in waits else [r for r in others if r not in waits]
        return named or "; ".join(f"{self._name(r)} is late: alive, but no progress" for r in late)

    def _name(self, rank: int) -> str:
        return f"worker {rank} ({self.peers[rank]})" if self.peers else f"worker {rank}"


class _Transfer:
    def __init__(self, comm: AllReduce, work: dist.Work | HalfSum | PartSum, key: str) -> None:
        self._comm = comm
        self._work: dist.Work | HalfSum | PartSum | None = work
        self._key = key
        self._callback: Callable[[], None] | None = None

    def when_done(self, callback: Callable[[], None]) -> None:
        """See `Announces`. It is called when this worker next starts a transfer, or waits for one."""
        self._callback = callback
        self._comm.watch(self)

    def tell(self) -> bool:
        """Call back if it is over; whether there is nothing more to tell."""
        if self._work is not None and not self._work.is_completed():
            return False
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
        return True

    def wait(self) -> None:
        if self._work is None:
            return
        self._comm._look()
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._comm._explain(error, self._key) from error
        self._work = None
        self._comm._pending.discard(self)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
