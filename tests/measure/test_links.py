"""A link of known rate is found again: what the meter calls transfer is what the link needs for the bytes."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(_SCRIPTS))
emulated: ModuleType = importlib.import_module("hosts")
sys.path.remove(str(_SCRIPTS))

_PART_BYTES = 2**16  # what a server sums and sends back at a time, over a link so slow
_RATE = "48mbit"


@pytest.mark.parametrize(("backend", "workers"), [("allreduce", 2), ("ps", 1)])
def test_the_rate_of_a_link_is_recovered(backend: str, workers: int, tmp_path: Path) -> None:
    """Of links of 6 MB/s, within 5 %.

    A ring of two sends the gradient's M bytes once each way. A server apart sends parts back as they come, and the last
    one when all is in. The second quickest step counts: a link can be slower than it should be, where the machine is
    taken away from it, but hardly faster.
    """
    if (reason := emulated.available()) is not None:
        pytest.skip(reason)
    model = ["--option", "model=mlp", "hidden=512", "layers=2"]
    how = ["--global-batch", "16", "--steps", "8", "--checkpoint-every", "never"]
    place = {"backend": backend, "workers": workers}
    with emulated.hosts(2, rate=_RATE) as h:
        emulated.job(h, ["train", "synthetic", *model, *how], **place, run_dir=tmp_path / "run")
        rate = h.rate_bytes_per_s
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    moved = steps[0]["sent_gradient"] + (_PART_BYTES if backend == "ps" else 0)
    transfers_ms = sorted(line["transfer_ms"] for line in steps if line["step"] > 2)
    assert moved / (transfers_ms[1] / 1e3) == pytest.approx(rate, rel=0.05)
    computing_ms = statistics.median(line["backward_ms"] + line["forward_ms"] for line in steps)
    assert computing_ms < 0.25 * transfers_ms[1]  # none of the link's time has gone there
