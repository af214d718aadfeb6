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

_PART_BYTES = 2**20  # what a server sums and sends back at a time
_RATE = "48mbit"


@pytest.mark.parametrize("backend", ["allreduce", "ps"])
def test_the_rate_of_a_link_is_recovered(backend: str, tmp_path: Path) -> None:
    """Two workers on links of 6 MB/s, within 5 %.

    A ring of two sends the gradient's bytes M once each way. One server apart takes M from both through its link, and
    the last parts go back when all of it is in.
    """
    if (reason := emulated.available()) is not None:
        pytest.skip(reason)
    model = ["--option", "model=mlp", "hidden=512", "layers=2"]
    how = ["--global-batch", "16", "--steps", "7", "--checkpoint-every", "never"]
    with emulated.hosts(3, rate=_RATE) as h:
        emulated.job(h, ["train", "synthetic", *model, *how], backend=backend, workers=2, run_dir=tmp_path / "run")
        rate = h.rate_bytes_per_s
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    nbytes = steps[0]["sent_gradient"]
    moved = nbytes if backend == "allreduce" else 2 * (nbytes + _PART_BYTES)
    transfer_s = statistics.median(line["transfer_ms"] for line in steps if line["step"] > 2) / 1e3
    assert moved / transfer_s == pytest.approx(rate, rel=0.05)
    computing_s = statistics.median(line["backward_ms"] + line["forward_ms"] for line in steps) / 1e3
    assert computing_s < 0.25 * transfer_s  # none of the link's time has gone there
