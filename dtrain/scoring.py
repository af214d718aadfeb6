"""How well predictions meet what was measured: runs that there are, and runs made for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dtrain.errors import DataError, UsageError
from dtrain.launcher import Plan, launch
from dtrain.measure.predict import Prediction, predict
from dtrain.measure.profile import Profile
from dtrain.plan import BACKENDS, Wanted, milliseconds
from dtrain.tables import table

_BUSY = 0.1


@dataclass(frozen=True, kw_only=True)
class Score:
    """A prediction beside a measured run."""

    what: str
    """Which run."""
    predicted: Prediction
    """What the model said."""
    measured_ms: float
    """The run's median step."""
    measured_exposed_ms: float | None
    """Its exposed communication, where the run says."""
    others: float | None = None
    """What other programs took of the cores meanwhile, as a part of all; None where nobody looked."""

    @property
    def error(self) -> float:
        """Of the step time: predicted over measured, less one."""
        return self.predicted.boxes.step_ms / self.measured_ms - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measured step lies in the interval."""
        return self.predicted.low_ms <= self.measured_ms <= self.predicted.high_ms

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "run": self.what,
            "measured_step_ms": self.measured_ms,
            "measured_exposed_comm_ms": self.measured_exposed_ms,
            "error": self.error,
            "inside": self.inside,
            "others": self.others,
            "predicted": self.predicted.record(),
        }


def scores(found: Sequence[Score]) -> str:
    """Predicted beside measured, as a table."""
    head = [
        "run",
        "predicted ms",
        "interval",
        "measured ms",
        "error",
        "inside",
        "exposed: predicted",
        "measured",
        "others",
    ]
    rows = []
    for s in found:
        p, exposed = s.predicted, s.measured_exposed_ms
        row = [
            s.what,
            milliseconds(p.boxes.step_ms),
            f"{milliseconds(p.low_ms)} to {milliseconds(p.high_ms)}",
            milliseconds(s.measured_ms),
        ]
        row += [f"{s.error:+.0%}", "yes" if s.inside else "no", milliseconds(p.boxes.exposed_comm_ms)]
        row += ["-" if exposed is None else milliseconds(exposed), "-" if s.others is None else f"{s.others:.0%}"]
        rows.append(row)
    lines = [table(head, rows)]
    if any(s.others is not None and s.others > _BUSY for s in found):
        lines.append(
            "others: what other programs took of the cores during the run. Predictions are as without them: such a row "
            "does not say how good the model is."
        )
    return "\n".join(lines)


def score_run(profile: Profile, folder: Path) -> Score:
    """How well the model meets a run that `dtrain train` has left, on this host.

    Raises:
        DataError: no run directory, or one of a run that cannot be predicted.
    """
    try:
        config, summary = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "summary.json")
        )
    except (OSError, ValueError) as error:
        raise DataError(f"--run {folder}: cannot be read: {error}") from error
    backend = config.get("backend")
    if backend not in (*BACKENDS, "solo") or config.get("staleness", 0) != 0 or config.get("backup_workers", 0):
        raise DataError(f"--run {folder}: only synchronous runs of ps, allreduce and solo are predicted, not {backend}")
    if any(config.get(name) for name in ("grow_batch", "adapt_batch")):
        raise DataError(f"--run {folder}: its global batch has changed on the way; plan each with --global-batch")
    if config.get("send_as", "same") != profile.send_as:
        raise DataError(
            f"--run {folder}: its gradients travelled as {config.get('send_as', 'same')}, and --send-as is "
            f"{profile.send_as}"
        )
    if "step_ms" not in summary:
        raise DataError(f"--run {folder}: summary.json has no step_ms: the run was too short")
    workers = int(config["workers"])
    wanted = Wanted(
        workers=(workers,),
        global_batch=int(config["global_batch"]),
        micro_batch=config.get("micro_batch"),
        backends=(backend,) if backend in BACKENDS else BACKENDS,
        update=config["update"] if config.get("update") in ("server", "sharded") else "worker",
        norm="global" if config.get("norm_batch") == "global" else "worker",
    )
    batch = wanted.samples(profile, workers)
    predicted = predict(profile, wanted.setting(backend, workers, int(config.get("servers", 1)), batch))
    return Score(
        what=str(folder),
        predicted=predicted,
        measured_ms=float(summary["step_ms"]),
        measured_exposed_ms=summary.get("exposed_comm_ms"),
    )


def verify(
    profile: Profile,
    wanted: Wanted,
    folder: Path,
    command: Callable[[str, int, Path], list[str]],
    *,
    timeout_s: float = 60.0,
) -> list[Score]:
    """Run the numbers of workers that are wanted on this host, each backend with one server, and score the model.

    Args:
        folder: where the runs' files go.
        command: (backend, workers, run directory) -> command line of a run.
        timeout_s: longest wait of a worker for another.

    Raises:
        UsageError: a link or a place that this host has not.
    """
    if wanted.place != "host" or wanted.link is not None:
        raise UsageError("--verify runs on this host: leave out --hardware, --link-rate, --latency-us and --place")
    found = []
    for workers in sorted(set(wanted.workers)):
        for backend in wanted.backends if workers > 1 else ("solo",):
            run_dir = folder / f"{backend}-{workers}"
            job = Plan(workers=workers, backend=backend, timeout_s=timeout_s)
            before = _used_s()
            code = launch(command(backend, workers, run_dir), job)
            others = _others(before, _used_s(), profile.cores)
            if code:
                raise SystemExit(code)
            summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
            batch = wanted.samples(profile, workers)
            found.append(
                Score(
                    what=f"{backend} x{workers}",
                    predicted=predict(profile, wanted.setting(backend, workers, 1, batch)),
                    measured_ms=float(summary["step_ms"]),
                    measured_exposed_ms=summary.get("exposed_comm_ms"),
                    others=others,
                )
            )
    return found


def _used_s() -> tuple[float, float, float]:
    """Now; core-seconds that this host's programs have used; and those of them that were ours, in processes that have
    ended."""
    host, children = psutil.cpu_times(), os.times()
    idle_s = host.idle + getattr(host, "iowait", 0.0) + getattr(host, "guest", 0.0)
    return time.monotonic(), sum(host) - idle_s, children.children_user + children.children_system


def _others(before: tuple[float, float, float], after: tuple[float, float, float], cores: int) -> float:
    elapsed_s, all_s, ours_s = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (all_s - ours_s) / (elapsed_s * max(cores, 1)))
