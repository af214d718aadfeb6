"""Without warm-up, a rate that was scaled for a large batch is too much at the start (Goyal et al. 2017).

A small network without batch norm on 8192 images of Fashion-MNIST, 14x14 pixels, SGD with momentum 0.9, batches of 256
at 8 times the rate of batches of 32: at once, or after a gradual warm-up from the rate of the small batch over 64
updates. What is looked at is the loss of each of the first 96 batches. A run counts as lost where the last of them is
no better than guessing. Each seed trains five networks: with three in all, at a rate of 0.07, nothing could be told,
as one without warm-up diverged and the two others were as good as those with it.

In the paper, ResNet-50 at 8192 samples ends with 24.8 % without warm-up and with 23.7 % after a gradual one. With batch
norm the beginning is harmless at this scale (`linear_scaling.py`).

Quick: the same, as fewer runs tell nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import tasks
from claim import Case, Check, Claim, Ink, Place, Row, Verdict, main, pick
from draw import beside, logarithmic, name, slide
from matplotlib.figure import Figure
from scipy import stats

import dtrain
from dtrain import largebatch

BASE = 32
K = 8
RATE = 0.08
"""For batches of 32."""
UPDATES = 96
WARM_UP_EPOCHS = 2.0
"""64 updates."""
NETWORKS = 5
LEVEL = 0.05
GUESSING = math.log(tasks.CLASSES)
WAYS = ("gradual warm-up", "no warm-up")


def cases(quick: bool) -> list[Case]:
    del quick  # fewer runs tell nothing
    return [{"case": way, "warm": way == WAYS[0], "networks": NETWORKS} for way in WAYS]


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return [place.run(_early, case, 100 * seed + network) for network in range(case["networks"])]


def _early(comm: dtrain.Backend, case: Case, seed: int) -> Row:
    data = tasks.images(8192)
    losses = tasks.Losses()
    schedule = largebatch.constant()
    if case["warm"]:
        schedule = largebatch.warm_up(schedule, WARM_UP_EPOCHS, start=1 / K)
    tasks.train(
        comm,
        tasks.cnn(seed, normalised=False),
        data.train,
        optimizer=lambda model: tasks.sgd(model, RATE * largebatch.scale(K * BASE, BASE)),
        course=largebatch.steady(schedule, K * BASE),
        global_batch=K * BASE,
        seed=seed,
        steps=UPDATES,
        log_every=1,
        hooks=[losses],
    )
    return {"data": data.name, "losses": [round(loss, 4) for loss in losses.losses]}


def curves(rows: Sequence[Row], way: str) -> list[list[float]]:
    """The losses of each run; infinite where they were no numbers."""
    runs = [row["losses"] for row in pick(rows, case=way)]
    return [[math.inf if loss is None else loss for loss in losses] for losses in runs]


def judge(rows: Sequence[Row]) -> Verdict:
    warm, cold = (curves(rows, way) for way in WAYS)
    worst, end = [max(run) for run in warm], [run[-1] for run in warm]
    worst_cold, end_cold = [max(run) for run in cold], [run[-1] for run in cold]
    lost, lost_cold = (sum(loss > 0.95 * GUESSING for loss in ends) for ends in (end, end_cold))
    higher, still = (
        float(stats.mannwhitneyu(one, other, alternative="greater").pvalue)
        for one, other in ((worst_cold, worst), (end_cold, end))
    )
    counts = [[lost_cold, len(cold) - lost_cold], [lost, len(warm) - lost]]
    more = float(stats.fisher_exact(counts, alternative="greater")[1])
    text = f"{statistics.median(worst_cold):.1f} against {statistics.median(worst):.1f}"
    last = f"{statistics.median(end_cold):.2f} against {statistics.median(end):.2f}"
    checks = [
        Check(f"the largest loss is higher without: median {text} (rank test: p = {higher:.2g})", higher <= LEVEL),
        Check(f"after {UPDATES} updates it still is: {last} (p = {still:.2g})", still <= LEVEL),
        Check(f"more runs are lost: {lost_cold} of {len(cold)} against {lost} (Fisher: p = {more:.2g})", more <= LEVEL),
    ]
    measured = (
        f"without and with: the loss goes up to {text}, is {last} after {UPDATES} updates; {lost_cold} and {lost} of "
    )
    return Verdict(f"{measured}{len(cold)} runs are lost", checks)


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    note = f"{rows[0]['data']}, no batch norm, batches of {K * BASE}, each line a run; large losses are cut off"
    drawn, (axes,) = slide(ink, "Without warm-up the loss jumps at once, and stays higher", note)
    for way, colour in ((WAYS[1], "run1"), (WAYS[0], "run0")):
        runs = curves(rows, way)
        for losses in runs:
            axes.plot(range(1, UPDATES + 1), losses, color=ink(colour), linewidth=1.0, alpha=0.6)
        beside(axes, way, UPDATES, min(GUESSING / 1.25, statistics.median(losses[-1] for losses in runs)), ink(colour))
    axes.plot([1, UPDATES], [GUESSING, GUESSING], color=ink("muted"), linewidth=1.0, linestyle="--")
    beside(axes, "guessing", UPDATES, GUESSING, ink("muted"))
    logarithmic(axes)
    axes.set_ylim(0.4, 10 * GUESSING)
    axes.set_xlim(1, 1.25 * UPDATES)
    name(axes, "update", "loss of the batch, nats")
    return drawn


CLAIM = Claim(
    number="3b",
    name="warm_up",
    title="A learning rate that was scaled for a large batch needs a gradual warm-up",
    source="Goyal et al. 2017 (arXiv 1706.02677), sections 2.2 and 5.2",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
