"""What the pictures and titles of a report are made of."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.measure import runfiles
from dtrain.measure.report import figures, findings, timelines, words
from dtrain.measure.report.prediction import predictions

from .made_runs import SLOWEST, STEPS, TYPICAL, change, make_run


@pytest.fixture
def run(tmp_path):
    return runfiles.read(make_run(tmp_path / "run"))


@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(2, 100).map(lambda n: 2 * n))
def test_a_thinned_curve_keeps_its_peaks_and_its_order(seed, count, most):
    noise = random.Random(seed)
    points = [(float(i), noise.uniform(-1, 1)) for i in range(count)]
    kept = figures.thin(points, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    if points:
        assert max(y for _, y in kept) == max(y for _, y in points)
        assert min(y for _, y in kept) == min(y for _, y in points)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_are_moved_apart_within_their_bounds(places):
    moved = figures.spread(places, 10.0, 0.0, 100.0)
    ordered = sorted(moved)
    assert all(b - a >= 10.0 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= -1e-6
    assert ordered[-1] <= 100.0 + 1e-6
    order = sorted(range(len(places)), key=lambda i: places[i])
    assert [moved[i] for i in order] == ordered  # none has passed another


def test_labels_with_room_stay():
    assert figures.spread([10.0, 50.0], 10.0, 0.0, 100.0) == [10.0, 50.0]


def test_the_parts_of_a_step_are_its_length(run):
    for boxes in figures.per_worker(run):
        assert sum(part.ms for part in figures.parts(boxes)) == pytest.approx(boxes["step_ms"])


def test_exposed_communication_is_one_part_where_it_is_not_split():
    boxes = {"forward_ms": 2.0, "exposed_comm_ms": 3.0, "rest_ms": 1.0}
    assert [(part.box, part.ms) for part in figures.parts(boxes)] == [("forward", 2.0), ("exposed", 3.0), ("rest", 1.0)]
    assert findings.where_time_goes([boxes]) == f"Exposed communication takes {words.percent(0.5)} of worker 0's step"


def test_typical_boxes_come_from_the_steps_where_the_run_has_no_summary(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    workers = figures.per_worker(runfiles.read(folder))
    assert len(workers) == 2
    assert workers[1]["backward_ms"] > workers[0]["backward_ms"]


def test_time_is_that_of_worker_0_at_the_end_of_the_step(run):
    step, end_s = figures.clock(run)[4]
    row = next(row for row in run.steps if (row["step"], row["worker"]) == (5, 0))
    assert (step, end_s) == (5.0, row["start_s"] + row["step_ms"] / 1e3)
    assert figures.over_time(run, [(5.0, 1.25)]) == [(end_s, 1.25)]


def test_without_steps_the_records_tell_the_time(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "steps.jsonl").unlink()
    assert figures.clock(runfiles.read(folder)) == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 62, "samples": 3968, "loss": 0.1, "time_s": 5.5}\n')
    assert figures.clock(runfiles.read(folder)) == [(62.0, 5.5)]


def test_the_cause_of_a_slow_step_is_named_not_its_effect(run):
    why = timelines.slower(run, SLOWEST)
    assert why is not None
    assert (why.worker, why.box) == (1, "data")  # worker 0 waits about as long, for that
    assert why.ms == pytest.approx(59.6, abs=0.5)


def test_a_worker_that_begins_late_is_the_cause(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for row in lines:
        if (row["step"], row["worker"]) == (SLOWEST, 0):
            row["start_s"] += 0.2
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    why = timelines.slower(runfiles.read(folder), SLOWEST)
    assert why is not None
    assert (why.worker, why.box) == (0, "start")
    assert findings.slow_step(31, timelines.timeline(runfiles.read(folder), SLOWEST), why).endswith(
        "began 200 ms after the first".replace("200 ", "200\xa0")
    )


def test_waiting_is_not_split_where_workers_do_not_wait_for_each_other():
    boxes = {"forward_ms": 2.0, "exposed_comm_ms": 3.0, "codec_ms": 1.0, "rest_ms": 1.0}
    assert [part.box for part in figures.parts(boxes)] == ["forward", "exposed", "rest"]


def test_a_timeline_has_each_workers_rows_in_order(tmp_path):
    folder = make_run(tmp_path / "run")
    named = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "head"}}
    change(folder, "trace.json", traceEvents=[named, *runfiles.read(folder).trace["traceEvents"]])
    run = runfiles.read(folder)
    tracks = timelines.timeline(run, TYPICAL)
    rows = [(track.owner, track.name, track.row) for track in tracks]
    each = [("compute", 0), ("gradient", 0), ("gradient", 1), ("norm", 0)]
    assert rows == [(owner, *row) for owner in ("worker 0", "head") for row in each]
    assert min(span.start_ms for track in tracks for span in track.spans) == 0.0
    assert [span.nbytes for span in tracks[1].spans] == [50_000, 50_000]


def test_of_too_many_spans_the_longest_stay(run):
    spans = [span for track in timelines.timeline(run, TYPICAL, most=3) for span in track.spans]
    assert len(spans) == 3
    assert {span.name for span in spans} <= {"backward", "blocked", "forward"}


def test_events_that_are_none_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    before = timelines.timeline(runfiles.read(folder), TYPICAL)
    events = runfiles.read(folder).trace["traceEvents"]
    odd = [7, {}, {"ph": "X"}, {"ph": "X", "ts": "a", "dur": 1, "pid": 0, "tid": 0, "args": {"step": TYPICAL}}]
    change(folder, "trace.json", traceEvents=[*odd, *events])
    assert timelines.timeline(runfiles.read(folder), TYPICAL) == before


def test_bytes_by_lane_are_a_mean_step(run):
    assert figures.bytes_by_lane(run)["gradient"] == (150_000.0, 150_000.0)
    assert findings.traffic(figures.bytes_by_lane(run)).startswith(f"{words.percent(150 / 151)} of the 151")


def test_who_is_late(run):
    assert findings.who_is_late(figures.late(run)) == "Worker 1 came last in 57 steps, which cost the others 1.31\xa0s"


def test_staleness_is_summed_over_workers(tmp_path):
    folder = make_run(tmp_path / "run")
    change(folder, "summary.json", staleness=[{"0": 2, "1": 2}, {"4": 1, "x": 3}])
    found = figures.staleness(runfiles.read(folder))
    assert found == [{0: 2, 1: 2}, {4: 1}]
    assert findings.how_stale(found) == "Gradients were 1.20 steps behind on average, 4 at most"


def test_differences_between_configurations():
    one = {"lr": 0.1, "seed": 0, "run_dir": "a", "versions": {"torch": "1"}, "buffers": ["x"]}
    two = {"lr": 0.2, "seed": 0, "run_dir": "b", "versions": {"torch": "2"}, "buffers": [], "more": 1}
    assert figures.differences([one, two]) == {"lr": [0.1, 0.2], "versions.torch": ["1", "2"], "more": ["", 1]}


def test_curves_say_what_became_of_them():
    assert findings.learning("loss", [(0, 2.0), (1, 0.5)]) == "Loss fell from 2.000 to 0.5000"
    assert findings.learning("accuracy", [(0, 0.5), (1, 0.96)]) == "Accuracy rose from 50.00\xa0% to 96.00\xa0%"
    assert findings.learning("loss", [(0, 2.0), (1, 2.01)]) == "Loss stayed at 2.010"
    assert findings.best("loss", [("A", 2.0), ("B", 1.0)], lowest=True) == "Loss: B ends lowest, at 1.000"


def test_the_ratio_and_what_it_depends_on(tmp_path):
    runs = []
    for place, (batch, ratio) in enumerate([(64, 1.5), (256, 6.0)]):
        folder = make_run(tmp_path / str(place), global_batch=batch)
        change(folder, "summary.json", ratio=ratio)
        runs.append(runfiles.read(folder))
    points = figures.ratios(runs)
    assert [(p.global_batch, p.workers, p.ratio) for p in points] == [(64.0, 2, 1.5), (256.0, 2, 6.0)]
    assert findings.what_pays(points, "global_batch") == (
        "The ratio rises from 1.50 to 6.00 as the global batch goes from 64 to 256"
    )


PREDICTED = {"backend": "ps", "workers": 2, "batch": 32.0, "servers": 1, "place": "host", "step_ms": 15.0}


def test_a_plan_is_held_against_the_run_that_it_fits(run):
    record = {**PREDICTED, "step_ms_low": 12.0, "step_ms_high": 19.0, "forward_ms": 3.0}
    plan = {"predictions": [record, {**record, "workers": 4}, {**record, "batch": 64.0}], "scores": [{"p": record}]}
    found = predictions(run, plan)
    assert found is not None
    assert [(one.low_ms, one.step_ms, one.high_ms) for one in found.steps] == [(12.0, 15.0, 19.0)]
    assert found.steps[0].measured_ms == run.summary["step_ms"]
    assert found.title.endswith("inside the interval")
    assert predictions(run, {"predictions": [{**record, "backend": "allreduce"}]}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (99.96, "100.0"),
        (1234.5, "1\u202f234"),
        (12.345, "12.3"),
        (1e-7, "1.00e-07"),
        (-3.14159, "-3.14"),
    ],
)
def test_digits(value, text):
    assert words.digits(value) == text


def test_units():
    assert words.nbytes(1_530_000) == "1.53\xa0MB"
    assert words.nbytes(999) == "999\xa0B"
    assert words.seconds(0.0213) == "21.3\xa0ms"
    assert words.seconds(600) == "10\xa0min"
    assert words.percent(0.034) == "3.4\xa0%"


def test_every_step_is_there(run):
    assert len(figures.step_times(run)) == STEPS
