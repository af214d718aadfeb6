"""The smallest batch that trains a Transformer, and accumulation as its cure.

Popel and Bojar 2018 train Transformers for translation on one graphics processor: at the same learning rate, the
small one (BASE) learns better from larger batches, and the large one (BIG) does not train at all below a certain
batch. Here: a language model of characters with layer norm after each branch, as theirs, on Python's documentation in
pieces of 48 characters. BIG has 3 layers of 64 units, BASE 1 of 32. Adam, a warm-up of 60 updates, then a constant
rate; all batches see the same 4096 pieces, so that small batches make more updates. The figure is the loss on test
pieces, in nats a character.

The cure for those who have memory for two samples only: 8 micro-batches of 2 make an update of 16
(`Loader(micro_batch=2)`), and so do 4 workers of 4 samples: the same model to rounding. `apart` is the largest
difference of any weight from the batch in one after 40 updates, in float64.

With a rate that falls as 1/sqrt(updates), which is what the paper's runs have, what batches of 2 lose is
measured too.

Quick: 1600 pieces, and fewer batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tasks
import torch
from claim import Case, Check, Claim, Ink, Interval, Place, Row, Verdict, gap, interval, main, pick, values
from draw import beside, name, points, powers, slide
from matplotlib.figure import Figure
from torch import nn

import dtrain
from dtrain.recipes.tasks import token_loss, token_score

WARMUP = 60
"""Updates."""
HIGH, LOW = 0.012, 0.006
"""Learning rates."""
SIZES = {"BIG": {"hidden": 64, "layers": 3}, "BASE": {"hidden": 32, "layers": 1}}
AGREE_STEPS = 40


def cases(quick: bool) -> list[Case]:
    samples, grid = (1600, (2, 8, 32)) if quick else (4096, (2, 4, 8, 16, 32))
    wanted = [("BIG", HIGH, b, "constant") for b in grid]
    wanted += [(size, LOW, b, "constant") for size in SIZES for b in ((2, 16) if quick or size == "BASE" else grid)]
    wanted += [] if quick else [("BIG", HIGH, b, "falling") for b in (2, 32)]
    found: list[Case] = [
        {"case": f"{size}, rate {lr}{' falling' if rate == 'falling' else ''}, batch {batch}", "part": "batch"}
        | {"size": size, "lr": lr, "batch": batch, "rate": rate, "samples": samples}
        for size, lr, batch, rate in wanted
    ]
    for way, workers, micro_batch in (("8 micro-batches of 2", 1, 2), ("4 workers of 4", 4, 4)):
        cut: Case = {"case": way, "part": "cure", "workers": workers, "micro_batch": micro_batch}
        found.append({**cut, "samples": samples if workers == 1 else 16 * AGREE_STEPS})
    return sorted(found, key=lambda case: case.get("batch", 3))


def measure(case: Case, seed: int, place: Place) -> list[Row]:
    return _cure(case, seed) if case["part"] == "cure" else place.run(_trained, case, seed)


def rate(how: str) -> Callable[[int], float]:
    """A factor that rises over the warm-up, then stays, or falls as 1/sqrt(updates)."""

    def factor(step: int) -> float:
        up = min(1.0, (step + 1) / WARMUP)
        return up if how == "constant" else min(up, (WARMUP / (step + 1)) ** 0.5)

    return factor


def _fit(
    comm: dtrain.Backend, model: nn.Module, data: Any, lr: float, batch: int, how: str, seed: int, **more: Any
) -> nn.Module:
    trainer = tasks.train(
        comm,
        model,
        data,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98)),
        factor=rate(how),
        loss=token_loss,
        global_batch=batch,
        seed=seed,
        **more,
    )
    return trainer.model


def _trained(comm: dtrain.Backend, case: Case, seed: int) -> list[Row]:
    text = tasks.text()
    model = tasks.transformer(seed, text.vocabulary, text.length, **SIZES[case["size"]])
    updates = case["samples"] // case["batch"]
    model = _fit(comm, model, text.train, case["lr"], case["batch"], case["rate"], seed, steps=updates)
    return [{"updates": updates, "loss": dtrain.evaluate(model, text.test, token_score, comm, batch_size=128)["loss"]}]


def _cure(case: Case, seed: int) -> list[Row]:
    """A batch of 16 cut into pieces: how far from the batch in one, and for micro-batches its loss."""
    place = Place("threads", case["workers"]) if case["workers"] > 1 else Place()
    whole, pieces = (
        at.run(_cut, micro_batch, seed, AGREE_STEPS, torch.float64)[0]
        for at, micro_batch in ((Place(), 16), (place, case["micro_batch"]))
    )
    row: Row = {"apart": float((whole - pieces).abs().max())}
    if case["workers"] == 1:
        row["loss"] = place.run(_cut, case["micro_batch"], seed, case["samples"] // 16, torch.float32)[1]
    return [row]


def _cut(
    comm: dtrain.Backend, micro_batch: int, seed: int, steps: int, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    text = tasks.text()
    model = tasks.transformer(seed, text.vocabulary, text.length, **SIZES["BIG"]).to(dtype)
    model = _fit(comm, model, text.train, LOW, 16, "constant", seed, steps=steps, micro_batch=micro_batch)
    return tasks.flat(model), dtrain.evaluate(model, text.test, token_score, comm, batch_size=128)["loss"]


def judge(rows: Sequence[Row]) -> Verdict:
    def lost(size: str, lr: float, small: int, large: int, rate: str = "constant") -> Interval:
        one = {"size": size, "lr": lr, "rate": rate}
        return gap(rows, "loss", {**one, "batch": small}, {**one, "batch": large})

    high, low, base = lost("BIG", HIGH, 2, 32), lost("BIG", LOW, 2, 16), lost("BASE", LOW, 2, 16)
    cured = gap(rows, "loss", {"case": "8 micro-batches of 2"}, {"size": "BIG", "lr": LOW, "batch": 16})
    apart = max(values(rows, "apart", part="cure"))
    checks = [
        Check(f"at rate {HIGH} BIG does not train from batches of 2: {high:+.2f} nats against 32", high.mean >= 0.5),
        Check(f"at rate {LOW} it trains worse from 2 than from 16: {low:+.2f}", low.mean >= 0.1),
        Check(f"the smaller BASE does not mind, at {LOW}: {base:+.2f}", base.mean <= 0.05),
        Check(f"8 micro-batches of 2 are as good as a batch of 16: {cured:+.3f} nats", abs(cured.mean) <= 0.03),
        Check(f"and they, and 4 workers of 4, are the same model: weights differ by {apart:.0e}", apart <= 1e-10),
    ]
    if pick(rows, rate="falling"):
        falling = lost("BIG", HIGH, 2, 32, "falling")
        checks.append(Check(f"so it is with a rate that falls as 1/sqrt(t): {falling:+.2f}", falling.mean >= 0.5))
    texts = [
        f"{n}: {interval(values(rows, 'loss', size='BIG', lr=HIGH, batch=n, rate='constant')):.2f}" for n in (2, 32)
    ]
    return Verdict(
        f"loss of BIG at rate {HIGH}, by batch: {', '.join(texts)} nats; BASE {base:+.2f} from 16 to 2", checks
    )


def picture(rows: Sequence[Row], ink: Ink) -> Figure:
    note = (
        f"Characters of Python's documentation, {rows[0]['samples']} pieces of 48, Adam, constant rate after {WARMUP} "
        "updates; BIG: 3 layers of 64, BASE: 1 of 32; 95 % intervals over seeds"
    )
    drawn, (axes,) = slide(ink, "Below some batch a Transformer does not train; accumulation mends it", note)
    lines = [("BIG", HIGH, "constant", "run1"), ("BIG", LOW, "constant", "run0"), ("BASE", LOW, "constant", "muted")]
    lines += [("BIG", HIGH, "falling", "run4")] if pick(rows, rate="falling") else []
    for size, lr, rate, colour in lines:
        own = pick(rows, part="batch", size=size, lr=lr, rate=rate)
        at = sorted({row["batch"] for row in own})
        found = [interval(values(own, "loss", batch=batch)) for batch in at]
        points(axes, at, found, ink(colour))
        label = f"{size}, rate {lr}{', falling' if rate == 'falling' else ''}"
        beside(axes, label, at[0], found[0].mean, ink(colour), left=True)
    cured = interval(values(rows, "loss", case="8 micro-batches of 2"))
    axes.plot([2], [cured.mean], "D", color=ink("run2"), markersize=7)
    beside(axes, f"BIG, rate {LOW}, 8 micro-batches of 2", 2, cured.mean, ink("run2"), left=True)
    powers(axes, sorted({row["batch"] for row in rows if row["part"] == "batch"}))
    axes.set_xlim(0.3, 40)
    name(axes, "batch, pieces", "test loss, nats a character")
    return drawn


CLAIM = Claim(
    number="9",
    name="smallest_batch",
    title="A large Transformer has a smallest batch below which it does not train; accumulated or spread over workers, "
    "small batches do",
    source="Popel & Bojar 2018 (arXiv 1804.00247), section 4, on batch size and on several GPUs",
    about=__doc__,
    cases=cases,
    measure=measure,
    judge=judge,
    picture=picture,
)

if __name__ == "__main__":
    main(CLAIM)
