"""Precise batch norm: running statistics computed again, with fixed weights (Wu & Johnson 2021, section 3).

Running averages follow weights that no longer are; after few or large steps, or with a slow momentum, they lag far
behind. Here the statistics are those of what each layer is given now, over many batches and over all workers, merged
as moments (Chan, Golub & LeVeque 1983): not the mean of the batches' variances, which lacks the variance between them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import UsageError
from dtrain.norm.domains import Domain, DomainBatchNorm
from dtrain.norm.frozen import FrozenBatchNorm
from dtrain.norm.layer import Forward, layers, on_first
from dtrain.norm.merge import Pair, gather_rows, kept, merge_pairs, pair
from dtrain.norm.moments import merge, moments, wide
from dtrain.norm.sync import check_comm
from dtrain.norm.virtual import VirtualBatchNorm
from dtrain.tables import table

ESTIMATORS = ("average", "ema", "layerwise")


@dataclass(frozen=True)
class Change:
    """What became of the statistics of one layer. Standard deviations are with the layer's eps, as where it divides."""

    mean: float
    """How far the mean has moved, in standard deviations of now: root mean square over channels."""
    variance: float
    """Variance now against before: geometric mean over channels."""
    values: float
    """Values a channel that the new statistics are of, over all workers; 0: no batch came here, nothing changed."""


@dataclass(frozen=True)
class Changes:
    """What became of the statistics, by the path of a layer. `str` gives a table."""

    layers: dict[str, Change]

    def __str__(self) -> str:
        rows = [[path, f"{c.mean:.3f}", f"{c.variance:.3f}", f"{c.values:.0f}"] for path, c in self.layers.items()]
        return table(["layer", "mean moved (std)", "variance (ratio)", "values a channel"], rows)


def precise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: str = "average",
    decay: float = 0.99,
    comm: Backend | None = None,
    forward: Forward | None = None,
) -> Changes:
    """Compute the running statistics again over `batches`, the weights as they are; in place.

    "average": one pass; every layer normalises by the batch that it is given, and its statistics are those of all its
    inputs. "ema": the same, where a batch counts `decay` times as much as the next: an exponential average that does
    not remember where it started, with the variance between batches. "layerwise": a pass for each layer, in the order
    of the forward; those before it normalise by their new statistics, so that each has the exact statistics of what it
    is given in evaluation. A layer used several times in a forward pools its uses (with "layerwise" it normalises by
    the batch in its own pass, which is not exact there).

    A kind of batch norm does not matter: while inputs are collected, all normalise by the whole batch of this worker;
    ghost groups, renormalisation and exchanges between workers are left aside, so that workers may have different
    numbers of batches. A batch of one value a channel has no variance, and is normalised by the statistics of before.
    Frozen layers stay as they are (`adapt` changes them), and layers without statistics too. Other modules are in
    evaluation mode. `num_batches_tracked` does not change. Should anything raise, all is as it was.

    Args:
        batches: read once; for "layerwise" something that can be read again: a list or a loader, not an iterator.
            1,000 to 10,000 samples are enough (section 3). Larger batches are better: what comes to later layers then
            has less of the noise of the statistics of earlier ones.
        decay: for "ema".
        comm: the backend over which workers' moments are merged, with one message at the end, or one a layer; the same
            bits on every worker. A worker may have no batch. None: this worker alone.
        forward: what is done with a batch; None: `model(batch)`, or `model(batch[0])` for a tuple or list.

    Returns:
        How much each layer changed.

    Raises:
        UsageError: no batch on any worker, or one value in all; an unknown estimator, a `decay` outside (0, 1), an
            iterator with "layerwise"; a layer that is synchronised over workers, and no `comm`; a lazy layer.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(f"estimator is {estimator!r}: one of {', '.join(ESTIMATORS)}")
    if not 0.0 < decay < 1.0:
        raise UsageError(f"decay is {decay}: above 0 and below 1; 'average' weighs all batches alike")
    if estimator == "layerwise" and isinstance(batches, Iterator):
        raise UsageError("'layerwise' reads the batches once for each layer: give a list or a loader, not an iterator")
    chosen = {path: p for path, p in _tracking(model, comm).items() if not isinstance(p.layer, FrozenBatchNorm)}
    run = _Run(model, batches, forward or on_first, comm or Solo(), decay if estimator == "ema" else 1.0)
    with _as_before(model, chosen) as before:
        values = _layer_by_layer(run, chosen) if estimator == "layerwise" else _at_once(run, chosen)
    return _changes(chosen, before, values)


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    source_samples: float = 0,
    comm: Backend | None = None,
    forward: Forward | None = None,
) -> Changes:
    """Statistics of a target domain in place of those of the source; nothing is trained (AdaBN: Li et al. 2016).

    As `precise` with "average"; frozen layers too.

    Args:
        source_samples: how many samples the statistics of before stand for against those of `batches` (all workers'
            together): they are merged as moments. 0: they are forgotten. A sample is one of the first dimension of
            what a layer is given. Workers' own statistics of before are merged first, all alike.

    Returns:
        How much each layer changed.

    Raises:
        UsageError: as `precise`; `source_samples` is negative or no number.
    """
    if not (source_samples >= 0 and math.isfinite(source_samples)):
        raise UsageError(f"source_samples is {source_samples}: what the old statistics count for, 0 or more")
    chosen = _tracking(model, comm)
    run = _Run(model, batches, forward or on_first, comm or Solo(), 1.0, source_samples)
    with _as_before(model, chosen) as before:
        values = _at_once(run, chosen)
    return _changes(chosen, before, values)


@dataclass(frozen=True)
class _Place:
    """A layer, and where it keeps these statistics: itself, or one of its domains."""

    layer: _BatchNorm
    holder: _BatchNorm | Domain

    @property
    def pair(self) -> Pair:
        return pair(self.holder)

    @torch.no_grad()
    def write(self, new: Pair) -> None:
        for buffer, value in zip(self.pair, new, strict=True):
            buffer.copy_(value)

    def normalised(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """What the layer gives with these statistics, of x (N, C, ...)."""
        kind = wide(x.dtype)
        affine = self.layer if self.holder.weight is None else self.holder
        weight, bias = (None if t is None else t.to(kind) for t in (affine.weight, affine.bias))
        return F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, self.layer.eps)


@dataclass
class _Inputs:
    """Moments of what a layer was given, where a value may weigh less than 1."""

    mean: Tensor
    m2: Tensor
    weight: float = 0.0
    squares: float = 0.0
    """Sum of the squares of the values' weights."""
    samples: float = 0.0
    turn: int = 0
    """When the layer was first used, counted from 1 over all layers' uses; 0: not at all."""
    fresh: bool = False
    """Whether the forward has not come here yet."""

    @classmethod
    def of(cls, place: _Place) -> _Inputs:
        zeros = torch.zeros_like(place.pair[0], dtype=torch.float64)
        return cls(zeros, zeros.clone())

    def take(self, mean: Tensor, m2: Tensor, count: int, samples: int, decay: float) -> None:
        if count == 0:
            return
        if self.fresh:
            self.m2 = self.m2 * decay
            self.weight, self.squares, self.samples = self.weight * decay, self.squares * decay**2, self.samples * decay
            self.samples += samples
            self.fresh = False
        self.weight += count
        self.squares += count
        away = mean - self.mean
        self.mean = self.mean + away * (count / self.weight)
        self.m2 = self.m2 + m2 + away.square() * (count * (1.0 - count / self.weight))

    def row(self) -> Tensor:
        """All of it, (2 C + 4,) float64."""
        rest = self.mean.new_tensor([self.weight, self.squares, self.samples, self.turn])
        return torch.cat([self.mean, self.m2, rest])

    @classmethod
    def merged(cls, rows: Tensor) -> _Inputs:
        """Of all workers, from their rows."""
        means, m2s = rows[:, :-4].chunk(2, dim=1)
        weights, squares, samples, turns = rows[:, -4:].unbind(1)
        mean, m2, weight = merge(means, m2s, weights)
        turn = min((int(turn) for turn in turns if turn), default=0)
        return cls(mean, m2, float(weight), float(squares.sum()), float(samples.sum()), turn)

    def blended(self, old: Pair, samples: float) -> _Inputs:
        """With statistics of before, as so many samples, of as many values each as there are here."""
        values = samples * self.weight / self.samples
        row = torch.cat([*old, self.mean.new_tensor([values, values, samples, 0.0], device=old[0].device)])
        row[len(self.mean) : -4] *= max(values - 1.0, 0.0)
        return _Inputs.merged(torch.stack([self.row(), row.to(self.mean.device)]))

    def statistics(self, path: str) -> Pair:
        """Mean and variance without bias: with Bessel's correction, where all values weigh alike.

        Raises:
            UsageError: one value has no variance.
        """
        pairs = self.weight**2 - self.squares
        if pairs <= 0.0:
            raise UsageError(f"{path} was given one value a channel in all: a variance needs more samples")
        return self.mean, self.m2 * (self.weight / pairs)


@dataclass
class _Run:
    """What a pass over the batches needs."""

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    comm: Backend
    decay: float
    source_samples: float = 0.0

    @torch.no_grad()
    def inputs(self, chosen: dict[str, _Place]) -> dict[str, _Inputs]:
        """What the chosen layers of all workers are given in a pass in which they normalise by the batch."""
        found = {path: _Inputs.of(place) for path, place in chosen.items()}
        by_holder = {id(place.holder): found[path] for path, place in chosen.items()}
        uses = itertools.count(1)
        with contextlib.ExitStack() as hooks:
            for layer in {place.layer for place in chosen.values()}:
                hook = _hook(by_holder, uses, self.decay)
                hooks.enter_context(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            for batch in self.batches:
                for inputs in found.values():
                    inputs.fresh = True
                with _eager():
                    self.forward(self.model, batch)
        rows = [inputs.row() for inputs in found.values()]
        everyone = gather_rows(torch.cat([row.to(rows[0].device) for row in rows]), self.comm, "norm/precise")
        parts = everyone.split([len(row) for row in rows], dim=1)
        return {path: _Inputs.merged(part) for path, part in zip(found, parts, strict=True)}


def _hook(found: dict[int, _Inputs], uses: Iterator[int], decay: float) -> Callable[..., Tensor | None]:
    def collect(layer: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], _: Tensor) -> Tensor | None:
        place = _Place(layer, layer.current() if isinstance(layer, DomainBatchNorm) else layer)
        if id(place.holder) not in found:
            return None
        x = next(iter((*args, *kwargs.values())))
        mean, m2, count = moments(x)
        inputs = found[id(place.holder)]
        inputs.turn = inputs.turn or next(uses)
        inputs.take(mean, m2, count, len(x), decay)
        return None if count < 2 else place.normalised(x, mean, m2 / count)

    return collect


def _at_once(run: _Run, chosen: dict[str, _Place]) -> dict[str, float]:
    """New statistics from one pass. Values a channel that came to each layer."""
    if not chosen:
        return {}
    found = _reached(run.inputs(chosen))
    if run.source_samples:
        old = merge_pairs([chosen[path].pair for path in found], run.comm)
        found = {p: i.blended(pair, run.source_samples) for (p, i), pair in zip(found.items(), old, strict=True)}
    statistics = {path: inputs.statistics(path) for path, inputs in found.items()}
    for path, new in statistics.items():
        chosen[path].write(new)
    return {path: inputs.weight for path, inputs in found.items()}


def _layer_by_layer(run: _Run, chosen: dict[str, _Place]) -> dict[str, float]:
    """New statistics from a pass for each layer; those that are done normalise by theirs, as in evaluation."""
    left, values = dict(chosen), dict[str, float]()
    while left:
        found = {path: inputs for path, inputs in run.inputs(left).items() if inputs.weight}
        if values and not found:
            break
        path = min(_reached(found), key=lambda path: found[path].turn)
        left.pop(path).write(found[path].statistics(path))
        values[path] = found[path].weight
    return values


def _reached(found: dict[str, _Inputs]) -> dict[str, _Inputs]:
    reached = {path: inputs for path, inputs in found.items() if inputs.weight > 0.0}
    if not reached:
        raise UsageError("no batch came to any batch-norm layer, on any worker: statistics are as before")
    return reached


@contextlib.contextmanager
def _as_before(model: nn.Module, chosen: dict[str, _Place]) -> Iterator[dict[str, Pair]]:
    """Within, evaluation mode; yields the chosen statistics. They come back if the body raises, and modes always."""
    before = {path: (place.pair[0].clone(), place.pair[1].clone()) for path, place in chosen.items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield before
    except BaseException:
        for path, place in chosen.items():
            place.write(before[path])
        raise
    finally:
        for module, training in modes:
            module.training = training


def _tracking(model: nn.Module, comm: Backend | None) -> dict[str, _Place]:
    """Where statistics are kept that are used, by path."""
    found: dict[str, _Place] = {}
    check_comm(layers(model), comm)
    for path, layer in layers(model).items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise UsageError(f"{path} is lazy and has no channels yet: run one forward first")
        if not isinstance(layer, VirtualBatchNorm):
            found |= {name: _Place(layer, holder) for name, holder in kept(layer, path).items()}
    return found


def _changes(chosen: dict[str, _Place], before: dict[str, Pair], values: dict[str, float]) -> Changes:
    changes = {}
    for path, place in chosen.items():
        eps = place.layer.eps
        (old_mean, old_var), (mean, var) = ([t.double() for t in pair] for pair in (before[path], place.pair))
        moved = ((mean - old_mean).square() / (var + eps)).mean().sqrt()
        ratio = ((var + eps) / (old_var + eps)).log().mean().exp()
        changes[path] = Change(float(moved), float(ratio), values.get(path, 0.0))
    return Changes(changes)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Within, no compiled graph runs or is made: an old one has no hooks of ours, and a new one would keep them."""
    loaded = "torch._dynamo" in sys.modules  # by torch.compile; it takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()
