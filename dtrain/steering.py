"""Hooks that steer a run: learning rate and global batch by the samples seen, or by the noise of the gradient."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from dtrain.errors import UsageError
from dtrain.hooks import Hook, State
from dtrain.largebatch import Course

log = logging.getLogger(__name__)


class Steer(Hook):
    """Sets the learning rate and the global batch of each step as a course says.

        course = largebatch.grow(largebatch.decay([30, 60, 80]), batch=256, max_batch=8192)
        trainer = dtrain.Trainer(..., hooks=[Steer(optimizer, course, samples=len(train))])

    The course is asked before each step, by the samples seen: a resumed run goes on where it was. A step that would
    reach over a change has the batch that it began with.
    """

    def __init__(self, optimizer: Optimizer, course: Course, *, samples: int) -> None:
        """
        Args:
            optimizer: its rates, as they are now, are what the course's factors multiply.
            samples: of the data set: those of an epoch.
        """
        if samples < 1:
            raise UsageError(f"samples is {samples}: give the size of the data set")
        self._optimizer = optimizer
        self._course = course
        self._samples = samples
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))

    def on_start(self, state: State) -> None:
        self.on_step(state)

    def on_step(self, state: State) -> None:
        setting = self._course(state.samples / self._samples)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * setting.factor
        if setting.batch != state.global_batch:
            if state.first and state.step:
                log.warning("step %d: global batch %d -> %d", state.step, state.global_batch, setting.batch)
            state.resize(setting.batch)

    def on_rewind(self, state: State) -> None:
        self.on_step(state)
