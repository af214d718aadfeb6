"""Figures as text: tables that fit a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

RATIO = (
    "ratio = compute time (forward, backward, optimizer) / time blocked on communication, of worker 0's typical step."
)
EFFICIENCY = (
    "efficiency = the step without the time blocked on communication / the step: what one worker alone would take."
)
SPEED = (
    "step ms is the typical step, the mean of the middle half; samples/s is over all steps, the slow first ones too."
)
THREADS = "threads: worker 0's device adds for all, so it sends more than any other worker; the figure is worker 0's."

BOXES = {
    **{name: name for name in ("data", "forward", "backward", "optimizer", "rest")},
    **{"exposed_comm": "exposed", "wait": "wait", "transfer": "transfer", "codec": "codec"},
    "hidden_comm": "(hidden)",
}
"""What a step's time goes to, and the heads of its columns."""

_FIGURES = ("step ms", "compute ms", "exposed comm ms", "ratio", "MB sent/step", "samples/s", "loss")
"""Heads of the columns that every run has."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns as wide as their longest cell; the first `left` ones to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """What `dtrain compare` prints."""
    runs = result["runs"]
    scores = [name for name in ("accuracy", "perplexity") if any(name in run for run in runs.values())]
    head = [
        "backend",
        *_FIGURES,
        *scores,
    ]
    rows = [[backend, *_timing(run), _loss(run), *(_score(run, s) for s in scores)] for backend, run in runs.items()]
    return "\n".join([table(head, rows), "", verdict(result), *_notes(runs)])


def verdict(result: dict[str, Any]) -> str:
    """Whether the runs trained the same model, in words."""
    largest = result["max_abs_weight_diff"]
    pair = max(result["pairs"], key=result["pairs"].__getitem__).replace(",", " and ")
    scope = f"after {result['steps']} steps in {result['dtype']}"
    if not math.isfinite(largest):
        return f"A weight is not a number {scope}, in {pair} at least: the training diverged; lower the learning rate."
    if len(result["bitwise"]) == len(result["pairs"]):
        return f"Same model, bit for bit: no weight differs between the runs {scope}."
    text = f"Largest difference of any weight between two runs, {pair}, {scope}: {largest:.1e}."
    if result["bitwise"]:
        text += " Equal bit for bit: " + "; ".join(p.replace(",", " and ") for p in result["bitwise"]) + "."
    return text


def run(summary: dict[str, Any]) -> str:
    """What `dtrain train` prints at the end."""
    scores = [name for name in ("accuracy", "perplexity", "trigram_perplexity") if name in summary]
    head = [
        "backend",
        "workers",
        *_FIGURES,
    ]
    row = [summary["backend"], str(summary["workers"]), *_timing(summary), _loss(summary)]
    lines = [table([*head, *scores], [[*row, *(_score(summary, s) for s in scores)]])]
    if "device0_extra_memory_bytes" in summary:
        names = ("memory_bytes", "bytes_sent_per_step", "bytes_received_per_step")
        memory, sent, received = (f"{summary[f'device0_extra_{name}'] / 1e6:.1f} MB" for name in names)
        lines.append(
            f"Worker 0's device updates for all: compared with another one it holds {memory} more, and in a step sends "
            f"{sent} and receives {received} more."
        )
    lines += _where_time_goes(summary)
    lines += _on_servers(summary)
    return "\n".join([*lines, "", *_notes([summary["backend"]])])


def _where_time_goes(summary: dict[str, Any]) -> list[str]:
    """The typical step of each worker by what it spends its time on, and who was late."""
    workers = summary.get("per_worker", [])
    if len(workers) < 2 or not all("exposed_comm_ms" in worker for worker in workers):
        return []
    rows = [
        [f"worker {rank}", *(_number(worker.get(f"{n}_ms"), 2) for n in BOXES)] for rank, worker in enumerate(workers)
    ]
    lines = ["", table(["ms", *(BOXES[n] for n in BOXES)], rows)]
    lines.append("exposed = wait (for a late worker) + transfer + codec; step = data to rest, and exposed.")
    if "efficiency" in summary:
        lines.append(f"Efficiency {100 * summary['efficiency']:.0f} %. {EFFICIENCY}")
    return [*lines, *late(summary)]


def late(summary: dict[str, Any]) -> list[str]:
    """Which worker the others waited for, where that cost more than a hundredth of the run."""
    costs = [worker["cost_s"] for worker in summary.get("late", [])]
    if not costs or max(costs) < 0.01 * summary["seconds"]:
        return []
    rank = costs.index(max(costs))
    steps = summary["late"][rank]["steps"]
    return [f"Worker {rank} cost the others {costs[rank]:.1f} s of waiting, and was the last one in {steps} steps."]


def _on_servers(summary: dict[str, Any]) -> list[str]:
    """Where servers stepped the optimizer: what they kept, and what became of each worker's gradients."""
    lines = []
    if "placement" in summary:
        kept, saved = (summary[f"optimizer_bytes{name}"] / 1e6 for name in ("", "_saved"))
        lines += ["", summary["placement"]]
        lines.append(
            f"The optimizer's state, {kept:.3f} MB, is there once; a copy on each worker would be {saved:.3f} MB more."
        )
        histograms = [{int(k): n for k, n in row.items()} for row in summary["staleness"]]
        if any(set(row) - {0} for row in histograms) or any(summary["dropped_gradients"]):
            rows = [
                [f"worker {rank}", str(dropped), " ".join(f"{k}:{row[k]}" for k in sorted(row))]
                for rank, (row, dropped) in enumerate(zip(histograms, summary["dropped_gradients"], strict=True))
            ]
            head = ["gradients", "dropped", "staleness:how often"]
            lines += ["", table(head, rows, left=1)]
    if summary.get("rewinds"):
        lines.append(f"Went back to a checkpoint {summary['rewinds']} times, because a process was lost.")
    return lines


def _notes(backends: Iterable[str]) -> list[str]:
    """What the columns mean."""
    return [RATIO, SPEED, *([THREADS] if "threads" in backends else [])]


def _timing(run: dict[str, Any]) -> list[str]:
    ratio = _number(run["ratio"], 1) if "ratio" in run else "-"
    cells = [_number(run.get(name), 2) for name in ("step_ms", "compute_ms", "exposed_comm_ms")]
    sent = run.get("bytes_sent_per_step")  # nothing, where all steps were made before
    return [*cells, ratio, _number(None if sent is None else sent / 1e6, 3), f"{run['samples_per_s']:.0f}"]


def _loss(run: dict[str, Any]) -> str:
    return _score(run, "loss", 4)


def _score(run: dict[str, Any], name: str, digits: int = 3) -> str:
    if name not in run:
        return "-"
    if run[name] is None:  # as a file has it, where a number was not finite
        return "nan"
    return f"{100 * run[name]:.2f} %" if name == "accuracy" else _number(run[name], digits)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
