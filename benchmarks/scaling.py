"""Weak and strong scaling on emulated hosts, beside what `dtrain plan` foresees from a probe of one worker.

    python benchmarks/scaling.py --json F --picture P        1, 2, 4, 8 workers, three backends: a quarter of an hour
    python benchmarks/scaling.py --case lstm --rate 200mbit  another model of predict.py, over other links
    python benchmarks/scaling.py --batch 256 --rate 200mbit  more to compute for the same gradients
    python benchmarks/scaling.py --quick                     1 and 2 workers over allreduce: half a minute

It needs root, or user namespaces (`hosts.py`). Backends: `allreduce`; `ps-1`, one server; `ps-n`, as many servers as
workers. Each worker and each server is a host of one core, with a link of the given rate each way. The model is probed
and played as in `predict.py`: no run of several workers goes into a prediction.

    weak     each worker keeps its batch; the global batch grows with the workers
    strong   the global batch stays; each worker's share of it shrinks. By default it is the one that weak scaling has
             with the most workers: that run belongs to both, and is made once

`measured ms` is the typical step, the mean of all workers' (each of the middle half of its steps, the first three left
out). `samples/s` is the global batch over it: of all workers together.

One worker alone, on one of the hosts, with backend `solo`, is what the others are compared with.

    weak       efficiency is the step time of one worker alone with the same batch, over that of n workers
    strong     efficiency is the step time of one worker alone with the global batch, over n times that of n workers
    speed-up   n times the efficiency: samples per second of n workers, over those of that one

Emulated hosts share the cores of this machine. Where n hosts are more than the cores, each computes as one would whose
core is n/cores times as slow. Set against a worker that had a core to itself, n workers would seem to lose by talking
what they lose by sharing cores. So the time of the worker alone is multiplied by n/cores where n is more, measured and
predicted alike, as `emulated` of `predict.py` multiplies the computing that it predicts from: this is the efficiency
among hosts that are all as slow as those of n. It follows that

- hosts of different n are not equally fast: beyond the cores, computing takes longer with every worker and sending does
  not, so a curve falls less than it would on real hosts, or rises. What says something is a measured point beside its
  prediction, and one backend beside another at the same n.
- where workers do not all compute at once, because links let them go on at different times, each has more of a core
  than that, and the measured efficiency is too high: see `compute_ms` beside `predicted_compute_ms` in the record.
  `exposed` needs no worker alone and no such factor.
- what servers and sockets take of the shared cores is part of the measured time.

`ratio` is that of `summary.json`: compute time (forward, backward, optimizer) over time blocked on communication, here
of the typical steps of all workers, there of worker 0. `exposed` is the time blocked on communication as a part of the
step. `error` is (predicted - measured) / measured of the step time; `within` says whether the measured time lies in the
predicted interval.

`busy` is the use of this machine's processors, and `stolen` what other virtual machines took of them, while links were
in use; of a worker alone both are over the whole run, with Python's start. With more than 3 % stolen links do not keep
their rate: such a run is made again, three times in all, and the least disturbed one counts (--quick: once). `others`
is what other programs of this machine took over the whole run: above 10 % the machine is too busy for this.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import pictures
import psutil
from hosts import Hosts, HostsError, Outcome, available, bytes_per_s, hosts
from predict import ALPHA_S, CASES, STOLEN, TRIES, Case, foreseen, probed, row_of, spec_of, trained
from watching import processors_s

from dtrain.measure.predict import Prediction
from dtrain.measure.profile import Profile
from dtrain.probe import Effort, probe
from dtrain.processes import cores
from dtrain.tables import table

BACKENDS = ("allreduce", "ps-1", "ps-n")
ALONE = "solo"
ALONE_STEPS = 40
"""Steps of a worker alone: they are short."""
OTHERS = 0.10
"""Of the processors' time, what other programs may take before a run says little."""
COLOURS = {"allreduce": "#888888", "ps-1": "#c1666b", "ps-n": "#2a6f97"}
SHORT = Effort(compute_s=2.0, link_s=0.3, crowd_s=0.3)
"""Of the probe, with --quick."""


@dataclass(frozen=True)
class Run:
    """What is run: so many workers, each with so many samples in a step."""

    backend: str
    workers: int
    batch: int

    @property
    def servers(self) -> int:
        """Of ps; 0 without."""
        return {"ps-1": 1, "ps-n": self.workers}.get(self.backend, 0)


# -- what to run ------------------------------------------------------------------------------------------------------


def runs_of(backends: Sequence[str], counts: Sequence[int], batch: int, global_batch: int) -> dict[str, list[Run]]:
    """The runs of weak and of strong scaling; one worker needs no backend."""
    batches = {"weak": dict.fromkeys(counts, batch), "strong": {n: global_batch // n for n in counts}}
    return {
        scaling: [Run(name, n, by_count[n]) for n in counts for name in (backends if n > 1 else [ALONE])]
        for scaling, by_count in batches.items()
    }


def divisible(counts: Sequence[int], batch: int) -> int:
    """The smallest global batch that all numbers of workers divide, and that leaves the most workers `batch` each."""
    step = math.lcm(*counts)
    return step * math.ceil(batch * max(counts) / step)


# -- runs -------------------------------------------------------------------------------------------------------------


def measure(
    case: Case, profile: Profile, runs: Sequence[Run], tries: int
) -> Iterator[tuple[Run, common.Row | HostsError]]:
    """What became of each run; those with as many workers are on the same hosts."""
    ordered = sorted(set(runs), key=lambda run: (run.workers, run.batch, run.backend))
    for workers, group in itertools.groupby(ordered, key=lambda run: run.workers):
        alike = list(group)
        with hosts(workers + max(run.servers for run in alike), rate=case.rate) as h:
            for run in alike:
                yield run, tried(h, case, profile, run, tries)


def collected(
    case: Case, profile: Profile, runs: Sequence[Run], tries: int
) -> tuple[dict[Run, common.Row], dict[str, str]]:
    """The rows, and why runs failed that did, by name; says so as it goes.

    Raises:
        HostsError: a worker alone failed: the others would have nothing to be set against.
    """
    rows: dict[Run, common.Row] = {}
    failed: dict[str, str] = {}
    for run, row in measure(case, profile, runs, tries):
        name = f"{run.workers} x {run.batch} samples, {run.backend}"
        if not isinstance(row, HostsError):
            rows[run] = row
            print(f"{name}: {row['measured_ms']:.1f} ms", flush=True)
        elif run.backend == ALONE:
            raise row
        else:
            failed[name] = str(row)
            print(f"{name} failed: {row}", flush=True)
    return rows, failed


def tried(h: Hosts, case: Case, profile: Profile, run: Run, tries: int) -> common.Row | HostsError:
    """A run, made again where it was disturbed: the least disturbed one. One that fails does not end the others."""
    rows: list[common.Row] = []
    try:
        while len(rows) < tries and (not rows or rows[-1]["stolen"] > STOLEN):
            rows.append(once(h, case, profile, run))
    except HostsError as error:
        if not rows:
            return error
    return {**min(rows, key=lambda row: row["stolen"]), "tries": len(rows)}


def once(h: Hosts, case: Case, profile: Profile, run: Run) -> common.Row:
    """One run on the emulated hosts, beside its prediction."""
    case = dataclasses.replace(case, batch=run.batch, steps=ALONE_STEPS if run.backend == ALONE else case.steps)
    backend, servers = run.backend.partition("-")[0], max(1, run.servers)
    prediction = foreseen(profile, case, backend, run.workers, servers, h.rate_bytes_per_s)
    with tempfile.TemporaryDirectory() as folder:
        before = spent()
        found = trained(h, case, backend, run.workers, servers, Path(folder) / "run")
        shares = since(before)
        row = row_of(case, backend, run.workers, servers, prediction, found)
    if run.backend == ALONE:
        row |= {"bound_ms": 0.0, **shares}  # no link tells when it trained
    row["others"] = shares["others"]
    return {**row, "backend": run.backend, **of_step(run, row["measured_ms"], found, prediction)}


def spent() -> dict[str, float]:
    """Seconds of all processors so far: there were, busy, stolen, and used by programs other than ours that ended."""
    times, own = psutil.cpu_times(), os.times()
    return {
        **processors_s(),
        "others": times.user + times.nice + times.system - sum(own[:4]),
    }


def since(before: Mapping[str, float]) -> dict[str, float]:
    """Shares of the processors' time since then."""
    passed = {name: seconds - before[name] for name, seconds in spent().items()}
    all_s = passed.pop("all") or 1.0
    return {name: max(0.0, seconds / all_s) for name, seconds in passed.items()}


def of_step(run: Run, measured_ms: float, found: Outcome, prediction: Prediction) -> dict[str, Any]:
    """Throughput and communication of a typical step, measured and predicted."""
    workers = found.summary["per_worker"]
    exposed_ms = statistics.fmean(worker["exposed_comm_ms"] for worker in workers)
    boxes = prediction.boxes
    return {
        "batch": run.batch,
        "global_batch": run.batch * run.workers,
        "samples_per_s": run.batch * run.workers / measured_ms * 1e3,
        "predicted_samples_per_s": prediction.samples_per_s,
        "ratio": ratio(workers),
        "ratio_of_worker_0": found.summary.get("ratio"),
        "predicted_ratio": prediction.ratio if math.isfinite(prediction.ratio) else None,
        "exposed": exposed_ms / measured_ms,
        "predicted_exposed": boxes.exposed_comm_ms / boxes.step_ms,
    }


# -- figures ----------------------------------------------------------------------------------------------------------


def ratio(workers: Sequence[Mapping[str, float]]) -> float | None:
    """Compute time over time blocked on communication, of the typical steps of all workers (`per_worker` of
    `summary.json`); None where nothing is sent, or nothing was waited for."""
    exposed_ms = sum(worker["exposed_comm_ms"] for worker in workers)
    if not exposed_ms > 0 or not any(worker["bytes_sent_per_step"] > 0 for worker in workers):
        return None
    return sum(worker["compute_ms"] for worker in workers) / exposed_ms


def slower(workers: int, core_count: int) -> float:
    """How many times as long a host computes where so many share the cores."""
    return max(1.0, workers / core_count)


def efficiency(row: common.Row, alone: common.Row, core_count: int, step: str = "measured_ms") -> float:
    """Samples per second of n workers over n times those of one worker alone, whose host is as slow as theirs.

    Args:
        alone: with the batch of one of the workers (weak), or with the whole global batch (strong).
        step: `measured_ms` or `predicted_ms`, of both.
    """
    alone_ms = alone[step] * slower(row["workers"], core_count)
    return (row["global_batch"] / row[step]) / (row["workers"] * alone["global_batch"] / alone_ms)


def judged(scaling: str, rows: Sequence[common.Row], core_count: int) -> list[common.Row]:
    """The rows of weak or of strong scaling with efficiency and speed-up, against the one of a worker alone."""
    alone = next(row for row in rows if row["backend"] == ALONE)
    found = []
    for row in rows:
        real, told = (efficiency(row, alone, core_count, step) for step in ("measured_ms", "predicted_ms"))
        speed_ups = {"speed_up": real * row["workers"], "predicted_speed_up": told * row["workers"]}
        found.append({"scaling": scaling, **row, "efficiency": real, "predicted_efficiency": told, **speed_ups})
    return found


def show(rows: Sequence[common.Row]) -> str:
    """The rows as two tables: step times, and what they mean for scaling, each beside its prediction."""
    head = ["scaling", "over", "n", "batch"]
    names = [[row["scaling"], row["backend"], str(row["workers"]), str(row["batch"])] for row in rows]
    times = [
        [
            *(f"{row[name]:.1f}" for name in ("measured_ms", "predicted_ms")),
            *(f"{row['low_ms']:.1f}-{row['high_ms']:.1f}", f"{row['error']:+.1%}", "yes" if row["within"] else "no"),
            *(f"{row[name]:.0%}" for name in ("busy", "stolen", "others")),
            str(row["tries"]),
        ]
        for row in rows
    ]
    gains = [
        [
            *(f"{row[name]:.0f}" for name in _beside("samples_per_s")),
            *(f"{row[name]:.1%}" for name in _beside("efficiency")),
            *(f"{row[name]:.2f}" for name in _beside("speed_up")),
            *("-" if row[name] is None else f"{row[name]:.2f}" for name in _beside("ratio")),
            *(f"{row[name]:.0%}" for name in _beside("exposed")),
        ]
        for row in rows
    ]
    heads = ["measured ms", "predicted", "interval", "error", "within", "busy", "stolen", "others", "tries"]
    figures = ["samples/s", "efficiency", "speed-up", "ratio", "exposed"]
    return "\n\n".join(
        table([*head, *more], [[*name, *cells] for name, cells in zip(names, body, strict=True)], left=2)
        for more, body in ((heads, times), ([word for name in figures for word in (name, "foreseen")], gains))
    )


def _beside(name: str) -> tuple[str, str]:
    return name, f"predicted_{name}"


def disturbed(row: common.Row) -> bool:
    """Whether others had so much of the processors that the run says little."""
    return bool(row["stolen"] > STOLEN or row["others"] > OTHERS)


def verdict(rows: Sequence[common.Row]) -> str:
    """How far predictions were off, of the runs that nobody disturbed; and whether efficiencies stand on another."""
    errors = [abs(row["error"]) for row in rows if not disturbed(row)]
    text = (
        f"{len(rows)} runs, {len(rows) - len(errors)} of them disturbed (stolen > {STOLEN:.0%}, others > {OTHERS:.0%})"
    )
    if errors:
        text += f"; errors of the rest: {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most."
    else:
        text += ": they say nothing of the prediction."
    if any(disturbed(row) for row in rows if row["backend"] == ALONE):
        text += "\nA worker alone was disturbed: measured efficiencies and speed-ups, which stand on it, say little."
    return text


def draw(rows: Sequence[common.Row], title: str, file: Path) -> None:
    """Efficiency of weak scaling and speed-up of strong scaling against the workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (weak, strong) = pyplot.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    counts = sorted({row["workers"] for row in rows})
    _curves(weak, [row for row in rows if row["scaling"] == "weak"], "efficiency")
    weak.plot(counts, [1.0] * len(counts), "--", color="black", linewidth=1, label="ideal")
    weak.set_ylabel("efficiency (1: as one worker alone)")
    weak.set_title("weak: the batch of each worker stays", fontsize=10)
    _curves(strong, [row for row in rows if row["scaling"] == "strong"], "speed_up")
    strong.plot(counts, counts, "--", color="black", linewidth=1, label="ideal")
    strong.set_ylabel("speed-up (times one worker alone)")
    strong.set_title("strong: the global batch stays", fontsize=10)
    for axis in (weak, strong):
        if min(row["efficiency"] for row in rows) < 0.1:  # on a straight scale all of it would lie at the bottom
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        axis.set_xlabel("workers")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    weak.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}\ndots: measured (hollow: disturbed); lines: predicted", fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _curves(axis: Any, rows: Sequence[common.Row], name: str) -> None:
    """Measured dots and predicted lines of each backend; all begin with the worker alone."""
    for backend in BACKENDS:
        own = [row for row in rows if row["backend"] in (ALONE, backend)]
        if len(own) < 2:
            continue
        at, colour = [row["workers"] for row in own], COLOURS[backend]
        axis.plot(at, [row[f"predicted_{name}"] for row in own], color=colour, label=backend)
        for row in own:
            fill = "white" if disturbed(row) else colour
            axis.plot(row["workers"], row[name], "o", color=colour, markerfacecolor=fill, markersize=6)


# -- the command ------------------------------------------------------------------------------------------------------


def _flags() -> argparse.ArgumentParser:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--case", default="mlp", help="the model: the first of predict.py whose name contains this")
    flags.add_argument(
        "--workers", type=common.count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="1 is always there"
    )
    flags.add_argument("--rate", help="payload of TCP each way: 100mbit, 1gbit (default: the case's in predict.py)")
    flags.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    flags.add_argument(
        "--batch", type=common.count, help="weak: samples of each worker (default: the case's in predict.py)"
    )
    flags.add_argument("--global-batch", type=common.count, help="strong: samples of all workers (default: see above)")
    flags.add_argument("--profiles", type=Path, metavar="DIR", help="keep the probe there, and take it from there")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    return flags


def chosen(flags: argparse.ArgumentParser, arguments: argparse.Namespace) -> Case:
    """The case with what the flags say of it; the rest of the flags made whole, and checked."""
    case = next((case for case in CASES if arguments.case in case.name), None)
    if case is None:
        flags.error(f"--case {arguments.case}: it is one of {', '.join(case.name for case in CASES)}")
    if arguments.quick:
        arguments.workers, arguments.backends = [1, 2], ["allreduce"]
    arguments.workers = sorted({1, *arguments.workers})
    arguments.backends = [name for name in BACKENDS if name in arguments.backends]
    if arguments.batch not in (None, case.batch):  # with a name of its own, as probes are kept by name
        case = dataclasses.replace(case, batch=arguments.batch, name=f"{case.name}, batch {arguments.batch}")
    if arguments.rate is not None:
        try:
            bytes_per_s(arguments.rate)
        except ValueError as error:
            flags.error(f"--rate: {error}")
        case = dataclasses.replace(case, rate=arguments.rate)
    if arguments.global_batch is None:
        arguments.global_batch = divisible(arguments.workers, case.batch)
    if any(arguments.global_batch % n for n in arguments.workers):
        counts = ", ".join(map(str, arguments.workers))
        flags.error(f"--global-batch {arguments.global_batch}: give a multiple of each of {counts}, for equal shares")
    return case


def _profile(case: Case, arguments: argparse.Namespace) -> Profile:
    if not arguments.quick or arguments.profiles:
        return probed(case, arguments.profiles)
    return probe(spec_of(case, 1), [case.batch, 4 * case.batch], threads=1, links=("allreduce",), effort=SHORT)


def main() -> None:
    flags = _flags()
    arguments = flags.parse_args()
    case = chosen(flags, arguments)
    if (reason := available()) is not None:
        flags.error(reason)
    wanted = runs_of(arguments.backends, arguments.workers, case.batch, arguments.global_batch)
    every = [run for runs in wanted.values() for run in runs]
    rows, failed = collected(case, _profile(case, arguments), every, 1 if arguments.quick else TRIES)
    found = [
        row
        for scaling, runs in wanted.items()
        for row in judged(scaling, [rows[run] for run in runs if run in rows], cores())
    ]
    title = f"{case.name}, links of {case.rate}, {cores()} cores for all hosts"
    print("", title, show(found), verdict(list(rows.values())), sep="\n")
    if arguments.json:
        told = {"case": dataclasses.asdict(case), "global_batch": arguments.global_batch, "cores": cores()}
        common.write(arguments.json, found, **told, alpha_s=ALPHA_S, quick=arguments.quick, failed=failed)
    if arguments.picture:
        draw(found, title, arguments.picture)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, and are not in the tables: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
