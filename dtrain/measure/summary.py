"""The typical step of a run, and what it says of communication."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

COMPUTE = ("forward_ms", "backward_ms", "optimizer_ms")


def mean(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure that all of the records have."""
    names = [name for name in records[0] if all(name in r for r in records)] if records else []
    return {name: statistics.fmean(r[name] for r in records) for name in names}


def summarise(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """A typical step: the mean of the middle half of the steps by length, the first ones (warm-up) left out.

    So a few slow steps do not count, and the parts add up to the whole, as medians of them would not. Bytes
    (`*_per_step`) are means over all steps. With them come `compute_ms` (forward, backward and optimizer), and where
    anything is sent `ratio` and `efficiency` (see `dtrain.tables` for what they are).
    """
    kept = list(records[min(3, len(records) // 2) :])
    if not kept:
        return {}
    everything, middle = mean(kept), mean(_middle_half(kept))
    summary = {name: value for name, value in middle.items() if name.endswith("_ms")}
    bytes_ = ("bytes_", "sent_", "received_")
    summary |= {f"{name}_per_step": value for name, value in everything.items() if name.startswith(bytes_)}
    if all(name in summary for name in COMPUTE):
        summary["compute_ms"] = sum(summary[name] for name in COMPUTE)
        exposed_ms = summary["exposed_comm_ms"]
        if exposed_ms > 0 and summary["bytes_sent_per_step"] > 0:
            summary["ratio"] = summary["compute_ms"] / exposed_ms
            summary["efficiency"] = max(0.0, 1.0 - exposed_ms / summary["step_ms"])
    return summary


def _middle_half(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    ordered = sorted(records, key=lambda record: record["step_ms"])
    outside = len(ordered) // 4
    return ordered[outside : len(ordered) - outside]
