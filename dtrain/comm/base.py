"""The seam: what a backend must do, and nothing else.

A backend sums flat tensors over workers. Everything above it (gradients, batch-norm statistics, metrics, broadcast,
barrier) is made of that one verb, so that a new backend is a small class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain.errors import UsageError

LANES = ("gradient", "norm", "metric")
"""Kinds of traffic. Each has a lane of its own: a batch-norm message and a gradient bucket never wait for each other's
turn, and cannot interleave differently on two workers. A key begins with its lane: `gradient/3`, `norm/layer1.bn`."""

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
)
"""Types that every backend sums."""


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when the tensor holds the result.

        Raises:
            CommError: another process is gone, late or silent; the message names it.
        """


@runtime_checkable
class Announces(Work, Protocol):
    """A Work that tells when its result has come, before anybody waits for it."""

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call back once, when this worker sees that the transfer is over: perhaps a while after, or never."""


@dataclass(eq=False)
class Traffic:
    """Payload bytes that one worker has sent and received, by lane."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def count(self, key: str, sent: int, received: int) -> None:
        lane = lane_of(key)
        self.sent[lane] += sent
        self.received[lane] += received


@runtime_checkable
class Backend(Protocol):
    """Sums flat tensors over `world_size` workers, which make the same calls in the same order within each lane."""

    name: str
    rank: int
    world_size: int
    traffic: Traffic
    packs: bool
    """Whether a tensor that lies elsewhere than in what `empty` gives costs a copy: gradients are then laid there, and
    not sent from where autograd put them."""

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Uninitialised flat tensor in the memory that this backend sends fastest."""

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        """Start to replace `flat` by its sum over workers: the same bits on every worker.

        Args:
            flat: contiguous tensor of one dimension, of a type in `DTYPES`; not to be touched until `wait`.
            key: lane, a slash, and a name; says what is sent, in error messages too.
        """

    def close(self) -> None:
        """Leave the job. Idempotent; no call may follow."""


@runtime_checkable
class PrimaryHost(Backend, Protocol):
    """A Backend whose worker 0 can update for all: gradients are gathered there, parameters come from there."""

    def gather_sum(self, flat: Tensor, key: str) -> Work:
        """Start to replace worker 0's `flat` by the sum over workers; the others' is left as it is."""

    def send_first(self, flat: Tensor, key: str) -> Work:
        """Start to replace everyone's `flat` by worker 0's."""


@runtime_checkable
class Scatters(Backend, Protocol):
    """A Backend that does the two halves of an all-reduce apart. Worker r's part of a flat tensor is the r-th of
    `world_size` equal ones."""

    def reduce_scatter(self, flat: Tensor, key: str) -> Work:
        """Start to replace this worker's part of `flat` by its sum over workers; the rest may hold anything then."""

    def all_gather(self, flat: Tensor, key: str) -> Work:
        """Start to replace each worker's part of `flat` by what that worker has there."""


@runtime_checkable
class Rejoins(Backend, Protocol):
    """A Backend that a job can go on with after a process was lost and replaced: its calls then raise `Rewound`."""

    epoch: int
    """How often the job has gone back to its last commit."""
    incarnation: int
    """How often this worker has been started again."""

    def rejoin(self, epoch: int) -> None:
        """Come again, in that epoch or a later one; returns when all workers have."""


@dataclass(frozen=True)
class Span:
    """One round at a server, in seconds of the monotonic clock of whoever asked."""

    name: str
    """The key of the transfer."""
    first_s: float
    """Its first part came."""
    last_s: float
    """Its last part came; until then the server waited."""
    done_s: float
    """The result was on its way."""
    last_rank: int
    """Whose part was the last."""


@runtime_checkable
class TellsSpans(Backend, Protocol):
    """A Backend whose servers remember their latest rounds."""

    def server_spans(self) -> list[list[Span]]:
        """By server: its latest rounds, on this worker's clock. Any worker may call it, between transfers."""


class Done:
    """The work of a transfer that is over when it starts."""

    def wait(self) -> None:
        return None


def lane_of(key: str) -> str:
    """The lane that a key travels on.

    Raises:
        UsageError: the key does not begin with a lane and a slash.
    """
    lane, slash, _ = key.partition("/")
    if not slash or lane not in LANES:
        raise UsageError(f"key {key!r} names no lane: a key is one of {', '.join(LANES)}, a slash, and a name")
    return lane


def dtype_name(dtype: torch.dtype) -> str:
    """As messages have it: `float32`."""
    return str(dtype).removeprefix("torch.")


def check_flat(flat: Tensor, key: str) -> None:
    """Refuse what cannot be summed as it lies in memory.

    Raises:
        UsageError: more than one dimension, not contiguous, sparse, or a type not in `DTYPES`.
    """
    lane_of(key)
    if flat.layout is not torch.strided or flat.dim() != 1 or not flat.is_contiguous():
        raise UsageError(f"{key}: all_reduce takes a flat contiguous tensor, not one of shape {tuple(flat.shape)}")
    if flat.dtype not in DTYPES:
        names = ", ".join(map(dtype_name, DTYPES))
        raise UsageError(f"{key}: type {flat.dtype} cannot be summed over workers; the types are {names}")
