"""Growing the batch instead of decaying the learning rate (Smith, Kindermans, Ying and Le 2018).

A small network on 16,384 images of Fashion-MNIST, 14x14 pixels, 10 epochs, SGD with momentum, ghost batch norm of 32
samples in every run. The schedule divides by 4 after 5, 7 and 9 epochs, in five ways, as the paper's figures 1 and 5:

    decay the rate      the usual one: rate 0.1, batches of 64
    grow the batch      the rate stays, and the batch is multiplied by 4 up to an eighth of the data; the rest is decay
    hybrid              the batch grows once, then the rate decays
    larger rate         as "grow the batch", with 4 times the rate and batches that begin at 256
    larger momentum     and momentum 0.975 instead of 0.9, with batches that begin at 1024
    no annealing        neither: what the schedule is worth

The scale of the noise, rate * samples / (batch * (1 - momentum)), is the same in all but the last, epoch by epoch.
Courses are `largebatch.grow`, run by the hook `dtrain.steering.Steer`. Accuracy is that of precise batch-norm
statistics.

Quick: 4096 images, without "hybrid".
"""

from __future__ import annotations

from collections.abc import Sequence

import tasks
from claim import Case, Check, Claim, Ink, Place, Row, Verdict, gap, interval, main, pick, values
from draw import dots, slide
from matplotlib.figure import Figure

import dtrain
from dtrain import largebatch

EPOCHS = 10
MILESTONES = (5, 7, 9)
FACTOR = 0.25
RATE = 0.1
NORM_BATCH = 32
WAYS = ("decay the rate", "grow the batch", "hybrid", "larger rate", "larger momentum", "no annealing")
PAPER_UPDATES = (78125, 29139, 6405, 2302)
"""Of its four schedules on CIFAR-10, computed from 50,000 images, 200 epochs and batches of at most 5120."""


def cases(quick: bool) -> list[Case]:
    ways = [way for way in WAYS if not (quick and way == "hybrid")]
    return [{"case": way, "samples": 4096 if quick else 16384} for way in ways]


def course(way: str, samples: int) -> tuple[largebatch.Course, float, float]:
    """The course, the learning rate at its start, and the momentum."""
    schedule, most = largebatch.decay(MILESTONES, FACTOR), samples // 8
    if way == "decay the rate":
        return largebatch.steady(schedule, 64), RATE, 0.9
    if way == "no annealing":
        return largebatch.steady(largebatch.constant(), 64), RATE, 0.9
    if way == "larger rate":
        return largebatch.grow(schedule, batch=256, max_batch=most), 4 * RATE, 0.9
    if way == "larger momentum":
        return largebatch.grow(schedule, batch=min(1024, most), max_batch=most), 4 * RATE, 0.975
    return largebatch.grow(schedule, batch=64, max_batch=256 if way == "hybrid" else most), RATE, 0.9


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return place.run(_trained, case, seed)


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    data = tasks.images(case["samples"])
    way, rate, momentum = course(case["case"], len(data.train))
    trainer = tasks.train(
        comm,
        tasks.cnn(seed),
        data.train,
        optimizer=lambda model: tasks.sgd(model, rate, momentum=momentum),
        course=way,
        global_batch=way(0.0).batch,
        seed=seed,
        epochs=EPOCHS,
        norm_batch=NORM_BATCH,
    )
    tasks.precisely(trainer.model, data.train, comm)
    expected = largebatch.steps(way, samples=len(data.train), epochs=EPOCHS)
    row: Row = {"data": data.name, "updates": trainer.state.step, "expected_updates": expected}
    return [{**row, "accuracy": tasks.accuracy(trainer.model, data.test, comm), "train_loss": trainer.state.loss}]


def paper_updates() -> tuple[int, ...]:
    """Optimizer steps of the paper's schedules on CIFAR-10 (section 5.1), by `largebatch.updates`.

    The last one comes out where samples that fill no batch are left out before the batch changes, the others where they
    go on.
    """
    schedule, most, epochs = largebatch.decay((60, 120, 160), 0.2), 5120, (60, 120, 160, 200)
    ways = [(largebatch.steady(schedule, 128), True)]
    for batch, carry in ((128, True), (640, True), (3200, False)):
        ways.append((largebatch.grow(schedule, batch=batch, max_batch=most), carry))
    return tuple(largebatch.updates(way, samples=50000, milestones=epochs, carry=carry) for way, carry in ways)


def judge(rows: Sequence[Row]) -> Verdict:
    away = {way: gap(rows, "accuracy", {"case": way}, {"case": WAYS[0]}) for way in WAYS if pick(rows, case=way)}
    found = {way: interval(values(rows, "accuracy", case=way)) for way in away}
    counts = {way: pick(rows, case=way)[0]["updates"] for way in away}
    exact = paper_updates()
    dearer = gap(rows, "accuracy", {"case": WAYS[0]}, {"case": WAYS[4]})
    checks = [
        Check(f"the schedule matters: without it {away[WAYS[5]]:+.2f} points", away[WAYS[5]].mean <= -0.4),
        Check(f"growing the batch is as good: {away[WAYS[1]]:+.2f} (within 0.7)", abs(away[WAYS[1]].mean) <= 0.7),
        Check(f"with a larger rate, too: {away[WAYS[3]]:+.2f} (within 1)", abs(away[WAYS[3]].mean) <= 1),
        Check(f"a larger momentum costs something: {away[WAYS[4]]:+.2f}", dearer.above_zero),
        Check(
            f"updates are those that the courses say, and the paper's: {', '.join(map(str, exact))}",
            exact == PAPER_UPDATES and all(row["updates"] == row["expected_updates"] for row in rows),
        ),
    ]
    if "hybrid" in away:
        checks.insert(
            2, Check(f"so is the hybrid: {away['hybrid']:+.2f} (within 0.7)", abs(away["hybrid"].mean) <= 0.7)
        )
    told = [f"{way} {found[way]:.1f} % in {counts[way]}" for way in (WAYS[0], WAYS[1], WAYS[3], WAYS[4])]
    return Verdict(f"test accuracy, and updates: {', '.join(told)}", checks)


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    one = rows[0]
    note = f"{one['data']}, {one['samples']} images, {EPOCHS} epochs, ghost batch norm of {NORM_BATCH}; 95 % intervals"
    drawn, (axes,) = slide(ink, "Grow the batch where the rate would fall: as good, in a fraction of the updates", note)
    colour = {"decay the rate": "muted", "larger momentum": "run1", "no annealing": "muted"}
    ways = [way for way in WAYS if pick(rows, case=way)]
    labels = [f"{way}\n{pick(rows, case=way)[0]['updates']} updates" for way in ways]
    found = [interval(values(rows, "accuracy", case=way)) for way in ways]
    dots(axes, ink, labels, found, [ink(colour.get(way, "run0")) for way in ways], ".1f")
    axes.set_xlabel("test accuracy, %")
    return drawn


CLAIM = Claim(
    number="4",
    name="grow_batch",
    title="Increasing the batch is as good as decaying the learning rate, with far fewer parameter updates",
    source="Smith, Kindermans, Ying & Le 2018 (arXiv 1711.00489), sections 3 to 5",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
