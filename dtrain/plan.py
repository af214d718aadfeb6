"""`dtrain plan`: predictions for many settings, in a table and in words."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dtrain.errors import UsageError
from dtrain.measure import advice
from dtrain.measure.hardware import Link
from dtrain.measure.predict import INTERVAL, Prediction, Setting, link_name, predict
from dtrain.measure.profile import Profile
from dtrain.measure.step import Place
from dtrain.probe import DISTURBED
from dtrain.tables import table

BACKENDS = ("ps", "allreduce")
"""Backends that can be predicted."""

_MOST_SERVERS = 128


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to predict for: every backend with every number of workers, servers and samples."""

    workers: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of workers."""
    backends: tuple[str, ...] = BACKENDS
    """`ps` and `allreduce`."""
    servers: tuple[int, ...] = (1, 2)
    """Numbers of servers, for ps."""
    batches: tuple[int, ...] = ()
    """Samples of each worker in a step; none: the global batch, shared out."""
    global_batch: int | None = None
    """Samples of all workers in a step; None: the profile's."""
    micro_batch: int | None = None
    """Most samples of one forward."""
    place: Place = "host"
    """Who shares a host, see `Setting`."""
    link: Link | None = None
    """Between hosts; None: as measured here."""
    sockets: bool = False
    """ps through sockets on one host too."""
    update: Literal["worker", "server", "sharded"] = "worker"
    """Who steps the optimizer."""
    norm: Literal["worker", "global"] = "worker"
    """Whose statistics batch norm uses."""

    def __post_init__(self) -> None:
        for name in ("workers", "servers", "batches"):
            values = getattr(self, name)
            if any(v < 1 for v in values) or (not values and name != "batches"):
                raise UsageError(
                    f"--{name} is {','.join(map(str, values))}: give numbers from 1 on, with commas between"
                )
        wrong = [b for b in self.backends if b not in BACKENDS]
        if wrong or not self.backends:
            raise UsageError(
                f"--backends has {', '.join(wrong) or 'none'}: only {' and '.join(BACKENDS)} can be planned"
            )
        if self.update == "sharded" and self.backends != ("allreduce",):
            raise UsageError("--update sharded is planned over all-reduce: give --backends allreduce")
        if self.batches and self.global_batch is not None:
            raise UsageError("--batches is for each worker and --global-batch for all together: give one of them")

    def samples(self, profile: Profile, workers: int) -> float:
        """Samples of each worker, where `batches` does not say."""
        return (self.global_batch or profile.global_batch) / workers

    def largest_micro_batch(self, profile: Profile) -> int:
        """Samples of the largest one of all settings."""
        samples = max(self.batches or (self.samples(profile, workers) for workers in self.workers))
        return max(1, math.ceil(min(samples, self.micro_batch or samples)))

    def most_servers(self, profile: Profile, workers: int) -> int:
        """How many servers there could be."""
        if self.place == "host":
            return max(1, profile.cores)
        return workers if self.place == "beside" else min(_MOST_SERVERS, 4 * workers)

    def setting(self, backend: str, workers: int, servers: int, batch: float) -> Setting:
        """One of the settings."""
        return Setting(
            backend="solo" if workers == 1 else backend,  # type: ignore[arg-type]
            workers=workers,
            batch=batch,
            micro_batch=self.micro_batch,
            servers=servers,
            place=self.place,
            link=self.link,
            sockets=self.sockets,
            update=self.update,
            norm=self.norm,
        )


def predictions(profile: Profile, wanted: Wanted) -> list[Prediction]:
    """Every setting that is wanted; one worker once, and no more servers than there could be."""
    found = []
    for workers in sorted(set(wanted.workers)):
        for batch in wanted.batches or (wanted.samples(profile, workers),):
            if workers == 1:
                found.append(predict(profile, wanted.setting("solo", 1, 1, batch)))
                continue
            for backend in wanted.backends:
                most = wanted.most_servers(profile, workers)
                counts = [k for k in sorted(set(wanted.servers)) if k <= most] or [1]
                for servers in counts if backend == "ps" else [1]:
                    found.append(predict(profile, wanted.setting(backend, workers, servers, batch)))
    return found


def words(profile: Profile, wanted: Wanted, *, fits: Callable[[float], bool] = lambda _: True) -> list[str]:
    """The answers in words.

    Args:
        fits: whether a worker has the memory for a micro-batch of so many samples.
    """

    @functools.cache
    def ask(backend: str, workers: int, servers: int, batch: float) -> Prediction:
        return predict(profile, wanted.setting(backend, workers, servers, batch))

    question = advice.Question(
        backends=wanted.backends,
        workers=sorted(set(wanted.workers)),
        servers=sorted(set(wanted.servers)),
        batch=lambda n: wanted.batches[-1] if wanted.batches else wanted.samples(profile, n),
        most_servers=lambda n: wanted.most_servers(profile, n),
        fits=lambda samples: fits(min(samples, wanted.micro_batch or math.inf)),
    )
    return advice.words(ask, question)


def about(profile: Profile, wanted: Wanted) -> list[str]:
    """What the predictions rest on."""
    where = {
        "host": f"All on this host of {profile.cores} cores: workers, servers and transfers share them, "
        f"so n workers have {profile.cores}/n cores each.",
        "apart": "Each worker and each server on a host of its own, like this one.",
        "beside": "Each worker on a host of its own, like this one; servers beside workers.",
    }[wanted.place]
    lines = [f"{profile.recipe}, {profile.parameters / 1e6:.3g} M parameters, on {profile.device}. {where}"]
    if profile.send_as != "same":
        lines.append(f"Gradients travel as {profile.send_as}.")
    if wanted.update == "sharded":
        lines.append("Each worker keeps a part of the optimizer's state, and steps that part for all.")
    used = [wanted.link] if wanted.link else [profile.links[name] for name in _used(wanted) if name in profile.links]
    for link in used:
        rate = f"{link.bytes_per_s / 1e9:.3g} GB/s" + (" in all" if link.shared else " each way")
        lines.append(f"Link {link.name}: {link.alpha_s * 1e6:.3g} us, {rate}. {link.source}.")
    if profile.disturbed >= DISTURBED:
        lines.append(
            f"Other programs were at work during the probe (a step took {profile.disturbed:.1f} times its own time): "
            "computing is predicted as without them, and runs beside them will be slower."
        )
    if max(wanted.workers) > profile.cores and wanted.place == "host":
        lines.append(f"More than {profile.cores} workers take turns on the cores: such rows say what that costs.")
    return lines


def _used(wanted: Wanted) -> list[str]:
    return [link_name(backend, sockets=wanted.sockets, update=wanted.update) for backend in wanted.backends]


def text(found: Sequence[Prediction]) -> str:
    """The predictions as a table."""
    head = [
        "backend",
        "workers",
        "servers",
        "batch each",
        "step ms",
        "interval",
        "compute ms",
        "exposed ms",
        "hidden ms",
    ]
    head += ["ratio", "efficiency", "samples/s"]
    rows = []
    for p in found:
        s, b = p.setting, p.boxes
        sends = b.exposed_comm_ms + b.hidden_comm_ms > 1e-6
        row = [s.backend, str(s.workers), str(s.servers) if s.backend == "ps" else "-", f"{s.batch:.4g}"]
        row += [
            milliseconds(b.step_ms),
            f"{milliseconds(p.low_ms)} to {milliseconds(p.high_ms)}",
            milliseconds(b.compute_ms),
        ]
        row += [milliseconds(b.exposed_comm_ms), milliseconds(b.hidden_comm_ms)] if sends else ["-", "-"]
        row += [f"{p.ratio:.1f}" if sends and math.isfinite(p.ratio) else "-", f"{p.efficiency:.0%}"]
        rows.append([*row, f"{p.samples_per_s:.0f}"])
    return table(head, rows)


def milliseconds(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def record(
    profile: Profile, wanted: Wanted, found: Sequence[Prediction], said: Sequence[str], scored: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Everything, for `--json`; `scored` are records of `dtrain.scoring.Score`."""
    return {
        "recipe": profile.recipe,
        "place": wanted.place,
        "about": about(profile, wanted),
        "interval": INTERVAL,
        "predictions": [p.record() for p in found],
        "words": list(said),
        "scores": list(scored),
        "profile": profile.record(),
    }


def teller(shown: bool) -> Callable[[str], None]:
    """Says on a terminal what a probe is doing."""
    if not (shown and sys.stderr.isatty()):
        return lambda _: None
    return lambda what: print(f"dtrain: probing {what} ...", file=sys.stderr, flush=True)
