"""A doctor for batch norm: does evaluation see what training saw, and are batch statistics those of enough samples?

The same batches run twice, with batch statistics (as in training) and with running ones (as in evaluation). Where the
two differ, a model that fits its training data seems not to: "false overfitting". What goes wrong, and from which size
of batch on: Wu & Johnson 2021, sections 3 and 4; Wu & He 2018, table 2.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.norm.domains import DomainBatchNorm
from dtrain.norm.frozen import FrozenBatchNorm
from dtrain.norm.ghost import GhostBatchNorm, group_sizes
from dtrain.norm.layer import Forward, layers, on_first
from dtrain.norm.merge import merged_statistics
from dtrain.norm.moments import merge, moments
from dtrain.norm.sync import SyncBatchNorm, check_comm
from dtrain.norm.virtual import VirtualBatchNorm
from dtrain.tables import table

MEAN_SHIFT = 0.25
"""Standard deviations that a running mean may be off: of normal values, one in ten then changes side at a ReLU."""
VARIANCE_FACTOR = 1.5
"""Factor that a running variance may be off: a value at one standard deviation then moves by 0.22, about as above."""
MEAN_NOISE = 0.3
"""Standard deviations that batch means may scatter: that of 11 independent samples. Published losses of accuracy are
small down to 16 and grow from 8 on."""
VARIANCE_NOISE = 0.5
"""Relative scatter of batch variances that is still good: that of 9 independent normal samples."""
UNLIKE = 2.0
"""Batch means of independent samples scatter by 1 / sqrt(samples) of a standard deviation at most; by more than this
many times that, batches are not drawn alike."""
UNLIKE_BATCHES = 4
"""Batches from which on that can be told from chance."""
DEAD = 0.01
"""A channel whose variance is below this part of `eps` comes out with a tenth of a standard deviation at most."""
INITIAL = 0.05
"""Part of a running average that may still be the initial value."""


@dataclass(frozen=True)
class LayerReport:
    """One batch-norm layer. Figures are rms values over its channels, without the dead ones; nan where unknown."""

    path: str
    kind: str
    samples: float
    """That share statistics, on average."""
    values: float
    """Of a channel in these."""
    mean_shift: float
    """Distance of the running mean from the mean of the data, in standard deviations of the data."""
    variance_ratio: float
    """Running variance over that of the data: geometric mean over channels."""
    variance_factor: float
    """How far the running variance is off, up or down: exp of the rms of the logarithm of the ratio; 1 is right."""
    mean_noise: float
    """Standard deviation over batches of the batch mean, in standard deviations of the data."""
    variance_noise: float
    """Standard deviation over batches of the batch variance, relative to the variance of the data."""
    dead: tuple[int, ...]
    """Channels that are constant, or nearly."""
    findings: dict[str, str]
    """What is suspicious, in a word, and why."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    layers: list[LayerReport]
    batches: int
    """Forwards, on all workers together."""
    output_shift: float
    """Rms difference of the model's outputs by batch and by running statistics, relative to their rms."""

    @property
    def suspicious(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.findings]

    @property
    def advice(self) -> list[str]:
        """What to do, for each kind of finding."""
        found = {word for layer in self.layers for word in layer.findings}
        return [text for word, text in _ADVICE.items() if word in found]

    def __str__(self) -> str:
        head = ["layer", "samples", "values", "mean off", "variance off", "mean noise", "variance noise", "findings"]
        rows = [
            [
                r.path,
                _number(r.samples, 0),
                _number(r.values, 0),
                _number(r.mean_shift),
                "x " + _number(r.variance_ratio),
                _number(r.mean_noise),
                _number(r.variance_noise),
                ", ".join(r.findings) or "-",
            ]
            for r in self.layers
        ]
        lines = [table(head, rows), "", "Means are in standard deviations of the data; variances relative to its own."]
        lines.append(
            f"From batch to running statistics, outputs change by {100 * self.output_shift:.1f} % of their rms "
            f"({self.batches} batches)."
        )
        lines += [f"{r.path}: {why}." for r in self.layers for why in r.findings.values()]
        return "\n".join([*lines, *(["", *self.advice] if self.advice else ["Nothing suspicious."])])

    def draw(self, file: str | Path) -> None:
        """How far running statistics are off, a bar a layer; the kind of picture goes by the suffix.

        Raises:
            UsageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError("matplotlib is not installed: pip install 'dtrain[report]'") from error
        figure = Figure(figsize=(9, 1.5 + 0.25 * len(self.layers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        places = list(range(len(self.layers)))
        for axes, values, base, limit, text in (
            (left, [r.mean_shift for r in self.layers], 0.0, MEAN_SHIFT, "running mean off (standard deviations)"),
            (right, [r.variance_factor for r in self.layers], 1.0, VARIANCE_FACTOR, "running variance off (factor)"),
        ):
            widths = [0.0 if math.isnan(v) else v - base for v in values]
            colours = ["tab:red" if w > limit - base else "tab:blue" for w in widths]
            axes.barh(places, widths, left=base, color=colours)
            axes.axvline(limit, color="black", linestyle=":", linewidth=1)
            axes.set_xlabel(text)
        left.set_yticks(places, [r.path for r in self.layers])
        left.margins(y=0.02)
        left.invert_yaxis()
        right.set_xscale("log")
        figure.savefig(file)


_ADVICE = {
    "stale": "Stale: recompute the statistics with fixed weights (norm.precise), or let averages follow faster (larger "
    "momentum, more steps). If these batches are not of the training data, see that both are preprocessed alike, or "
    "adapt the statistics to them (norm.adapt).",
    "noisy": "Noisy: let more samples share statistics (a larger norm_batch, over workers if need be), or do without: "
    "norm.replace_with_group_norm, or norm.freeze towards the end of training.",
    "unlike": "Unlike: shuffle the data, so that every batch is a fair sample; where that cannot be, synchronise "
    "(norm_batch='global') or use norm.replace_with_group_norm.",
    "dead": "Dead: the layer before gives these channels no signal: look for a learning rate that was too large, dead "
    "ReLUs, or constant inputs. Their running variance is near zero: other data are blown up by it.",
    "unused": "Unused: these batches did not reach the layer; its running statistics cannot be judged.",
}


def diagnose(
    model: nn.Module, batches: Iterable[Any], *, comm: Backend | None = None, forward: Forward | None = None
) -> Diagnosis:
    """Look at every batch-norm layer of a model on some batches. Nothing is changed, even where a forward raises.

    Dropout is off in both passes. Give batches as in training (size, order, preprocessing) to learn about training; as
    in evaluation, to learn whether evaluation sees what training saw. About 20 batches tell the noise well.

    Args:
        batches: what `forward` takes; read once.
        comm: where given, all workers call with their own batches and get the same answer; running statistics of plain
            layers are then those of all workers together. Synchronised layers want equally many batches on each.
        forward: (model, batch) -> outputs; None: the model is called with the batch, or its first item if it is a
            tuple or list.

    Layers of several domains (`per_domain`) are judged for the domain around the call: `with domain(name)`.

    Raises:
        UsageError: no batches, no batch norm in the model, or layers synchronised over a backend that was not given.
    """
    found = layers(model)
    if not found:
        raise UsageError("diagnose: the model has no batch-norm layer")
    check_comm(found, comm)
    comm = comm or Solo()
    run = forward or on_first
    merged = merged_statistics(model, comm) if comm.world_size > 1 else contextlib.nullcontext()
    rows: dict[str, list[Tensor]] = {path: [] for path in found}
    device = next(itertools.chain(model.parameters(), model.buffers(), [torch.empty(0)])).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of squares: change and output; forwards
    with torch.no_grad(), merged:
        for batch in batches:
            with _unchanged(model), _collected(found, rows):
                model.eval()
                for layer in found.values():
                    layer.train()
                by_batch = _flat(run(model, batch))
            with _unchanged(model):
                model.eval()
                by_running = _flat(run(model, batch))
            squares = [(by_batch - by_running).square().sum(), by_batch.square().sum()]
            sums += torch.stack([*squares, torch.ones_like(squares[0])]).to(device)
        comm.all_reduce(sums, "norm/diagnose").wait()
        mine = [torch.stack(r).to(device) if r else None for r in rows.values()]
        everyone = _gather(mine, list(found.values()), comm, device)
        reports = [
            _report(path, layer, _shared(layer, parts))
            for (path, layer), parts in zip(found.items(), everyone, strict=True)
        ]
    if not sums[2]:
        raise UsageError("diagnose: there are no batches")
    shift = math.sqrt(float(sums[0] / sums[1])) if sums[1] else 0.0
    return Diagnosis(layers=reports, batches=int(sums[2]), output_shift=shift)


# --- running


def _flat(outputs: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.double().flatten().to(leaves[0].device) for leaf in leaves])


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """After it, buffers and the numbers and flags that modules keep, `training` for one, are what they were."""
    modules = list(model.modules())
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    numbers = [(m, {k: v for k, v in m.__dict__.items() if isinstance(v, (int, float))}) for m in modules]
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer.copy_(value)
        for module, kept in numbers:
            module.__dict__.update(kept)


@contextlib.contextmanager
def _collected(found: dict[str, _BatchNorm], rows: dict[str, list[Tensor]]) -> Iterator[None]:
    """Within, the moments of what each layer gets are added to its rows."""

    def collect(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows[path] += [_row(part) for part in _groups(layer, x) if part.numel()]

        return hook

    handles = [layer.register_forward_pre_hook(collect(path), with_kwargs=True) for path, layer in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The parts of a batch that have statistics of their own."""
    if isinstance(layer, GhostBatchNorm) and len(x) > layer.norm_batch:
        return tuple(torch.split(x, group_sizes(len(x), layer.norm_batch, values=x[0, 0].numel())))
    return (x,)


def _row(x: Tensor) -> Tensor:
    """(2 C + 2,) float64: means, M2, values of a channel, samples."""
    mean, m2, count = moments(x)
    return torch.cat([mean, m2, mean.new_tensor([count, len(x)])])


def _gather(mine: list[Tensor | None], found: list[_BatchNorm], comm: Backend, device: torch.device) -> list[Tensor]:
    """For each layer (workers, rows, 2 C + 2); a worker with fewer rows has rows of zeros at the end."""
    counts = torch.zeros(comm.world_size, len(mine), dtype=torch.float64, device=device)
    counts[comm.rank] = torch.tensor([0.0 if rows is None else len(rows) for rows in mine])
    comm.all_reduce(counts.view(-1), "norm/diagnose.rows").wait()
    shapes = [(int(n), 2 * layer.num_features + 2) for n, layer in zip(counts.amax(0), found, strict=True)]
    flat = torch.zeros(comm.world_size, sum(a * b for a, b in shapes), dtype=torch.float64, device=device)
    parts = [
        part.view(comm.world_size, *s)
        for part, s in zip(flat.split([a * b for a, b in shapes], 1), shapes, strict=True)
    ]
    for part, rows in zip(parts, mine, strict=True):
        if rows is not None:
            part[comm.rank, : len(rows)] = rows
    if flat.numel():
        comm.all_reduce(flat.view(-1), "norm/diagnose.moments").wait()
    return parts


# --- judging


def _shared(layer: _BatchNorm, parts: Tensor) -> Tensor:
    """Rows (statistics, 2 C + 2) of the samples that share statistics: of several workers, where synchronised."""
    if isinstance(layer, SyncBatchNorm) and layer.comm is not None and len(parts) > 1:
        size, channels = layer.group_size or len(parts), layer.num_features
        merged = []
        for group in parts.split(size):
            for rows in group.transpose(0, 1):
                mean, m2, count = merge(rows[:, :channels], rows[:, channels:-2], rows[:, -2])
                merged.append(torch.cat([mean, m2, count.view(1), rows[:, -1].sum().view(1)]))
        parts = torch.stack(merged) if merged else parts.flatten(0, 1)
    else:
        parts = parts.flatten(0, 1)
    return parts[parts[:, -2] > 0]


def _report(path: str, layer: _BatchNorm, rows: Tensor) -> LayerReport:
    nan, kind = math.nan, type(layer).__name__
    if not len(rows):
        why = {"unused": "these batches do not reach it"}
        return LayerReport(path, kind, nan, nan, nan, nan, nan, nan, nan, (), why)
    means, m2s = rows[:, :-2].chunk(2, dim=1)
    counts = rows[:, -2]
    mean, m2, total = merge(means, m2s, counts)
    variance = m2 / (total - 1).clamp(min=1)
    alive = variance > DEAD * layer.eps
    mean_noise = variance_noise = mean_shift = ratio = factor = nan
    if len(rows) > 1:
        batch_variances = m2s / (counts - 1).clamp(min=1).unsqueeze(1)
        mean_noise = _rms((means.var(0) / variance).sqrt()[alive])
        variance_noise = _rms((batch_variances.std(0) / variance)[alive])
    kept = layer.current() if isinstance(layer, DomainBatchNorm) else layer
    if kept.running_mean is not None and kept.running_var is not None and not isinstance(layer, VirtualBatchNorm):
        mean_shift = _rms(((kept.running_mean.to(mean) - mean) / variance.sqrt())[alive])
        logarithm = (kept.running_var.to(mean) / variance)[alive].clamp(min=1e-12).log()
        ratio, factor = math.exp(logarithm.mean().item()), math.exp(_rms(logarithm))
    samples = rows[:, -1].mean().item()
    dead = tuple(torch.nonzero(~alive).flatten().tolist())
    findings: dict[str, str] = {}
    if mean_shift > MEAN_SHIFT or factor > VARIANCE_FACTOR:
        findings["stale"] = _stale(layer, mean_shift, ratio, factor)
    by_batch = not isinstance(layer, (FrozenBatchNorm, VirtualBatchNorm))
    if by_batch and (mean_noise > MEAN_NOISE or variance_noise > VARIANCE_NOISE):
        findings["noisy"] = (
            f"statistics of {samples:.0f} samples scatter by {mean_noise:.2f} standard deviations (mean) and by "
            f"{100 * variance_noise:.0f} % (variance)"
        )
    if len(rows) >= UNLIKE_BATCHES and mean_noise * math.sqrt(samples) > UNLIKE:
        findings["unlike"] = (
            f"batch means scatter {mean_noise * math.sqrt(samples):.1f} times as much as those of {samples:.0f} "
            "independent samples could"
        )
    if dead:
        findings["dead"] = f"{len(dead)} of {layer.num_features} channels are constant ({_listed(dead)})"
    return LayerReport(
        path=path,
        kind=kind,
        samples=samples,
        values=counts.mean().item(),
        mean_shift=mean_shift,
        variance_ratio=ratio,
        variance_factor=factor,
        mean_noise=mean_noise,
        variance_noise=variance_noise,
        dead=dead,
        findings=findings,
    )


def _stale(layer: _BatchNorm, shift: float, ratio: float, factor: float) -> str:
    text = (
        f"the running mean is {shift:.2f} standard deviations from that of these data, the running variance "
        f"{ratio:.2f} times theirs, and off by a factor of {factor:.2f} in a typical channel"
    )
    if layer.momentum is not None and layer.num_batches_tracked is not None:
        batches = int(layer.num_batches_tracked)
        initial = (1 - layer.momentum) ** batches
        if initial > INITIAL:
            text += (
                f"; after {batches} batches at momentum {layer.momentum}, {100 * initial:.0f} % is the initial value"
            )
    return text


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _listed(channels: tuple[int, ...], most: int = 8) -> str:
    return ", ".join(map(str, channels[:most])) + (", ..." if len(channels) > most else "")


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
