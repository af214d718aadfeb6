"""Ring all-reduce by `torch.distributed`: gloo on the processor, NCCL on CUDA.

One process group per lane. Where the program has not made a default group, one is made here, on a store of our own;
where it has, new groups are made beside it and the default group is left alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm import collectives
from dtrain.comm.base import LANES, Traffic, Work, check_flat, lane_of
from dtrain.comm.peers import Peer, suspects
from dtrain.errors import CommError, ConnectError


class AllReduce:
    """A Backend over torch's process groups.

    Traffic is by formula, not measured: a ring moves 2(n-1)/n of the bytes in each direction (Patarasuk & Yuan 2009).
    Half precision is added in half precision, hop by hop, as the library does.
    """

    name = "allreduce"

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
        self._store = store
        self._timeout_s = timeout_s
        self._owns_default = not dist.is_initialized()
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._closed = False
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
        except (RuntimeError, ValueError) as error:
            self.close()
            raise ConnectError(f"worker {rank} could not join the process group: {_first_line(error)}") from error
        mine = Peer(socket.gethostname(), os.getpid())
        self.peers = [Peer.decode(data) for data in collectives.gather_bytes(self, mine.encode())]

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        check_flat(flat, key)
        nbytes = flat.numel() * flat.element_size() * 2 * (self.world_size - 1) // self.world_size
        self.traffic.count(key, nbytes, nbytes)
        try:
            work = dist.all_reduce(flat, group=self._groups[lane_of(key)], async_op=True)
        except RuntimeError as error:
            raise self._explain(error, key) from error
        return _Transfer(self, work, key)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if self._owns_default and dist.is_initialized():
                dist.destroy_process_group()
            elif not self._owns_default:
                for group in self._groups.values():
                    dist.destroy_process_group(group)
        self._groups = {}

    def _explain(self, error: RuntimeError, key: str) -> CommError:
        """The library says which address closed; find out which worker that was, and tell the others first."""
        named = suspects(getattr(self, "peers", []), self.rank)
        text = named or f"a worker does not answer ({_first_line(error)})"
        return CommError(f"worker {self.rank}, all-reduce of {key}: {self._first_to_say(text)}")

    def _first_to_say(self, text: str) -> str:
        """What the first worker to see the fault said: later ones would blame whoever ended because of it."""
        if self._store is None:
            return text
        try:
            return self._store.compare_set("fault", "", text).decode() or text
        except RuntimeError:
            return text


class _Transfer:
    def __init__(self, comm: AllReduce, work: dist.Work, key: str) -> None:
        self._comm = comm
        self._work: dist.Work | None = work
        self._key = key

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._comm._explain(error, self._key) from error
        self._work = None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
