"""What a probe found out, as a file: how long the model computes, what it sends and when, and what the links cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.errors import DataError
from dtrain.measure.hardware import Link
from dtrain.measure.step import Bucket, NormMessage

VERSION = 1
"""Of the file. Another one is refused."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Seconds as a function of the samples in a micro-batch: `base_s + per_sample_s * samples`."""

    base_s: float = 0.0
    """What it takes whatever the samples."""
    per_sample_s: float = 0.0
    """What each sample adds."""

    def at(self, samples: float) -> float:
        """Seconds for that many samples."""
        return self.base_s + self.per_sample_s * samples


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A model on a host, as probed; saved and loaded as JSON."""

    recipe: str
    """What was probed, for people."""
    parameters: int
    """Trainable ones."""
    global_batch: int
    """Samples in a step, unless one asks for others."""
    data: Line
    """Fetching the samples of a step."""
    forward: Line
    """Forward of a micro-batch, with the loss."""
    backward: Line
    """Backward of a micro-batch."""
    optimizer: Line
    """The optimizer's step."""
    rest_s: float = 0.0
    """What the trainer does in a step beside all that."""
    scatter: float = 0.0
    """How far a step's time lies from the typical one: the standard deviation as a part of it, from quartiles."""
    doubt: float = 0.0
    """How far the measured typical times lie from the lines, as a part of them."""
    buckets: tuple[Bucket, ...] = ()
    """Of backends that send large gradients from where they lie (allreduce)."""
    packed: tuple[Bucket, ...] = ()
    """Of backends that lay all gradients in buffers of their own (ps)."""
    send_as: str = "same"
    """Type that gradients travel as, in `buckets`, `packed` and `links`: same, bf16, fp16."""
    norms: tuple[NormMessage, ...] = ()
    """Batch-norm layers, whose statistics travel where they are synchronised; for two workers."""
    cores: int = 1
    """Processors of the host."""
    threads: int = 1
    """Processor threads with which the lines were measured."""
    all_threads: float = 1.0
    """Time with as many threads as cores over the time with `threads`."""
    crowded: float = 1.0
    """Time of one thread while every other core is at work for another worker over its time alone."""
    disturbed: float = 1.0
    """Time by the clock over the time in which the model's thread ran: above 1, other programs were at work. Of one
    thread, computing times leave out what they took."""
    links: Mapping[str, Link] = field(default_factory=dict)
    """What was measured: allreduce, its halves (`allreduce sharded`), `ps` (shared memory), `ps sockets`."""
    device: str = "cpu"
    """Where the model computed."""
    host: Mapping[str, str] = field(default_factory=dict)
    """Processor and versions."""
    probed: Mapping[str, Any] = field(default_factory=dict)
    """The measured times that the lines were laid through, for people and plots."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"version": VERSION, **dataclasses.asdict(self)}


def load(path: Path) -> Profile:
    """Read a profile that was saved.

    Raises:
        DataError: no such file, or not a profile of this version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--profile {path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        said = found.get("version") if isinstance(found, dict) else None
        raise DataError(f"--profile {path}: is of version {said}, and this is {VERSION}: probe again")
    try:
        return _profile({key: value for key, value in found.items() if key != "version"})
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"--profile {path}: is no profile: {error}") from error


def _profile(found: dict[str, Any]) -> Profile:
    lines: dict[str, Any] = {
        name: Line(**found[name]) for name in ("data", "forward", "backward", "optimizer") if name in found
    }
    lists: dict[str, Any] = {
        name: tuple(kind(**row) for row in found.get(name, ()))
        for name, kind in (("buckets", Bucket), ("packed", Bucket), ("norms", NormMessage))
    }
    links = {name: Link(**row) for name, row in found.get("links", {}).items()}
    fields: dict[str, Any] = {**found, **lines, **lists, "links": links}
    return Profile(**fields)
