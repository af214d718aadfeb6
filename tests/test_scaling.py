"""The scaling benchmark: what efficiency, speed-up and ratio are, which runs are made, and that they are."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dtrain.measure import summarise
from dtrain.measure.profile import Line, Profile
from dtrain.measure.step import Bucket

SCRIPTS = Path(__file__).parents[1] / "benchmarks"

sys.path.insert(0, str(SCRIPTS))
scaling: ModuleType = importlib.import_module("scaling")
emulated: ModuleType = importlib.import_module("hosts")
predict: ModuleType = importlib.import_module("predict")
sys.path.remove(str(SCRIPTS))


@functools.cache
def refusal() -> str | None:
    return emulated.available()


def row(backend: str, workers: int, global_batch: int, measured_ms: float, **more: Any) -> dict[str, Any]:
    """A run as the script has it, foreseen to take twice as long as it took."""
    made = {
        "backend": backend,
        "workers": workers,
        "batch": global_batch // workers,
        "global_batch": global_batch,
        "measured_ms": measured_ms,
        "predicted_ms": 2 * measured_ms,
        "low_ms": 1.9 * measured_ms,
        "high_ms": 2.1 * measured_ms,
        "error": 1.0,
        "within": False,
        "samples_per_s": global_batch / measured_ms * 1e3,
        "predicted_samples_per_s": global_batch / measured_ms * 500,
        "ratio": None,
        "predicted_ratio": None if workers == 1 else 0.25,
        "exposed": 0.0,
        "predicted_exposed": 0.8,
        "busy": 0.5,
        "stolen": 0.0,
        "others": 0.0,
        "tries": 1,
    }
    return {**made, **more}


# -- figures ----------------------------------------------------------------------------------------------------------


def test_weak_efficiency_is_the_step_of_a_worker_alone_over_that_of_all():
    alone, four = row("solo", 1, 8, 10.0), row("allreduce", 4, 32, 40.0)
    assert scaling.efficiency(four, alone, core_count=4) == pytest.approx(0.25)
    assert scaling.efficiency(alone, alone, core_count=4) == 1.0


def test_strong_efficiency_is_the_step_of_a_worker_alone_over_n_times_that_of_all():
    alone, four = row("solo", 1, 64, 100.0), row("ps-1", 4, 64, 50.0)
    assert scaling.efficiency(four, alone, core_count=4) == pytest.approx(100 / (4 * 50))


def test_sharing_cores_is_no_loss_by_itself():
    """8 hosts on 2 cores compute 4 times as long; with nothing to wait for they lose nothing else."""
    alone, eight = row("solo", 1, 8, 10.0), row("allreduce", 8, 64, 40.0)
    assert scaling.efficiency(eight, alone, core_count=2) == pytest.approx(1.0)
    assert scaling.efficiency(eight, alone, core_count=8) == pytest.approx(0.25)
    assert [scaling.slower(n, 2) for n in (1, 2, 3, 8)] == [1.0, 1.0, 1.5, 4.0]


def test_rows_are_judged_against_the_worker_alone_by_what_was_measured_and_by_what_was_predicted():
    rows = [row("solo", 1, 64, 100.0), row("ps-1", 4, 64, 50.0, predicted_ms=100.0)]
    alone, four = scaling.judged("strong", rows, 4)
    assert [alone[name] for name in ("scaling", "efficiency", "speed_up")] == ["strong", 1.0, 1.0]
    assert (four["speed_up"], four["predicted_speed_up"]) == pytest.approx((2.0, 2.0))
    assert (four["efficiency"], four["predicted_efficiency"]) == pytest.approx((0.5, 0.5))


PROFILE = Profile(
    recipe="made up",
    parameters=1_000_000,
    global_batch=8,
    data=Line(per_sample_s=1e-5),
    forward=Line(base_s=1e-3, per_sample_s=1e-3),
    backward=Line(base_s=2e-3, per_sample_s=2e-3),
    optimizer=Line(base_s=1e-3),
    rest_s=1e-4,
    buckets=(Bucket(nbytes=4e6, ready=1.0),),
    packed=(Bucket(nbytes=4e6, ready=1.0),),
)


@pytest.mark.parametrize(("backend", "workers"), [("allreduce", 2), ("allreduce", 8), ("ps", 4)])
def test_predicted_weak_efficiency_is_what_the_plan_calls_scaling(backend, workers, monkeypatch):
    monkeypatch.setattr(predict, "cores", lambda: 2)
    case = predict.CASES[0]

    def foreseen(backend: str, workers: int) -> tuple[dict[str, Any], float]:
        found = predict.foreseen(PROFILE, case, backend, workers, 1, 25e6)
        return row(backend, workers, workers * case.batch, 1.0, predicted_ms=found.boxes.step_ms), found.scaling

    (alone, _), (together, expected) = foreseen("solo", 1), foreseen(backend, workers)
    assert 0 < expected < 1
    assert scaling.efficiency(together, alone, 2, "predicted_ms") == pytest.approx(expected)


def test_the_ratio_is_that_of_the_summary():
    steps = [
        {
            **{"step_ms": 50.0, "forward_ms": 10.0 + i, "backward_ms": 20.0, "optimizer_ms": 5.0},
            **{"exposed_comm_ms": 14.0, "bytes_sent": 1e6},
        }
        for i in range(9)
    ]
    worker = summarise(steps)
    assert scaling.ratio([worker]) == pytest.approx(worker["ratio"])
    late = {**worker, "compute_ms": 3 * worker["compute_ms"], "exposed_comm_ms": 0.0}
    assert scaling.ratio([worker, late]) == pytest.approx(4 * worker["ratio"])


def test_there_is_no_ratio_where_nothing_is_sent_or_nothing_waits():
    assert scaling.ratio([{"compute_ms": 5.0, "exposed_comm_ms": 0.1, "bytes_sent_per_step": 0.0}]) is None
    assert scaling.ratio([{"compute_ms": 5.0, "exposed_comm_ms": 0.0, "bytes_sent_per_step": 1e6}]) is None


def test_shares_of_the_processors(monkeypatch):
    before = {"all": 10.0, "busy": 5.0, "stolen": 1.0, "others": 3.0}
    monkeypatch.setattr(scaling, "spent", lambda: {"all": 14.0, "busy": 7.0, "stolen": 1.1, "others": 2.9})
    assert scaling.since(before) == pytest.approx({"busy": 0.5, "stolen": 0.025, "others": 0.0})
    assert scaling.since(scaling.spent()) == {"busy": 0.0, "stolen": 0.0, "others": 0.0}


def test_the_tables_have_what_was_measured_beside_what_was_predicted():
    rows = scaling.judged("weak", [row("solo", 1, 8, 10.0), row("ps-n", 4, 32, 40.0, ratio=0.5, stolen=0.25)], 4)
    times, gains = (part.splitlines() for part in scaling.show(rows).split("\n\n"))
    assert len(times) == len(gains) == 4
    assert " ".join(times[3].split()) == "weak ps-n 4 8 40.0 80.0 76.0-84.0 +100.0% no 50% 25% 0% 1"
    assert " ".join(gains[3].split()) == "weak ps-n 4 8 800 400 25.0% 25.0% 1.00 1.00 0.50 0.25 0% 80%"
    assert gains[2].split()[-4:-2] == ["-", "-"]


def test_the_verdict_leaves_out_what_was_disturbed():
    rows = [row("ps-1", 2, 16, 10.0, error=error) for error in (-0.1, 0.2, 0.3)]
    others = [row("ps-1", 2, 16, 10.0, stolen=0.04), row("ps-1", 2, 16, 10.0, others=0.2)]
    assert "5 runs, 2 of them disturbed" in scaling.verdict([*rows, *others])
    assert "errors of the rest: 20.0% in the median, 30.0% at most" in scaling.verdict([*rows, *others])
    assert scaling.verdict(others).endswith("they say nothing of the prediction.")
    assert "stand on it" in scaling.verdict([*rows, row("solo", 1, 8, 10.0, others=0.2)])


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("solo", 1, 8, 10.0), row("allreduce", 4, 32, 40.0), row("ps-1", 4, 32, 80.0, stolen=0.2)]
    both = [*scaling.judged("weak", rows, 4), *scaling.judged("strong", rows, 4)]
    scaling.draw(both, "made up", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


# -- which runs -------------------------------------------------------------------------------------------------------


def test_weak_scaling_keeps_the_batch_and_strong_scaling_the_global_batch():
    runs = scaling.runs_of(["allreduce", "ps-n"], [1, 2, 4], 8, 32)
    of_each = {name: [(run.backend, run.workers, run.batch, run.servers) for run in runs[name]] for name in runs}
    assert of_each["weak"] == [
        ("solo", 1, 8, 0),
        *(("allreduce", 2, 8, 0), ("ps-n", 2, 8, 2)),
        *(("allreduce", 4, 8, 0), ("ps-n", 4, 8, 4)),
    ]
    assert [(name, n, batch) for name, n, batch, _ in of_each["strong"]] == [
        ("solo", 1, 32),
        *(("allreduce", 2, 16), ("ps-n", 2, 16)),
        *(("allreduce", 4, 8), ("ps-n", 4, 8)),
    ]
    assert set(runs["weak"]) & set(runs["strong"]) == {run for run in runs["weak"] if run.workers == 4}


@pytest.mark.parametrize(
    ("counts", "batch", "expected"), [([1, 2, 4, 8], 8, 64), ([1, 2, 4, 8], 1, 8), ([1, 3], 4, 12)]
)
def test_the_global_batch_by_default_gives_equal_shares(counts, batch, expected):
    assert scaling.divisible(counts, batch) == expected
    assert scaling.divisible([1, 2, 3, 8], 4) == 48  # 32 would not do for 3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--case", "vgg"], "it is one of mlp"),
        (["--workers", "0"], "give a whole number, 1 or more"),
        (["--batch", "0"], "give a whole number, 1 or more"),
        (["--rate", "fast"], "give bits a second"),
        (["--global-batch", "12"], "give a multiple of each of 1, 2, 4, 8"),
        (["--global-batch", "0"], "give a whole number, 1 or more"),
    ],
)
def test_flags_that_cannot_be_meant(words, complaint, capsys):
    flags = scaling._flags()
    with pytest.raises(SystemExit):
        scaling.chosen(flags, flags.parse_args(words))
    assert complaint in capsys.readouterr().err


def test_flags_that_are_left_out():
    flags = scaling._flags()
    arguments = flags.parse_args(["--workers", "4", "2", "--backends", "ps-n", "allreduce", "--batch", "16"])
    case = scaling.chosen(flags, arguments)
    assert (case.batch, case.rate, arguments.workers, arguments.global_batch) == (16, "100mbit", [1, 2, 4], 64)
    assert arguments.backends == ["allreduce", "ps-n"]
    assert case.name != predict.CASES[0].name  # its probe is another one


@pytest.mark.parametrize(
    ("stolen", "kept", "tries"),
    [([0.01, 0.0, 0.0], 0.01, 1), ([0.2, 0.02, 0.0], 0.02, 2), ([0.5, 0.04, 0.2, 0.0], 0.04, 3)],
)
def test_a_disturbed_run_is_made_again_and_the_least_disturbed_one_counts(stolen, kept, tries, monkeypatch):
    @contextlib.contextmanager
    def hosts(count: int, *, rate: str) -> Iterator[int]:
        assert (count, rate) == (4, "100mbit")  # two workers, two servers
        yield count

    left = iter(stolen)
    monkeypatch.setattr(scaling, "hosts", hosts)
    monkeypatch.setattr(scaling, "once", lambda *_: {"stolen": next(left)})
    run = scaling.Run("ps-n", 2, 8)
    made = list(scaling.measure(predict.CASES[0], PROFILE, [run, run], 3))
    assert made == [(run, {"stolen": kept, "tries": tries})]


def test_a_run_that_fails_leaves_those_before_it(monkeypatch):
    def once(*_: object) -> dict[str, float]:
        if not left:
            raise emulated.HostsError("worker 1 ended with 3")
        return {"stolen": left.pop()}

    monkeypatch.setattr(scaling, "once", once)
    run, left = scaling.Run("ps-1", 2, 8), [0.2]
    assert scaling.tried(None, predict.CASES[0], PROFILE, run, 3) == {"stolen": 0.2, "tries": 1}
    assert str(scaling.tried(None, predict.CASES[0], PROFILE, run, 3)) == "worker 1 ended with 3"


# -- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick(tmp_path):
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    pytest.importorskip("matplotlib")
    files = ["--json", tmp_path / "record", "--picture", tmp_path / "picture.png"]
    command = [sys.executable, SCRIPTS / "scaling.py", "--quick", *files]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record").read_text(encoding="utf-8"))
    of = {(r["scaling"], r["workers"]): r for r in record["rows"]}
    assert set(of) == {(name, n) for name in ("weak", "strong") for n in (1, 2)}
    for alone in (of["weak", 1], of["strong", 1]):
        assert (alone["backend"], alone["ratio"], alone["efficiency"], alone["bound_ms"]) == ("solo", None, 1.0, 0.0)
    weak, strong = of["weak", 2], of["strong", 2]
    assert weak["measured_ms"] == strong["measured_ms"]  # one run
    assert (weak["backend"], weak["batch"], strong["global_batch"]) == ("allreduce", 8, 16)
    assert weak["measured_ms"] > 0.9 * weak["bound_ms"] > 0
    assert 0 < weak["exposed"] < 1
    assert 0 < weak["ratio"] < 1  # links of 100 Mbit/s, and little to compute
    assert weak["low_ms"] <= weak["predicted_ms"] <= weak["high_ms"]
    assert weak["error"] == pytest.approx(weak["predicted_ms"] / weak["measured_ms"] - 1)
    factor = max(1.0, 2 / record["cores"])
    assert weak["efficiency"] == pytest.approx(of["weak", 1]["measured_ms"] * factor / weak["measured_ms"])
    assert {"stolen", "busy", "others", "link", "tries"} <= set(weak)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
