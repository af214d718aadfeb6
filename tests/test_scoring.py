"""Predictions beside runs: each run by its own setting, and what other programs did meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain import plan, scoring
from dtrain.errors import DataError
from dtrain.measure.predict import predict

from .test_plan import PROFILE


def run_dir(folder: Path, **config: object) -> Path:
    folder.mkdir()
    asked = {"backend": "allreduce", "workers": 2, "global_batch": 64, "micro_batch": None, "norm_batch": "worker"}
    (folder / "config.json").write_text(json.dumps({**asked, **config}), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"step_ms": 125.0, "exposed_comm_ms": 24.0}), encoding="utf-8")
    return folder


def test_a_run_is_scored_by_its_own_setting(tmp_path: Path):
    score = scoring.score_run(PROFILE, run_dir(tmp_path / "a"))
    expected = predict(PROFILE, plan.Wanted().setting("allreduce", 2, 1, 32))
    assert score.predicted == expected
    assert score.error == pytest.approx(expected.boxes.step_ms / 125 - 1)
    assert score.measured_exposed_ms == 24.0
    again = scoring.score_run(PROFILE, run_dir(tmp_path / "b", global_batch=128, micro_batch=16))
    assert (again.predicted.setting.batch, again.predicted.setting.micro_batch) == (64, 16)
    row = score.record()
    assert row["inside"] == (row["predicted"]["step_ms_low"] <= 125 <= row["predicted"]["step_ms_high"])
    assert "+" in scoring.scores([score]) or "-" in scoring.scores([score])


@pytest.mark.parametrize(
    "config", [{"backend": "threads"}, {"staleness": 3}, {"staleness": None}, {"backup_workers": 1}]
)
def test_runs_that_are_not_synchronous_are_refused(tmp_path: Path, config: dict[str, object]):
    with pytest.raises(DataError, match="only synchronous runs"):
        scoring.score_run(PROFILE, run_dir(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"grow_batch": 256}, "its global batch has changed on the way"),
        ({"adapt_batch": 1.0}, "its global batch has changed on the way"),
        ({"send_as": "bf16"}, "travelled as bf16, and --send-as is same"),
    ],
    ids=str,
)
def test_runs_that_the_profile_does_not_tell_of_are_refused(tmp_path: Path, config: dict[str, object], said: str):
    with pytest.raises(DataError, match=said):
        scoring.score_run(PROFILE, run_dir(tmp_path / "a", **config))


def test_a_run_whose_workers_step_in_parts(tmp_path: Path):
    profile = replace(PROFILE, links={**PROFILE.links, "allreduce sharded": PROFILE.links["allreduce"]})
    score = scoring.score_run(profile, run_dir(tmp_path / "a", update="sharded"))
    assert score.predicted.setting.update == "sharded"


def test_a_score_says_whether_the_run_lies_in_the_interval(tmp_path: Path):
    score = scoring.score_run(PROFILE, run_dir(tmp_path / "a"))
    middle = score.predicted.boxes.step_ms
    assert replace(score, measured_ms=middle).inside
    assert not replace(score, measured_ms=middle * 3).inside


def test_what_other_programs_took_is_told_with_the_scores(tmp_path: Path):
    # 10 s on 2 cores: 15 core-seconds used, 9 of them by the run.
    assert scoring._others((100.0, 50.0, 7.0), (110.0, 65.0, 16.0), 2) == pytest.approx(0.3)
    assert scoring._others((100.0, 50.0, 7.0), (110.0, 55.0, 16.0), 2) == 0.0
    score = scoring.score_run(PROFILE, run_dir(tmp_path / "a"))
    assert "does not say how good the model is" in scoring.scores([replace(score, others=0.3)])
    assert "does not say how good the model is" not in scoring.scores([replace(score, others=0.01)])
