"""The noise scale of SGD says how far it strays, and how the batch goes with rate and momentum (Smith & Le 2018).

Two parts:

    line    linear regression, 256 samples of 8 numbers, from the best weights: how much larger the loss is on average
            than there, over the noise scale g = `dtrain.largebatch.SGDNoise(...).scale`. If g says it all, that is one
            number for all rates, batches and momenta. Batches are drawn apart from each other, as the theory has them;
            once also by a shuffle for each epoch, as people do. 16 regressions at once, each with batches of its own
    edge    a network of 196-128-10 units (ReLU) on N images of Fashion-MNIST, 14x14 pixels, 1000 updates: the smallest
            batch whose test accuracy, on average over the last 300, is within 5 points of that of the best. It is to
            grow with ε, N and 1 / (1 − m)

The paper looks at the best batch itself; at this scale accuracy hardly falls beyond it, and where the best one is says
little. What makes small batches bad, noise, has an edge that can be measured.

Quick: fewer updates of the line, and three settings of the edge.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import tasks
import torch
from claim import Case, Check, Claim, Ink, Place, Row, Verdict, interval, main, pick, values
from draw import beside, logarithmic, name, points, slide
from matplotlib.figure import Figure
from torch import Tensor, nn

import dtrain
from dtrain.data import Batch
from dtrain.largebatch import SGDNoise
from dtrain.recipes.data import TensorData
from dtrain.recipes.tasks import seeded

LINE, EDGE = "line", "edge"
SAMPLES, NUMBERS, COPIES = 256, 8, 16
SETTINGS = [
    (0.01, 4, 0.0),
    (0.01, 8, 0.0),
    (0.02, 8, 0.0),
    (0.01, 64, 0.0),
    (0.01, 128, 0.0),
    (0.001, 8, 0.9),
    (0.005, 8, 0.5),
]
"""Rates, batches and momenta."""
SHUFFLED = (0.01, 64, 0.0)
SETTLE = 300
"""Updates until losses are looked at."""
UPDATES, LAST = 1000, 300
BELOW = 5.0
"""Points under the best accuracy."""
EDGES = [(0.125, 0.0, 1000), (0.25, 0.0, 1000), (0.5, 0.0, 1000), (1.0, 0.0, 1000), (0.05, 0.9, 1000), (0.5, 0.0, 4000)]
"""Rates, momenta and numbers of images."""
PER_RATE = 48
"""About the batch of the edge, over ε / (1 − m)."""
SPREAD = (0.5, 1, 2, 4)
"""Batches that are tried, over that."""


def cases(quick: bool) -> list[Case]:
    steps = 1000 if quick else 1500
    edges = [EDGES[0], EDGES[2], EDGES[4]] if quick else EDGES
    found: list[Case] = []
    for lr, momentum, samples in edges:
        middle = PER_RATE * lr / (1 - momentum)
        for times in SPREAD:
            case: Case = {
                "part": EDGE,
                "lr": lr,
                "momentum": momentum,
                "samples": samples,
                "batch": round(middle * times),
            }
            found.append({"case": f"edge, {setting(case)}, batch {case['batch']}", **case})
    for shuffled, (lr, batch, momentum) in [*((False, one) for one in SETTINGS), (True, SHUFFLED)]:
        case = {"part": LINE, "lr": lr, "batch": batch, "momentum": momentum, "shuffled": shuffled, "steps": steps}
        text = f"line, {lr:g}, {batch}, {momentum:g}{', shuffled' if shuffled else ''}"
        found.append({"case": text, **case})
    return found


def setting(one: Case) -> str:
    momentum = f", m {one['momentum']:g}" if one["momentum"] else ""
    return f"ε {one['lr']:g}{momentum}, N {one['samples']}"


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_line if case["part"] == LINE else _edge, case, seed)


# -- the line ---------------------------------------------------------------------------------------------------------


class Lines(nn.Module):
    """So many linear regressions, from the same weights: [n, copies, numbers] -> [n, copies]."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.repeat(COPIES, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x * self.weight).sum(-1)
        return out


def _squares(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


class Excess(dtrain.Hook):
    """How much larger the loss over all samples is than the least one, on average over steps and copies."""

    def __init__(self, best: Tensor, hessian: Tensor) -> None:
        self._best, self._hessian = best, hessian
        self._total, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        return self._total / self._count

    def on_step(self, state: dtrain.State) -> None:
        if state.step > SETTLE:
            away = next(state.model.parameters()).detach() - self._best
            self._total += 0.5 * float(((away @ self._hessian) * away).sum()) / COPIES
            self._count += 1


def order(steps: int, batch: int, generator: torch.Generator, *, shuffled: bool) -> Tensor:
    """Which samples come, for each copy: [steps * batch, copies]. Either each batch is drawn apart, or each epoch."""
    rounds = -(-steps * batch // SAMPLES) if shuffled else steps
    drawn = [torch.rand(COPIES, SAMPLES, generator=generator).argsort(1) for _ in range(rounds)]
    parts = drawn if shuffled else [one[:, :batch] for one in drawn]
    return torch.cat([part.short() for part in parts], 1).T[: steps * batch].contiguous()


def _line(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data, generator = (torch.Generator().manual_seed(s) for s in (0, seed))
    x = torch.randn(SAMPLES, NUMBERS, generator=data)
    y = x.sum(1) + torch.randn(SAMPLES, generator=data)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    model = seeded(lambda: Lines(best), seed=seed, dtype=torch.float32)
    which = order(case["steps"], case["batch"], generator, shuffled=case["shuffled"])
    excess = Excess(best, x.T @ x / SAMPLES)
    tasks.train(
        comm,
        model,
        TensorData(which, transform=lambda drawn: (x[drawn[0].long()], y[drawn[0].long()])),
        optimizer=lambda model: tasks.sgd(model, case["lr"], momentum=case["momentum"]),
        loss=_squares,
        global_batch=case["batch"],
        seed=seed,
        shuffle=False,
        steps=case["steps"],
        log_every=1000,
        hooks=[excess],
    )
    noise = SGDNoise(lr=case["lr"], batch=case["batch"], num_samples=SAMPLES, momentum=case["momentum"]).scale
    rough = case["lr"] / (1 - case["momentum"]) * SAMPLES / case["batch"]
    return [{"excess": excess.mean, "noise": noise, "ratio": excess.mean / noise, "rough_ratio": excess.mean / rough}]


# -- the edge ---------------------------------------------------------------------------------------------------------


class Late(dtrain.Hook):
    """Test accuracy on average over the last updates: that of one step alone is as noisy as the step."""

    def __init__(self, test: TensorData) -> None:
        self.found: list[float] = []
        self._test = test

    def on_step(self, state: dtrain.State) -> None:
        if state.step > UPDATES - LAST and state.step % 20 == 0:
            self.found.append(tasks.accuracy(state.model, self._test, state.comm))


def _edge(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"], 5000)
    late = Late(data.test)
    tasks.train(
        comm,
        tasks.mlp(seed, data.pixels, 128, tasks.CLASSES),
        data.train,
        optimizer=lambda model: tasks.sgd(model, case["lr"], momentum=case["momentum"]),
        global_batch=case["batch"],
        seed=seed,
        steps=UPDATES,
        log_every=1000,
        hooks=[late],
    )
    return [{"data": data.name, "accuracy": statistics.fmean(late.found)}]


def edge(found: Sequence[Row]) -> float:
    """The batch where accuracy is `BELOW` points under the best, between those that were tried; NaN: below all."""
    by_batch = sorted(found, key=lambda row: row["batch"])
    least = max(row["accuracy"] for row in found) - BELOW
    for under, over in reversed(list(itertools.pairwise(by_batch))):
        if under["accuracy"] < least <= over["accuracy"]:
            share = (least - under["accuracy"]) / (over["accuracy"] - under["accuracy"])
            return float(under["batch"] * (over["batch"] / under["batch"]) ** share)
    return math.nan


# -- what it says -----------------------------------------------------------------------------------------------------


def edges(rows: Sequence[Row], **where: object) -> list[float]:
    """Of a setting, by seed."""
    found = pick(rows, part=EDGE, **where)
    return [edge([row for row in found if row["seed"] == seed]) for seed in sorted({row["seed"] for row in found})]


def judge(rows: Sequence[Row]) -> Verdict:
    apart = [{"part": LINE, "lr": lr, "batch": b, "momentum": m, "shuffled": False} for lr, b, m in SETTINGS]
    ratios, rough = ([statistics.fmean(values(rows, key, **one)) for one in apart] for key in ("ratio", "rough_ratio"))
    spread, rough_spread = (max(found) / min(found) for found in (ratios, rough))
    lr, batch, momentum = SHUFFLED
    same = {"part": LINE, "lr": lr, "batch": batch, "momentum": momentum}
    pairs = zip(*(values(rows, "ratio", shuffled=shuffled, **same) for shuffled in (True, False)), strict=True)
    shuffled = interval([a / b for a, b in pairs])
    plain = [one for one in EDGES if one[1:] == (0.0, 1000) and pick(rows, part=EDGE, lr=one[0], samples=1000)]
    by_rate = [edges(rows, lr=lr, momentum=0.0, samples=1000) for lr, _, _ in plain]
    logs = [math.log(lr) for lr, _, _ in plain]
    slope = interval([float(np.polyfit(logs, np.log(found), 1)[0]) for found in zip(*by_rate, strict=True)])
    middle = edges(rows, lr=0.5, momentum=0.0, samples=1000)
    heavy = edges(rows, lr=0.05, momentum=0.9, samples=1000)
    times = interval([a / b for a, b in zip(heavy, middle, strict=True)])
    listed = ", ".join(f"{lr:g}: {interval(found):.1f}" for (lr, _, _), found in zip(plain, by_rate, strict=True))
    checks = [
        Check(f"excess loss over g is one number, to 15 %: largest over smallest {spread:.2f}", spread <= 1.15),
        Check(f"over ε N / (B (1 − m)) it is not: {rough_spread:.2f} (1.5 or more)", rough_spread >= 1.5),
        Check(
            f"the same where an epoch is a shuffle, as in practice: {shuffled:.2f} of it (0.8 to 1.25)",
            0.8 <= shuffled.mean <= 1.25,
        ),
        Check(
            f"the edge of the batch grows as ε to a power of {slope:.2f} (0.7 to 1.3); {listed}",
            0.7 <= slope.mean <= 1.3,
        ),
        Check(
            f"at equal ε / (1 − m) it is the same with momentum 0.9: {times:.2f} times (0.5 to 2)",
            0.5 <= times.mean <= 2,
        ),
    ]
    more = edges(rows, lr=0.5, momentum=0.0, samples=4000)
    if more:
        grown = interval([a / b for a, b in zip(more, middle, strict=True)])
        checks.append(
            Check(f"it grows with N: 4 times the images, {grown:.2f} times the batch (2 or more)", grown.mean >= 2)
        )
    return Verdict(
        f"excess loss over g is one number within a factor of {spread:.2f} for 7 settings; by shuffled epochs "
        f"{shuffled:.2f} of it. The edge of the batch grows as ε to the power {slope:.2f}",
        checks,
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    note = (
        f"left: linear regression, {SAMPLES} samples, g = ε / (1 − m) · (N / B − 1); right: 196-128-10 network, "
        f"{pick(rows, part=EDGE)[0]['data']}, {UPDATES} updates; 95 % intervals over seeds"
    )
    title = "Rate, batch and momentum make one noise; but a shuffle for each epoch makes less"
    drawn, (left, right) = slide(ink, title, note, panels=2)
    for shuffled, settings, colour in ((False, SETTINGS, ink("run0")), (True, [SHUFFLED], ink("run1"))):
        for lr, batch, momentum in settings:
            where: Case = {"part": LINE, "lr": lr, "batch": batch, "momentum": momentum, "shuffled": shuffled}
            found = interval(values(rows, "excess", **where))
            x = pick(rows, **where)[0]["noise"]
            points(left, [x], [found], colour, "shuffled epochs" if shuffled else "")
    noises = sorted({row["noise"] for row in pick(rows, part=LINE)})
    ratio = statistics.fmean(values(rows, "ratio", part=LINE, shuffled=False))
    left.plot(noises, [ratio * g for g in noises], color=ink("muted"), linewidth=1.2, linestyle="--", zorder=0.8)
    for which in ("x", "y"):
        logarithmic(left, which)
    name(left, "noise scale g", "excess loss")
    plain = [one for one in EDGES if pick(rows, part=EDGE, lr=one[0], momentum=one[1], samples=one[2])]
    drawn_edges = {one: interval(edges(rows, lr=one[0], momentum=one[1], samples=one[2])) for one in plain}
    line = [one for one in plain if one[1:] == (0.0, 1000)]
    points(right, [one[0] for one in line], [drawn_edges[one] for one in line], ink("run0"))
    for one in plain:
        if one not in line:
            label, colour, shift = ("m = 0.9", "run1", 0.93) if one[1] else (f"N = {one[2]}", "run2", 1.07)
            points(right, [shift * one[0] / (1 - one[1])], [drawn_edges[one]], ink(colour))
            beside(right, label, 1.1 * one[0] / (1 - one[1]), drawn_edges[one].mean, ink(colour))
    for which in ("x", "y"):
        logarithmic(right, which)
    name(right, "ε / (1 − m)", f"smallest batch within {BELOW:g} points of the best")
    return drawn


CLAIM = Claim(
    number="1",
    name="noise_scale",
    title="The noise scale ε / (1 − m) · (N / B − 1) says how far SGD strays; the batch goes with ε, N and 1 / (1 − m)",
    source="Smith & Le 2018 (arXiv 1710.06451), sections 4 and 5",
    about=__doc__ or "",
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
