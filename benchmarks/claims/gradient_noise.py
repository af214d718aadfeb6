"""The gradient noise scale: measured without bias, it grows and tells the batch that pays (McCandlish et al. 2018).

B_simple = tr Σ / |G|², the variance of one image's gradient over the square of the mean gradient, for a network of
64-64-10 units (ReLU) on the digits of scikit-learn. Three parts:

    frozen     the learning rate is 0, so that the truth stays: `dtrain.largebatch.GradientNoise` over 4 workers with
               16 images each, against the exact value over all training images; and what comes out naively, when the
               square of a batch's gradient is taken for |G|²
    training   SGD, rate 0.1: exact after so many steps, and measured live over the steps before
    race       steps to a training loss of 0.15 with the best of rates that are 2 times apart, for batches of 1 to all;
               `dtrain.largebatch.fit` finds the critical batch, and B_simple of the way there, each step the same rate
               and 64 images, is compared with it

In the paper (table 1), B_simple is 50 at the start on MNIST and 900 on average, and its critical batch 20 and 200: they
differ by factors of 2 to 10 or so.

Quick: fewer steps and batches.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import tasks
import torch
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, interval, main, pick, values
from draw import beside, logarithmic, name, points, powers, slide
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dtrain
from dtrain import largebatch, recipes
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.part import Part
from dtrain.recipes.data import TensorData
from dtrain.recipes.tasks import class_loss

WIDTHS = (64, 64, 10)
BATCH = 64
LR, WAY_LR = 0.1, 0.4
"""Of "training", and of "the way": about the best one for this batch."""
LOSS = 0.15
FROZEN, TRAINING, RACE, WAY = "frozen", "training", "race", "the way"
FIRST_GUESS = {"noise_scale": 16.0, "lr_max": 0.8}
"""Of `largebatch.optimal_lr`: rates around it are tried."""
TRIED = (0, 1, -1, 2, -2, 3, -3)
"""Powers of 2 of the guess."""
MOST_STEPS = 6000
LOOK_EVERY = 32
"""Images, at least, between two looks at the loss over all training images."""


def cases(quick: bool) -> list[Case]:
    batches = (4, 16, 64, 256, 1024) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    marks = (100, 300, 1000) if quick else (100, 300, 1000, 2000)
    found: list[Case] = [{"case": TRAINING, "marks": list(marks)}]
    found += [{"case": FROZEN, "steps": 250 if quick else 500}, {"case": WAY}]
    return [*found, *({"case": RACE, "batch": batch} for batch in batches)]


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    if case["case"] == RACE:  # also with fewer images than workers
        return Place().run(_race, case, seed)
    return place.run({FROZEN: _frozen, TRAINING: _training, WAY: _way}[case["case"]], case, seed)


def digits(seed: int) -> TensorData:
    data: Any = recipes.build("digits", seed=seed).train
    found: TensorData = data
    return found


def exact(model: nn.Module, data: TensorData) -> float:
    """tr Σ / |G|² over all images, with G their mean gradient."""
    weights = {key: p.detach() for key, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return class_loss(lambda x: functional_call(model, weights, (x,)), tuple(x[None] for x in sample))  # type: ignore[arg-type]

    per_image = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *data.batch(torch.arange(len(data))))
    parts = [g.flatten(1).double() for g in per_image.values()]
    return sum(float(g.var(0).sum()) for g in parts) / sum(float(g.mean(0).square().sum()) for g in parts)


class Live(dtrain.Hook):
    """Measures the noise scale at each step; an estimate, and a copy of the model, after some of them."""

    def __init__(self, marks: Sequence[int], window: int, population: int) -> None:
        self.estimates: dict[int, largebatch.Estimate] = {}
        self.models: dict[int, nn.Module] = {}
        self._marks, self._window, self._population = frozenset(marks), window, population

    def on_start(self, state: dtrain.State) -> None:
        self.models[0] = copy.deepcopy(state.model)
        self._noise = largebatch.GradientNoise(state.model, state.comm, every=1, window=self._window)
        state.observe(self._noise)

    def on_step(self, state: dtrain.State) -> None:
        if state.step in self._marks:
            self.estimates[state.step] = self._noise.estimate(population=self._population).whole
            self.models[state.step] = copy.deepcopy(state.model)


def _sgd(
    comm: dtrain.Backend,
    data: TensorData,
    seed: int,
    lr: float,
    *hooks: dtrain.Hook,
    batch: int = BATCH,
    steps: int = MOST_STEPS,
) -> None:
    tasks.train(
        comm,
        tasks.mlp(seed, *WIDTHS),
        data,
        optimizer=lambda model: tasks.sgd(model, lr, momentum=0.0),
        global_batch=batch,
        seed=seed,
        steps=steps,
        log_every=1000,
        hooks=hooks,
    )


def _frozen(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = digits(seed)
    live = Live([case["steps"]], case["steps"], len(data))
    _sgd(comm, data, seed, 0.0, live, steps=case["steps"])
    found = live.estimates[case["steps"]]
    naive = found.noise / (found.square - found.noise / len(data) + found.noise / BATCH)
    return [{"exact": exact(live.models[0], data), **ends(found), "naive": naive}]


def _training(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = digits(seed)
    live = Live(case["marks"], 100, len(data))
    _sgd(comm, data, seed, LR, live, steps=case["marks"][-1])
    rows: list[Row] = []
    for step, model in live.models.items() if comm.rank == 0 else ():
        found = live.estimates.get(step)
        rows.append({"step": step, "exact": exact(model, data), **(ends(found) if found else {})})
    return rows


def ends(found: largebatch.Estimate) -> Row:
    return {"live": float(found.scale), "low": float(found.low), "high": float(found.high)}


# -- the race ---------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """The loss is where it is to be; all workers see so after the same step."""


class Until(dtrain.Hook):
    """Stops where the loss over all training images is low enough."""

    def __init__(self, comm: dtrain.Backend, data: TensorData, every_steps: int) -> None:
        self.step = math.nan
        """At which it was; NaN: never."""
        self._comm, self._data, self._every_steps = comm, data, every_steps

    def on_start(self, state: dtrain.State) -> None:
        part = Part(self._data, self._comm, batch_size=len(self._data))
        self._surface = LossSurface(state.model, class_loss, part, comm=self._comm)

    def on_step(self, state: dtrain.State) -> None:
        if state.step % self._every_steps == 0 and self._surface.value() <= LOSS:
            self.step = state.step
            raise Reached


def _race(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data, batch = digits(seed), case["batch"]
    guess = 2.0 ** round(math.log2(largebatch.optimal_lr(batch, **FIRST_GUESS)))
    best, at = math.inf, 0
    for power in TRIED:  # one that takes longer than the best one is given up
        until = Until(comm, data, max(1, LOOK_EVERY // batch))
        with contextlib.suppress(Reached):
            _sgd(comm, data, seed, guess * 2.0**power, until, batch=batch, steps=int(min(best - 1, MOST_STEPS)))
        if until.step < best:
            best, at = until.step, power
    return [{"steps": best, "lr": guess * 2.0**at, "inside": abs(at) < max(TRIED)}]


def _way(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = digits(seed)
    until, live = Until(comm, data, 1), Live(range(0, MOST_STEPS, 5), MOST_STEPS, len(data))
    with contextlib.suppress(Reached):
        _sgd(comm, data, seed, WAY_LR, live, until)
    scales = [exact(model, data) for model in live.models.values()] if comm.rank == 0 else [math.nan]
    return [{"steps": until.step, "mean": statistics.fmean(scales), **ends(live.estimates[max(live.estimates)])}]


# -- what it says -----------------------------------------------------------------------------------------------------


def raced(rows: Sequence[Row]) -> tuple[list[int], list[Interval]]:
    """Batches, and steps with each."""
    batches = sorted({row["batch"] for row in pick(rows, case=RACE)})
    return batches, [interval(values(rows, "steps", case=RACE, batch=batch)) for batch in batches]


def fitted(rows: Sequence[Row]) -> list[largebatch.Fit]:
    """Of each seed."""
    seeds = sorted({row["seed"] for row in rows})
    races = [[row for row in pick(rows, case=RACE, seed=seed) if row["steps"] is not None] for seed in seeds]
    return [largebatch.fit([row["batch"] for row in race], [row["steps"] for row in race]) for race in races]


def span(found: Sequence[float]) -> str:
    """Least to largest over seeds."""
    return f"{min(found):.0f} to {max(found):.0f}"


def judge(rows: Sequence[Row]) -> Verdict:
    frozen = {key: values(rows, key, case=FROZEN) for key in ("exact", "live", "naive")}
    live, naive = (
        interval([100 * (a / b - 1) for a, b in zip(frozen[key], frozen["exact"], strict=True)])
        for key in ("live", "naive")
    )
    marks = sorted({row["step"] for row in pick(rows, case=TRAINING)})
    start, end = (values(rows, "exact", case=TRAINING, step=step) for step in (marks[0], marks[-1]))
    grown = [b / a for a, b in zip(start, end, strict=True)]
    seen = [row for row in pick(rows, case=TRAINING) if row["step"] > 0]
    late = [row for row in seen if row["step"] > marks[1]]
    held = sum(row["low"] <= row["exact"] and row["exact"] <= (row["high"] or math.inf) for row in late)
    fits, way = fitted(rows), values(rows, "mean", case=WAY)
    critical, residual = interval([f.critical_batch for f in fits]), interval([f.residual for f in fits])
    times = interval([a / f.critical_batch for a, f in zip(way, fits, strict=True)])
    batches, _ = raced(rows)
    rates = [interval([math.log2(x) for x in values(rows, "lr", case=RACE, batch=batch)]).mean for batch in batches]
    grows = all(a <= b + 0.5 for a, b in itertools.pairwise(rates))
    told = ", ".join(f"{2**rate:.2g}" for rate in rates)
    return Verdict(
        f"B_simple {span(start)} at the start, {span(end)} after {marks[-1]} steps; to a loss of {LOSS}, on average "
        f"{interval(way):.0f}, measured live {interval(values(rows, 'live', case=WAY)):.0f}; the "
        f"critical batch {critical:.0f}",
        [
            Check(f"weights frozen, the estimate is within 10 % of the truth: {live:+.1f} %", abs(live.mean) <= 10),
            Check(f"the naive one is too small by 30 % or more: {naive:+.1f} %", naive.mean <= -30),
            Check(
                f"it grows 10 times or more in {marks[-1]} steps, for each seed: {span(grown)} times", min(grown) >= 10
            ),
            Check(
                f"measured live, intervals hold the truth for most, after step {marks[1]}: {held} of {len(late)}",
                held > len(late) / 2,
            ),
            Check(
                f"steps by batch follow S_min (1 + B_crit / B), to 20 %: {100 * residual.mean:.0f} %",
                residual.mean <= 0.2,
            ),
            Check(f"B_simple tells B_crit to within a factor of 10: {times:.1f} times", 0.1 <= times.mean <= 10),
            Check(f"the best rate grows with the batch: {told} for {batches[0]} to {batches[-1]}", grows),
            Check(
                "none is at the edge of the rates that were tried", all(row["inside"] for row in pick(rows, case=RACE))
            ),
        ],
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    note = (
        f"{'-'.join(map(str, WIDTHS))} network, digits; left: SGD, batches of {BATCH}, a line a seed; right: steps to "
        f"a training loss of {LOSS} with the best rate, 95 % intervals over seeds"
    )
    title = "The noise of the gradient grows in training, and tells the batch that pays"
    drawn, (left, right) = slide(ink, title, note, panels=2)
    marks = sorted({row["step"] for row in pick(rows, case=TRAINING)})
    at = [max(step, 30) for step in marks]
    for seed in sorted({row["seed"] for row in rows}):
        course = values(sorted(pick(rows, case=TRAINING, seed=seed), key=lambda row: row["step"]), "exact")
        left.plot(at, course, color=ink("run0"), marker="o", markersize=5, linewidth=1.6)
    left.set_xscale("log")
    left.set_xticks(at, [str(step) for step in marks])
    left.minorticks_off()
    logarithmic(left)
    name(left, "step", "gradient noise scale B_simple, images")
    batches, steps = raced(rows)
    fits = fitted(rows)
    critical = statistics.fmean(f.critical_batch for f in fits)
    curve = largebatch.TradeOff(steps_min=statistics.fmean(f.steps_min for f in fits), critical_batch=critical)
    right.plot(batches, [curve.steps(batch) for batch in batches], color=ink("run1"), linewidth=1.2, linestyle="--")
    points(right, batches, steps, ink("run0"))
    right.lines[-1].set_linestyle("none")
    powers(right, batches)
    right.set_xticks(batches[::2], [str(batch) for batch in batches[::2]])
    right.axvline(critical, color=ink("muted"), linewidth=1)
    logarithmic(right)
    beside(right, f"critical batch {critical:.0f}", critical, max(i.mean for i in steps), ink("ink"))
    name(right, "batch (images)", "steps, and S_min (1 + B_crit / B)")
    return drawn


CLAIM = Claim(
    number="5",
    name="gradient_noise",
    title="The gradient noise scale is measured without bias, grows in training, and tells the largest batch that pays",
    source="McCandlish et al. 2018 (arXiv 1812.06162), sections 2.2 to 2.4, table 1 and appendix A.1",
    about=__doc__ or "",
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
    place=Place("threads", 4),
)

if __name__ == "__main__":
    main(CLAIM)
