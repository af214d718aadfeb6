"""What the batch does: speed, memory and quality of a model at global batches of 16 to 4096 samples.

    python benchmarks/batch.py --json F --picture P                `text` and `fashion`; by its limits, 80 minutes at
                                                                   most, less on two cores that nobody else uses
    python benchmarks/batch.py --recipe text --batch 16 64 256     some batches of one recipe
    python benchmarks/batch.py --backend threads --workers 2       the global batch over two workers
    python benchmarks/batch.py --quick                             `text` (a small one) and `digits`, one thread: half
                                                                   a minute

The *global batch* is the number of samples in one step of the optimizer, over all workers. A worker's share of it is
computed at once, or in *micro-batches* one after the other, whose gradients are added up (accumulation). A sample of
`text` is a piece of 64 characters, of `fashion` and `digits` an image. Where the files of Fashion-MNIST are not found,
the script says so and takes `digits`; nothing is fetched.

Each case is trained by `dtrain.Trainer` in a process of its own, for `--epochs` passes over the data, but for no more
than `--seconds-per-case` seconds (and four steps at least). A case that fails is named at the end, where the exit
status is then 1; the others go on. The columns:

    rate         the recipe's learning rate, scaled by `--scaling` from the batch that it was tuned for: `none` leaves
                 it, `sqrt` multiplies it by the root of (batch / that batch), `linear` by (batch / that batch)
    updates      steps of the optimizer in all epochs: a larger batch makes fewer of them
    timed        full steps that the speed comes from. The short last one of each epoch is no such step. Where training
                 had fewer than six, the same model makes more after it, which count for nothing but the speed
    step ms      the typical step: the mean of the middle half of them, the first ones left out
    .../s        samples (characters of a text) in a step, over the typical step
    min/epoch    all training samples at that speed, evaluation not included. A case that ran into its limit has seen a
                 part of an epoch only, so this is the time that an epoch would take
    memory       what a process grows by, at most, in three steps of a fresh copy of the model: weights, gradients,
                 optimizer's state, activations, workspace, of all workers. Not Python, torch and the data. malloc hands
                 larger pieces back at once there (see memory.py): what it would keep is no need of the step
    predicted    the same from two micro-batches of 2 and 4 samples, see `dtrain.measure.footprint`: all that operations
                 ask for. A small LSTM's kernel never touches a third of that, and the process does not grow by it; what
                 a convolution's takes and gives back within (some MiB) is not foreseen. A case that is predicted not to
                 fit into the memory that is free is left out
    training,    perplexity (`text`) or accuracy, at the end, of test data and of as many training samples, evenly
    test         spread. A dash: the limit came before the end of the epochs, so that there is nothing to compare.
                 Running statistics of batch norm are computed anew before that, over 2048 training samples: at large
                 batches there are too few steps for their average

Throughput *saturates* at the smallest batch with 90 % of the largest samples/s. A larger one costs memory, and updates,
for little speed.

Then accumulation against real batches: a global batch in micro-batches of 32 of each worker, and in one. The two take
turns, a few steps each, and `times` is the time of a step with accumulation over that of the step in one, in the median
over rounds. That both train the same model is seen from their weights: from the same start over the same samples for
three steps, the largest difference of any weight, in float32 and float64, and beside it the furthest that a weight has
moved. Batch norm would see groups of 32 samples in one and of the whole batch in the other, so it is told to share
statistics among 32 samples in both (`norm_batch=32`); the line "plain" shows what comes of not telling it. In float32
roundings grow with each step, most of all through a deep network; float64 says whether it is the same sum.

`threads` is n workers in one process that take turns: they compute what n processes would, but the speed is that of one
process that does the work of all. So `solo` is the backend to measure speed with. Where others use the machine too,
give `--threads 1`: two threads of one operation that wait for each other took up to 10 times as long there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import common
import pictures
import psutil
import torch
from memory import batch_of
from torch import Tensor, nn

import dtrain
from dtrain import norm
from dtrain.data import Batch, BatchedData, Loader, cut, to_device
from dtrain.errors import DataError, DtrainError, Preempted
from dtrain.hooks import Hook, State, finite
from dtrain.measure import memory, summarise
from dtrain.measure.footprint import footprint
from dtrain.measure.memory import Footprint
from dtrain.recipes import Recipe
from dtrain.spec import RunSpec, one_device
from dtrain.tables import table

RECIPES = ("text", "fashion", "digits")
BATCHES = [2**power for power in range(4, 13)]
SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""Powers of (batch / the recipe's batch)."""

MICRO_BATCH = 32
SATURATED = 0.9
"""The part of the best samples/s at which throughput is taken as saturated."""

LEAST_STEPS = 4
"""Of a case, whatever its limit."""
TIMED_STEPS = 6
MEMORY_STEPS = 3
AGREEMENT_STEPS = 3
ROUND_STEPS = 4
"""Steps in a turn of accumulation or of the batch in one; the first is not counted."""
ROUNDS = 8

PRECISE_SAMPLES = 2048
RECORD_SAMPLES = 2048
"""About so many samples lie between two looks at the clock."""
TELL_S = 10.0
FREE = 0.8
"""How much of the memory that is free a case may be predicted to take."""
TIMEOUT_S = 600.0
"""Longest wait of a worker for the others, which take their turns."""

HANDED_BACK_BYTES = 65536
"""Pieces from this size on go back to the system when they are freed, as in memory.py."""

PRELOADED = ["torch", "torch._dynamo", "dtrain", "dtrain.runs", "sklearn.datasets"]
"""Imported once for the processes of all cases, where it is installed: seconds each."""

QUICK_OPTIONS = {"text": ("hidden=32",)}

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Who trains."""

    backend: str
    workers: int
    threads: int | None = None
    """Processor threads of torch, for `solo`; None: as torch has it."""

    def run(self, fn: Callable[..., T], *arguments: object) -> T:
        """`fn(comm, *arguments)` as each worker; what worker 0 returned."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return dtrain.run(fn, *arguments, workers=self.workers, backend=self.backend, timeout_s=TIMEOUT_S)[0]


class Some(BatchedData):
    """Some samples of a data set."""

    def __init__(self, data: Any, indices: Tensor) -> None:
        self._data = data
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor) -> Batch:
        return self._data.batch(self._indices[indices])


def evenly(data: Any, count: int) -> Some:
    """So many samples, or all there are, from the first to the last at equal distances."""
    count = min(count, len(data))
    return Some(data, torch.arange(count) * len(data) // count)


def whole(data: Any, global_batch: int) -> Some:
    """The data without what would make a short last batch."""
    return Some(data, torch.arange(len(data) // global_batch * global_batch))


# -- a training -------------------------------------------------------------------------------------------------------


class Limit(Hook):
    """Stops a training after some seconds, and tells how far it is."""

    def __init__(self, seconds: float, label: str) -> None:
        self._seconds = seconds
        self._label = label
        self.stop: Callable[[], None] = lambda: None

    def on_start(self, state: State) -> None:
        self._start_s = self._told_s = time.perf_counter()

    def on_step(self, state: State) -> None:
        now_s = time.perf_counter()
        if state.step >= LEAST_STEPS and now_s - self._start_s > self._seconds:
            self.stop()
        if state.first and self._label and now_s - self._told_s > TELL_S:
            self._told_s = now_s
            say(f"{self._label}: step {state.step} of {state.steps}, {now_s - self._start_s:.0f} s")


@dataclass
class Fitted:
    """What a training left, on one worker."""

    model: nn.Module
    steps: int
    total_steps: int
    """That were asked for."""
    full: list[dict[str, float]]
    """Times of its steps that had a whole global batch, see `dtrain.measure.StepTimes.record`."""

    @property
    def completed(self) -> bool:
        return self.steps == self.total_steps


def fit(
    comm: dtrain.Backend,
    recipe: Recipe,
    spec: RunSpec,
    data: Any = None,
    seconds: float = float("inf"),
    label: str = "",
) -> Fitted:
    """Train a copy of the recipe's model as one worker of a job.

    Args:
        data: other samples than the recipe's.
        seconds: when to stop, if it is not over.
        label: what to call it on stderr; empty: say nothing.
    """
    model = copy.deepcopy(recipe.model).to(one_device(spec))
    optimizer = recipe.optimizer(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = spec.lr
    config = spec.train_config(recipe)
    loader = Loader(
        recipe.train if data is None else data,
        global_batch=spec.global_batch or recipe.global_batch,
        micro_batch=spec.micro_batch,
        rank=comm.rank,
        world_size=comm.world_size,
        seed=spec.seed,
    )
    per_epoch, samples = loader.steps_per_epoch or 0, loader.num_samples or 0
    total = config.steps or per_epoch * (config.epochs or 0)
    limit = Limit(seconds, label)
    scheduler = recipe.schedule(optimizer, total) if recipe.schedule else None
    trainer = dtrain.Trainer(
        model, recipe.loss, optimizer, loader, comm=comm, config=config, scheduler=scheduler, hooks=[limit]
    )
    limit.stop = trainer.stop
    with contextlib.suppress(Preempted):
        trainer.fit()
    trainer.replica.close()
    short = samples % loader.global_batch > 0
    full = [record for record in trainer.records if not (short and record["step"] % per_epoch == 0)]
    return Fitted(trainer.model, trainer.state.step, total, full)


def spec_of(recipe: str, options: Sequence[str], arguments: argparse.Namespace) -> RunSpec:
    """What all cases of a recipe have in common."""
    data = {"fashion": arguments.fashion_data, "text": arguments.text_data}.get(recipe)
    return RunSpec(recipe=recipe, options=tuple(options), data=data, epochs=arguments.epochs, seed=arguments.seed)


def at(spec: RunSpec, batch: int, rate: float, micro_batch: int | None) -> RunSpec:
    """The same with a global batch, a learning rate and micro-batches."""
    log_every = max(1, RECORD_SAMPLES // batch)
    return replace(spec, global_batch=batch, lr=rate, log_every=log_every, micro_batch=micro_batch)


def for_steps(spec: RunSpec, steps: int, **more: Any) -> RunSpec:
    """The same for some steps."""
    return replace(spec, epochs=None, steps=steps, log_every=1, **more)


def scaled(rate: float, batch: int, tuned_batch: int, scaling: str) -> float:
    """The learning rate for a batch, from that of the batch that it was tuned for."""
    return rate * (batch / tuned_batch) ** SCALINGS[scaling]


# -- what is done in a process of its own -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of a recipe before anything is trained."""

    train_samples: int
    test_samples: int
    parameters: int
    rate: float
    tuned_batch: int
    headline: str
    """perplexity or accuracy."""
    unit: str
    """What is counted by the second: characters, images."""
    units: int
    """In a sample."""
    normalised: bool
    """Whether there is batch norm in it, so that samples of a micro-batch depend on each other."""
    device: str
    threads: int
    predicted_bytes: dict[tuple[int, int | None], int] = field(default_factory=dict)
    """By global batch and micro-batch."""


def facts(spec: RunSpec, place: Place, ways: Sequence[tuple[int, int | None]]) -> Facts:
    """Look at a recipe, and predict the memory of each global batch and micro-batch (None: in one)."""
    recipe = spec.build()
    device = one_device(spec)
    model = copy.deepcopy(recipe.model).to(device)
    optimizer = recipe.optimizer(model.parameters())
    tokens = recipe.headline == "perplexity"
    threads, found = place.run(_foresee, recipe, model, to_device(batch_of(recipe, 4), device))
    if found is None:
        raise RuntimeError("worker 0 did not look at the model")
    predicted = {}
    for batch, micro_batch in ways:
        loader = Loader(recipe.train, global_batch=batch, micro_batch=micro_batch, world_size=place.workers)
        peak_bytes = found.at(loader.micro_batch, accumulate=micro_batch is not None).peak_bytes
        # Workers take turns, and those that wait have what stays from step to step, and gradients.
        others_bytes = (place.workers - 1) * (found.kept_bytes + found.direct_bytes)
        predicted[batch, micro_batch] = peak_bytes + others_bytes
    return Facts(
        train_samples=len(recipe.train),  # type: ignore[arg-type]
        test_samples=len(recipe.test),  # type: ignore[arg-type]
        parameters=sum(p.numel() for p in model.parameters()),
        rate=float(optimizer.param_groups[0]["lr"]),
        tuned_batch=recipe.global_batch,
        headline=recipe.headline,
        unit="characters" if tokens else "images",
        units=int(recipe.train[0][1].numel()) if tokens else 1,
        normalised=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        device=str(device),
        threads=threads,
        predicted_bytes=predicted,
    )


def _foresee(comm: dtrain.Backend, recipe: Recipe, model: nn.Module, batch: Batch) -> tuple[int, Footprint | None]:
    """Threads of torch where the model is to train, and how its memory grows; one worker looks for all."""
    found = footprint(model, recipe.loss, batch, recipe.optimizer) if comm.rank == 0 else None
    return torch.get_num_threads(), found


def measure(spec: RunSpec, place: Place, seconds: float) -> common.Row:
    """One case: trained, scored where it came to its end, and its memory."""
    recipe = spec.build()
    warm_up(recipe, spec, place)
    batch = spec.global_batch or recipe.global_batch
    start_s = time.perf_counter()
    full, row = place.run(_train, recipe, spec, seconds)
    missing = TIMED_STEPS - len(full)
    if missing > 0:
        more = for_steps(spec, missing + 1)
        full = full + place.run(fit, recipe, more, whole(recipe.train, batch)).full[1:]
    row["seconds"] = time.perf_counter() - start_s
    step_s = summarise(full)["step_ms"] / 1e3
    row |= {"step_ms": step_s * 1e3, "timed_steps": len(full), "samples_per_s": batch / step_s}
    return row


def _train(
    comm: dtrain.Backend, recipe: Recipe, spec: RunSpec, seconds: float
) -> tuple[list[dict[str, float]], common.Row]:
    """Times of the full steps, and a row with the scores of training and test samples, if all epochs were made."""
    label = f"{spec.recipe}, global batch {spec.global_batch}"
    fitted = fit(comm, recipe, spec, seconds=seconds, label=label)
    row: common.Row = {"steps": fitted.steps, "updates": fitted.total_steps, "completed": fitted.completed}
    if fitted.completed:
        row |= _scores(comm, recipe, fitted.model)
    return fitted.full, row


def _scores(comm: dtrain.Backend, recipe: Recipe, model: nn.Module) -> common.Row:
    """`train_loss`, `test_accuracy` and the like."""
    device = next(model.parameters()).device
    test: Any = recipe.test
    norm.precise(model, _precise_batches(comm, recipe, device), comm=comm, forward=recipe.loss)
    row: common.Row = {}
    for name, data in (("train", evenly(recipe.train, len(test))), ("test", test)):
        means = recipe.finish(dtrain.evaluate(model, data, recipe.score, comm, device=device))
        row |= {f"{name}_{score}": value for score, value in means.items()}
    return row


def _precise_batches(comm: dtrain.Backend, recipe: Recipe, device: torch.device) -> Iterator[Batch]:
    """This worker's part of the samples for running statistics, the same for any batch."""
    data = evenly(recipe.train, PRECISE_SAMPLES)
    mine = torch.arange(len(data))[cut(len(data), comm.rank, comm.world_size)]
    for indices in mine.split(256):
        yield to_device(data.batch(indices), device)


def warm_up(recipe: Recipe, spec: RunSpec, place: Place) -> None:
    """Two small steps: what is loaded when it is first used is there from now on."""
    place.run(fit, recipe, for_steps(spec, 2, global_batch=2 * place.workers, micro_batch=None))


def memories(specs: Sequence[RunSpec], place: Place) -> list[int | None]:
    """For each batch of one recipe: the most memory of a few steps, over what there is without them.

    None where the system does not tell.
    """
    device = one_device(specs[0])
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library than glibc
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(parameter, HANDED_BACK_BYTES)
    recipe = specs[0].build()
    warm_up(recipe, specs[0], place)
    found: list[int | None] = []
    for spec in specs:
        gc.collect()
        with contextlib.suppress(AttributeError):
            library.malloc_trim(0)
        known = memory.forget_peak(device)
        before_bytes = memory.peak_bytes(device)
        place.run(fit, recipe, for_steps(spec, MEMORY_STEPS))
        found.append(memory.peak_bytes(device) - before_bytes if known else None)
    return found


def accumulate(spec: RunSpec, place: Place, seconds: float, *, normalised: bool) -> common.Row:
    """A global batch in micro-batches and in one: times, memory, and how far the weights are apart."""
    recipe = spec.build()
    warm_up(recipe, spec, place)
    ways = [replace(spec, micro_batch=MICRO_BATCH), spec]
    batch = spec.global_batch or recipe.global_batch
    data = whole(recipe.train, batch)
    times: tuple[list[float], list[float]] = ([], [])
    start_s = time.perf_counter()
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            fitted = place.run(fit, recipe, for_steps(ways[which], ROUND_STEPS), data)
            times[which].append(statistics.median(record["step_ms"] for record in fitted.full[1:]) / 1e3)
        if number > 0 and time.perf_counter() - start_s > seconds:
            break
    agreements = [
        {"dtype": dtype, "plain": plain, **differences(replace(spec, dtype=dtype), place, plain=plain)}
        for dtype, plain in (("float32", False), ("float64", False), *((("float64", True),) if normalised else ()))
    ]
    return {
        **common.ratio_row(f"global batch {batch}", f"micro-batches of {MICRO_BATCH}", "in one", times),
        "micro_batches": -(-batch // (MICRO_BATCH * place.workers)),
        "agreements": agreements,
    }


def differences(spec: RunSpec, place: Place, *, plain: bool) -> common.Row:
    """Some steps in micro-batches and in one: the largest difference of any weight, and the furthest one has moved."""
    recipe = spec.build()
    batch = spec.global_batch or recipe.global_batch
    data = whole(recipe.train, batch)
    steps = min(AGREEMENT_STEPS, len(data) // batch)
    one = for_steps(spec, steps, norm_batch="worker" if plain else str(MICRO_BATCH))
    fitted = [place.run(fit, recipe, way, data) for way in (replace(one, micro_batch=MICRO_BATCH), one)]
    ends = [dict(found.model.named_parameters()) for found in fitted]
    starts = dict(recipe.model.named_parameters())
    device = torch.device("cpu")
    return {
        "steps": steps,
        "difference": furthest([ends[0][name].to(device) - ends[1][name].to(device) for name in starts]),
        "moved": furthest([ends[1][name].to(device) - start for name, start in starts.items()]),
    }


def furthest(tensors: Iterable[Tensor]) -> float:
    """The largest size of any number in them; NaN where one is."""
    return float(torch.stack([tensor.detach().abs().max().double() for tensor in tensors]).max())


def apart(fn: Callable[..., T], *arguments: object, **named: object) -> T:
    """The same in a process of its own: its memory and speed owe nothing to the cases before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(fn, *arguments, **named).result()


def attempt(what: str, fn: Callable[..., T], *arguments: object, **named: object) -> tuple[T | None, str]:
    """`apart`, and why it failed, so that hours of other cases are not lost with it."""
    try:
        return apart(fn, *arguments, **named), ""
    except BrokenProcessPool:
        why = "its process was killed, perhaps for lack of memory"
    except RuntimeError as error:
        why = f"failed: {error}".splitlines()[0]
    say(f"{what}: {why}")
    return None, why


# -- what follows from the figures ------------------------------------------------------------------------------------


def saturation(speeds: Mapping[int, float], part: float = SATURATED) -> int:
    """The smallest batch that reaches that part of the best speed; speeds by batch."""
    best = max(speeds.values())
    return min(batch for batch, speed in speeds.items() if speed >= part * best)


def of_recipe(rows: Sequence[common.Row], recipe: str, part: str) -> list[common.Row]:
    return [row for row in rows if row["recipe"] == recipe and row["part"] == part]


def speeds_of(rows: Iterable[common.Row]) -> dict[int, float]:
    """Samples/s by batch, where they were measured."""
    return {row["global_batch"]: row["samples_per_s"] for row in rows if "samples_per_s" in row}


def verdict(rows: Sequence[common.Row], facts: Facts) -> str:
    """Where throughput saturates, in words."""
    speeds = speeds_of(rows)
    if not speeds:
        return "No batch was measured."
    best, enough = max(speeds, key=speeds.__getitem__), saturation(speeds)
    rate = f"{speeds[best] * facts.units:,.0f} {facts.unit}/s at {best}"
    if len(speeds) == 1:
        return f"One batch is no curve: {rate}."
    if enough == max(speeds):
        return f"Throughput grows up to the largest batch here, {enough}; best: {rate}."
    share = f"{100 * speeds[enough] / speeds[best]:.0f} %"
    return f"Throughput saturates at a global batch of {enough}, with {share} of the best ({rate})."


def show(rows: Sequence[common.Row], facts: Facts) -> str:
    """The table of batch size of one recipe; a dash for what was not measured."""
    head = ["global batch", "rate", "updates", "timed", "step ms", f"{facts.unit}/s", "min/epoch"]
    head += ["memory", "predicted", f"{facts.headline}, training", "test"]
    body = []
    for row in rows:
        measured = "samples_per_s" in row
        body.append(
            [
                *(str(row["global_batch"]), f"{row['rate']:.3g}", str(row["updates"])),
                *([str(row["timed_steps"]), f"{row['step_ms']:.1f}"] if measured else ["-", "-"]),
                f"{row['samples_per_s'] * facts.units:,.0f}" if measured else "-",
                f"{row['epoch_minutes']:.2f}" if measured else "-",
                *(_bytes(row.get("memory_bytes")), _bytes(row["predicted_bytes"])),
                *(_score(row.get(f"{name}_{facts.headline}"), facts.headline) for name in ("train", "test")),
            ]
        )
    return table(head, body, left=0)


def show_accumulation(rows: Sequence[common.Row]) -> str:
    """Accumulation against the batch in one."""
    head = ["global batch", f"micro-batches of {MICRO_BATCH}", "ms", "in one, ms", "times", "from", "to"]
    head += ["memory", "in one, memory"]
    body = [
        [
            *(str(row["global_batch"]), str(row["micro_batches"])),
            *(f"{row['contender_ms']:.1f}", f"{row['baseline_ms']:.1f}"),
            *(f"{row[f'ratio_{name}']:.2f}" for name in ("median", "min", "max")),
            *(_bytes(row["accumulated_bytes"]), _bytes(row["memory_bytes"])),
        ]
        for row in rows
    ]
    return table(head, body, left=0)


def show_agreement(row: common.Row) -> str:
    """How far weights are apart after some steps with accumulation and without."""
    lines = []
    for found in row["agreements"]:
        how = f"plain, {found['dtype']}" if found["plain"] else found["dtype"]
        what = f"largest difference of any weight after {found['steps']} steps: {found['difference']:.1e}"
        lines.append(f"global batch {row['global_batch']}, {how}: {what} (weights moved by up to {found['moved']:.1e})")
    return "\n".join(lines)


def _bytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else memory.show(nbytes)


def _score(value: float | None, headline: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if headline == "accuracy" else f"{value:.2f}"


def draw(parts: Sequence[tuple[str, Facts, Sequence[common.Row]]], file: Path) -> None:
    """Speed, memory and quality against the global batch; a colour for each recipe.

    Speeds are drawn as parts of the recipe's best, so that characters and images can be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (speed, space, quality) = pyplot.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained")
    axes = {"perplexity": quality}
    headlines = {found.headline for _, found, rows in parts if any(f"test_{found.headline}" in row for row in rows)}
    axes["accuracy"] = quality.twinx() if len(headlines) == 2 else quality
    for number, (name, found, rows) in enumerate(parts):
        colour = f"C{number}"
        speeds = speeds_of(rows)
        if speeds:
            best, enough = max(speeds.values()), saturation(speeds)
            label = f"{name}, best {best * found.units:,.0f} {found.unit}/s"
            shares = [100 * rate / best for rate in speeds.values()]
            speed.plot(list(speeds), shares, marker="o", markersize=4, color=colour, label=label)
            ring = {"marker": "o", "markersize": 11, "fillstyle": "none"}
            speed.plot([enough], [100 * speeds[enough] / best], color=colour, **ring)
        _line(space, rows, "memory_bytes", 2**20, colour, "-", f"{name}, measured")
        _line(space, rows, "predicted_bytes", 2**20, colour, ":", f"{name}, predicted")
        part = 0.01 if found.headline == "accuracy" else 1.0
        for split, style in (("test", "-"), ("train", "--")):
            words = f"{name}, {found.headline}, {'test' if split == 'test' else 'training'}"
            _line(axes[found.headline], rows, f"{split}_{found.headline}", part, colour, style, words)
    speed.axhline(100 * SATURATED, color="grey", linewidth=0.8, linestyle=":")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("samples/s, % of the recipe's best")
    speed.set_title(f"speed (circle: first to reach {100 * SATURATED:.0f} %)", fontsize=10)
    space.set_yscale("log", base=2)
    space.set_ylabel("memory of a step, MiB")
    space.set_title("memory", fontsize=10)
    quality.set_title("quality after the same epochs", fontsize=10)
    if not headlines:
        quality.text(0.5, 0.5, "no case came to its end in time", ha="center", transform=quality.transAxes)
        quality.set_yticks([])
    for headline, panel in axes.items():
        if panel.lines:
            colours = {line.get_color() for line in panel.lines}
            colour = colours.pop() if len(colours) == 1 else "black"
            panel.set_ylabel("accuracy, %" if headline == "accuracy" else "perplexity", color=colour)
    batches = sorted({row["global_batch"] for _, _, rows in parts for row in rows})
    space.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for panel in (speed, space, quality):
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches], fontsize=8)
        panel.set_xlim(batches[0] / 1.2, batches[-1] * 1.2)
        panel.set_xlabel("global batch, samples")
        panel.spines["top"].set_visible(False)
        owners = dict.fromkeys(axes.values()) if panel is quality else (panel,)
        shown = [line for owner in owners for line in owner.lines if not line.get_label().startswith("_")]
        if shown:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 1 + (len(shown) > 2)}
            panel.legend(handles=shown, frameon=False, fontsize=8, **below)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _line(panel: Any, rows: Sequence[common.Row], name: str, unit: float, colour: str, style: str, label: str) -> None:
    """A figure against the batch, where there is one."""
    points = [(row["global_batch"], row[name] / unit) for row in rows if row.get(name) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colour, label=label)


# -- the command ------------------------------------------------------------------------------------------------------


def study(
    spec: RunSpec, place: Place, arguments: argparse.Namespace
) -> tuple[Facts, list[common.Row], list[common.Row]]:
    """One recipe: what is known of it, a row for each batch, and a row for each accumulation.

    Raises:
        DataError: its data are not here.
    """
    ways: list[tuple[int, int | None]] = [(batch, None) for batch in arguments.batch]
    ways += [(batch, micro) for batch in arguments.accumulate for micro in (MICRO_BATCH, None)]
    known = apart(facts, spec, place, ways)
    specs = {
        (batch, micro): at(spec, batch, scaled(known.rate, batch, known.tuned_batch, arguments.scaling), micro)
        for batch, micro in dict.fromkeys(ways)
        if _refusal(spec.recipe, batch, known) is None
    }
    found, _ = attempt(f"{spec.recipe}, memory", memories, list(specs.values()), place) if specs else ([], "")
    space = dict(zip(specs, found or [None] * len(specs), strict=True))
    rows = []
    for batch in arguments.batch:
        row: common.Row = {"recipe": spec.recipe, "options": list(spec.options), "part": "batch", "global_batch": batch}
        row["rate"] = scaled(known.rate, batch, known.tuned_batch, arguments.scaling)
        row["updates"] = -(-known.train_samples // batch) * arguments.epochs
        row["predicted_bytes"] = known.predicted_bytes[batch, None]
        rows.append(row)
        if (batch, None) not in specs:
            row["left_out"] = _refusal(spec.recipe, batch, known)
            say(f"{spec.recipe}, global batch {batch}: left out: {row['left_out']}")
            continue
        row["memory_bytes"] = space[batch, None]
        what = f"{spec.recipe}, global batch {batch}"
        measured, row["failed"] = attempt(what, measure, specs[batch, None], place, arguments.seconds_per_case)
        if measured is None:
            continue
        row |= measured
        row["units_per_s"], row["unit"] = row["samples_per_s"] * known.units, known.unit
        row["epoch_minutes"] = known.train_samples / row["samples_per_s"] / 60
        score = _score(row.get(f"test_{known.headline}"), known.headline)
        speed = f"{row['units_per_s']:,.0f} {known.unit}/s"
        say(f"{what}: {speed}, test {known.headline} {score}, {row['seconds']:.0f} s")
    both = []
    for batch in arguments.accumulate:
        what = f"{spec.recipe}, global batch {batch}, accumulated"
        if (batch, None) not in specs or batch <= MICRO_BATCH * place.workers:
            say(f"{what}: left out: {_refusal(spec.recipe, batch, known) or 'it is no more than one micro-batch'}")
            continue
        row = {"recipe": spec.recipe, "options": list(spec.options), "part": "accumulation", "global_batch": batch}
        for micro, name in ((MICRO_BATCH, "accumulated_bytes"), (None, "memory_bytes")):
            row |= {name: space[batch, micro], f"predicted_{name}": known.predicted_bytes[batch, micro]}
        one = specs[batch, None]
        seconds = arguments.seconds_per_case
        measured, row["failed"] = attempt(what, accumulate, one, place, seconds, normalised=known.normalised)
        both.append(row)
        if measured is None:
            continue
        row |= measured
        say(f"{what}: {row['ratio_median']:.2f} times the step in one")
    return known, rows, both


def _refusal(recipe: str, batch: int, known: Facts) -> str | None:
    """Why a batch is not measured, or None."""
    if batch > known.train_samples:
        return f"{recipe} has {known.train_samples} training samples"
    if not fits(known.predicted_bytes[batch, None], known):
        return "it is predicted not to fit into the memory that is free"
    return None


def fits(predicted_bytes: int, known: Facts) -> bool:
    """Whether that much memory is free now."""
    if known.device.startswith("cuda"):
        free_bytes, _ = torch.cuda.mem_get_info(torch.device(known.device))
    else:
        free_bytes = psutil.virtual_memory().available
    return predicted_bytes <= FREE * free_bytes


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _flags() -> argparse.ArgumentParser:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--recipe", nargs="+", choices=RECIPES, help="default: text and fashion")
    flags.add_argument("--fashion-data", metavar="DIR", help="where the files of Fashion-MNIST are")
    flags.add_argument("--text-data", metavar="FILE", help="a text in UTF-8 instead of Python's documentation")
    flags.add_argument(
        "--batch", type=common.count, nargs="+", metavar="N", help="global batches (default 16, 32, ... 4096)"
    )
    flags.add_argument(
        "--accumulate", type=common.count, nargs="*", metavar="N", help="global batches (default 256 and 1024)"
    )
    flags.add_argument("--epochs", type=common.count, help="passes over the data (default 2; 1 with --quick)")
    flags.add_argument("--scaling", choices=SCALINGS, default="sqrt", help="of the learning rate (default sqrt)")
    flags.add_argument("--seconds-per-case", type=float, metavar="S", help="longest training (default 180)")
    flags.add_argument("--backend", choices=("solo", "threads"), default="solo")
    flags.add_argument("--workers", type=common.count, default=1, metavar="N", help="for threads (default 1)")
    flags.add_argument(
        "--threads", type=common.count, metavar="N", help="processor threads of torch (default: as torch has it)"
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    return flags


def _read(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, with defaults that depend on --quick; what was given stays."""
    arguments = flags.parse_args()
    if arguments.backend == "solo" and arguments.workers != 1:
        flags.error(f"--workers {arguments.workers} needs --backend threads")
    if arguments.backend == "threads" and arguments.threads is not None:
        flags.error("--threads goes with --backend solo: the workers of threads share the cores evenly")
    defaults: dict[str, Any] = {
        "recipe": ["text", "fashion"],
        "batch": BATCHES,
        "accumulate": [256, 1024],
        "epochs": 2,
        "seconds_per_case": 180.0,
    }
    if arguments.quick:
        few = {"recipe": ["text", "digits"], "batch": [32, 128, 512], "accumulate": [128], "epochs": 1}
        defaults = {**few, "seconds_per_case": 2.0, "threads": 1 if arguments.backend == "solo" else None}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.batch = sorted(set(arguments.batch))
    if any(batch % (MICRO_BATCH * arguments.workers) for batch in arguments.accumulate):
        flags.error(
            f"--accumulate takes multiples of {MICRO_BATCH} samples for each worker: micro-batches are to be full"
        )
    if not arguments.seconds_per_case > 0:
        flags.error("--seconds-per-case is more than 0")
    return arguments


def main() -> None:
    arguments = _read(_flags())
    place = Place(arguments.backend, arguments.workers, arguments.threads)
    hardware, parts, rows, absent = common.hardware(), [], [], {}
    wanted = list(dict.fromkeys(arguments.recipe))
    for name in wanted:  # which grows where data are absent
        spec = spec_of(name, QUICK_OPTIONS.get(name, ()) if arguments.quick else (), arguments)
        try:
            known, own, both = study(spec, place, arguments)
        except DataError as error:
            absent[name] = str(error)
            say(f"absent: {name}: {error}")
            if name == "fashion" and "digits" not in wanted:
                say("digits are taken instead")
                wanted.append("digits")
            continue
        parts.append((name, known, own))
        rows += [*own, *both]
    if not parts:
        raise SystemExit("no recipe has its data here")
    for name, known, own in parts:
        both = of_recipe(rows, name, "accumulation")
        _print(name, known, own, both, place, arguments)
    for name, why in absent.items():
        print(f"\nabsent: {name}: {why}")
    failed = [row for row in rows if row.get("failed")]
    for row in failed:
        print(f"\n{row['recipe']}, {row['part']}, global batch {row['global_batch']}: {row['failed']}")
    if arguments.json:
        more = {n: v for n, v in vars(arguments).items() if n not in ("json", "picture", "recipe")}
        more |= {"recipes": {name: _told(known) for name, known, _ in parts}, "absent": absent, "hardware": hardware}
        more["saturation"] = {name: saturation(speeds_of(own)) for name, _, own in parts if speeds_of(own)}
        common.write(arguments.json, finite(rows), **more)
    if arguments.picture:
        draw(parts, arguments.picture)
    if failed:
        raise SystemExit(1)


def _told(known: Facts) -> dict[str, Any]:
    """For the record; predictions are in its rows."""
    return {name: value for name, value in vars(known).items() if name != "predicted_bytes"}


def _print(
    name: str,
    known: Facts,
    rows: Sequence[common.Row],
    both: Sequence[common.Row],
    place: Place,
    arguments: argparse.Namespace,
) -> None:
    options = " ".join(["", *(option for row in rows[:1] for option in row["options"])])
    who = f"backend {place.backend}, {place.workers} worker(s), {known.threads} thread(s), {known.device}"
    size = f"{known.train_samples:,} training samples, {known.parameters:,} weights"
    print(f"\n{name}{options}: {size}, {arguments.epochs} epoch(s), {who}")
    scaling = f"rate: {known.rate:g} at {known.tuned_batch}, scaled: {arguments.scaling}"
    print(f"{scaling}; at most {arguments.seconds_per_case:g} s a case")
    print(show(rows, known), verdict(rows, known), sep="\n")
    both = [row for row in both if not row["failed"]]
    if both:
        print("", show_accumulation(both), *(show_agreement(row) for row in both), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except DtrainError as error:
        raise SystemExit(f"dtrain: {error}") from error
