"""Links between workers: a latency and a rate, as measured here, as given, or as such hardware has them.

A message of b bytes takes `alpha_s + b / bytes_per_s` from one process to another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtrain.errors import UsageError

SMALL_BYTES = 2**14
"""A message below this may take another way: in shared memory, the workers add it up themselves."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a transfer costs."""

    name: str
    """Which link, for people."""
    alpha_s: float
    """Latency: what a message of no bytes takes, one way."""
    bytes_per_s: float
    """Rate in each direction; of `shared` links, of all that is under way together."""
    small_alpha_s: float | None = None
    """Latency of messages below 16 KiB, where they take another way."""
    core_s_per_byte: float = 0.0
    """What a byte costs the processors."""
    scatter: float = 0.05
    """Half the width of the middle 80 % of the time of a transfer, as a part of it; of a given link a guess."""
    uneven: float = 0.0
    """How unevenly several such links share one that they all go to, see `Wiring`. Connections of TCP do so for about
    as long as a step takes: of four into one port, over 0.7 s the fastest had 43 to 74 % and the slowest 5 to 9 %, over
    1.4 s 29 to 38 and 20 % (`throughput` of benchmarks/hosts.py)."""
    shared: bool = False
    """One path for all workers, as on one host."""
    source: str = ""
    """Where the figures come from."""

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.alpha_s >= 0:
            raise UsageError(
                f"link {self.name}: alpha_s is {self.alpha_s}, bytes_per_s {self.bytes_per_s}: give a latency of 0 or "
                "more and a rate above 0"
            )


UNEVEN = 0.5
"""Of TCP: between a share for each and a stick broken at random, see `Link.uneven`."""

_FRAMING = 1448 / 1538
"""Payload of a full TCP segment (MTU 1500, time stamps) over what it takes on the wire with preamble and gap."""


def _ethernet(gbit: float, alpha_s: float, source: str) -> Link:
    return Link(
        name=f"{gbit:g}gbit",
        alpha_s=alpha_s,
        bytes_per_s=gbit * 1e9 / 8 * _FRAMING,
        uneven=UNEVEN,
        scatter=0.1,
        source=source,
    )


_TCP = "line rate times 1448/1538 (TCP in Ethernet frames of 1500 bytes); latency through the kernel: an assumption"

HARDWARE = {
    link.name: link
    for link in (
        _ethernet(1, 50e-6, _TCP),
        _ethernet(10, 30e-6, _TCP),
        _ethernet(25, 20e-6, _TCP),
        Link(
            name="100gbit",
            alpha_s=9.6e-6,
            bytes_per_s=100e9 / 8 * 4096 / 4178,
            scatter=0.1,
            source="RDMA (RoCE): line rate times 4096/4178 for its frames; latency of a step of NCCL's ring over a "
            "network (hwLat in its tuning.cc, Simple protocol)",
        ),
        Link(
            name="nvlink",
            alpha_s=3.4e-6,
            bytes_per_s=130e9,
            scatter=0.1,
            source="8 V100 with six NVLinks each, 150 GB/s in each direction, times an assumed 87 %; latency of a step "
            "of NCCL's ring (hwLat in its tuning.cc, NVLink, Simple protocol)",
        ),
    )
}
"""Links that people have, by name, for `--hardware`. Rates are what a program can get at best."""

_UNITS = {"bit": 1 / 8, "b": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}


def parse_rate(text: str) -> float:
    """Bytes per second from `200mbit`, `10gbit`, `1.5GB`, `12GiB`, with or without `/s`.

    Raises:
        UsageError: something else.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]i?)?(bit|b)(/s)?\s*", text.lower())
    try:
        rate = float(found[1]) * _PREFIXES[found[2] or ""] * _UNITS[found[3]] if found else 0.0
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise UsageError(f"--link-rate {text}: give a number and a unit, such as 200mbit, 10gbit or 1.2GB")
    return rate


def named(name: str) -> Link:
    """A link of `HARDWARE`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in HARDWARE:
        raise UsageError(f"--hardware {name}: it is one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def given(link: Link | None, rate: str | None, latency_us: float | None) -> Link | None:
    """A link with a rate or a latency of the user's own; None where nothing is given.

    Raises:
        UsageError: a rate or a latency that cannot be meant.
    """
    if rate is None and latency_us is None:
        return link
    if latency_us is not None and not 0 <= latency_us < 1e9:
        raise UsageError(f"--latency-us {latency_us}: give microseconds, 0 or more")
    link = link or replace(HARDWARE["1gbit"], name="given")
    if rate is not None:
        link = replace(link, name=rate, bytes_per_s=parse_rate(rate), source="given")
    if latency_us is not None:
        link = replace(link, alpha_s=latency_us * 1e-6, small_alpha_s=None)
    return link


def fit(
    sizes_bytes: Sequence[float], times_s: Sequence[Sequence[float]], *, at: float = 0.5
) -> tuple[float, float, float]:
    """A line through the medians of measured times: (seconds at no bytes, seconds per byte, scatter).

    Least squares of relative errors, so that small messages count as much as large ones; neither figure below zero.

    Args:
        sizes_bytes: size of each message.
        times_s: of each size, the times that were measured.
        at: quantile to take in the place of the medians.

    Returns:
        The line, and the larger of two things: half the width of the middle 80 % of the times around their median, and
        how far a median lies from the line, both as a part of the time (medians over the sizes).
    """
    sizes = np.asarray(sizes_bytes, dtype=float)
    medians = np.array([np.quantile(t, at) for t in times_s])
    rows = np.stack([1 / medians, sizes / medians], axis=1)
    (base, slope), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    if base < 0:
        base, slope = 0.0, float(np.median(medians / sizes))
    if slope <= 0:
        base, slope = float(np.median(medians)), 0.0
    spread = [(np.quantile(t, 0.9) - np.quantile(t, 0.1)) / 2 / np.median(t) for t in times_s]
    misfit = np.abs(base + slope * sizes - medians) / medians
    return float(base), float(slope), float(max(np.median(spread), np.median(misfit)))
