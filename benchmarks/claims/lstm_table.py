"""The table of batch size for a language model: speed saturates, memory does not, and quality does not come by itself.

The recipe `text`, an LSTM that foresees the next character of Python's documentation in pieces of 64, trained for the
same number of samples at global batches of 64 to 4096 pieces, by the code of `benchmarks/batch.py`: words (five
characters) a second, minutes an epoch, memory of a step, and perplexity of training and test pieces, where the rate is
multiplied by the root of (batch / 32), the batch that the recipe's is tuned for, and where it is not.

Times are taken in turns: a few steps at each batch, then again, and the median of the rounds, so that other work on the
machine strikes all alike. One thread.

Quick: an LSTM of 32 cells instead of 64, and fewer batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, gap, interval, main, pick, values
from draw import logarithmic, name, points, powers, slide
from matplotlib.figure import Figure

# isort: split
import batch

from dtrain.spec import RunSpec

ROUNDS = 3
TIMED_STEPS = 3
WORD = 5
"""Characters."""


def cases(quick: bool) -> list[Case]:
    batches = [64, 512, 4096] if quick else [64, 256, 1024, 4096]
    size: Case = {"hidden": 32 if quick else 64, "epochs": 1}
    found: list[Case] = [
        {"case": part, "part": part, "once": True, "batches": batches, **size} for part in ("speed", "memory")
    ]
    for number in batches:
        for rule in ("none", "sqrt") if number in (batches[0], batches[-1]) else ("sqrt",):
            case = f"batch {number}, rate {'scaled by the root' if rule == 'sqrt' else 'as it is'}"
            found.append({"case": case, "part": "quality", "batch": number, "rule": rule, **size})
    return found


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    at = batch.Place(place.backend, place.workers)
    spec = RunSpec(recipe="text", options=(f"hidden={case['hidden']}",), epochs=case["epochs"], seed=seed)
    if case["part"] == "quality":
        recipe = spec.build()
        rate = float(recipe.optimizer(recipe.model.parameters()).param_groups[0]["lr"])
        scaled = batch.scaled(rate, case["batch"], recipe.global_batch, case["rule"])
        row = batch.measure(batch.at(spec, case["batch"], scaled, None), at, float("inf"))
        return [{"rate": scaled, **{key: row[key] for key in ("steps", "train_perplexity", "test_perplexity")}}]
    specs = [batch.at(spec, number, 1e-4, None) for number in case["batches"]]
    if case["part"] == "memory":
        found = batch.apart(batch.memories, specs, at)
        return [{"batch": n, "memory_bytes": nbytes} for n, nbytes in zip(case["batches"], found, strict=True)]
    return _speeds(specs, at)


def _speeds(specs: Sequence[RunSpec], at: batch.Place) -> list[Row]:
    """Characters a second at each batch, in the median of rounds over all."""
    recipe = specs[0].build()
    batch.warm_up(recipe, specs[0], at)
    length = int(recipe.train[0][1].numel())
    step_s: dict[int, list[float]] = {spec.global_batch or 0: [] for spec in specs}
    for _ in range(ROUNDS):
        for spec in specs:
            number = spec.global_batch or 0
            few = batch.whole(recipe.train, number)
            steps = batch.for_steps(spec, max(TIMED_STEPS, 512 // number) + 1)
            full = at.run(batch.fit, recipe, steps, few).full[1:]
            step_s[number].append(statistics.median(record["step_ms"] for record in full) / 1e3)
    samples = len(recipe.train)  # type: ignore[arg-type]
    rows = []
    for number, seconds in step_s.items():
        rate = number / statistics.median(seconds)
        rows.append({"batch": number, "words_per_s": rate * length / WORD, "epoch_minutes": samples / rate / 60})
    return rows


def judge(rows: Sequence[Row]) -> Verdict:
    batches = rows[0]["batches"]
    small, large = batches[0], batches[-1]
    speeds = {n: statistics.fmean(values(rows, "words_per_s", part="speed", batch=n)) for n in batches}
    space = {n: statistics.fmean(values(rows, "memory_bytes", part="memory", batch=n)) for n in batches}
    enough, best = batch.saturation(speeds), max(speeds.values())

    def more(key: str, one: tuple[int, str], other: tuple[int, str]) -> Interval:
        where = [{"part": "quality", "batch": n, "rule": rule} for n, rule in (one, other)]
        return gap(rows, key, *where)

    test = more("test_perplexity", (large, "none"), (small, "none"))
    train = more("train_perplexity", (large, "none"), (small, "none"))
    rooted = more("test_perplexity", (large, "none"), (large, "sqrt"))
    left = more("test_perplexity", (large, "sqrt"), (small, "sqrt"))
    grown = space[large] / space[enough]
    checks = [
        Check(
            f"speed saturates: {enough} pieces have 90 % of the best, {best:,.0f} words/s",
            enough < large,
        ),
        Check(f"memory goes on: {grown:.1f} times from there to {large}", grown >= 0.5 * large / enough),
        Check(f"test perplexity does not improve by itself from {small} to {large}: {test:+.1f}", test.above_zero),
        Check(f"nor does that of training: {train:+.1f}", train.above_zero),
        Check(f"a scaled rate mends some of it: {-rooted.mean:+.1f}, and {left:+.1f} are left", rooted.above_zero),
    ]
    parts = []
    for n in batches:
        own = {"part": "quality", "batch": n, "rule": "sqrt"}
        numbers = [interval(values(rows, f"{name}_perplexity", **own)).mean for name in ("train", "test")]
        minutes = statistics.fmean(values(rows, "epoch_minutes", part="speed", batch=n))
        parts.append(
            f"{n}: {speeds[n] / 1e3:.1f} k words/s, {minutes:.1f} min, {space[n] / 2**20:.0f} MiB, "
            f"{numbers[0]:.1f} and {numbers[1]:.1f}"
        )
    return Verdict(
        f"by batch, rate scaled by the root: speed, an epoch, memory, training and test perplexity: {'; '.join(parts)}",
        checks,
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    one = rows[0]
    batches = one["batches"]
    note = f"LSTM of {one['hidden']} cells, characters of Python's documentation, one epoch, one thread"
    drawn, (speed, space, quality) = slide(ink, "Larger batches: no faster, larger, and no better", note, panels=3)
    words = [interval([w / 1e3 for w in values(rows, "words_per_s", part="speed", batch=n)]) for n in batches]
    points(speed, batches, words, ink("run0"))
    name(speed, "batch, pieces", "speed, 1000 words/s")
    speed.set_ylim(bottom=0)
    mib = [interval([m / 2**20 for m in values(rows, "memory_bytes", part="memory", batch=n)]) for n in batches]
    points(space, batches, mib, ink("run2"))
    logarithmic(space)
    name(space, "batch, pieces", "memory of a step, MiB")
    for rule, colour, label in (("none", "run1", "rate as it is"), ("sqrt", "run0", "rate scaled")):
        own = pick(rows, part="quality", rule=rule)
        at = sorted({row["batch"] for row in own})
        found = [interval(values(own, "test_perplexity", batch=n)) for n in at]
        points(quality, at, found, ink(colour))
        quality.annotate(
            label,
            (at[-1], found[-1].mean),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            color=ink(colour),
        )
    logarithmic(quality)
    name(quality, "batch, pieces", "test perplexity")
    for axes in (speed, space, quality):
        powers(axes, batches)
    return drawn


CLAIM = Claim(
    number="10",
    name="lstm_table",
    title="With the batch of a language model, speed saturates while memory grows, and quality does not improve by "
    "itself",
    source="common advice; compare Shallue et al. 2019 (arXiv 1811.03600)",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
