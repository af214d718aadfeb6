"""Large batches generalise worse because they make fewer updates; as many updates close the gap (Hoffer et al. 2017).

A small network on 8192 images of Fashion-MNIST, 14x14 pixels, batches of 64 against batches of 1024, SGD with momentum
0.9 and a cosine schedule over all updates. Step by step as the paper's table 1:

    small batch       8 epochs of 64
    large batch       8 epochs of 1024, the same learning rate: a 16th of the updates
    + learning rate   times the square root of 16; gradients clipped at 1, as in all that follow
    + ghost norm      batch norm over 64 samples, as in the small batch (`TrainConfig(norm_batch=64)`)
    + regime          16 times the epochs: as many updates as the small batch

Test accuracy is that of precise batch-norm statistics: with few updates the running average lags, which is no matter of
generalisation. The paper also says that the distance of the weights from where they began grows as the logarithm of
time: here that is measured at a constant learning rate, and fitted by a + b log t and by a power of t.

Quick: 4096 images, 5 epochs, batches of 64 and 512.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import tasks
from claim import Case, Check, Claim, Ink, Place, Row, Verdict, gap, interval, main, pick, values
from draw import dots, slide
from matplotlib.figure import Figure

import dtrain

SMALL = 64
LR = 0.1
CLIP = 1.0
WALK_STEPS = [2**k for k in range(4, 11)]
STEPS = ("small batch", "large batch", "+ learning rate", "+ ghost norm", "+ regime")
WALK = "distance"


def cases(quick: bool) -> list[Case]:
    size: Case = (
        {"samples": 4096, "epochs": 5, "large": 512} if quick else {"samples": 8192, "epochs": 8, "large": 1024}
    )
    found = [{"case": case, **size} for case in reversed(STEPS)]
    return [*found, {"case": WALK, **size, "steps": WALK_STEPS}]


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_walk if case["case"] == WALK else _trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"])
    number = STEPS.index(case["case"])
    batch = SMALL if number == 0 else case["large"]
    times = batch // SMALL
    lr = LR * times**0.5 if number >= 2 else LR
    epochs = case["epochs"] * (times if number >= 4 else 1)
    updates = epochs * -(-len(data.train) // batch)
    trainer = tasks.train(
        comm,
        tasks.cnn(seed),
        data.train,
        optimizer=lambda model: tasks.sgd(model, lr),
        factor=tasks.cosine(updates),
        global_batch=batch,
        seed=seed,
        epochs=epochs,
        clip_grad_norm=CLIP if number >= 2 else None,
        norm_batch=SMALL if number >= 3 else None,
    )
    running = tasks.accuracy(trainer.model, data.test, comm)
    tasks.precisely(trainer.model, data.train, comm)
    row: Row = {"data": data.name, "batch": batch, "lr": lr, "updates": trainer.state.step, "running": running}
    row |= {"accuracy": tasks.accuracy(trainer.model, data.test, comm), "train_loss": trainer.state.loss}
    return [row]


def _walk(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"])
    walk = tasks.Walk(case["steps"])
    tasks.train(
        comm,
        tasks.cnn(seed),
        data.train,
        optimizer=lambda model: tasks.sgd(model, LR),
        global_batch=SMALL,
        seed=seed,
        steps=case["steps"][-1],
        hooks=[walk],
    )
    return [{"data": data.name, "step": step, "distance": far} for step, far in walk.distances.items()]


def fits(steps: Sequence[float], distances: Sequence[float]) -> tuple[float, float, float]:
    """Root mean square of the relative residual of a + b log t, that of c t^p, and p."""
    t, d = np.log(np.asarray(steps, float)), np.asarray(distances, float)
    line, power = np.polyfit(t, d, 1), np.polyfit(t, np.log(d), 1)
    residuals = (np.polyval(line, t) / d - 1, np.exp(np.polyval(power, t)) / d - 1)
    log, other = (float(np.sqrt(np.mean(r**2))) for r in residuals)
    return log, other, float(power[0])


def judge(rows: Sequence[Row]) -> Verdict:
    found = {case: interval(values(rows, "accuracy", case=case)) for case in STEPS}
    lost, kept = (gap(rows, "accuracy", {"case": STEPS[0]}, {"case": case}) for case in (STEPS[1], STEPS[4]))
    by_lr, by_ghost, by_regime = (
        gap(rows, "accuracy", {"case": after}, {"case": before}) for before, after in itertools.pairwise(STEPS[1:])
    )
    walks = [pick(rows, case=WALK, seed=seed) for seed in sorted({row["seed"] for row in rows})]
    residuals = [fits([row["step"] for row in walk], [row["distance"] for row in walk]) for walk in walks]
    log, power, exponent = (interval(column) for column in zip(*residuals, strict=True))
    return Verdict(
        "accuracy " + ", ".join(f"{case} {one:.1f} %" for case, one in found.items()),
        [
            Check(f"the large batch loses 5 points or more: {lost:.1f}", lost.mean >= 5),
            Check(f"a rate times sqrt(M) gives some of them back: {by_lr:+.1f}", by_lr.above_zero),
            Check(f"ghost batch norm gives more: {by_ghost:+.1f}", by_ghost.above_zero),
            Check(
                f"as many updates give the rest: {by_regime:+.1f}, and {kept:.1f} are left (at most 1.5)",
                kept.mean <= 1.5,
            ),
            Check(
                f"distance grows as log t: residual {100 * log.mean:.1f} %, of a power of t (exponent {exponent:.2f}) "
                f"{100 * power.mean:.1f} %",
                log.mean < power.mean,
            ),
        ],
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    one = pick(rows, case=STEPS[4])[0]
    note = f"{one['data']}, {one['samples']} images, batches of {SMALL} and {one['large']}; 95 % intervals over seeds"
    drawn, (axes,) = slide(ink, "As many updates, and the large batch is as good as the small one", note)
    found = [interval(values(rows, "accuracy", case=case)) for case in STEPS]
    updates = [pick(rows, case=case)[0]["updates"] for case in STEPS]
    labels = [f"{case}\n{n} updates" for case, n in zip(STEPS, updates, strict=True)]
    dots(axes, ink, labels, found, [ink("muted"), *[ink("run5")] * 3, ink("run0")], ".1f")
    axes.set_xlabel("test accuracy, %")
    return drawn


CLAIM = Claim(
    number="7",
    name="train_longer",
    title="Large batches generalise worse because they make fewer updates; with ghost batch norm, a larger rate and as "
    "many updates there is no gap",
    source="Hoffer et al. 2017 (arXiv 1705.08741), table 1 and section 3",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
