"""Linear scaling of the learning rate, and its elbow (Goyal et al. 2017).

A small network on 16,384 images of Fashion-MNIST, 14x14 pixels, batch norm over 32 samples in every run (ghost batch
norm where a batch has more), SGD with momentum 0.9, 6 epochs; the rate is divided by 10 after a third, two thirds and
five sixths of them, and warmed up over the first sixth. Batches of 32 have a rate of 0.05. Larger ones have k times 32
samples, and k times the rate (linear), its root (sqrt), or the same (none). Accuracy is that of precise batch-norm
statistics.

In the paper: the same error from 256 to 8192 samples with linear scaling and warm-up, 23.7 %, and more beyond; at 8192,
41.7 % without scaling, 26.2 % with the root, and 24.8 % without warm-up.

At this scale batch norm makes a missing warm-up harmless in the end; `warm_up.py` looks at the beginning, without it.

Quick: 8192 images, 3 epochs, and fewer batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import tasks
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, gap, interval, main, pick, values
from draw import beside, name, points, powers, slide
from matplotlib.figure import Figure

import dtrain
from dtrain import largebatch

BASE = 32
RATE = 0.05
K = 8
"""Times the base batch where rules are compared."""


def cases(quick: bool) -> list[Case]:
    size: Case = {"samples": 8192, "epochs": 3} if quick else {"samples": 16384, "epochs": 6}
    wanted = [("linear", BASE, True), *((rule, K * BASE, True) for rule in ("linear", "sqrt", "none"))]
    wanted += [("linear", K * BASE, False)]
    wanted += [("linear", n, True) for n in ((64, 1024) if quick else (64, 128, 512, 1024, 2048))]
    return [
        {"case": f"{rule}, batch {batch}{'' if warm else ', no warm-up'}", "part": "error"}
        | {"batch": batch, "rule": rule, "warm": warm, **size}
        for rule, batch, warm in wanted
    ]


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_error, case, seed)


def schedule(case: Case) -> largebatch.Schedule:
    """Of the scaled rate, by epochs."""
    epochs = case["epochs"]
    found = largebatch.decay([epochs / 3, epochs * 2 / 3, epochs * 5 / 6])
    start = 1 / largebatch.scale(case["batch"], BASE, case["rule"])
    return largebatch.warm_up(found, epochs / 6, start=start) if case["warm"] else found


def _error(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"])
    rate = RATE * largebatch.scale(case["batch"], BASE, case["rule"])
    trainer = tasks.train(
        comm,
        tasks.cnn(seed),
        data.train,
        optimizer=lambda model: tasks.sgd(model, rate),
        course=largebatch.steady(schedule(case), case["batch"]),
        global_batch=case["batch"],
        seed=seed,
        epochs=case["epochs"],
        norm_batch=BASE,
    )
    tasks.precisely(trainer.model, data.train, comm)
    row: Row = {"data": data.name, "lr": rate, "updates": trainer.state.step}
    return [{**row, "error": 100 - tasks.accuracy(trainer.model, data.test, comm)}]


def judge(rows: Sequence[Row]) -> Verdict:
    def error(batch: int, rule: str = "linear", warm: bool = True) -> Case:
        return {"part": "error", "batch": batch, "rule": rule, "warm": warm}

    def more(one: Case, other: Case) -> Interval:
        return gap(rows, "error", one, other)

    large, base = K * BASE, error(BASE)
    batches = sorted({row["batch"] for row in pick(rows, part="error", rule="linear")})
    lost = {batch: more(error(batch), base) for batch in batches[1:]}
    last = batches[-1]
    within = [batch for batch, points in lost.items() if points.mean <= 1.5]
    elbow = max(within, default=BASE)
    root, none, cold = (
        more(one, error(large)) for one in (error(large, "sqrt"), error(large, "none"), error(large, warm=False))
    )
    checks = [
        Check(f"twice the batch and the rate: {lost[64]:+.1f} points of error (within 1)", abs(lost[64].mean) <= 1),
        Check(f"{K} times: {lost[large]:+.1f} (within 1.5)", abs(lost[large].mean) <= 1.5),
        Check(f"the root of {K} instead of {K} is worse: {root:+.1f}", root.above_zero),
        Check(f"the rate of the small batch is worse still: {none:+.1f}", none.mean > root.mean and none.above_zero),
        Check(f"linear scaling ends: {lost[last]:+.1f} at {last}", lost[last].mean >= 4),
        Check(f"no warm-up costs error: {cold:+.1f} at {large}", cold.above_zero),
    ]
    text = ", ".join(f"{batch}: {points:+.1f}" for batch, points in lost.items())
    found = interval(values(rows, "error", **base))
    return Verdict(
        f"error {found:.1f} % at {BASE}; linear scaling adds {text} points, so it reaches {elbow // BASE} times the "
        f"batch; at {large} the root adds {root:+.1f} to that, none {none:+.1f}",
        checks,
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    one = pick(rows, part="error")[0]
    note = f"{one['data']}, {one['samples']} images, {one['epochs']} epochs, ghost batch norm of {BASE}; 95 % intervals"
    drawn, (axes,) = slide(ink, "The rate grows with the batch, up to an elbow", note)
    own = pick(rows, part="error", rule="linear", warm=True)
    batches = sorted({row["batch"] for row in own})
    found = [interval(values(own, "error", batch=batch)) for batch in batches]
    points(axes, batches, found, ink("run0"))
    beside(axes, "rate times k", batches[-1], found[-1].mean, ink("run0"))
    for rule, colour, label in (("sqrt", "run4", "rate times root of k"), ("none", "run1", "same rate")):
        other = interval(values(rows, "error", part="error", rule=rule, batch=K * BASE))
        points(axes, [K * BASE], [other], ink(colour))
        beside(axes, label, K * BASE, other.mean, ink(colour), left=True)
    powers(axes, batches)
    axes.set_xlim(batches[0] / 1.3, batches[-1] * 2)
    name(axes, "batch", "test error, %")
    return drawn


CLAIM = Claim(
    number="3",
    name="linear_scaling",
    title="When the batch is multiplied by k, multiply the learning rate by k, with gradual warm-up: the error "
    "stays, up to a largest batch",
    source="Goyal et al. 2017 (arXiv 1706.02677), sections 2 and 5",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
