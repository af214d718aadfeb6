"""What a server's pure core wants done: messages to send, sums and steps to make, memory to map."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dtrain.ps.layout import Layout
from dtrain.ps.members import Send, Session
from dtrain.ps.rounds import Part
from dtrain.ps.wire import Answer, Fetch, Pull, PullShared, Share, Unshare

# -- of parameters that live here -------------------------------------------------------------------------------------

Asked = tuple[int, int]
"""A worker's request: its rank and the number of the request."""


@dataclass(frozen=True)
class Reply:
    """Answer a worker."""

    rank: int
    answer: Answer


@dataclass(frozen=True)
class Build:
    """All workers have described the same parameters: make room for them; then answer Done."""

    layout: Layout
    asked: list[Asked]


@dataclass(frozen=True)
class Load:
    """Take in values of parameters and the optimizer's state; then answer Done."""

    parts: list[Tensor]
    asked: Asked


@dataclass(frozen=True)
class Save:
    """Answer with a part of the values and the state."""

    rank: int
    request: Fetch


@dataclass(frozen=True)
class Gradient:
    """What a worker pushed of one bucket."""

    rank: int
    payloads: list[Tensor]  # one a part, in order
    flags: bytes
    asked: list[int]  # requests to answer Done when it has been used


@dataclass(frozen=True)
class Measure:
    """Sum these gradients, keep the sums, and answer with the sums of squares of their mean."""

    gradients: list[list[Gradient]]  # by bucket, in worker order
    factor: float


@dataclass(frozen=True)
class Direct:
    """Begin a step with trust ratios; keep what moves the parameters, and answer with the sums of squares of both."""

    gradients: list[list[Gradient]]  # by bucket, in worker order
    factor: float
    settings: Tensor  # the optimizer's, for this step
    measured: bool  # whether the sums are known from Measure


@dataclass(frozen=True)
class Update:
    """Step the optimizer on a bucket with the sum of these gradients times `factor`; answer them, and the pulls."""

    bucket: int
    gradients: list[Gradient]  # in worker order
    factor: float
    settings: Tensor  # the optimizer's, for this step
    behind: int  # staleness of the gradient
    measured: bool  # whether the sum is known from Measure
    pulls: list[tuple[int, Pull | PullShared]] = field(default_factory=list)
    ratios: list[float] | None = None  # of all pieces that the server has: the end of a step that Direct began


@dataclass(frozen=True)
class Give:
    """Answer a pull with the parameters as they are now."""

    rank: int
    request: Pull | PullShared


@dataclass(frozen=True)
class TellSquares:
    """Answer with the sums of squares of the last Measure or Direct."""

    asked: Asked


StoreWork = Reply | Build | Load | Save | Measure | Direct | Update | Give | TellSquares


# -- of everything else -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumUp:
    """A round is complete: sum its parts in worker order, and answer each."""

    parts: list[tuple[Session, Part]]


@dataclass(frozen=True)
class Map:
    """Map a segment of shared memory, or forget it; then answer."""

    session: Session
    request: Share | Unshare


@dataclass(frozen=True)
class Tell:
    """Answer with what was done lately."""

    session: Session
    seq: int


@dataclass(frozen=True)
class Forget:
    """These connections are used no more: free what was mapped for them; drop all work for them."""

    sessions: list[Session]


@dataclass(frozen=True)
class GiveUp:
    """A worker is alive and makes no progress: whoever started it is to end it, or it cannot be replaced."""

    pid: int


Effect = Send | SumUp | Map | Tell | Forget | GiveUp | StoreWork
