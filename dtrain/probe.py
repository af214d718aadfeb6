"""A short look at a model and at this host's links: what `dtrain plan` predicts from.

The model takes a few steps alone, at several batch sizes, with all cores and with one; then real processes exchange
messages of several sizes over each backend, and take the same steps beside each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.comm import collectives
from dtrain.comm.base import Backend, Work
from dtrain.comm.solo import Solo
from dtrain.config import HALVES, TrainConfig
from dtrain.data import Loader, to_device
from dtrain.errors import UsageError
from dtrain.jobs import run as run_job
from dtrain.links import measure_link
from dtrain.measure.hardware import fit
from dtrain.measure.profile import Line, Profile
from dtrain.measure.step import Bucket, NormMessage
from dtrain.measure.stopwatch import PHASES
from dtrain.processes import cores
from dtrain.recipes import Recipe
from dtrain.replica import replicate
from dtrain.spec import RunSpec, one_device
from dtrain.trainer import Trainer, autocast

_WARMUP = 2

DISTURBED = 1.15
"""Time by the clock over the time in which a thread ran: from here on the host counts as busy."""

_BLOCK = 4
_LONG_STEP_S = 0.5
_MOST_CROWD = 8

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a probe takes."""

    compute_s: float = 6.0
    """About so long the model computes, in all."""
    fewest: int = 2
    """Steps that are measured at each size, at least."""
    most: int = 24
    """And at most."""
    link_s: float = 1.5
    """About so long each link is measured."""
    crowd_s: float = 1.5
    """About so long models compute beside each other."""


def probe(
    spec: RunSpec,
    batches: Sequence[int],
    *,
    threads: int | None = None,
    links: Sequence[str] = ("allreduce", "ps", "ps sockets"),
    effort: Effort | None = None,
    say: Say = lambda _: None,
) -> Profile:
    """Probe a recipe and this host.

    Args:
        spec: the run that is planned.
        batches: samples of a micro-batch to measure at; at least two sizes give a line.
        threads: processor threads of a worker; None: half of the cores.
        links: which to measure.
        effort: how long.
        say: told what is being done.

    Raises:
        UsageError: a recipe, an option or a batch that cannot be meant.
        DataError: data that cannot be read.
    """
    effort = effort or Effort()
    device = one_device(spec)
    recipe = spec.build()
    sizes = sorted({min(b, _samples(recipe)) for b in batches if b > 0})
    if not sizes:
        raise UsageError(f"batches are {list(batches)}: give numbers of samples above 0")
    say(f"the model, at {', '.join(map(str, sizes))} samples")
    subject = _Subject(spec, recipe, device)
    everything = cores()
    threads = min(everything, threads or max(1, everything // 2))
    before = torch.get_num_threads()
    try:
        steps, all_threads = _measure(subject, sizes, threads, everything, effort)
        torch.set_num_threads(threads)
        buckets, packed = (subject.buckets(sizes[-1], packs=packs) for packs in (False, True))
        rest_s = subject.rest_s(sizes[0])
    finally:
        torch.set_num_threads(before)
    crowded = _crowding(spec, sizes[-1], effort.crowd_s, say, device) if links else 1.0
    found = {}
    for name in links:
        say(f"messages over {name}")
        found[name] = measure_link(name, effort.link_s, dtype=HALVES.get(spec.send_as, torch.float32))
    lines = {name: _line(sizes, [[s[name] for s in steps[b]] for b in sizes]) for name in PHASES}
    totals = {b: [sum(s[name] for name in PHASES) for s in steps[b]] for b in sizes}
    disturbed = max(1.0, statistics.median(_disturbed(steps[b]) for b in sizes)) if threads == 1 else 1.0
    _, _, doubt = fit(sizes, [[statistics.median(totals[b])] for b in sizes])
    return Profile(
        recipe=" ".join([spec.recipe, *spec.options]),
        parameters=sum(p.numel() for p in recipe.model.parameters() if p.requires_grad),
        global_batch=spec.global_batch or recipe.global_batch,
        **lines,
        rest_s=rest_s,
        scatter=_scatter(list(totals.values())),
        doubt=doubt,
        buckets=buckets,
        packed=packed,
        send_as=spec.send_as,
        norms=_norms(recipe.model),
        cores=everything,
        threads=threads,
        # Beside other programs, threads that wait for each other take many times as long: that says nothing.
        all_threads=all_threads if disturbed < DISTURBED else min(1.0, all_threads),
        crowded=crowded,
        disturbed=disturbed,
        links=found,
        device=device.type,
        host=_about(device),
        probed={"samples": sizes, "step_ms": {str(b): [t * 1e3 for t in totals[b]] for b in sizes}},
    )


# -- the model --------------------------------------------------------------------------------------------------------


class _Recorder(Solo):
    """A world of one that notes when each message would leave."""

    def __init__(self, now: Callable[[], Any], *, packs: bool) -> None:
        super().__init__()
        self.packs = packs
        self.messages: list[tuple[str, int, Any]] = []
        self._now = now

    def all_reduce(self, flat: Tensor, key: str) -> Work:
        self.messages.append((key, flat.numel() * flat.element_size(), self._now()))
        return super().all_reduce(flat, key)


class _Clock:
    """Moments on a device: of the processor, or events in a CUDA stream, which stop nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter(), time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds. Of one thread on the processor, those in which it ran: what other programs took is left out."""
        if not self._cuda:
            return float(end[1] - start[1]) if torch.get_num_threads() == 1 else self.passed(start, end)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def passed(self, start: Any, end: Any) -> float:
        """Seconds by the clock on the wall."""
        return self.between(start, end) if self._cuda else float(end[0] - start[0])


class _Subject:
    """The recipe's model, data and optimizer, to be stepped at any batch."""

    def __init__(self, spec: RunSpec, recipe: Recipe, device: torch.device) -> None:
        self._spec = spec
        self._recipe = recipe
        self._device = device
        self.model: nn.Module = recipe.model.to(device)
        self.model.train()
        self._optimizer = recipe.optimizer(self.model.parameters())
        self._clock = _Clock(device)
        self._streams: dict[int, Iterator[Any]] = {}
        self._tie(packs=False)

    def _tie(self, *, packs: bool) -> None:
        self._recorder = _Recorder(self._clock.now, packs=packs)
        send_as = HALVES.get(self._spec.send_as)
        self._replica = replicate(self.model, self._recorder, bucket_mb=self._spec.bucket_mb, send_as=send_as)

    def step(self, samples: int) -> dict[str, Any]:
        """One step: seconds of each phase, and of each message its key, bytes and seconds since backward began."""
        now, between = self._clock.now, self._clock.between
        self._recorder.messages.clear()
        moments = [now()]
        batch, total = next(self._stream(samples))
        moments.append(now())
        with autocast(self._spec.amp, self._device):
            loss = self._recipe.loss(self.model, to_device(batch, self._device))
        moments.append(now())
        self._replica.backward(loss, samples=total, total=total)
        moments.append(now())
        if self._spec.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._spec.clip_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        moments.append(now())
        seconds = {name: between(*pair) for name, pair in zip(PHASES, itertools.pairwise(moments), strict=True)}
        sent = [(key, nbytes, between(moments[2], at)) for key, nbytes, at in self._recorder.messages]
        seconds["data"] = self._clock.passed(*moments[:2])  # may wait for a disk
        wall_s = self._clock.passed(moments[1], moments[3])
        return {**seconds, "wall": wall_s, "messages": [m for m in sent if m[0].startswith("gradient/")]}

    def buckets(self, samples: int, *, packs: bool) -> tuple[Bucket, ...]:
        """What is sent, and after which part of backward: medians of three steps."""
        self._tie(packs=packs)
        steps = [self.step(samples) for _ in range(_WARMUP + 3)][_WARMUP:]
        rows = zip(*(s["messages"] for s in steps), strict=True)
        found = [(row[0][1], [m[2] / s["backward"] for m, s in zip(row, steps, strict=True)]) for row in rows]
        return tuple(Bucket(nbytes=n, ready=min(1.0, max(0.0, statistics.median(at)))) for n, at in found)

    def rest_s(self, samples: int) -> float:
        """What the trainer does in a step beside the phases: the lower quartile of ten steps. The last thing to ask."""
        loader = Loader(self._recipe.train, global_batch=samples, rank=0, world_size=1, seed=self._spec.seed)
        config = TrainConfig(steps=10, log_every=self._spec.log_every, bucket_mb=self._spec.bucket_mb)
        trainer = Trainer(self.model, self._recipe.loss, self._optimizer, loader, comm=Solo(), config=config)
        trainer.fit()
        return statistics.quantiles([r["rest_ms"] for r in trainer.records[_WARMUP:]], n=4)[0] / 1e3

    def _stream(self, samples: int) -> Iterator[Any]:
        if samples not in self._streams:
            loader = Loader(self._recipe.train, global_batch=samples, rank=0, world_size=1, seed=self._spec.seed)
            self._streams[samples] = _forever(loader, samples)
        return self._streams[samples]


def _forever(loader: Loader, samples: int) -> Iterator[Any]:
    """Full micro-batches without end."""
    for epoch in itertools.count():
        for step in loader.epoch(epoch):
            for micro in step.micro_batches:
                if micro.samples == samples:
                    yield micro.batch, micro.samples


def _measure(
    subject: _Subject, sizes: Sequence[int], threads: int, most: int, effort: Effort
) -> tuple[dict[int, list[dict[str, Any]]], float]:
    """The steps at each size, and the time that `most` threads take at the largest over that of `threads`.

    In blocks that take turns, so that a slow spell of the host falls on all; the first of a block warms up.
    """
    runs = [(size, threads) for size in sizes] + ([(sizes[-1], most)] if threads < most else [])
    found: dict[tuple[int, int], list[dict[str, Any]]] = {run: [] for run in runs}
    torch.set_num_threads(threads)
    for size in sizes:
        subject.step(size)
    start_s = time.perf_counter()
    subject.step(sizes[-1])
    block = _BLOCK if time.perf_counter() - start_s < _LONG_STEP_S else 2
    end_s = time.perf_counter() + effort.compute_s
    while True:
        for size, count in runs:
            torch.set_num_threads(count)
            found[size, count] += [subject.step(size) for _ in range(block)][1:]
        fewest = min(map(len, found.values()))
        if fewest >= effort.most or (fewest >= effort.fewest and time.perf_counter() > end_s):
            break
    steps = {size: found[size, threads] for size in sizes}
    return steps, _shortest(found[sizes[-1], most]) / _shortest(steps[sizes[-1]]) if threads < most else 1.0


def _shortest(steps: Sequence[dict[str, Any]]) -> float:
    """Least seconds of a forward and backward by the clock: for ratios, which other programs would spoil."""
    return min(float(s["wall"]) for s in steps)


def _disturbed(steps: Sequence[dict[str, Any]]) -> float:
    """Time by the clock over the time in which the thread ran."""
    return statistics.median(float(s["wall"] / (s["forward"] + s["backward"])) for s in steps)


def _line(sizes: Sequence[int], times_s: Sequence[Sequence[float]]) -> Line:
    if len(sizes) == 1:
        return Line(per_sample_s=statistics.median(times_s[0]) / sizes[0])
    base_s, per_sample_s, _ = fit(sizes, times_s)
    return Line(base_s=base_s, per_sample_s=per_sample_s)


def _scatter(times_s: Sequence[Sequence[float]]) -> float:
    """Standard deviation of a step's time as a part of it, from the quartiles: a stray slow step changes little."""
    parts = [t / statistics.median(times) for times in times_s for t in times]
    if len(parts) < 4:
        return 0.0
    low, _, high = statistics.quantiles(parts, n=4)
    return (high - low) / 1.349


def _norms(model: nn.Module) -> tuple[NormMessage, ...]:
    """The sums of each batch-norm layer, where statistics are those of all workers; see `dtrain.norm.sync`."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return tuple(
        NormMessage(forward_bytes=(2 * m.num_features + 2) * 8, backward_bytes=2 * m.num_features * 8) for m in layers
    )


def _samples(recipe: Recipe) -> int:
    return len(recipe.train)  # type: ignore[arg-type]


def _about(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in ("dtrain", "torch", "pyzmq")}
    return {"device": name, "system": f"{platform.system()} {platform.machine()}", **versions}


# -- beside others ----------------------------------------------------------------------------------------------------


def _crowding(spec: RunSpec, samples: int, seconds: float, say: Say, device: torch.device) -> float:
    """How many times as long a model computes with one thread while every other core does the same."""
    crowd = min(cores(), _MOST_CROWD)
    if device.type != "cpu" or crowd < 2:
        return 1.0
    say(f"{crowd} models beside each other")
    rows = run_job(_crowd, spec, samples, seconds, workers=crowd, backend="allreduce")
    return max(1.0, statistics.median(together for _, together in rows) / rows[0][0])


def _crowd(comm: Backend, spec: RunSpec, samples: int, seconds: float) -> tuple[float, float]:
    """One worker with one thread: time of a step with the others at rest (on worker 0), and with all at work."""
    torch.set_num_threads(1)
    quiet = dataclasses.replace(spec, device="cpu")
    subject = _Subject(quiet, quiet.build(), torch.device("cpu"))
    for _ in range(_WARMUP):
        subject.step(samples)
    collectives.barrier(comm)
    alone = _steps_for(subject, samples, seconds / 2) if comm.rank == 0 else 0.0
    collectives.barrier(comm)
    together = _steps_for(subject, samples, seconds / 2)
    collectives.barrier(comm)
    return alone, together


def _steps_for(subject: _Subject, samples: int, seconds: float) -> float:
    end_s = time.perf_counter() + seconds
    steps: list[dict[str, Any]] = []
    while len(steps) < 3 or time.perf_counter() < end_s:
        steps.append(subject.step(samples))
    return statistics.median(float(s["forward"] + s["backward"]) for s in steps)
