"""Training loss does not tell a model that has learnt from one that has memorised; evidence does (Smith & Le 2018).

Logistic regression on two classes of Fashion-MNIST (pullover, coat), 28x28 pixels, 600 images, once with their labels
and once with random ones, for strengths λ of the Gaussian prior from 1e-4 to 1e5. Each is trained to the minimum of its
cost by Newton's method, an optimizer that asks `dtrain.largebatch.LossSurface` for the Hessian of all workers' samples;
then `dtrain.largebatch.evidence` gives E, the logarithm of how much likelier the data are if labels are guessed than
under the model: below 0 the model is right, above 0 guessing is. In float64.

A seed decides which images, and the random labels. The paper has MNIST, 0 against 1. Left out: its second half, on
noise and batches, is claim 1.

Quick: 14x14 pixels, 150 images and fewer strengths. With as many images as that, weights are still enough to memorise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from claim import Case, Check, Claim, Ink, Place, Row, Verdict, interval, main, pick, values
from draw import beside, name, points, slide
from matplotlib.figure import Figure
from tasks import train
from torch import Tensor, nn

import dtrain
from dtrain import recipes
from dtrain.errors import DataError
from dtrain.largebatch.curvature import LossSurface
from dtrain.largebatch.evidence import evidence
from dtrain.largebatch.part import Part
from dtrain.recipes.data import TensorData

CLASSES = (2, 4)
KINDS = ("true labels", "random labels")
GRIDS = {
    "full": [10.0**e for e in (5, 4, 3, 2.5, 2, 1.5, 1, 0, -1, -2, -3, -4)],
    "quick": [10.0**e for e in (5, 4, 3, 2, 1, 0, -2, -4)],
}
"""Strengths λ of the prior, falling: each training begins where the one before has ended."""
STEPS = 15
"""Newton steps for each strength, from where the one before ended; it stops by itself."""
SETTLED = 1e-9
"""What a step must promise to gain of the cost to be made."""
TEST_SAMPLES = 2000
CHANCE = 3.0
"""Log evidence that random labels may have by chance: 20 to 1."""


def cases(quick: bool) -> list[Case]:
    size: Case = {"samples": 600, "pool": 1, "grid": "full"}
    if quick:
        size = {"samples": 150, "pool": 2, "grid": "quick"}
    return [{"case": kind, **size} for kind in KINDS]


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data, test, source = _two_classes(case, seed)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(data.tensors[0][0].numel(), 1)).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    surface = LossSurface(model, _loss, Part(data, comm, batch_size=len(data)), comm=comm)
    unseen = LossSurface(model, _loss, Part(test, comm, batch_size=len(test)), comm=comm)
    rows: list[Row] = []
    for strength in GRIDS[case["grid"]]:
        train(
            comm,
            model,
            data,
            optimizer=lambda model, strength=strength: Newton(model, surface, strength),
            loss=_loss,
            global_batch=len(data),
            seed=seed,
            steps=STEPS,
        )
        found = evidence(surface, precision=strength, classes=2)
        row: Row = {"data": source, "pixels": surface.size - 1, "strength": strength, "ratio": found.log_ratio}
        row |= {"log_occam": found.log_occam, "cost": found.cost, "distance": found.distance}
        row |= {"train_loss": surface.value(), "train_accuracy": _accuracy(model, data, comm)}
        row |= {"test_loss": unseen.value(), "test_accuracy": _accuracy(model, test, comm)}
        rows.append(row)
    return rows


class Newton(torch.optim.Optimizer):
    """Steps to the minimum of the quadratic that the cost is near here, half as far while that would raise the cost."""

    def __init__(self, model: nn.Module, surface: LossSurface, precision: float) -> None:
        super().__init__(model.parameters(), {"lr": 1.0})
        self._surface, self._precision = surface, precision
        self._settled = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """With `.grad` the gradient of the mean loss, as a Trainer leaves it."""
        if self._settled:
            return
        surface, at = self._surface, self._surface.point()
        slope = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])
        slope = surface.samples * slope + self._precision * at
        matrix = surface.samples * surface.hessian(rows_at_once=256)
        matrix.diagonal().add_(self._precision)
        move = torch.cholesky_solve(slope.unsqueeze(1), torch.linalg.cholesky(matrix)).squeeze(1)
        gain, cost, part = 0.5 * float(slope @ move), self._cost(at), 1.0
        if gain < SETTLED:
            self._settled = True
            return
        while self._cost(at - part * move) > cost and part > 1e-6:
            part /= 2
        for parameter, new in zip(
            self.param_groups[0]["params"], surface.by_name(at - part * move).values(), strict=True
        ):
            parameter.copy_(new)

    def _cost(self, at: Tensor) -> float:
        return self._surface.samples * self._surface.value(at) + self._precision / 2 * float(at @ at)


def _loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1])


def _right(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor | float]:
    return {"right": ((model(batch[0]).squeeze(1) > 0) == (batch[1] > 0.5)).sum()}


def _accuracy(model: nn.Module, data: TensorData, comm: dtrain.Backend) -> float:
    return 100 * dtrain.evaluate(model, data, _right, comm, batch_size=1000)["right"]


def _two_classes(case: Case, seed: int) -> tuple[TensorData, TensorData, str]:
    """Training and test images of two classes in float64, with labels 0 and 1; digits where there are no clothes."""
    try:
        recipe = recipes.build("fashion", dtype=torch.float64)
    except DataError:
        recipe = recipes.build("digits", dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    random_labels = case["case"] == KINDS[1]
    train_data = _chosen(recipe.train, case["samples"], case["pool"], generator, random_labels)
    return train_data, _chosen(recipe.test, TEST_SAMPLES, case["pool"], generator, random_labels), recipe.name


def _chosen(data: Any, samples: int, pool: int, generator: torch.Generator, random_labels: bool) -> TensorData:
    labels = data.tensors[1]
    of_these = torch.nonzero((labels == CLASSES[0]) | (labels == CLASSES[1])).flatten()
    mine = of_these[torch.randperm(len(of_these), generator=generator)[:samples]]
    pixels, kinds = data.batch(mine)
    pixels = F.avg_pool2d(pixels, pool) if pixels.shape[-1] == 28 else pixels
    true = (kinds == CLASSES[1]).double()
    made = torch.randint(2, true.shape, generator=generator).double()
    return TensorData(pixels, made if random_labels else true)


def best(rows: Sequence[Row], key: str, kind: str, seed: int) -> Row:
    """The strength at which a figure is lowest."""
    return min(pick(rows, case=kind, seed=seed), key=lambda row: row[key])


def judge(rows: Sequence[Row]) -> Verdict:
    seeds = sorted({row["seed"] for row in rows})
    lowest = {kind: [best(rows, "ratio", kind, seed) for seed in seeds] for kind in KINDS}
    true, made = (interval([row["ratio"] for row in lowest[kind]]) for kind in KINDS)
    weakest = min(row["strength"] for row in rows)
    memorised = interval(values(rows, "train_accuracy", case=KINDS[1], strength=weakest))
    against = values(rows, "ratio", case=KINDS[1], strength=weakest)
    apart = [
        abs(math.log10(row["strength"] / best(rows, "test_loss", KINDS[0], seed)["strength"]))
        for row, seed in zip(lowest[KINDS[0]], seeds, strict=True)
    ]
    accuracy = interval([row["test_accuracy"] for row in lowest[KINDS[0]]])
    settled = max(row["distance"] for row in rows)
    return Verdict(
        f"lowest E {true:.0f} with true labels, {made:.1f} with random ones, which are memorised all the same "
        f"({memorised:.0f} % of the training images right)",
        [
            Check(f"true labels: E falls far below 0, to {true:.1f}", all(r["ratio"] < -10 for r in lowest[KINDS[0]])),
            Check(
                f"random labels: E is above {-CHANCE:.0f} for every λ; lowest {made:.2f}",
                all(row["ratio"] > -CHANCE for row in lowest[KINDS[1]]),
            ),
            Check(
                f"though they are memorised: {memorised:.1f} % right at λ = {weakest:g}, where E = "
                f"{interval(against):.0f}",
                memorised.mean > 99 and min(against) > 0,
            ),
            Check(
                f"the λ of the lowest E is within a factor of 10 of that of the lowest test loss (factors "
                f"{', '.join(f'{10**a:.1f}' for a in apart)}; {accuracy:.1f} % of test images right there)",
                max(apart) <= 1.01,
            ),
            Check(f"all runs are at the minimum of their cost, within {settled:.0e}", settled < 1e-3),
        ],
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    one = rows[0]
    note = (
        f"Logistic regression, {one['data']}, {one['samples']} images of two classes, {one['pixels']} pixels; 95 % "
        "intervals over seeds"
    )
    drawn, (left, right) = slide(ink, "Bayesian evidence tells learning from memorising", note, panels=2)
    strengths = sorted({row["strength"] for row in rows})
    for kind, colour, at in zip(KINDS, (ink("run0"), ink("run1")), (1e3, 1.0), strict=True):
        found = [interval(values(rows, "ratio", case=kind, strength=s)) for s in strengths]
        points(left, strengths, found, colour)
        nearest = min(range(len(strengths)), key=lambda i: abs(math.log(strengths[i] / at)))
        beside(left, f"{kind}", strengths[nearest], found[nearest].mean, colour)
    left.axhline(0, color=ink("muted"), linewidth=0.8)
    name(left, "strength of the prior λ", "E (nats): above 0, guessing is likelier")
    found = [interval(values(rows, "test_loss", case=KINDS[0], strength=s)) for s in strengths]
    points(right, strengths, found, ink("run0"))
    name(right, "strength of the prior λ", "test loss, true labels (nats)")
    for axes, key, word in ((left, "ratio", "E"), (right, "test_loss", "test loss")):
        lows = [best(rows, key, KINDS[0], seed)["strength"] for seed in sorted({row["seed"] for row in rows})]
        middle = math.exp(sum(map(math.log, lows)) / len(lows))
        axes.axvline(middle, color=ink("run0"), alpha=0.35, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"lowest {word}\nat λ = {middle:.0f}", (middle, 0.98), xycoords=("data", "axes fraction"), va="top",
            xytext=(5, 0), textcoords="offset points", color=ink("run0"), fontsize=9,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks([1e-4, 1e-2, 1, 1e2, 1e4], ["0.0001", "0.01", "1", "100", "10 000"])
        axes.minorticks_off()
    return drawn


CLAIM = Claim(
    number="2",
    name="evidence",
    title="Bayesian evidence tells a model of informative labels from one that has memorised random ones",
    source="Smith & Le 2018 (arXiv 1710.06451), sections 2 and 3",
    about=__doc__ or "",
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
