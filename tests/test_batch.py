"""The table of batch size: what follows from the figures, and one small run."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dtrain.recipes.data import TensorData

SCRIPTS = Path(__file__).parents[1] / "benchmarks"

sys.path.insert(0, str(SCRIPTS))
batch: ModuleType = importlib.import_module("batch")
sys.path.remove(str(SCRIPTS))


def facts(**changed: Any) -> Any:
    of_text = {
        "train_samples": 1000,
        "test_samples": 100,
        "parameters": 10,
        "rate": 0.004,
        "tuned_batch": 32,
        "headline": "perplexity",
        "unit": "characters",
        "units": 64,
        "normalised": False,
        "device": "cpu",
        "threads": 1,
    }
    return batch.Facts(**{**of_text, **changed})


def row(global_batch: int, **measured: Any) -> dict[str, Any]:
    return {"global_batch": global_batch, "rate": 0.004, "updates": 2, "predicted_bytes": 3 * 2**20, **measured}


SPEED = {"timed_steps": 8, "step_ms": 32.0, "samples_per_s": 1000.0, "epoch_minutes": 1 / 60, "memory_bytes": 2**21}


def test_throughput_saturates_at_the_smallest_batch_with_nine_tenths_of_the_best():
    assert batch.saturation({16: 10.0, 32: 89.9, 64: 90.0, 128: 100.0, 256: 80.0}) == 64
    assert batch.saturation({256: 95.0, 16: 100.0}) == 16
    assert batch.saturation({16: 1.0, 32: 2.0}) == 32
    assert batch.saturation({16: 50.0, 32: 60.0, 64: 100.0}, part=0.6) == 32


def test_the_verdict_names_the_point_and_the_best_or_that_there_is_none():
    slow, fast = ({**SPEED, "samples_per_s": speed} for speed in (950.0, 1000.0))
    said = batch.verdict([row(16, **slow), row(32, **fast), row(64)], facts())
    assert said == ("Throughput saturates at a global batch of 16, with 95 % of the best (64,000 characters/s at 32).")
    growing = batch.verdict([row(16, **{**SPEED, "samples_per_s": 500.0}), row(32, **fast)], facts())
    assert growing == "Throughput grows up to the largest batch here, 32; best: 64,000 characters/s at 32."
    assert batch.verdict([row(64), row(32, **fast)], facts()) == "One batch is no curve: 64,000 characters/s at 32."
    assert batch.verdict([row(64)], facts()) == "No batch was measured."


def test_the_table_has_a_dash_for_what_was_not_measured():
    scores = {"train_perplexity": 4.0, "test_perplexity": 5.125}
    rows = [row(16, **SPEED), row(32, **SPEED, **scores), row(4096, left_out="it does not fit")]
    head, _, *lines = batch.show(rows, facts()).splitlines()
    assert "characters/s" in head
    cut_short, complete, left_out = (line.split() for line in lines)
    assert cut_short == ["16", "0.004", "2", "8", "32.0", "64,000", "0.02", "2.00", "MiB", "3.00", "MiB", "-", "-"]
    assert complete[:-2] == ["32", *cut_short[1:-2]]
    assert complete[-2:] == ["4.00", "5.12"]
    assert left_out == ["4096", "0.004", "2", "-", "-", "-", "-", "-", "3.00", "MiB", "-", "-"]


def test_the_table_of_images_has_accuracies():
    scores = {"train_accuracy": 1.0, "test_accuracy": 0.9125}
    table = batch.show([row(16, **SPEED, **scores)], facts(headline="accuracy", unit="images", units=1))
    assert table.splitlines()[-1].endswith("100.00 %  91.25 %")
    assert " 1,000 " in table


def test_rates_are_scaled_from_the_batch_that_they_were_tuned_for():
    assert batch.scaled(0.2, 512, 128, "none") == 0.2
    assert batch.scaled(0.2, 512, 128, "sqrt") == pytest.approx(0.4)
    assert batch.scaled(0.2, 512, 128, "linear") == pytest.approx(0.8)
    assert batch.scaled(0.2, 32, 128, "linear") == pytest.approx(0.05)


def test_samples_are_chosen_evenly_and_whole_batches_lose_the_rest():
    data = TensorData(torch.arange(10))
    chosen = batch.evenly(data, 4)
    assert len(chosen) == 4
    assert chosen.batch(torch.arange(4))[0].tolist() == [0, 2, 5, 7]
    assert len(batch.evenly(data, 99)) == 10
    assert len(batch.whole(data, 4)) == 8


def test_a_weight_that_is_not_a_number_is_no_agreement():
    assert batch.furthest([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])]) == 3.0
    assert math.isnan(batch.furthest([torch.tensor([math.nan]), torch.tensor([1.0])]))


def test_a_case_that_fails_says_why_and_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory\nby far")

    monkeypatch.setattr(batch, "apart", fails)
    assert batch.attempt("text, global batch 16", print) == (None, "failed: out of memory")
    assert "text, global batch 16: failed: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--accumulate", "100"], "multiples of 32"),
        (["--backend", "threads", "--workers", "2", "--accumulate", "96"], "multiples of 32"),
        (["--workers", "2"], "needs --backend threads"),
        (["--batch", "0"], "1 or more"),
        (["--seconds-per-case", "0"], "more than 0"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_runs(
    given: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["batch.py", *given])
    with pytest.raises(SystemExit):
        batch._read(batch._flags())
    assert why in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_over_two_threads_where_fashion_is_absent(tmp_path: Path):
    record, picture = tmp_path / "record", tmp_path / "picture.png"
    command = [sys.executable, SCRIPTS / "batch.py", "--quick", "--recipe", "fashion", "--fashion-data", tmp_path]
    command += ["--batch", 64, 512, 2048, "--accumulate", 128, "--backend", "threads", "--workers", 2]
    command += ["--seconds-per-case", 10, "--json", record, "--picture", picture]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text(encoding="utf-8"))
    assert list(found["absent"]) == ["fashion"]
    small, large, left_out, both = found["rows"]
    for measured, updates in ((small, 23), (large, 3)):
        assert measured["recipe"] == "digits"
        assert measured["completed"]
        assert measured["steps"] == measured["updates"] == updates
        assert measured["timed_steps"] >= 6
        assert measured["samples_per_s"] == pytest.approx(measured["global_batch"] / measured["step_ms"] * 1e3)
        assert 0 < measured["test_accuracy"] <= 1
    assert small["rate"] == 0.1  # at the batch that it was tuned for
    assert large["predicted_bytes"] > 3 * small["predicted_bytes"]
    assert "1437 training samples" in left_out["left_out"]
    assert "samples_per_s" not in left_out
    assert both["micro_batches"] == 2
    assert both["predicted_accumulated_bytes"] < both["predicted_memory_bytes"]
    single, double, plain = (one["difference"] for one in both["agreements"])
    assert double < 1e-10 < single < 1e-3 < plain
    assert found["saturation"]["digits"] in (64, 512)
    assert "absent: fashion: " in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
