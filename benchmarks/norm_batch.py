"""Error against norm batch: how many samples share batch-norm statistics, at a fixed batch of SGD.

    python benchmarks/norm_batch.py --json F --picture P    Fashion-MNIST where it is found, else digits: minutes
    python benchmarks/norm_batch.py --recipe digits         what scikit-learn brings
    python benchmarks/norm_batch.py --quick                 digits, two norm batches, one seed: seconds

A small network of three convolutions with batch norm is trained with a batch of 64, in one process, with statistics of
groups of `norm batch` samples: ghost batch norm (the curve is that of Wu & Johnson 2021, "Rethinking Batch in
BatchNorm", section 3, who draw it for ImageNet). Then it is evaluated twice: by the running statistics, and by precise
ones, the moments of 2048 training images. Beside it is the same network with group norm, which has no norm batch.

The second part is plain batch norm where the running average lags: few steps an epoch, or a small momentum, at a
constant learning rate. After each epoch: the error by running statistics, by precise ones, and by those of each batch
that is evaluated, as in training. `closed` is the part of the gap between the first and the last that precise ones
close; above 100% where they are better than the batch's own.

Errors are those of the first 5000 test images, in percent: the mean over seeds, the smallest and the largest.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import recipes
from dtrain.comm.solo import Solo
from dtrain.data import shuffled
from dtrain.errors import DataError
from dtrain.evaluate import evaluate
from dtrain.norm import convert, precise, replace_with_group_norm
from dtrain.recipes.data import TensorData
from dtrain.recipes.tasks import class_score, seeded, warmup_cosine
from dtrain.tables import table

BATCH = 64
EPOCHS = {"fashion": 4, "digits": 12}
CLASSES = 10
GROUPS = 8
TEST_SAMPLES = 5000
PRECISE_SAMPLES = 2048
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
LR = 0.1


@dataclass(frozen=True)
class Lag:
    """A set-up whose running average lags behind the weights."""

    name: str
    batch: int
    momentum: float
    lr: float
    epochs: int


LAGS = [
    Lag("batch 1024, momentum 0.1", batch=1024, momentum=0.1, lr=0.2, epochs=5),
    Lag("batch 64, momentum 0.01", batch=64, momentum=0.01, lr=0.1, epochs=3),
]
QUICK_LAGS = [Lag("batch 256, momentum 0.1", batch=256, momentum=0.1, lr=0.2, epochs=2)]


@dataclass(frozen=True)
class Task:
    """What is trained."""

    recipe: str
    train: TensorData
    test: TensorData
    epochs: int

    def batches(self, batch: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch; what is left over is left out."""
        order = shuffled(len(self.train), seed, epoch)
        for indices in order.split(batch)[: len(order) // batch]:
            yield self.train.batch(indices)

    def images(self, batch: int) -> Iterator[Tensor]:
        """Training images for precise statistics."""
        for indices in torch.arange(min(PRECISE_SAMPLES, len(self.train))).split(batch):
            yield self.train.batch(indices)[0]


def find(recipe: str, data: str | None, *, samples: int, epochs: int | None) -> Task:
    """The first `samples` images of that recipe's data, and as many as 5000 to test; `auto` as in the flags."""
    if recipe == "auto":
        try:
            return find("fashion", data, samples=samples, epochs=epochs)
        except DataError as error:
            print(f"digits are taken: {error}")
            return find("digits", None, samples=samples, epochs=epochs)
    made = recipes.build(recipe, data=data) if recipe == "fashion" else recipes.build(recipe)
    train, test = made.train, made.test
    if not isinstance(train, TensorData) or not isinstance(test, TensorData):
        raise TypeError(f"recipe {recipe} does not hold its data in memory")
    return Task(recipe, _first(train, samples), _first(test, TEST_SAMPLES), epochs or EPOCHS[recipe])


def _first(data: TensorData, samples: int) -> TensorData:
    return TensorData(*(t[:samples] for t in data.tensors), transform=data.transform)


def network(seed: int) -> nn.Module:
    """Images [n, 1, H, W] -> logits [n, 10]."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(64, CLASSES))

    return seeded(make, seed=seed, dtype=torch.float32)


# -- training ---------------------------------------------------------------------------------------------------------


def error(model: nn.Module, task: Task) -> float:
    """Percent of the test images, by the running statistics that the model has."""
    return 100 * (1 - evaluate(model, task.test, class_score, Solo(), batch_size=500)["accuracy"])


def precise_error(model: nn.Module, task: Task, batch: int) -> float:
    """The same by precise statistics, in a copy."""
    model = copy.deepcopy(model)
    precise(model, task.images(batch), estimator="average")
    return error(model, task)


@torch.no_grad()
def batch_error(model: nn.Module, task: Task, batch: int) -> float:
    """The same by the statistics of each batch, as in training, in a copy."""
    model = copy.deepcopy(model).train()
    right = 0
    for indices in torch.arange(len(task.test)).split(batch):
        images, labels = task.test.batch(indices)
        right += int((model(images).argmax(1) == labels).sum())
    return 100 * (1 - right / len(task.test))


def epochs(
    model: nn.Module, task: Task, count: int, *, seed: int, batch: int, lr: float, cosine: bool
) -> Iterator[int]:
    """Train; yields after each epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **SGD)
    schedule = warmup_cosine(optimizer, count * (len(task.train) // batch)) if cosine else None
    for epoch in range(count):
        for images, labels in task.batches(batch, seed=seed, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        yield epoch + 1


def norm_batch_row(task: Task, norm_batch: int | None, seed: int) -> common.Row:
    """A network trained and evaluated; None: with group norm."""
    start_s = time.perf_counter()
    model = network(seed)
    if norm_batch is None:
        model = replace_with_group_norm(model, GROUPS)
    else:
        model = convert(model, norm_batch=norm_batch, micro_batch=BATCH)
    for _ in epochs(model, task, task.epochs, seed=seed, batch=BATCH, lr=LR, cosine=True):
        pass
    row: common.Row = {"part": "norm batch", "norm_batch": norm_batch, "seed": seed, "running": error(model, task)}
    if norm_batch is not None:
        row["precise"] = precise_error(model, task, BATCH)
    return {**row, "seconds": round(time.perf_counter() - start_s, 1)}


def lag_rows(task: Task, lag: Lag, seed: int) -> list[common.Row]:
    """Errors after each epoch."""
    model = network(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = lag.momentum
    rows: list[common.Row] = []
    for epoch in epochs(model, task, lag.epochs, seed=seed, batch=lag.batch, lr=lag.lr, cosine=False):
        rows.append(
            {
                "part": lag.name,
                "epoch": epoch,
                "seed": seed,
                "running": error(model, task),
                "precise": precise_error(model, task, lag.batch),
                "batch": batch_error(model, task, lag.batch),
            }
        )
    return rows


# -- figures ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[common.Row]) -> str:
    """Errors by norm batch."""
    body = []
    for norm_batch in dict.fromkeys(row["norm_batch"] for row in rows):
        own = [row for row in rows if row["norm_batch"] == norm_batch]
        running = [row["running"] for row in own]
        if norm_batch is None:
            body.append([f"group norm, {GROUPS} groups", _spread(running), "-", "-"])
            continue
        precisely = [row["precise"] for row in own]
        gains = [r - p for r, p in zip(running, precisely, strict=True)]
        body.append([str(norm_batch), _spread(running), _spread(precisely), f"{statistics.mean(gains):+.2f}"])
    return table(["norm batch", "error %, running", "error %, precise", "running - precise"], body)


def show_lags(rows: Sequence[common.Row]) -> str:
    """Errors by epoch where the average lags."""
    body = []
    for part, epoch in dict.fromkeys((row["part"], row["epoch"]) for row in rows):
        own = [row for row in rows if (row["part"], row["epoch"]) == (part, epoch)]
        errors = {name: [row[name] for row in own] for name in ("running", "precise", "batch")}
        running, precisely, batch = (statistics.mean(values) for values in errors.values())
        closed = f"{(running - precisely) / (running - batch):.0%}" if running - batch >= 1 else "-"
        body.append([part, str(epoch), *(_spread(values) for values in errors.values()), closed])
    return table(["set-up", "epoch", "error %, running", "error %, precise", "error %, batch", "closed"], body)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(rows: Sequence[common.Row], lags: Sequence[common.Row], title: str, file: Path) -> None:
    """Error against norm batch, and against epochs for each set-up that lags; lines are means, bands from the smallest
    to the largest over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(row["part"] for row in lags))
    figure, panels = pyplot.subplots(1, 1 + len(parts), figsize=(4.2 * (1 + len(parts)), 3.8), layout="constrained")
    first, *others = panels
    sizes = sorted({row["norm_batch"] for row in rows if row["norm_batch"] is not None})
    for number, name in enumerate(("running", "precise")):
        values = [[row[name] for row in rows if row["norm_batch"] == size] for size in sizes]
        _band(first, sizes, values, f"C{number}", f"batch norm, {name} statistics")
    group = [row["running"] for row in rows if row["norm_batch"] is None]
    _band(first, [sizes[0], sizes[-1]], [group, group], "C2", "group norm")
    first.set_xscale("log", base=2)
    first.set_xticks(sizes, [str(size) for size in sizes])
    first.set_xlabel("norm batch (samples that share statistics)")
    first.set_ylabel("test error, %")
    first.set_title(title, fontsize=10)
    for panel, part in zip(others, parts, strict=True):
        own = [row for row in lags if row["part"] == part]
        at = sorted({row["epoch"] for row in own})
        for number, name in ((0, "running"), (1, "precise"), (3, "batch")):
            values = [[row[name] for row in own if row["epoch"] == epoch] for epoch in at]
            _band(panel, at, values, f"C{number}", f"{name} statistics")
        panel.set_xticks(at)
        panel.set_xlabel("epoch")
        panel.set_title(part, fontsize=10)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _band(panel: object, at: Sequence[int], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    panel.plot(at, [statistics.mean(v) for v in values], marker="o", markersize=3, color=colour, label=label)  # type: ignore[attr-defined]
    lows, highs = [min(v) for v in values], [max(v) for v in values]
    panel.fill_between(at, lows, highs, color=colour, alpha=0.2, linewidth=0)  # type: ignore[attr-defined]


# -- the command ------------------------------------------------------------------------------------------------------


def _flags() -> argparse.ArgumentParser:
    flags = common.parser(__doc__ or "")
    flags.add_argument(
        "--recipe",
        choices=("auto", "fashion", "digits"),
        default="auto",
        help="whose data (default: fashion, else digits)",
    )
    flags.add_argument("--data", metavar="DIR", help="where the files of Fashion-MNIST are")
    flags.add_argument("--norm-batch", type=common.count, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N")
    flags.add_argument("--seeds", type=common.count, default=3)
    flags.add_argument("--samples", type=common.count, default=8192, help="training images (default 8192)")
    flags.add_argument("--epochs", type=common.count, help="default 4 for fashion, 12 for digits")
    flags.add_argument("--picture", type=Path, metavar="FILE", help="draw it, .png or .svg; needs matplotlib")
    return flags


def main() -> None:
    flags = _flags()
    arguments = flags.parse_args()
    if arguments.picture and importlib.util.find_spec("matplotlib") is None:
        flags.error("--picture needs matplotlib: pip install 'dtrain[report]'")
    lags = LAGS
    if arguments.quick:
        arguments.recipe, arguments.norm_batch, arguments.seeds = "digits", [2, 32], 1
        arguments.epochs, lags = 3, QUICK_LAGS
    torch.set_num_threads(1)
    hardware = common.hardware()
    task = find(arguments.recipe, arguments.data, samples=arguments.samples, epochs=arguments.epochs)
    rows = []
    for norm_batch in [*sorted(arguments.norm_batch), None]:
        for seed in range(arguments.seeds):
            rows.append(norm_batch_row(task, norm_batch, seed))
            print({k: v for k, v in rows[-1].items() if k != "part"}, flush=True)
    late = [row for lag in lags for seed in range(arguments.seeds) for row in lag_rows(task, lag, seed)]
    title = f"{task.recipe}: {len(task.train)} images, {task.epochs} epochs, {arguments.seeds} seed(s)"
    print("", title, show(rows), "", show_lags(late), sep="\n")
    if arguments.json:
        told = {"recipe": task.recipe, "samples": len(task.train), "test_samples": len(task.test), "batch": BATCH}
        told |= {"epochs": task.epochs, "lr": LR, "sgd": SGD, "group_norm_groups": GROUPS, "seeds": arguments.seeds}
        told |= {"precise_samples": min(PRECISE_SAMPLES, len(task.train)), "lags": [asdict(lag) for lag in lags]}
        common.write(arguments.json, [*rows, *late], **{**told, "torch_threads": 1, "hardware": hardware})
    if arguments.picture:
        draw(rows, late, title, arguments.picture)


if __name__ == "__main__":
    main()
