"""What messages cost on this host: processes exchange some over a backend, and a line is laid through the times."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.jobs import run as run_job
from dtrain.measure.hardware import SMALL_BYTES, Link, fit
from dtrain.sharded import all_gather, reduce_scatter

SIZES_BYTES = (2**10, 2**13, 2**16, 2**19, 2**22, 2**24)
"""Messages that the links are measured with."""

LINKS = {
    "allreduce": ("allreduce", "auto"),
    "allreduce sharded": ("allreduce", "auto"),
    "ps": ("ps", "auto"),
    "ps sockets": ("ps", "off"),
}
"""What can be measured: name -> backend, and its lanes. Sharded: the two halves of an all-reduce, apart."""

_PAIR = 2
_QUIET = 0.25
"""Quantile of the times of a sum that counts: other programs on the host lengthen the later ones."""


def measure_link(name: str, seconds: float, *, workers: int = _PAIR, dtype: torch.dtype = torch.float32) -> Link:
    """Latency and rate of one of `LINKS` on this host, by processes that exchange messages for about `seconds`.

    Args:
        dtype: what is summed; halves cost more to add than they save on a host.
    """
    backend, lanes = LINKS[name]
    rows = run_job(_exchange, name, seconds, dtype, workers=workers, backend=backend, lanes=lanes)
    return link_of(name, rows, workers=workers)


def _exchange(comm: Backend, name: str, seconds: float, dtype: torch.dtype) -> dict[str, Any]:
    """One worker of a pair: seconds of sums of each size, and core-seconds of a byte of the largest."""
    flats = {n: comm.empty(n // dtype.itemsize, dtype, f"gradient/{n}") for n in SIZES_BYTES}
    sum_of = _sum_in_halves if name == "allreduce sharded" else _sum
    for flat in flats.values():
        flat.zero_()
    times: dict[int, list[float]] = {n: [] for n in SIZES_BYTES}
    for number in itertools.count():
        start_s = time.perf_counter()
        for nbytes, flat in flats.items():
            times[nbytes].append(_sum_s(comm, sum_of, flat, nbytes))
        if number == 0:
            times = {n: [] for n in SIZES_BYTES}
            # Every worker makes as many rounds: as worker 0's first says, with a bound for a host that is busy then.
            rounds = max(5, min(60, int(seconds / (time.perf_counter() - start_s))))
            rounds = collectives.gather_numbers(comm, [rounds])[0][0]
        elif number == rounds:
            break
    return {"times": times, "core_s_per_byte": _core_s(comm, sum_of, flats[SIZES_BYTES[-1]])}


_SumOf = Callable[[Backend, Tensor, int], None]


def _sum(comm: Backend, flat: Tensor, nbytes: int) -> None:
    comm.all_reduce(flat, f"gradient/{nbytes}").wait()


def _sum_in_halves(comm: Backend, flat: Tensor, nbytes: int) -> None:
    reduce_scatter(comm, flat, f"gradient/{nbytes}").wait()
    all_gather(comm, flat, f"gradient/values{nbytes}").wait()


def _sum_s(comm: Backend, sum_of: _SumOf, flat: Tensor, nbytes: int) -> float:
    """Seconds of one sum that all begin together; of small ones the mean of several, as they leave a barrier apart."""
    calls = 10 if nbytes <= 2**16 else 1
    collectives.barrier(comm)
    start_s = time.perf_counter()
    for _ in range(calls):
        sum_of(comm, flat, nbytes)
    return (time.perf_counter() - start_s) / calls


def _core_s(comm: Backend, sum_of: _SumOf, flat: Tensor) -> float:
    """Core-seconds of all processes of this job, servers too, for a byte of a tensor that is summed; on worker 0."""
    family = psutil.Process().parent().children() if comm.rank == 0 else []
    collectives.barrier(comm)
    before = _spent_s(family)
    nbytes = flat.numel() * flat.element_size()
    calls = 12
    for _ in range(calls):
        sum_of(comm, flat, nbytes)
    collectives.barrier(comm)
    return (_spent_s(family) - before) / (calls * nbytes)


def _spent_s(family: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in family:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def link_of(name: str, rows: Sequence[dict[str, Any]], *, workers: int = _PAIR) -> Link:
    """Latency and rate of a link of this host, from what each worker of a job measured.

    A sum takes as long as on its slowest worker. On one host all bytes go through one path: a ring moves 2 (n-1) times
    the tensor in all, servers 2 n times.
    """
    times = {
        int(size): [max(column) for column in zip(*(row["times"][size] for row in rows), strict=True)]
        for size in rows[0]["times"]
    }
    ring = LINKS[name][0] == "allreduce"
    moved, hops = (2 * (workers - 1), 2 * (workers - 1)) if ring else (2 * workers, 2)
    large = [n for n in times if n >= SMALL_BYTES]
    base_s, per_byte_s, scatter = fit(large, [times[n] for n in large], at=_QUIET)
    small_s = statistics.median(float(np.quantile(times[n], _QUIET)) for n in times if n < SMALL_BYTES)
    return Link(
        name=name,
        alpha_s=base_s / hops,
        small_alpha_s=small_s / hops,
        bytes_per_s=moved / per_byte_s if per_byte_s > 0 else 1e12,
        core_s_per_byte=max(0.0, rows[0]["core_s_per_byte"]) / moved,
        scatter=scatter,
        shared=True,
        source=f"measured: {workers} processes on this host",
    )
