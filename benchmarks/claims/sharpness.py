"""Large batches end in sharper minima (Keskar et al. 2017), compared at one training loss.

A network of 64-64-64-10 units (ReLU) on the digits of scikit-learn, trained with SGD and with Adam at one learning rate
each, until the loss over all training images first is between 0.018 and 0.02. There, between two steps, the largest
eigenvalue of the Hessian and the paper's sharpness (metric 2.1, ε = 1e-3, the whole space) are measured, over the
training images of all workers, with `dtrain.largebatch`. At equal epochs the loss would differ, and with it the
sharpness: that would prove nothing.

The paper has larger networks and data, Adam only, and batches of 256 against a tenth of the data; there sharpness
differs by a factor of 10 to 200, and large batches lose up to 5 points of test accuracy, which is reported here too.

Quick: SGD alone, three batches.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tasks
import torch
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, interval, main, pick, values
from draw import name, points, powers, slide
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

import dtrain
from dtrain import recipes
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.part import Part
from dtrain.largebatch.sharpness import sharpness
from dtrain.largebatch.spectrum import top_eigenvalues
from dtrain.recipes.tasks import class_loss, class_score

LOSS = 0.02
EPSILON = 1e-3
WIDTHS = (64, 64, 64, 10)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
}
LARGEST = 10_000
"""Stands for all training images in a step."""
MOST_UPDATES = 20_000
BAND = 0.1
"""How far below `LOSS`, in parts of it, a run may be when it is measured: noisy ones jump over it, and come back."""
LOOK_EVERY = 64
"""Samples, at least, between two looks at the loss over all training images, while it is far from `LOSS`."""


def cases(quick: bool) -> list[Case]:
    names, batches = (["SGD"], [LARGEST, 64, 4]) if quick else (list(OPTIMIZERS), [LARGEST, 256, 64, 16, 4])
    return [{"case": f"{one}, {batch_name(b)}", "optimizer": one, "batch": b} for one in names for b in batches]


def batch_name(batch: int) -> str:
    return "all" if batch == LARGEST else str(batch)


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    digits = recipes.build("digits", seed=seed)
    data: Any = digits.train
    model = tasks.mlp(seed, *WIDTHS)
    batch = min(case["batch"], len(data))
    look = Look(
        LossSurface(model, class_loss, Part(data, comm, batch_size=len(data)), comm=comm), -(-LOOK_EVERY // batch)
    )
    with contextlib.suppress(Reached):
        tasks.train(
            comm,
            model,
            data,
            optimizer=OPTIMIZERS[case["optimizer"]],
            global_batch=batch,
            seed=seed,
            steps=MOST_UPDATES,
            hooks=[look],
        )
    test: Any = digits.test
    accuracy = 100 * dtrain.evaluate(model, test, class_score, comm)["accuracy"]
    return [{"data": digits.name, "samples": len(data), "test_accuracy": accuracy, **look.found}]


class Reached(Exception):
    """The training is where it is to be measured; all workers see so after the same step."""


class Look(dtrain.Hook):
    """Measures the sharpness, between two steps, where the loss over all training images first is low enough."""

    def __init__(self, surface: LossSurface, every_steps: int) -> None:
        self.found: Row = {"updates": None, "loss": None, "top": None, "sharpness": None}
        """None: not reached."""
        self._surface = surface
        self._every_steps = every_steps
        self._near = False

    def on_step(self, state: dtrain.State) -> None:
        if state.step % self._every_steps and not self._near:
            return
        loss = self._surface.value()
        self._near = loss < 2 * LOSS
        if not (1 - BAND) * LOSS <= loss <= LOSS:
            return
        top = top_eigenvalues(self._surface, tolerance=1e-3)
        rise = sharpness(self._surface, epsilon=EPSILON)
        self.found = {"updates": state.step, "loss": loss, "top": top.values[0], "sharpness": rise.value}
        raise Reached


def of(rows: Sequence[Row], key: str, optimizer: str, batch: int) -> Interval:
    return interval(values(rows, key, optimizer=optimizer, batch=batch))


def judge(rows: Sequence[Row]) -> Verdict:
    batches = sorted({row["batch"] for row in rows})
    small, large = batches[0], batches[-1]
    checks, told = [], []
    for one in dict.fromkeys(row["optimizer"] for row in rows):
        for key, what, most in (("top", "λ_max", 3.0), ("sharpness", "the paper's sharpness", 1.5)):
            found = [of(rows, key, one, batch) for batch in batches]
            listed = ", ".join(f"{batch_name(b)}: {value:.2f}" for b, value in zip(batches, found, strict=True))
            grows = all(a.mean < b.mean for a, b in itertools.pairwise(found))
            checks.append(Check(f"{one}: {what} grows with each batch; {listed}", grows))
            times = ratios(rows, key, one, large, small)
            text = f"{one}: {what} with all images is, for each seed, {most:g} times that with {small} or more"
            checks.append(Check(f"{text}: {interval(times):.1f}", min(times) > most))
        times, rise = (interval(ratios(rows, key, one, large, small)) for key in ("top", "sharpness"))
        against = f"with all images as with {small}"
        told.append(f"{one}: λ_max {times:.1f} times and sharpness {rise:.1f} times as large {against}")
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    reached = len(losses) == len(rows)
    spread = (
        f"{min(losses):.4f} to {max(losses):.4f}" if reached else f"only {len(losses)} of {len(rows)} runs come there"
    )
    accuracies = ", ".join(
        f"{batch_name(b)}: {interval(values(rows, 'test_accuracy', batch=b)):.1f} %" for b in (small, large)
    )
    checks.append(Check(f"all at a training loss of {LOSS}: {spread}", reached))
    return Verdict(f"{'; '.join(told)}. Test accuracy {accuracies}", checks)


def ratios(rows: Sequence[Row], key: str, optimizer: str, one: int, other: int) -> list[float]:
    """How many times as large a figure is with one batch as with another, seed by seed."""
    pairs = (values(rows, key, optimizer=optimizer, batch=batch) for batch in (one, other))
    return [a / b for a, b in zip(*pairs, strict=True)]


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    samples = rows[0]["samples"]
    note = (
        f"{'-'.join(map(str, WIDTHS))} network, digits, {samples} training images, each run to a loss of {LOSS} on "
        "them; 95 % intervals over seeds"
    )
    drawn, (left, right) = slide(ink, "At the same training loss, larger batches sit in sharper minima", note, panels=2)
    batches = sorted({row["batch"] for row in rows})
    at = [min(batch, samples) for batch in batches]
    for one, colour in zip(OPTIMIZERS, (ink("run0"), ink("run1")), strict=True):
        if not pick(rows, optimizer=one):
            continue
        points(left, at, [of(rows, "top", one, batch) for batch in batches], colour, one)
        points(right, at, [of(rows, "sharpness", one, batch) for batch in batches], colour, one)
    for axes, title in ((left, "largest eigenvalue of the Hessian"), (right, f"sharpness (%), ε = {EPSILON:g}")):
        powers(axes, at)
        axes.set_ylim(bottom=0)
        name(axes, "batch (images)", title)
    return drawn


CLAIM = Claim(
    number="6",
    name="sharpness",
    title="At equal training loss, large batches end in sharper minima than small ones",
    source="Keskar et al. 2017 (arXiv 1609.04836), section 2.2 and tables 3 and 4",
    about=__doc__ or "",
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
    seeds=5,
)

if __name__ == "__main__":
    main(CLAIM)
