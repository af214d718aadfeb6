"""One worker's step at a server: what has come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dtrain.errors import ProtocolError
from dtrain.ps.effects import Gradient
from dtrain.ps.layout import BucketRange
from dtrain.ps.wire import DTYPE_NAMES, PART_BYTES, Begin, Push, PushShared


@dataclass
class Turn:
    """A worker's step under way."""

    step: int
    since_s: float  # when it began; once complete, when it was
    begin: Begin | None = None
    settings: Tensor | None = None
    pushed: dict[int, dict[int, tuple[Push | PushShared, Tensor]]] = field(default_factory=dict)
    complete: bool = False
    answer_to: int | None = None  # request that is answered when the step is made
    ratios: Tensor | None = None  # float64, in bytes: what the worker has passed on
    counted: int = 0  # workers whose gradient the step is made of, if this one's is among them

    def gradient(self, rank: int, bucket: int) -> Gradient:
        """Of a bucket that has come whole."""
        parts = [self.pushed[bucket][n] for n in sorted(self.pushed[bucket])]
        return Gradient(rank, [payload for _, payload in parts], parts[0][0].flags, [r.seq for r, _ in parts])

    def take(self, rank: int, request: Push | PushShared, payload: Tensor, range_: BucketRange) -> None:
        """A part of a bucket's gradient has come.

        Raises:
            ProtocolError: it has before, or does not fit.
        """
        number, shared = (request.part, False) if isinstance(request, Push) else (0, True)
        parts = self.pushed.setdefault(request.bucket, {})
        if number in parts or (parts and (shared or isinstance(parts.get(0, (None,))[0], PushShared))):
            raise ProtocolError(f"worker {rank} pushed bucket {request.bucket}, part {number} twice")
        numel = range_.numel if isinstance(request, PushShared) else part_sizes(range_)[number : number + 1]
        if payload.numel() != (numel if isinstance(numel, int) else sum(numel)) or payload.numel() == 0:
            raise ProtocolError(f"{payload.numel()} numbers for bucket {request.bucket}, part {number}")
        if len(request.flags) != (-(-range_.flags // 8)):
            raise ProtocolError(f"{len(request.flags)} bytes of flags for bucket {request.bucket}")
        parts[number] = (request, payload)

    def has(self, range_: BucketRange) -> bool:
        """Whether all of a bucket's gradient has come."""
        parts = self.pushed.get(range_.bucket, {})
        if 0 in parts and isinstance(parts[0][0], PushShared):
            return True
        return len(parts) == len(part_sizes(range_))

    def answered(self) -> int:
        """The request that it owes an answer; it is answered now."""
        seq, self.answer_to = self.answer_to, None
        if seq is None:
            raise ProtocolError(f"a second answer in step {self.step}")
        return seq


def part_sizes(range_: BucketRange) -> list[int]:
    """Elements of the parts in which a range travels."""
    most = PART_BYTES // DTYPE_NAMES[range_.dtype].itemsize
    full, rest = divmod(range_.numel, most)
    return [most] * full + ([rest] if rest else [])
