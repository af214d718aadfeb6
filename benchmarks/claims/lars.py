"""LARS against SGD, and LAMB against Adam, where a batch is an eighth of the data (You et al. 2017 and 2020).

A small network on 8192 images of Fashion-MNIST, 14x14 pixels, 8 epochs of batches of 1024: 64 updates. Once with ghost
batch norm over 64 samples, once without any norm. Each optimizer has the best of its own rates, 2 times apart: chosen
by the first half of the test images, over all seeds; the errors are those of the other half. Rates are warmed up for an
epoch and then fall, for SGD and LARS by a polynomial of power 2, for Adam and LAMB by one of power 1, as in the papers.
Momentum is 0.9 and weight decay 0; LARS and LAMB leave biases and the scales of norms without a ratio. "Base" is SGD
with batches of 64 at one rate, for as many epochs: 16 times the updates. Statistics of batch norm are precise ones.

In the papers: AlexNet loses 13 points from batches of 256 to 8192 with SGD, and with LARS and batch norm 2; LAMB trains
BERT with batches of 32,768, where Adam fails. Networks there are tens of layers deep; these have four.

Quick: 4096 images and batches of 512, without batch norm only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tasks
import torch
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, gap, interval, main, pick, values
from draw import dots, name, slide
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Adam, Optimizer

import dtrain
from dtrain import largebatch
from dtrain.recipes.data import TensorData

EPOCHS = 8
PARTS = 8
"""Batches in an epoch."""
NORM_BATCH = BASE_BATCH = 64
TRUST = 0.1
"""The trust coefficient of LARS: with it, rates are of the size of SGD's, which biases have."""
BASE = "base"
NORM, PLAIN = "ghost batch norm", "no norm"
BASE_RATE = 0.2
POWERS = {BASE: 2.0, "SGD": 2.0, "LARS": 2.0, "Adam": 1.0, "LAMB": 1.0}
"""Of the polynomial by which the rate falls."""
MAKERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    BASE: lambda model, lr: tasks.sgd(model, lr),
    "SGD": lambda model, lr: tasks.sgd(model, lr),
    "LARS": lambda model, lr: largebatch.LARS(model.parameters(), lr=lr, momentum=0.9, trust_coefficient=TRUST),
    "Adam": lambda model, lr: Adam(model.parameters(), lr=lr),
    "LAMB": lambda model, lr: largebatch.LAMB(model.parameters(), lr=lr),
}
RATES: dict[str, dict[str, list[float]]] = {
    NORM: {
        "SGD": [0.4, 0.8, 1.6, 3.2],
        "LARS": [0.32, 0.64, 1.28, 2.56],
        "Adam": [0.02, 0.04, 0.08],
        "LAMB": [0.04, 0.08, 0.16],
    },
    PLAIN: {
        "SGD": [0.1, 0.2, 0.4, 0.8],
        "LARS": [0.32, 0.64, 1.28, 2.56],
        "Adam": [0.02, 0.04, 0.08, 0.16],
        "LAMB": [0.04, 0.08, 0.16],
    },
}


def cases(quick: bool) -> list[Case]:
    found: list[Case] = []
    for net in [PLAIN] if quick else [NORM, PLAIN]:
        rates = {BASE: [BASE_RATE], **RATES[net]}
        for optimizer, grid in rates.items():
            for lr in grid:
                case: Case = {"case": f"{net}, {optimizer}, rate {lr:g}", "net": net, "optimizer": optimizer, "lr": lr}
                found.append({**case, "samples": 4096 if quick else 8192})
    return found


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"])
    normalised, optimizer = case["net"] == NORM, case["optimizer"]
    batch = BASE_BATCH if optimizer == BASE else len(data.train) // PARTS
    schedule = largebatch.warm_up(largebatch.polynomial(EPOCHS, POWERS[optimizer]), 1)
    trainer = tasks.train(
        comm,
        tasks.cnn(seed, normalised=normalised),
        data.train,
        optimizer=lambda model: MAKERS[optimizer](model, case["lr"]),
        course=largebatch.steady(schedule, batch),
        global_batch=batch,
        seed=seed,
        epochs=EPOCHS,
        norm_batch=NORM_BATCH if normalised else None,
        nonfinite="allow",
    )
    if normalised:
        tasks.precisely(trainer.model, data.train, comm)
    half = len(data.test) // 2
    parts = (TensorData(*data.test.batch(which)) for which in torch.arange(2 * half).split(half))
    tuning, last = (100 - tasks.accuracy(trainer.model, part, comm) for part in parts)
    row: Row = {"data": data.name, "batch": batch, "updates": trainer.state.step, "train_loss": trainer.state.loss}
    return [{**row, "tuning_error": tuning, "error": last}]


def best(rows: Sequence[Row], net: str, optimizer: str) -> Case:
    """Which rows: those of the rate with the lowest mean error on the images that rates are chosen by."""
    found = {row["lr"] for row in pick(rows, net=net, optimizer=optimizer)}
    where: list[Case] = [{"net": net, "optimizer": optimizer, "lr": lr} for lr in sorted(found)]
    return min(where, key=lambda one: interval(values(rows, "tuning_error", **one)).mean)


def inside(rows: Sequence[Row], net: str, optimizer: str) -> bool:
    """Whether rates below and above the best one were tried."""
    found = [row["lr"] for row in pick(rows, net=net, optimizer=optimizer)]
    return bool(min(found) < best(rows, net, optimizer)["lr"] < max(found))


def error(rows: Sequence[Row], net: str, optimizer: str) -> Interval:
    return interval(values(rows, "error", **best(rows, net, optimizer)))


def judge(rows: Sequence[Row]) -> Verdict:
    nets = list(dict.fromkeys(row["net"] for row in rows))
    checks, told, edges = [], [], []
    for net in nets:
        found = {optimizer: error(rows, net, optimizer) for optimizer in MAKERS}
        told.append(f"{net}: " + ", ".join(f"{optimizer} {one:.1f}" for optimizer, one in found.items()))
        edges += [f"{net}, {optimizer}" for optimizer in RATES[net] if not inside(rows, net, optimizer)]
        lost, lars, lamb, kept = (
            gap(rows, "error", best(rows, net, one), best(rows, net, other))
            for one, other in (("SGD", BASE), ("SGD", "LARS"), ("Adam", "LAMB"), ("LARS", BASE))
        )
        checks += [
            Check(f"{net}: the very large batch costs SGD 3 points or more: {lost:.1f}", lost.mean >= 3),
            Check(f"{net}: LARS gives some of them back: {lars:.1f}", lars.above_zero),
            Check(f"{net}: LAMB is better than Adam: {lamb:.1f}", lamb.above_zero),
            Check(f"{net}: LARS is as good as the small batch, within 1 point: {kept:.1f} worse", kept.mean <= 1),
        ]
    text = "each optimizer was tried with rates below and above its best one"
    checks.append(Check(f"{text}; not {', '.join(edges)}" if edges else text, not edges))
    return Verdict(f"test error in %, {'; '.join(told)}", checks)


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    nets = list(dict.fromkeys(row["net"] for row in rows))
    one = pick(rows, optimizer="LARS")[0]
    note = (
        f"{one['data']}, {one['samples']} images, {EPOCHS} epochs; base: SGD with batches of {BASE_BATCH}, the others: "
        f"{one['batch']}, each with its best rate; 95 % intervals over seeds"
    )
    title = "In as few updates LARS learns more than SGD, but not what many small batches do"
    drawn, all_axes = slide(ink, title, note, panels=len(nets), sharex=True)
    colours = [ink("muted"), ink("run5"), ink("run0"), ink("run5"), ink("run1")]
    for axes, net in zip(all_axes, nets, strict=True):
        found = [error(rows, net, optimizer) for optimizer in MAKERS]
        dots(axes, ink, list(MAKERS), found, colours, ".1f")
        name(axes, "test error, %", net)
    return drawn


CLAIM = Claim(
    number="8",
    name="lars",
    title="With very large batches, LARS learns more than SGD and LAMB more than Adam, each with its best rate",
    source="You, Gitman & Ginsburg 2017 (arXiv 1708.03888), section 6; You et al. 2020 (arXiv 1904.00962), section 4",
    about=__doc__ or "",
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
    seeds=5,
)

if __name__ == "__main__":
    main(CLAIM)
