"""Broadcast, barrier, gathering and agreement: functions over the one verb of the seam.

To hand out one worker's tensor, the others add zeros to it. What is added are the bits, read as integers, so that
every value arrives as it was: minus zero, infinities and NaN payloads too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dtrain.comm.base import Backend
from dtrain.errors import LayoutError

_CHUNK_BYTES = 16 * 2**20
_NUMBER = torch.int64


def broadcast(comm: Backend, tensors: Iterable[Tensor], key: str = "metric/broadcast") -> None:
    """Replace every tensor by worker 0's, bit by bit. Same shapes and types on every worker (see `agree`)."""
    if comm.world_size == 1:
        return
    for group in _groups(tensors):
        sizes = [t.numel() * t.element_size() for t in group]
        total = sum(sizes)
        flat = torch.zeros(-(-total // 8) * 8, dtype=torch.uint8, device=group[0].device)
        if comm.rank == 0:
            torch.cat([_bytes(t) for t in group], out=flat[:total])
        comm.all_reduce(flat.view(_NUMBER), key).wait()
        for tensor, part in zip(group, flat[:total].split(sizes), strict=True):
            _copy_bytes(tensor, part)


def barrier(comm: Backend, key: str = "metric/barrier") -> None:
    """Return when every worker has come here."""
    comm.all_reduce(torch.zeros(1, dtype=_NUMBER), key).wait()


def gather_numbers(comm: Backend, numbers: Sequence[int], key: str = "metric/gather") -> list[list[int]]:
    """Each worker's row of 64-bit integers, in worker order. Rows have one length on all workers."""
    table = torch.zeros(comm.world_size, len(numbers), dtype=_NUMBER)
    table[comm.rank] = torch.tensor(list(numbers), dtype=_NUMBER)
    comm.all_reduce(table.view(-1), key).wait()
    return table.tolist()


def gather_bytes(comm: Backend, data: bytes, key: str = "metric/gather") -> list[bytes]:
    """Each worker's bytes, of any length, in worker order."""
    sizes = [row[0] for row in gather_numbers(comm, [len(data)], key)]
    table = torch.zeros(comm.world_size, max(1, -(-max(sizes) // 8)) * 8, dtype=torch.uint8)
    if data:
        table[comm.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    comm.all_reduce(table.view(-1).view(_NUMBER), key).wait()
    return [bytes(row[:size].numpy()) for row, size in zip(table, sizes, strict=True)]


def broadcast_bytes(comm: Backend, data: bytes, key: str = "metric/broadcast") -> bytes:
    """Worker 0's bytes, of any length, on every worker; what the others give is not looked at."""
    size = torch.tensor([len(data)])
    broadcast(comm, [size], key)
    flat = torch.zeros(int(size), dtype=torch.uint8)
    if comm.rank == 0 and data:
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    broadcast(comm, [flat], key)
    return flat.numpy().tobytes()


def sum_numbers(comm: Backend, numbers: Sequence[float], key: str = "metric/sum") -> list[float]:
    """Element-wise sum over workers, in float64."""
    flat = torch.tensor(list(numbers), dtype=torch.float64)
    comm.all_reduce(flat, key).wait()
    return flat.tolist()


def any_says(comm: Backend, said: bool, key: str) -> bool:
    """Whether any worker says so; the same answer on all."""
    return sum_numbers(comm, [float(said)], key)[0] > 0


def agree(comm: Backend, entries: Sequence[str], what: str) -> None:
    """Make sure that all workers hold the same list of `entries`, before anything of that layout is sent.

    Messages here have the same size on every worker whatever they hold, so that a difference ends in this error and
    not in a collective of unequal sizes (which aborts the process in gloo, and hangs elsewhere).

    Raises:
        LayoutError: on every worker, naming the first entry that differs and what each worker has there.
    """
    digest = hashlib.sha256("\n".join(entries).encode()).digest()[:16]
    rows = gather_numbers(comm, [len(entries), *_words(digest)], "metric/agree")
    if all(row == rows[0] for row in rows):
        return
    everyone = [json.loads(data) for data in gather_bytes(comm, json.dumps(list(entries)).encode(), "metric/agree")]
    index = next(i for i in range(max(map(len, everyone))) if len({_entry(e, i) for e in everyone}) > 1)
    held = "; ".join(f"worker {rank} has {_entry(e, index)}" for rank, e in enumerate(everyone))
    raise LayoutError(f"{what} differ between workers, first at number {index}: {held}")


def first_difference(comm: Backend, named: Sequence[tuple[str, Tensor]]) -> tuple[str, list[int]] | None:
    """Name of the first tensor whose bits are not the same on all workers, with the ranks that differ from worker 0.

    Each worker sends 8 bytes a tensor. None where all agree.
    """
    sums = [_words(hashlib.sha256(_bytes(t).cpu().numpy().data).digest()[:8])[0] for _, t in named]
    rows = gather_numbers(comm, [*sums, 1], "metric/check")
    here = [rank for rank, row in enumerate(rows) if row[-1]]  # not those that the job goes on without
    for column, (name, _) in enumerate(named):
        odd = [rank for rank in here if rows[rank][column] != rows[here[0]][column]]
        if odd:
            return name, odd
    return None


def _entry(entries: list[str], index: int) -> str:
    return entries[index] if index < len(entries) else "nothing"


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _copy_bytes(tensor: Tensor, part: Tensor) -> None:
    # The part may begin at any byte: a clone is aligned for the tensor's type.
    with torch.no_grad():
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in messages of about 16 MiB, each on one device; empty ones left out."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if not groups or size >= _CHUNK_BYTES or groups[-1][0].device != tensor.device:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return groups
