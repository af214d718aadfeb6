"""What the scripts of claims share. A claim of the literature is measured over several seeds, judged, and drawn.

How to write one (`train_longer.py` is an example):

    def cases(quick): return [{"case": "small batch", "batch": 64}, ...]     what is compared; the longest first
    def measure(case, seed, place): return [{"accuracy": ...}]               trains through tasks.py; one row or more
    def judge(rows): return Verdict("62 against 86 %", [Check(...), ...])    from the rows of all cases and seeds
    def picture(rows, ink): return slide(...)[0]                             draw.py helps

    CLAIM = Claim(number="7", name="train_longer", title="what the paper says, a sentence", source="paper, section",
                  about=__doc__, cases=cases, measure=measure, judge=judge, picture=picture)

    if __name__ == "__main__":
        main(CLAIM)

A case is a dict of plain values (`"once": True`: for the first seed only); the case and the seed are added to each row
that is measured of it. All functions are functions of the module, as cases run in processes of their own. Measure with
other seeds (`--first-seed 2000`) before a threshold is written down; the record is then made with the default ones,
which nobody has looked at. A number that is not finite becomes None in a row. `--from FILE` judges and draws the rows
of a record again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

sys.path.append(str(Path(__file__).parents[1]))  # common.py and pictures.py of all benchmarks

import common
import pictures
import torch
from scipy import stats

import dtrain
from dtrain.errors import DtrainError
from dtrain.hooks import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Case = dict[str, Any]
Ink = pictures.Ink
"""The colour of a name: `ink("run0")`; see the report's style.css."""

FIRST_SEED = 7000
CONFIDENCE = 0.95
TIMEOUT_S = 600.0
"""Longest wait of a worker for the others, which may take turns."""
PRELOADED = ["torch", "torch._dynamo", "dtrain", "scipy.stats", "sklearn.datasets"]
"""Imported once for the processes of all cases: seconds each."""

T = TypeVar("T")


# -- what a claim is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Who trains."""

    backend: str = "solo"
    workers: int = 1

    def run(self, fn: Callable[..., T], *arguments: object) -> T:
        """`fn(comm, *arguments)` as each worker; what worker 0 returned."""
        return dtrain.run(fn, *arguments, workers=self.workers, backend=self.backend, timeout_s=TIMEOUT_S)[0]


@dataclass(frozen=True)
class Check:
    """One thing that the claim says would be seen."""

    text: str
    """What was expected and what was seen, with numbers."""
    met: bool


@dataclass(frozen=True)
class Verdict:
    """What became of a claim here."""

    measured: str
    """A sentence with the main numbers, for the table."""
    checks: Sequence[Check]

    @property
    def word(self) -> str:
        met = [check.met for check in self.checks]
        return "holds" if all(met) else "holds partly" if any(met) else "does not hold here"

    def __str__(self) -> str:
        lines = [f"{'yes' if check.met else 'NO '}  {check.text}" for check in self.checks]
        return "\n".join([self.measured, *lines, f"Verdict: {self.word}."])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and how it is seen here."""

    number: str
    """Its place in the table: 1b, 7."""
    name: str
    """Of the script, the record and the picture."""
    title: str
    """One sentence, as the paper says it."""
    source: str
    """Paper, section."""
    about: str
    """For --help: what is trained, how long it takes, what is left out."""
    cases: Callable[[bool], Sequence[Case]]
    """(quick) -> what is compared."""
    measure: Callable[[Case, int, Place], list[Row]]
    """(case, seed, place) -> what was measured."""
    judge: Callable[[Sequence[Row]], Verdict]
    picture: Callable[[Sequence[Row], Ink], Figure]
    place: Place = Place()
    """Unless --backend and --workers say otherwise."""
    seeds: int = 3
    """Unless --seeds says otherwise; 1 where nothing is random."""


# -- arithmetic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval (Student's t). `f"{interval:.2f}"` gives `13.14 ± 0.30`."""

    mean: float
    half: float
    """NaN for one value."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is; of one value, whether it is."""
        return (self.mean if math.isnan(self.half) else self.low) > 0

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if math.isnan(self.half) else f"{mean} ± {format(self.half, spec.lstrip('+'))}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width at 95 %; no half-width where one of them is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Interval(statistics.fmean(values), math.nan)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


def pick(rows: Sequence[Row], **where: object) -> list[Row]:
    """The rows that have these values, by seed."""
    found = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
    return sorted(found, key=lambda row: row["seed"])


def values(rows: Sequence[Row], key: str, **where: object) -> list[float]:
    """A figure of the rows that have these values, by seed; NaN where it was not finite."""
    return [math.nan if row[key] is None else float(row[key]) for row in pick(rows, **where)]


def gap(rows: Sequence[Row], key: str, one: Case, other: Case) -> Interval:
    """How much larger a figure is in one case than in another, seed by seed: what seeds have in common cancels."""
    pairs = zip(values(rows, key, **one), values(rows, key, **other), strict=True)
    return interval([a - b for a, b in pairs])


# -- the runs ---------------------------------------------------------------------------------------------------------


def collect(
    claim: Claim, cases: Sequence[Case], seeds: Sequence[int], place: Place, jobs: int
) -> tuple[list[Row], float]:
    """The rows of all cases and seeds, in that order, from so many runs at a time with one thread each.

    And the seconds of processors that they took: where others use the machine too, the clock says little.
    """
    wanted = [(case, seed) for case in cases for seed in (seeds[:1] if case.get("once") else seeds)]
    found: list[list[Row]] = [[] for _ in wanted]
    total_s = 0.0
    with _runner(jobs) as start:
        runs = {start(timed, claim.measure, case, seed, place): at for at, (case, seed) in enumerate(wanted)}
        for number, done in enumerate(as_completed(runs), 1):
            case, seed = wanted[runs[done]]
            rows, seconds = done.result()
            total_s += seconds
            found[runs[done]] = [finite({**case, "seed": seed, **row}) for row in rows]
            _say(f"{claim.name} {number}/{len(wanted)}: {_brief(case)}, seed {seed}: {seconds:.0f} s")
    return [row for rows in found for row in rows], total_s


@contextlib.contextmanager
def _runner(jobs: int) -> Iterator[Callable[..., Future[tuple[list[Row], float]]]]:
    """Starts calls: in processes, or for one job in this one. What has not begun when something fails is left out."""
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield _here
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as processes:
        try:
            yield processes.submit
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            raise


def _here(fn: Callable[..., tuple[list[Row], float]], *arguments: Any) -> Future[tuple[list[Row], float]]:
    done: Future[tuple[list[Row], float]] = Future()
    done.set_result(fn(*arguments))
    return done


def timed(measure: Callable[..., list[Row]], *arguments: object) -> tuple[list[Row], float]:
    """What was measured, and the seconds of processors that it took, with those of processes that it has waited for."""
    before = os.times()
    rows = measure(*arguments)
    return rows, sum(os.times()[:4]) - sum(before[:4])


def _one_thread() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))


def _brief(case: Case) -> str:
    return str(case.get("case", ", ".join(f"{name} {value}" for name, value in case.items()) or "run"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the command ------------------------------------------------------------------------------------------------------


def flags(claim: Claim) -> argparse.ArgumentParser:
    text = f"{claim.number}. {claim.title}\n{claim.source}\n\n{claim.about.strip()}"
    found = common.parser(text)
    found.add_argument("--seeds", type=common.count, default=claim.seeds, metavar="N", help=f"default {claim.seeds}")
    found.add_argument("--first-seed", type=int, default=FIRST_SEED, metavar="N", help=f"default {FIRST_SEED}")
    found.add_argument("--backend", choices=("solo", "threads", "ps", "allreduce"), default=claim.place.backend)
    found.add_argument("--workers", type=common.count, metavar="N", help="of the backend; 1 for solo")
    found.add_argument(
        "--jobs", type=common.count, metavar="N", help="runs at a time, one thread each (default: cores)"
    )
    found.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    found.add_argument("--from", type=Path, dest="record", metavar="FILE", help="judge and draw this record again")
    return found


def _read(claim: Claim, given: Sequence[str] | None) -> argparse.Namespace:
    found = flags(claim)
    arguments = found.parse_args(given)
    if arguments.workers is None:
        arguments.workers = 1 if arguments.backend == "solo" else max(claim.place.workers, 2)
    if arguments.jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        arguments.jobs = max(1, cores // arguments.workers) if arguments.backend in ("ps", "allreduce") else cores
    return arguments


def main(claim: Claim, given: Sequence[str] | None = None) -> None:
    """The command of a claim's script."""
    arguments = _read(claim, given)
    if arguments.record is not None:
        again(claim, arguments)
        return
    hardware, start_s = common.hardware(), time.perf_counter()
    place = Place(arguments.backend, arguments.workers)
    seeds = [arguments.first_seed + k for k in range(arguments.seeds)]
    try:
        rows, processor_s = collect(claim, claim.cases(arguments.quick), seeds, place, arguments.jobs)
    except DtrainError as error:
        raise SystemExit(f"dtrain: {error}") from error
    more = {"quick": arguments.quick, "seeds": seeds, "jobs": arguments.jobs, "hardware": hardware}
    more |= {"place": asdict(place), "seconds": round(time.perf_counter() - start_s)}
    more |= {"processor_seconds": round(processor_s)}
    if arguments.json is not None:  # before they are judged: hours of rows are not to be lost
        common.write(arguments.json, rows, **head(claim), **more)
    verdict = conclude(claim, rows, arguments)
    if arguments.json is not None:
        common.write(arguments.json, rows, **head(claim), **more, **told(verdict))


def again(claim: Claim, arguments: argparse.Namespace) -> None:
    """Judge and draw the rows of a record; what it says of the run stays."""
    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    if record.get("claim") != claim.number:
        raise SystemExit(f"{arguments.record} is no record of claim {claim.number}")
    verdict = conclude(claim, record["rows"], arguments)
    if arguments.json is not None:
        rows = record.pop("rows")
        text = json.dumps({**record, **head(claim), **told(verdict), "rows": rows}, indent=1)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")


def conclude(claim: Claim, rows: Sequence[Row], arguments: argparse.Namespace) -> Verdict:
    """Say and draw what came out."""
    verdict = claim.judge(rows)
    print(f"{claim.number}. {claim.title} ({claim.source})", verdict, sep="\n")
    pictures.save_drawn(claim.picture, rows, arguments.picture)
    return verdict


def head(claim: Claim) -> dict[str, str]:
    """Of a record: which claim."""
    return {"claim": claim.number, "name": claim.name, "title": claim.title, "source": claim.source}


def told(verdict: Verdict) -> dict[str, object]:
    """Of a record: what came out."""
    checks = [asdict(check) for check in verdict.checks]
    return {"verdict": verdict.word, "measured": verdict.measured, "checks": checks}
