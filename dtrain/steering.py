"""Hooks that steer a run: learning rate and global batch by the samples seen, or by the noise of the gradient."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

from dtrain.errors import UsageError
from dtrain.hooks import Hook, State
from dtrain.largebatch import (
    Course,
    Decision,
    Estimate,
    Estimates,
    GradientNoise,
    Rule,
    Schedule,
    Setting,
    adascale_gain,
    advise,
    constant,
    decide,
    scale,
)
from dtrain.largebatch.gradient_noise import check_window
from dtrain.largebatch.scaling import RULES

log = logging.getLogger(__name__)


class Steer(Hook):
    """Sets the learning rate and the global batch of each step as a course says.

        course = largebatch.grow(largebatch.decay([30, 60, 80]), batch=256, max_batch=8192)
        trainer = dtrain.Trainer(..., hooks=[Steer(optimizer, course, samples=len(train))])

    The course is asked before each step, by the samples seen: a resumed run goes on where it was. A step that would
    reach over a change has the batch that it began with. Groups that come into the optimizer later count from the rate
    that they come with.
    """

    steers = True

    def __init__(self, optimizer: Optimizer, course: Course, *, samples: int) -> None:
        """
        Args:
            optimizer: its rates, as they are now, are what the course's factors multiply.
            samples: of the data set: those of an epoch.
        """
        if not isinstance(first := course(0.0), Setting):
            raise UsageError(
                f"the course gave {first!r} for the beginning, and not a Setting: make one of a schedule by "
                "largebatch.steady(schedule, batch), or by grow"
            )
        self._rates = _Rates(optimizer, samples)
        self._course = course

    def on_start(self, state: State) -> None:
        self.on_step(state)

    def on_step(self, state: State) -> None:
        setting = self._course(self._rates.epochs(state))
        self._rates.set(setting.factor)
        if state.record is not None:
            state.record["global_batch"] = state.global_batch
        if setting.batch != state.global_batch:
            if state.first and state.step:
                log.warning("step %d: global batch %d -> %d", state.step, state.global_batch, setting.batch)
            state.resize(setting.batch)

    def on_rewind(self, state: State) -> None:
        self.on_step(state)


class NoiseScale(Hook):
    """Measures the gradient noise scale while a run goes on, adds it to the records, and gives advice at the end.

    Give it before logs and checkpoints. Records have `noise_scale` with the ends of its interval, `noise_low` and
    `noise_high`, all in samples; NaN where it is not identifiable. Nothing but the records changes.
    """

    def __init__(self, *, every: int = 20, window: int = 100, optimizer: Optimizer | None = None) -> None:
        """
        Args:
            every, window, optimizer: as of `dtrain.largebatch.GradientNoise`.
        """
        check_window(every, window)
        self._every, self._window, self._optimizer = every, window, optimizer
        self._saved: dict[str, Any] | None = None  # what is to be loaded when there is something to measure
        self._noise: GradientNoise | None = None
        self.found: Estimates | None = None
        """The latest estimate."""

    def on_start(self, state: State) -> None:
        if self._noise is None:
            self._noise = GradientNoise(
                state.model,
                state.comm,
                every=self._every,
                window=self._window,
                optimizer=self._optimizer,
                loss_scale=state.loss_scale,
            )
            state.observe(self._noise)
        if self._saved is not None:
            groups = self._noise.state()["groups"]
            self._noise.load({**_UNMEASURED, "groups": groups, **self._saved})
            self._saved = None

    def on_step(self, state: State) -> None:
        if state.record is None or self._noise is None:
            return
        self.found = self._noise.estimate()
        whole = self.found.whole
        state.record |= {"noise_scale": whole.scale, "noise_low": whole.low, "noise_high": whole.high}

    def on_end(self, state: State) -> None:
        if self._noise is not None:
            self.found = self._noise.estimate()
            whole = self.found.whole
            if state.first:
                log.warning("%s", advise(whole, state.global_batch).text if whole.identified else whole)

    def on_rewind(self, state: State) -> None:
        self.on_start(state)

    def saved(self) -> dict[str, Any] | None:
        if self._saved is not None or self._noise is None:
            return {"noise": self._saved or {}}
        return {"noise": self._noise.state()}

    def restore(self, saved: dict[str, Any] | None) -> None:
        self._saved = {} if saved is None else saved["noise"]


_UNMEASURED: dict[str, Any] = {"count": 0, "skipped": 0, "rows": []}
"""What a `GradientNoise` that has seen nothing has to save, beside its groups."""


class AdaptBatch(NoiseScale):
    """Lets the global batch follow the gradient noise scale, by a rule; each decision is logged with its reason.

        hooks=[AdaptBatch(optimizer, Rule(largest=4096), samples=len(train), lr_scaling="sqrt"), JsonLog(...)]

    Every so many steps the rule is asked (see `dtrain.largebatch.decide`); after a change the measurement begins anew.
    The learning rate follows by `lr_scaling` and a schedule of its own: give the Trainer no scheduler.
    """

    steers = True

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        *,
        samples: int,
        schedule: Schedule | None = None,
        lr_scaling: str = "adascale",
        preconditioned: bool = False,
        ask_every: int = 20,
        every: int = 1,
        window: int = 100,
    ) -> None:
        """
        Args:
            optimizer: its rates, as they are now, belong to the batch that the run begins with.
            rule: the batch that a noise scale asks for, and its bounds.
            samples: of the data set: those of an epoch.
            schedule: of the rate besides; None: constant.
            lr_scaling: `linear`, `sqrt` or `none` of (batch / first batch); `adascale`: the gain of AdaScale (Johnson
                et al. 2020), which is between 1 and linear by the noise scale at the change.
            preconditioned: measure the gradient as Adam divides it; the optimizer is one of that kind.
            ask_every: steps from one decision to the next.
            every, window: as of `dtrain.largebatch.GradientNoise`.
        """
        if not isinstance(rule, Rule):
            raise UsageError(f"rule is {rule!r}: give a largebatch.Rule, such as Rule(largest=4096)")
        if ask_every < 1:
            raise UsageError(f"ask_every is {ask_every}: a number of steps, 1 or more")
        if lr_scaling not in (*RULES, "adascale"):
            raise UsageError(f"lr_scaling is {lr_scaling!r}: one of adascale, {', '.join(RULES)}")
        super().__init__(every=every, window=window, optimizer=optimizer if preconditioned else None)
        self._rates = _Rates(optimizer, samples)
        self._rule = rule
        self._schedule = schedule or constant()
        self._lr_scaling = lr_scaling
        self._ask_every = ask_every
        self._gain = 1.0
        self.decisions: list[dict[str, Any]] = []
        """Changes of the batch: `step`, `batch` and `reason`."""

    def on_start(self, state: State) -> None:
        super().on_start(state)
        self._rates.set(self._gain * self._schedule(self._rates.epochs(state)))

    def on_step(self, state: State) -> None:
        super().on_step(state)
        if state.record is not None:
            state.record["global_batch"] = state.global_batch
        if state.step % self._ask_every == 0 and self._noise is not None:
            self.found = self._noise.estimate()
            decision = decide(self.found.whole, state.global_batch, self._rule)
            if decision.batch != state.global_batch:
                self._change(state, decision, self.found.whole)
        self._rates.set(self._gain * self._schedule(self._rates.epochs(state)))

    def saved(self) -> dict[str, Any] | None:
        return {**(super().saved() or {}), "gain": self._gain, "decisions": self.decisions}

    def restore(self, saved: dict[str, Any] | None) -> None:
        super().restore(saved)
        self._gain, self.decisions = (1.0, []) if saved is None else (saved["gain"], list(saved["decisions"]))

    def _change(self, state: State, decision: Decision, found: Estimate) -> None:
        before = state.global_batch
        state.resize(decision.batch)
        if self._lr_scaling == "adascale":
            noise = found.scale if found.identified else found.low
            self._gain *= adascale_gain(decision.batch / before, noise, base_batch=before)
        else:
            self._gain *= scale(decision.batch, before, self._lr_scaling)
        self.decisions.append({"step": state.step, "batch": decision.batch, "reason": decision.reason})
        if state.first:
            log.warning("step %d: %s", state.step, decision.reason)
        if self._noise is not None:
            self._noise.reset()


class _Rates:
    """Learning rates as factors of what they were at the start."""

    def __init__(self, optimizer: Optimizer, samples: int) -> None:
        if samples < 1:
            raise UsageError(f"samples is {samples}: give the size of the data set")
        self._optimizer = optimizer
        self._samples = samples
        self._first = [float(group["lr"]) for group in optimizer.param_groups]

    def epochs(self, state: State) -> float:
        return state.samples / self._samples

    def set(self, factor: float) -> None:
        groups = self._optimizer.param_groups
        self._first += [float(group["lr"]) for group in groups[len(self._first) :]]
        for group, first in zip(groups, self._first, strict=True):
            group["lr"] = first * factor
