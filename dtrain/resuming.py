"""Going on with a run: whether a run directory fits what is asked for, and what became of the run that left it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from dtrain import checkpoint, env
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.errors import DataError, UsageError
from dtrain.learning import Learning
from dtrain.recipes import Recipe
from dtrain.spec import RunSpec, batch_of, first_rate
from dtrain.trainer import Trainer


def check_place(spec: RunSpec, *, again: bool = False) -> None:
    """Refuse a run directory that does not fit what is asked for.

    Args:
        again: whether this job was started before, and so finds checkpoints of its own.

    Raises:
        UsageError: it has the checkpoints of another run, or none is given to resume.
        DataError: there is no checkpoint to resume from.
    """
    if spec.resume and spec.auto_resume:
        raise UsageError("--resume and --auto-resume: the one needs a checkpoint, the other does not; give one of them")
    if spec.run_dir is None:
        if spec.resume or spec.auto_resume:
            flag = "--resume" if spec.resume else "--auto-resume"
            raise UsageError(f"{flag} needs --run-dir: the directory of the run to go on with")
        return
    root = Path(spec.run_dir) / "checkpoints"
    found = checkpoint.steps(root)
    if found and not (spec.resume or spec.auto_resume or again):
        raise UsageError(f"{spec.run_dir} has the checkpoints of an earlier run: give --resume, or another --run-dir")
    if spec.resume and not found:
        checkpoint.load(root)  # says what is wrong


def started_again(comm: Backend) -> bool:
    """Whether a launcher has started this job before. torchrun's agents do not all count alike: any one's word does."""
    return collectives.any_says(comm, env.resolve().restart > 0, "metric/again")


def resumes(comm: Backend, spec: RunSpec, folder: Path, *, again: bool) -> bool:
    """Whether to go on from a checkpoint, the same for all workers."""
    if spec.resume:
        return True
    found = (spec.auto_resume or again) and bool(checkpoint.steps(folder / "checkpoints"))
    return collectives.any_says(comm, found, "metric/resume")


def has_ended(trainer: Trainer, folder: Path) -> bool:
    """Whether a run that has made all of its steps has also left its files; worker 0 looks for all."""
    ended = trainer.comm.rank == 0 and ended_at(folder) == trainer.state.step
    return collectives.any_says(trainer.comm, ended, "metric/ended")


def ended_at(folder: Path) -> int | None:
    """The last step of a run that has ended."""
    try:
        steps: int | None = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError):
        return None
    return steps


def ended_before(comm: Backend, spec: RunSpec, folder: Path) -> dict[str, Any]:
    """The summary of a run that had ended when it was started again."""
    if comm.rank == 0 and spec.progress:
        print(f"dtrain: the run in {folder} had ended; nothing is left to train", file=sys.stderr, flush=True)
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'summary.json'} cannot be read: {error}") from error
    collectives.barrier(comm)
    return summary


_SAME = (
    *("recipe", "options", "data", "dtype", "seed", "global_batch", "norm_batch", "precise_batches"),
    *("lr", "amp", "send_as", "clip_grad_norm"),
    *(field.name for field in dataclasses.fields(Learning) if field.name != "curvature_samples"),
)
"""What a resumed run must share with the run that it goes on with."""


def resume(trainer: Trainer, spec: RunSpec, recipe: Recipe, folder: Path) -> int:
    """Go on from the newest checkpoint; the step that was reached."""
    planned = check_same(spec, recipe, folder)
    step = trainer.resume(folder / "checkpoints")
    total = trainer.state.steps
    collectives.barrier(trainer.comm)  # all have read the old config.json
    if trainer.comm.rank == 0:
        if spec.progress:
            of = "" if total is None else f" of {total}"
            print(f"dtrain: resuming {folder} at step {step}{of}", file=sys.stderr, flush=True)
        now = _length(dataclasses.asdict(trainer.config))
        if planned not in (None, now):
            text = f"dtrain: this run is now {now}; up to step {step} its learning rate was planned for {planned}"
            print(text, file=sys.stderr, flush=True)
    return step


def check_same(spec: RunSpec, recipe: Recipe, folder: Path) -> str | None:
    """Refuse to resume a run that was told otherwise; how long it was planned to be, where that is known."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} cannot be read: {error}; remove it to resume without it") from error
    given = {**dataclasses.asdict(spec), "lr": first_rate(spec, recipe), "global_batch": batch_of(spec, recipe)}
    for name in _SAME:
        if name not in saved:
            continue
        here, there = given[name], saved[name]
        if isinstance(here, tuple):
            here, there = sorted(here), sorted(there)
        if name == "lr" and there is None:  # as files of older versions say that it is the recipe's
            there = first_rate(dataclasses.replace(spec, lr=None), recipe)
        if here != there:
            raise UsageError(
                f"{name} is {here!r}, and the run in {folder} has {there!r}: give the same, or another --run-dir"
            )
    return _length(saved)


def _length(config: dict[str, Any]) -> str:
    """Of `epochs` and `steps`, the one that is given, in words."""
    return f"{config['steps']} steps" if config.get("steps") is not None else f"{config.get('epochs')} epochs"


def nothing_to_train(step: int) -> DataError:
    return DataError(f"nothing to train: the checkpoint is at step {step} already; raise --epochs or --steps")
