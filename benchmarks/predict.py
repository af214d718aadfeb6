"""Does `dtrain plan` foresee what happens? Step times on emulated hosts, predicted from a probe of one worker.

    python benchmarks/predict.py                   three models, 4 and 8 workers, both backends: half an hour; as root
    python benchmarks/predict.py --quick --json F  one model, 4 workers: two minutes
    python benchmarks/predict.py --profiles DIR    keep the probes there, and take them from there the next time

A probe looks at each model on one worker (`dtrain.probe`); no run of several workers over these links goes in. The
links are known: token buckets hold them to the rate (`hosts.py`), and there is a host for each worker and each server.
Emulated hosts share this machine's processors, so the model computes as many times longer as there are workers to a
core, which is put into the profile; the rates are low enough that the links bind, and `link` tells for what part of
the time the busiest one was full.

`error` is (predicted - measured) / measured of the typical step, the mean of all workers' (each of the middle half of
its steps). `within` says whether the measured time lies in the predicted interval. The bound is that of the bytes on
the busiest link: 2(n-1)/n M/B for a ring, max(1, n/k) M/B for k servers apart (Jiang et al. 2020, section 3.1).
`stolen` is what other virtual machines took of the processors: above 3 % links do not keep their rate, and the case is
measured again, at most twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import pictures
from hosts import Hosts, Outcome, available, hosts, job

from dtrain.measure.hardware import UNEVEN, Link
from dtrain.measure.predict import Prediction, Setting, predict
from dtrain.measure.profile import Line, Profile, load
from dtrain.probe import probe
from dtrain.processes import cores
from dtrain.spec import RunSpec
from dtrain.tables import table

GOALS = {"median": 0.10, "largest": 0.25}


@dataclass(frozen=True)
class Case:
    """What is trained, over which links."""

    name: str
    options: tuple[str, ...]
    batch: int
    """Samples of each worker."""
    rate: str
    steps: int = 8


CASES = [
    Case("mlp 1.0 M", ("model=mlp", "hidden=512", "layers=2"), 8, "100mbit"),
    Case("lstm 1.6 M", ("model=lstm", "hidden=256"), 4, "100mbit"),
    Case("transformer 0.9 M", ("model=transformer", "hidden=128", "layers=4"), 4, "50mbit"),
]
TRIES = 3
STOLEN = 0.03
"""Of the processors' time, what other virtual machines took: above it, links do not keep their rate (`hosts.py`), and a
case is measured again, up to `TRIES` times. The least disturbed one counts."""
WIRINGS = [("allreduce", 1), ("ps", 1), ("ps", 2), ("ps", 4)]
ALPHA_S = 100e-6
"""Latency of a message over the bridge of emulated hosts, through the kernel and a busy scheduler; a guess that hardly
counts at these sizes."""


def spec_of(case: Case, workers: int) -> RunSpec:
    return RunSpec(
        recipe="synthetic",
        options=case.options,
        global_batch=case.batch * workers,
        steps=case.steps,
        checkpoint_every="never",
        progress=False,
    )


def probed(case: Case, folder: Path | None) -> Profile:
    """The profile of a model on one thread, from the folder if it is there."""
    file = None if folder is None else folder / f"{case.name.replace(' ', '-')}.json"
    if file is not None and file.exists():
        return load(file)
    found = probe(spec_of(case, 1), [case.batch, 4 * case.batch], threads=1, links=("allreduce", "ps sockets"))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file)
    return found


def emulated(profile: Profile, workers: int) -> Profile:
    """The profile of a host of one core, of which `workers` share this machine's."""
    slower = max(1.0, workers / cores())

    def longer(line: Line) -> Line:
        return Line(base_s=line.base_s * slower, per_sample_s=line.per_sample_s * slower)

    lines = {name: longer(getattr(profile, name)) for name in ("data", "forward", "backward", "optimizer")}
    return dataclasses.replace(
        profile, **lines, rest_s=profile.rest_s * slower, cores=1, threads=1, all_threads=1.0, crowded=1.0
    )


def foreseen(profile: Profile, case: Case, backend: str, workers: int, servers: int, bytes_per_s: float) -> Prediction:
    link = Link(name=case.rate, alpha_s=ALPHA_S, bytes_per_s=bytes_per_s, uneven=UNEVEN, scatter=0.05, source="tc tbf")
    setting = Setting(
        backend=backend,  # type: ignore[arg-type]
        workers=workers,
        batch=case.batch,
        servers=servers,
        place="apart",
        link=link,
    )
    return predict(emulated(profile, workers), setting)


def row_of(case: Case, backend: str, workers: int, servers: int, prediction: Prediction, found: Outcome) -> common.Row:
    boxes = found.summary["per_worker"]
    measured_ms = statistics.fmean(worker["step_ms"] for worker in boxes)
    nbytes = _gradient_bytes(found)
    bytes_per_s = prediction.setting.link.bytes_per_s  # type: ignore[union-attr]
    share = 2 * (workers - 1) / workers if backend == "allreduce" else max(1.0, workers / servers)
    return {
        "case": case.name,
        "backend": backend,
        "workers": workers,
        "servers": servers if backend == "ps" else None,
        "rate": case.rate,
        "gradient_bytes": nbytes,
        "predicted_ms": prediction.boxes.step_ms,
        "low_ms": prediction.low_ms,
        "high_ms": prediction.high_ms,
        "measured_ms": measured_ms,
        "error": prediction.boxes.step_ms / measured_ms - 1,
        "within": prediction.low_ms <= measured_ms <= prediction.high_ms,
        "bound_ms": share * nbytes / bytes_per_s * 1e3,
        "compute_ms": statistics.fmean(worker["compute_ms"] for worker in boxes),
        "predicted_compute_ms": prediction.boxes.compute_ms,
        **found.use.figures(),
    }


def _gradient_bytes(found: Outcome) -> float:
    """Bytes of all messages of a backward, from the first worker's steps."""
    trace = json.loads((found.run_dir / "trace.json").read_text(encoding="utf-8"))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 0 and "nbytes" in e["args"]]
    step = trace["otherData"]["typical_step"]
    return sum(e["args"]["nbytes"] for e in events if e["args"]["step"] == step and e["name"].startswith("gradient/"))


def measure(case: Case, profile: Profile, workers: int, wirings: list[tuple[str, int]]) -> list[common.Row]:
    """One model with so many workers, over every wiring."""
    rows = []
    with hosts(workers + max(servers for _, servers in wirings), rate=case.rate) as h:
        for backend, servers in wirings:
            prediction = foreseen(profile, case, backend, workers, servers, h.rate_bytes_per_s)
            tries = []
            while len(tries) < TRIES and (not tries or tries[-1]["stolen"] > STOLEN):
                with tempfile.TemporaryDirectory() as folder:
                    found = trained(h, case, backend, workers, servers, Path(folder) / "run")
                    tries.append(row_of(case, backend, workers, servers, prediction, found))
            rows.append({**min(tries, key=lambda row: row["stolen"]), "tries": len(tries)})
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def trained(h: Hosts, case: Case, backend: str, workers: int, servers: int, run_dir: Path) -> Outcome:
    """A run on the emulated hosts."""
    how = ["--global-batch", str(case.batch * workers), "--steps", str(case.steps), "--log-every", "4"]
    command = ["train", "synthetic", "--option", *case.options, *how, "--checkpoint-every", "never"]
    return job(h, command, backend=backend, workers=workers, servers=servers, run_dir=run_dir, timeout_s=600.0)


def show(rows: list[common.Row]) -> str:
    """The rows as a table."""
    head = [
        "case",
        "over",
        "n",
        "MB",
        "predicted ms",
        "interval",
        "measured ms",
        "error",
        "within",
        "bound ms",
        "stolen",
    ]
    cells = [
        [
            row["case"],
            row["backend"] + (f" {row['servers']}" if row["servers"] else ""),
            str(row["workers"]),
            f"{row['gradient_bytes'] / 1e6:.1f}",
            f"{row['predicted_ms']:.0f}",
            f"{row['low_ms']:.0f}-{row['high_ms']:.0f}",
            f"{row['measured_ms']:.0f}",
            f"{row['error']:+.1%}",
            "yes" if row["within"] else "no",
            f"{row['bound_ms']:.0f}",
            f"{row['stolen']:.0%}",
        ]
        for row in rows
    ]
    return table(head, cells, left=2)


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--workers", type=common.count, nargs="+", default=[4, 8])
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    flags.add_argument("--profiles", type=Path, metavar="DIR", help="keep probes there, and take them from there")
    flags.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    arguments = flags.parse_args()
    if (reason := available()) is not None:
        flags.error(reason)
    rows: list[common.Row] = []
    for some in _measured(arguments):  # written down as they come: a run of half an hour may be ended early
        rows += some
        if arguments.json:
            common.write(arguments.json, rows, goals=GOALS, alpha_s=ALPHA_S)
    errors = sorted(abs(row["error"]) for row in rows)
    print("", show(rows), sep="\n")
    print(
        f"median error {statistics.median(errors):.1%} (goal {GOALS['median']:.0%}), "
        f"largest {errors[-1]:.1%} (goal {GOALS['largest']:.0%}), {len(rows)} cases"
    )
    pictures.save("predict", rows, arguments.picture)


def _measured(arguments: argparse.Namespace) -> Iterator[list[common.Row]]:
    """The rows of each model and number of workers."""
    cases = [case for case in CASES if arguments.case in case.name]
    if arguments.quick:
        yield measure(cases[0], probed(cases[0], arguments.profiles), 4, WIRINGS[:2])
        return
    profiles = [probed(case, arguments.profiles) for case in cases]
    for case, profile in zip(cases, profiles, strict=True):
        for workers in arguments.workers:
            yield measure(case, profile, workers, WIRINGS)


if __name__ == "__main__":
    main()
