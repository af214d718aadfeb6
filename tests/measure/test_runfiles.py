"""Reading run directories: whole ones, torn ones, ones with less in them, and what is none."""

from __future__ import annotations

import json
import math

import pytest

from dtrain.errors import DataError
from dtrain.measure import runfiles
from dtrain.measure.runfiles import number, numbers

from .made_runs import STEPS, change, make_run, write


def test_a_whole_run_is_read(tmp_path):
    run = runfiles.read(make_run(tmp_path / "run", workers=3))
    assert run.missing == {}
    assert run.workers == 3
    assert len(run.steps) == 3 * STEPS
    assert [row["worker"] for row in run.steps[:4]] == [0, 1, 2, 0]
    assert len(run.records) == STEPS // 2
    assert len(run.scores) == 3
    assert run.of("backend") == "ps"


def test_a_torn_last_line_is_left_out_silently(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 61, "worker": 0, "step_')
    run = runfiles.read(folder)
    assert len(run.steps) == 2 * STEPS
    assert run.missing == {}


def test_a_torn_line_in_the_middle_is_told_of(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4][:20] + "\n"
    (folder / "steps.jsonl").write_text("".join(lines))
    run = runfiles.read(folder)
    assert len(run.steps) == 2 * STEPS - 1
    assert "1 of" in run.missing["steps.jsonl"]
    assert "line 5" in run.missing["steps.jsonl"]


def test_a_step_made_again_after_a_resume_counts_once(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "worker": 1, "step_ms": 99.0}) + "\n")
    run = runfiles.read(folder)
    assert len(run.steps) == 2 * STEPS
    assert [row["step_ms"] for row in run.steps if (row["step"], row["worker"]) == (7, 1)] == [99.0]


def test_what_is_missing_is_said_of_an_old_run(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("steps.jsonl", "trace.json"):
        (folder / name).unlink()
    run = runfiles.read(folder)
    assert set(run.missing) == {"steps.jsonl", "trace.json"}
    assert run.steps == []
    assert run.trace == {}


def test_a_file_that_is_no_json_object_is_said_to_be_none(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "trace.json").write_text("[1, 2")
    write(folder, "summary.json", [1, 2])
    run = runfiles.read(folder)
    assert "cannot be read" in run.missing["trace.json"]
    assert "no JSON object" in run.missing["summary.json"]
    assert run.summary == {}


def test_depth_without_end_is_no_crash(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "trace.json").write_text("[" * 100_000)
    assert "cannot be read" in runfiles.read(folder).missing["trace.json"]


def test_rows_that_name_no_step_and_worker_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "steps.jsonl").write_text('{"step": 1}\n{"step": "1", "worker": 0}\n{"step": 1, "worker": -1}\n[]\n')
    assert runfiles.read(folder).steps == []


def test_bytes_that_are_no_text_are_no_crash(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    assert runfiles.read(folder).records == []


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_what_is_no_run_directory_is_refused(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("")
    elif kind == "empty":
        place.mkdir()
    with pytest.raises(DataError, match=str(place)):
        runfiles.read(place)


def test_workers_are_counted_where_no_file_says(tmp_path):
    folder = make_run(tmp_path / "run", workers=3)
    change(folder, "summary.json", workers=None)
    change(folder, "config.json", workers="many")
    assert runfiles.read(folder).workers == 3


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [], {}, 10**400])
def test_what_is_no_finite_number_is_none(value):
    assert number(value) is None


def test_numbers_of_a_record():
    assert numbers({"a": 1, "b": "x", "c": 2.5, "d": None}) == {"a": 1.0, "c": 2.5}
    assert numbers("no record") == {}
