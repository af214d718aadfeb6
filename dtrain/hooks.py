"""What hangs on the training loop. A hook is given the state of the run, never the trainer.

    class Hook(Protocol):
        on_start(state)    before the first step
        on_step(state)     after each optimizer step
        on_epoch(state)    after each epoch
        on_end(state)      after the last step
    on_stop(state)     when the run was asked to stop: saves what is to be saved
    on_rewind(state)   after the run has gone back to an earlier step, because a process was lost

Hooks run on every worker, at the same steps, in the order in which they were given: one that communicates may.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from dtrain import checkpoint, norm
from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.evaluate import Score, evaluate
from dtrain.measure.ledger import Late
from dtrain.measure.trace import Event
from dtrain.prometheus import Metrics
from dtrain.replica import Observer

log = logging.getLogger(__name__)


@dataclass
class State:
    """What a hook sees of a run, and may add metrics to."""

    look: Callable[[], nn.Module]
    """Gives the model when its parameters are there."""
    comm: Backend
    steps: int | None
    """Optimizer steps in all, where it is known; changes with the global batch."""
    snapshot: Callable[[], dict[str, object] | None]
    """What a checkpoint holds, on worker 0, or the next one if the job goes on without it; None elsewhere. All workers
    must call it."""
    observe: Callable[[Observer], None]
    """`Replica.observe`: shows an observer each worker's gradients before they are summed."""
    resize: Callable[[int], None]
    """Gives the steps to come another global batch. All workers call it, after the same step."""
    loss_scale: Callable[[], float] = lambda: 1.0
    """What the loss is multiplied by, in half precision."""
    global_batch: int = 0
    """Samples of a step to come, over all workers; an epoch's last may have fewer."""
    step: int = 0
    """Optimizer steps made."""
    epoch: int = 0
    """Epochs completed."""
    samples: int = 0
    """Samples seen by all workers together."""
    loss: float = math.nan
    """Mean loss over the samples since the last record."""
    record: dict[str, float] | None = None
    """What is to be logged after this step, on worker 0: loss, rate, times, bytes. None between records."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""
    share: int = 1
    """Samples of a full global batch that are this worker's: what its own statistics weigh."""
    rewinds: int = 0
    """How often the run has gone back to an earlier step, because a process was lost."""
    fresh: list[list[dict[str, float]]] = field(default_factory=list)
    """For each step whose times became known after this one: each worker's record, see `dtrain.measure.Ledger`. Only
    this worker's, where workers do not wait for each other."""
    late: list[Late] = field(default_factory=list)
    """By worker: what its lateness cost the others."""
    events: Callable[[], tuple[list[Event], dict[str, int]]] = lambda: ([], {})
    """This worker's part of a trace of a few steps, and which of them is typical and which the slowest."""

    @property
    def model(self) -> nn.Module:
        """What is trained, with the parameters after the last step."""
        return self.look()

    @property
    def first(self) -> bool:
        """Whether this is worker 0, which prints and writes for all."""
        return self.comm.rank == 0


class Hook:
    """Base of hooks: does nothing."""

    steers = False
    """Whether it sets the learning rate: then a Trainer takes no scheduler beside it."""

    def on_start(self, state: State) -> None: ...

    def on_step(self, state: State) -> None: ...

    def on_epoch(self, state: State) -> None: ...

    def on_end(self, state: State) -> None: ...

    def on_stop(self, state: State) -> None: ...

    def on_rewind(self, state: State) -> None: ...

    def saved(self) -> dict[str, Any] | None:
        """What a checkpoint is to keep of this hook, the only one of its class. All call it; worker 0's counts."""
        return None

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Be as when `saved` gave this, on every worker, before `on_start` or `on_rewind`; None: as at the start."""


class Progress(Hook):
    """A progress bar on worker 0, with the loss and the latest metrics; a terminal's only, unless `always`."""

    def __init__(self, label: str, *, stream: TextIO | None = None, always: bool = False) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._always = always
        self._bar: tqdm[Any] | None = None

    def on_start(self, state: State) -> None:
        if state.first and (self._always or self._stream.isatty()):
            self._bar = tqdm(
                total=state.steps,
                initial=state.step,
                desc=self._label,
                file=self._stream,
                unit="step",
                leave=True,
            )

    def on_step(self, state: State) -> None:
        if self._bar is None:
            return
        if state.record:
            shown = {
                "loss": f"{state.loss:.4f}",
                **{k: f"{v:.4f}" for k, v in state.metrics.items() if k != "loss"},
            }
            self._bar.set_postfix(shown, refresh=False)
        self._bar.total = state.steps
        self._bar.update(state.step - self._bar.n)

    def on_rewind(self, state: State) -> None:
        if self._bar is not None:
            self._bar.n = state.step
            self._bar.refresh()

    def on_end(self, state: State) -> None:
        if self._bar is not None:
            self._bar.close()


class Evaluate(Hook):
    """Scores of a data set after each epoch and at the end, into `state.metrics`."""

    def __init__(
        self,
        dataset: Dataset[Any],
        score: Score,
        *,
        finish: Callable[[dict[str, float]], dict[str, float]] = dict,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            score: see `dtrain.evaluate`.
            finish: turns the means into what is reported (a perplexity, say).
        """
        self._dataset = dataset
        self._score = score
        self._finish = finish
        self._device = device
        self._scored_step = -1

    def on_epoch(self, state: State) -> None:
        if state.step == self._scored_step:
            return
        self._scored_step = state.step
        means = evaluate(
            state.model, self._dataset, self._score, state.comm, device=self._device, statistics_of=state.share
        )
        state.metrics = self._finish(means)

    def on_end(self, state: State) -> None:
        self.on_epoch(state)

    def on_rewind(self, state: State) -> None:
        self._scored_step = -1


class Precise(Hook):
    """Batch-norm statistics of the weights as they are, after each epoch and at the end: see `dtrain.norm.precise`.

    Give it before `Evaluate` and `Checkpoint`, which are to have them.
    """

    def __init__(
        self,
        batches: Callable[[int], Iterable[Any]],
        *,
        estimator: str = "average",
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        """
        Args:
            batches: this worker's batches to compute them over; called with the number of epochs completed.
            estimator, forward: as of `dtrain.norm.precise`.
        """
        self._batches = batches
        self._estimator = estimator
        self._forward = forward
        self._step = -1

    def on_epoch(self, state: State) -> None:
        if state.step != self._step:
            self._step = state.step
            batches = self._batches(state.epoch)
            norm.precise(state.model, batches, estimator=self._estimator, comm=state.comm, forward=self._forward)

    def on_end(self, state: State) -> None:
        self.on_epoch(state)

    def on_rewind(self, state: State) -> None:
        self._step = -1


class LineLog(Hook):
    """Base of logs with one JSON object a line, on worker 0.

    A run that starts or is resumed at a step keeps what the file has up to that step; the rest is written anew. A
    number that is not finite is null.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_start(self, state: State) -> None:
        if state.first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_to_step(self._path, state.step)
            self._path.write_text("".join(kept), encoding="utf-8")
            if self._file is None and kept:
                self._go_on_after(json.loads(kept[-1]))
            self._file = self._path.open("a", encoding="utf-8")

    def on_end(self, state: State) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_rewind(self, state: State) -> None:
        if self._file is not None:
            self._file.close()
        self.on_start(state)

    def _go_on_after(self, last: dict[str, Any]) -> None:
        """Another process has written the file so far; its last line."""

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.writelines(json.dumps(finite(record), allow_nan=False) + "\n" for record in records)
            self._file.flush()


class JsonLog(LineLog):
    """Records of steps, and the metrics after each epoch and at the end. See `LineLog`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metrics_step = -1

    def on_step(self, state: State) -> None:
        if state.record is not None:
            self._write([{**_position(state), **state.record}])

    def on_epoch(self, state: State) -> None:
        if state.metrics and state.step != self._metrics_step:
            self._metrics_step = state.step
            self._write([{**_position(state), "metrics": state.metrics}])

    def on_end(self, state: State) -> None:
        self.on_epoch(state)
        super().on_end(state)

    def on_rewind(self, state: State) -> None:
        self._metrics_step = -1
        super().on_rewind(state)


def _position(state: State) -> dict[str, int]:
    return {"step": state.step, "epoch": state.epoch, "samples": state.samples}


def finite(value: Any) -> Any:
    """The same tree for strict JSON, which knows no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_to_step(path: Path, step: int) -> list[str]:
    """Lines of a log up to a step, the step included; without what a kill has torn."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            found = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(found, int) and found <= step and line.endswith("\n"):
            kept.append(line)
    return kept


class TensorBoard(Hook):
    """Scalars for TensorBoard, on worker 0. Needs the extra `dtrain[tensorboard]`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("TensorBoard is not installed: pip install 'dtrain[tensorboard]'") from error
        self._make = SummaryWriter
        self._folder = folder
        self._writer: Any = None
        self._metrics_step = -1

    def on_start(self, state: State) -> None:
        if state.first:
            self._writer = self._make(str(self._folder), purge_step=state.step + 1 if state.step else None)

    def on_step(self, state: State) -> None:
        self._write("train", state.record or {}, state.step)

    def on_epoch(self, state: State) -> None:
        if state.step != self._metrics_step:
            self._metrics_step = state.step
            self._write("test", state.metrics, state.step)

    def on_end(self, state: State) -> None:
        self.on_epoch(state)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, group: str, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


class Prometheus(Hook):
    """The latest record and metrics for Prometheus at http://127.0.0.1:PORT/metrics, on worker 0."""

    _COUNTERS = ("step", "epoch", "samples")

    def __init__(self, port: int) -> None:
        """
        Args:
            port: 0 takes a free one, which is logged as a warning.
        """
        self._port = port
        self._figures: dict[str, float] = {}
        self._server: Metrics | None = None

    def on_start(self, state: State) -> None:
        if state.first:
            self._see(state)
            self._server = Metrics(
                self._port,
                lambda: self._figures,
                meanings={"late_worker": "The worker that the others have waited for longest"},
                counters=self._COUNTERS,
                worker=str(state.comm.rank),
            )
            log.warning("metrics at http://127.0.0.1:%d/metrics", self._server.port)

    def on_step(self, state: State) -> None:
        if state.record is not None:
            self._see(state)

    def on_epoch(self, state: State) -> None:
        self._see(state)

    def on_rewind(self, state: State) -> None:
        self._see(state)

    def on_end(self, state: State) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def on_stop(self, state: State) -> None:
        self.on_end(state)

    def _see(self, state: State) -> None:
        figures: dict[str, float] = {**_position(state)}
        figures |= {f"test_{name}": value for name, value in state.metrics.items()}
        figures |= state.record or {k: v for k, v in self._figures.items() if k not in figures}
        if state.late:
            figures["late_worker"] = max(range(len(state.late)), key=lambda rank: state.late[rank].cost_s)
            figures["late_cost_s"] = max(late.cost_s for late in state.late)
        self._figures = figures


class Checkpoint(Hook):
    """Saves the run every so many steps, and at the end."""

    def __init__(self, root: Path, *, every_steps: int | None = None, keep: int = 3) -> None:
        """
        Args:
            root: directory of the checkpoints.
            every_steps: None: after each epoch.
            keep: how many of the newest stay.
        """
        if every_steps is not None and every_steps < 1:
            raise UsageError(f"every_steps is {every_steps}: give 1 or more")
        self._root = root
        self._every_steps = every_steps
        self._keep = keep
        self._saved_step = -1

    def on_start(self, state: State) -> None:
        self._saved_step = state.step

    def on_step(self, state: State) -> None:
        if self._every_steps is not None and state.step % self._every_steps == 0:
            self._save(state)

    def on_epoch(self, state: State) -> None:
        if self._every_steps is None:
            self._save(state)

    def on_end(self, state: State) -> None:
        self._save(state)

    def on_stop(self, state: State) -> None:
        self._save(state)

    def on_rewind(self, state: State) -> None:
        self._saved_step = state.step

    def _save(self, state: State) -> None:
        if state.step == self._saved_step:
            return
        self._saved_step = state.step
        groups = state.snapshot()
        if groups is not None:
            checkpoint.save(self._root, state.step, groups, keep=self._keep)
