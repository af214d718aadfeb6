"""What the benchmark scripts share: flags, ratios of alternating runs, and the record that each leaves."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from dtrain.tables import table

ROOT = Path(__file__).parents[1]

_RESULTS = [f":!benchmarks/{name}" for name in ("results", "claims/results", "claims/README.md")]
"""What a run writes itself."""

Row = dict[str, Any]

Times = tuple[Sequence[float], Sequence[float]]
"""Seconds a step by round, of contender and baseline."""


def parser(description: str) -> argparse.ArgumentParser:
    """Flags of every script: --quick and --json."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="fewer and smaller cases, well under a minute")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    return flags


def count(text: str) -> int:
    """The value of a flag that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give a whole number, 1 or more")
    return value


def alternate(
    contender: Callable[[], None], baseline: Callable[[], None], *, rounds: int, steps: int, warmup: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds a step of each, by round. They take turns, and who goes first alternates: a slow phase of the machine
    strikes both."""
    for _ in range(warmup):
        contender()
        baseline()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order = ((0, contender), (1, baseline)) if number % 2 == 0 else ((1, baseline), (0, contender))
        for which, step in order:
            start_s = time.perf_counter()
            for _ in range(steps):
                step()
            times[which].append((time.perf_counter() - start_s) / steps)
    return times


def join(runs: Sequence[Times]) -> Times:
    """The rounds of several runs."""
    return [second for run in runs for second in run[0]], [second for run in runs for second in run[1]]


def ratio_row(case: str, contender: str, baseline: str, times: Times) -> Row:
    """A row of the record: the contender's time over the baseline's, round by round."""
    ratios = [c / b for c, b in zip(*times, strict=True)]
    low, high = median_interval(ratios)
    return {
        "case": case,
        "contender": contender,
        "baseline": baseline,
        "ratio_median": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "contender_ms": statistics.median(times[0]) * 1e3,
        "baseline_ms": statistics.median(times[1]) * 1e3,
        "rounds": len(ratios),
    }


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Between which of them the true median lies, whatever their distribution (David and Nagaraja 2003, section 7.1);
    the least and the largest, where they are too few to say it with that confidence."""
    ordered, count = sorted(values), len(values)
    beyond, below = 0.0, 0
    while below < count // 2:
        beyond += math.comb(count, below) * 0.5**count  # so few lie below the median
        if beyond > (1 - confidence) / 2:
            break
        below += 1
    cut = max(0, below - 1)
    return ordered[cut], ordered[-1 - cut]


def show(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    head = ["case", "contender", "baseline", "ratio", "95 %", "min", "max", "contender ms", "baseline ms", "rounds"]
    return table(
        head,
        [
            [
                *(row["case"], row["contender"], row["baseline"]),
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}" if "ratio_low" in row else "-",  # an older record
                *(f"{row[f'ratio_{name}']:.3f}" for name in ("min", "max")),
                *(f"{row[f'{name}_ms']:.1f}" for name in ("contender", "baseline")),
                str(row["rounds"]),
            ]
            for row in rows
        ],
    )


def record(rows: Sequence[Row], file: Path | None, **more: object) -> None:
    """Print the rows, and write them with what is needed to run them again."""
    print(show(rows))
    if file is not None:
        write(file, rows, **more)


def write(file: Path, rows: Sequence[Row], **more: object) -> None:
    """Write rows with what is needed to run them again."""
    contents = {
        "command": " ".join(["python", *(word.removeprefix(f"{ROOT}/") for word in sys.argv)]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "hardware": hardware(),
        **more,
        "rows": list(rows),
    }
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it, other than those of results."""
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", *_RESULTS])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changes else head


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("dtrain", "pyzmq", "msgpack", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def hardware() -> dict[str, object]:
    """Processor, cores, memory, GPUs."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "load_average": round(psutil.getloadavg()[0], 2),
    }
