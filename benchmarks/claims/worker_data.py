"""Workers whose data differ, each with few classes: whose samples should share batch-norm statistics?

Ten workers of 8 samples each; a global batch of 80 has 8 samples of each class of Fashion-MNIST (14x14 pixels), so
that it is the same for all. What differs is who gets which:

    1 class, its own      worker 3 has nothing but class 3, from the first step to the last
    1 class, in turn      in each step another one, so that a worker sees all of them in time
    2 or 8 classes        4 samples of each of two, 1 of each of eight; in turn

The kinds: `per worker`, plain batch norm over a worker's 8 samples, as DistributedDataParallel has it;
`synchronised`, over all 80 (`TrainConfig(norm_batch="global")`); `renormalised`, `norm.renorm` with limits that open
as in the paper, in proportion to the length of the run; `group norm`, which knows no batch. The same seeds, steps,
order and learning rate for all. Running statistics of all workers are merged for evaluation; `precise` ones are
computed anew from training images of all classes.

Ioffe 2017 takes batches of 16 labels with 2 images each, for Inception-v3 on ImageNet: 67.0 % with batch norm, 78.5 %
with renormalisation.

Quick: a quarter of the steps; without 2 classes and group norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import tasks
import torch
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, gap, interval, main, pick, values
from draw import dots, slide
from matplotlib.figure import Figure
from torch import Tensor, nn

import dtrain
from dtrain import norm

WORKERS = 10
EACH = 8
"""Samples of a worker in a step."""
LR = 0.05
GROUPS = 4
MOMENTUM = 0.02
"""Of the running averages of renormalisation: the paper's are slower than batch norm's, too."""
KINDS = ("per worker", "synchronised", "renormalised", "group norm")


SETTINGS = [(1, True, kind) for kind in KINDS] + [(k, False, kind) for k in (1, 2, 8) for kind in (KINDS[0], KINDS[2])]
"""Classes of a worker, whether always the same ones, and the kind. Synchronised and group norm are the same for all."""


def cases(quick: bool) -> list[Case]:
    wanted = [one for one in SETTINGS if not quick or (one[0] in (1, 8) and one[2] != "group norm")]
    return [
        {"case": f"{kind}, {named(k, own)}", "kind": kind, "classes": k, "own": own, "steps": 80 if quick else 320}
        for k, own, kind in sorted(wanted, key=lambda one: one[2] != "synchronised")
    ]


def named(classes: int, own: bool) -> str:
    return f"{classes} class{'es' if classes > 1 else ''}{', its own' if own else ', in turn' if classes == 1 else ''}"


def order(labels: Tensor, *, classes: int, own: bool, steps: int, seed: int) -> Tensor:
    """Indices of samples (steps * 80,): in each global batch the 8 of worker 0, then the 8 of worker 1, ...

    Worker w has samples of the classes w, w + 1, ..., w + classes - 1, in the next step of one more each, unless they
    are its own. Each class is read in a random order, again and again.
    """
    generator = torch.Generator().manual_seed(seed)
    piles = []
    for label in range(tasks.CLASSES):
        pile = torch.where(labels == label)[0]
        rounds = -(-steps * EACH // len(pile))
        piles.append(torch.cat([pile[torch.randperm(len(pile), generator=generator)] for _ in range(rounds)]))
    taken = [0] * tasks.CLASSES
    found = []
    for step in range(steps):
        for worker in range(WORKERS):
            for sample in range(EACH):
                label = (worker + sample % classes + (0 if own else step)) % tasks.CLASSES
                found.append(piles[label][taken[label]])
                taken[label] += 1
    return torch.stack(found)


def network(kind: str, seed: int, steps: int) -> nn.Module:
    model = tasks.cnn(seed)
    if kind == "group norm":
        return norm.replace_with_group_norm(model, GROUPS)
    if kind == "renormalised":
        model = norm.renorm(model, warmup=steps // 20, r_steps=steps // 3, d_steps=steps // 5)
        for layer in model.modules():
            if isinstance(layer, norm.BatchRenorm):
                layer.momentum = MOMENTUM
    return model


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    tasks.images()
    return place.run(_trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images()
    kind, steps = case["kind"], case["steps"]
    places = order(data.train.tensors[1], classes=case["classes"], own=case["own"], steps=steps, seed=seed)
    trainer = tasks.train(
        comm,
        network(kind, seed, steps),
        tasks.Ordered(data.train, places),
        optimizer=lambda model: tasks.sgd(model, LR),
        factor=tasks.cosine(steps),
        global_batch=WORKERS * EACH,
        shuffle=False,
        seed=seed,
        steps=steps,
        norm_batch={"per worker": "worker", "synchronised": "global"}.get(kind),
    )
    row: Row = {"data": data.name, "error": 100 - tasks.accuracy(trainer.model, data.test, comm)}
    if kind != "group norm":
        tasks.precisely(trainer.model, data.train, comm)
        row["precise"] = 100 - tasks.accuracy(trainer.model, data.test, comm)
    return [row]


def judge(rows: Sequence[Row]) -> Verdict:
    def error(kind: str, classes: int = 1, own: bool = False, key: str = "error") -> Interval:
        return interval(values(rows, key, kind=kind, classes=classes, own=own))

    per_worker, synchronised, renormalised = KINDS[:3]
    sync, mixed = error(synchronised, own=True), error(per_worker, 8)
    own, again = error(per_worker, own=True), error(per_worker, own=True, key="precise")
    turn, helped = error(per_worker), error(renormalised)
    always = error(renormalised, own=True)
    apart = gap(rows, "error", {"kind": synchronised, "own": True}, {"kind": per_worker, "classes": 8})
    texts = [
        f"own {own:.1f}, in turn {turn:.1f}, all mixed {mixed:.1f} %",
        f"synchronised {sync:.1f}",
        f"renormalised {always:.1f}, {helped:.1f}, {error(renormalised, 8):.1f}",
    ]
    if pick(rows, kind=KINDS[3]):
        texts.append(f"group norm {error(KINDS[3], own=True):.1f}")
    checks = [
        Check(
            f"with a class for each worker, per-worker batch norm has 3 times the error of mixed workers or more: "
            f"{own:.1f} against {mixed:.1f} %",
            own.mean >= 3 * mixed.mean,
        ),
        Check(f"precise statistics do not mend that: {again:.1f} %", again.mean >= 2 * mixed.mean),
        Check(f"synchronised, it does not matter: {apart:+.1f} points from mixed", apart.mean <= 2),
        Check(
            f"renormalisation mends at least half of it where classes come in turn: {turn:.1f} to {helped:.1f} %",
            turn.mean - helped.mean >= 0.5 * (turn.mean - mixed.mean),
        ),
        Check(
            f"and where each worker has its own: {own:.1f} to {always:.1f} %",
            own.mean - always.mean >= 0.5 * (own.mean - mixed.mean),
        ),
    ]
    return Verdict("error with one class a worker, per-worker: " + "; ".join(texts), checks)


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    labels, found, colours = [], [], []
    colour = {"per worker": "run1", "synchronised": "run0", "renormalised": "run4", "group norm": "muted"}
    for classes, own, kind in sorted(SETTINGS, key=lambda one: (one[0], not one[1], KINDS.index(one[2]))):
        own_rows = pick(rows, kind=kind, classes=classes, own=own)
        if own_rows:
            labels.append(f"{named(classes, own)}: {kind}")
            found.append(interval(values(own_rows, "error")))
            colours.append(ink(colour[kind]))
    note = f"{rows[0]['data']}, {WORKERS} workers of {EACH} samples, {rows[0]['steps']} updates; intervals: 95 %"
    drawn, (axes,) = slide(ink, "Workers with classes of their own need shared batch-norm statistics", note)
    dots(axes, ink, labels, found, colours, ".1f")
    axes.set_xlabel("test error, %")
    return drawn


CLAIM = Claim(
    number="11",
    name="worker_data",
    title="Where workers see different classes, per-worker batch norm fails; synchronised batch norm does not, and "
    "batch renormalisation mends most of it",
    source="Ioffe 2017 (arXiv 1702.03275), section 4.3; Hsieh et al. 2020 (arXiv 1910.00189)",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
    place=Place("threads", WORKERS),
)

if __name__ == "__main__":
    main(CLAIM)
