"""`dtrain plan`: which settings are predicted, what is printed and written, and how runs are scored."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain import cli, plan
from dtrain.cli.planning import PlanCommand, probed_sizes
from dtrain.errors import UsageError
from dtrain.measure.hardware import Link, named
from dtrain.measure.profile import Line, Profile
from dtrain.measure.step import Bucket

HERE = Link(name="here", alpha_s=1e-4, bytes_per_s=1e9, shared=True, source="made up")
PROFILE = Profile(
    recipe="made up",
    parameters=2_500_000,
    global_batch=64,
    data=Line(),
    forward=Line(per_sample_s=0.001),
    backward=Line(per_sample_s=0.002),
    optimizer=Line(base_s=0.005),
    scatter=0.05,
    buckets=(Bucket(nbytes=1e7, ready=1.0),),
    packed=(Bucket(nbytes=1e7, ready=1.0),),
    cores=4,
    links={"allreduce": HERE, "ps": HERE, "ps sockets": HERE},
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, re.sub(r"\x1b\[[0-9;]*m", "", err)


# --- which settings


def test_every_setting_is_predicted_once():
    found = plan.predictions(PROFILE, plan.Wanted(workers=(4, 1, 2, 2), servers=(1, 2, 8)))
    asked = [(p.setting.backend, p.setting.workers, p.setting.servers, p.setting.batch) for p in found]
    assert asked == [
        ("solo", 1, 1, 64.0),
        *[("ps", 2, 1, 32.0), ("ps", 2, 2, 32.0), ("allreduce", 2, 1, 32.0)],
        *[("ps", 4, 1, 16.0), ("ps", 4, 2, 16.0), ("allreduce", 4, 1, 16.0)],
    ]


def test_batches_are_of_each_worker():
    found = plan.predictions(PROFILE, plan.Wanted(workers=(1, 2), backends=("allreduce",), batches=(8, 16)))
    assert [p.setting.batch for p in found] == [8, 16, 8, 16]


def test_hosts_bound_the_number_of_servers():
    assert plan.Wanted().most_servers(PROFILE, 16) == 4
    assert plan.Wanted(place="beside").most_servers(PROFILE, 16) == 16
    assert plan.Wanted(place="apart").most_servers(PROFILE, 16) == 64


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"workers": (0, 2)}, "--workers is 0,2"),
        ({"servers": ()}, "--servers is "),
        ({"backends": ("ps", "threads")}, "--backends has threads: only ps and allreduce"),
        ({"batches": (8,), "global_batch": 64}, "give one of them"),
    ],
)
def test_what_cannot_be_planned(wrong: dict[str, object], said: str):
    with pytest.raises(UsageError, match=said):
        plan.Wanted(**wrong)  # type: ignore[arg-type]


def test_the_memory_of_a_worker_bounds_the_advised_batch():
    wanted = plan.Wanted(place="apart", link=named("1gbit"))
    free, bound = (plan.words(PROFILE, wanted, **more) for more in ({}, {"fits": lambda samples: samples <= 4}))
    assert not any("none up to" in line for line in free)
    assert any("none up to" in line for line in bound)


def test_probed_sizes_lie_between_the_ends_and_apart():
    assert probed_sizes([8, 64]) == [8, 23, 64]
    assert probed_sizes([64, 64]) == [16, 32, 64]
    assert probed_sizes([1]) == [1]


# --- the command


def test_the_command_answers_in_a_table_and_in_words(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path):
    file = tmp_path / "plan.json"
    code, out, err = call(capsys, "--profile", saved, "--hardware", "1gbit", "--workers", "1,2,4", "--json", file)
    assert (code, err) == (0, "")
    for words in ("Link 1gbit", "Intervals:", "Backend:", "Servers:", "Batch per worker", "Workers:"):
        assert words in out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert {"about", "interval", "place", "predictions", "profile", "recipe", "scores", "words"} == set(record)
    assert all(line in out for line in record["words"])
    for row in record["predictions"]:
        assert row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"]
        assert row["place"] == "apart"
    rows = [(r["backend"], r["workers"]) for r in record["predictions"]]
    assert rows == [("solo", 1), ("ps", 2), ("ps", 2), ("allreduce", 2), ("ps", 4), ("ps", 4), ("allreduce", 4)]


def test_a_slower_link_is_slower(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path):
    steps = []
    for rate in ("10mbit", "10gbit"):
        call(capsys, "--profile", saved, "--link-rate", rate, "-n", "4", "--json", tmp_path / rate)
        record = json.loads((tmp_path / rate).read_text(encoding="utf-8"))
        steps.append([row["step_ms"] for row in record["predictions"]])
    assert all(slow > fast for slow, fast in zip(*steps, strict=True))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--hardware", "token-ring"], 64, "--hardware token-ring: it is one of 1gbit"),
        (["--link-rate", "fast"], 64, "--link-rate fast"),
        (["--workers", "two"], 64, "--workers two: give numbers with commas"),
        (["--workers", "0"], 64, "--workers is 0"),
        (["--backends", "threads"], 64, "only ps and allreduce"),
        (["--place", "host", "--hardware", "1gbit"], 64, "--place host has no link"),
        (["--verify", "--hardware", "1gbit"], 64, "--verify runs"),
        (["--verify", "--batches", "8"], 64, "--verify runs"),
        (["--send-as", "bf16"], 64, "was probed with --send-as same: probe again"),
        (["--send-as", "bf16", "--update", "server"], 64, "takes gradients as they are"),
        (["--update", "sharded"], 64, "--update sharded is planned over all-reduce: give --backends allreduce"),
        (["--update", "sharded", "--backends", "allreduce"], 64, "no link for allreduce sharded"),
        (["--run", "nowhere"], 65, "--run nowhere: cannot be read"),
        (["--json", "/nowhere/at/all"], 64, "--json /nowhere/at/all"),
    ],
)
def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], saved: Path, arguments: list[str], code: int, said: str
):
    found, _, err = call(capsys, "--profile", saved, *arguments)
    assert (found, said in err) == (code, True), err


def test_a_profile_of_another_recipe_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    replace(PROFILE, recipe="fashion width=8").save(tmp_path / "fashion.json")
    code, _, err = call(capsys, "digits", "--profile", tmp_path / "fashion.json")
    assert code == 64
    assert "is of fashion: `dtrain plan fashion --profile ...`" in err
    assert call(capsys, "fashion", "--profile", tmp_path / "fashion.json")[0] == 0


def test_what_is_said_of_halves_and_of_shards():
    halves = replace(PROFILE, send_as="bf16")
    assert "Gradients travel as bf16." in plan.about(halves, plan.Wanted())
    shards = plan.Wanted(update="sharded", backends=("allreduce",))
    assert any("keeps a part of the optimizer's state" in line for line in plan.about(PROFILE, shards))


def test_a_profile_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    code, _, err = call(capsys, "--profile", "nowhere.json")
    assert code == 65
    assert "--profile nowhere.json: cannot be read" in err


def test_a_profile_that_cannot_be_saved(capsys: pytest.CaptureFixture[str], saved: Path):
    code, _, err = call(capsys, "--profile", saved, "--save-profile", "/nowhere/at/all")
    assert code == 64
    assert "--save-profile /nowhere/at/all" in err


def test_the_flags_of_a_verifying_run_are_those_of_the_plan():
    command = PlanCommand(recipe="digits", seed=7, options=("width=4",), steps=5, norm_batch="global")
    words = command._command("ps", 3, Path("there"))
    at = {flag: words[words.index(flag) + 1] for flag in ("--backend", "--workers", "--seed", "--option", "--steps")}
    assert at == {"--backend": "ps", "--workers": "3", "--seed": "7", "--option": "width=4", "--steps": "5"}
    assert "--no-progress" in words
    assert words[words.index("--norm-batch") + 1] == "global"
    assert "--update" not in command._command("allreduce", 2, Path("there"))
    halves = PlanCommand(recipe="digits", send_as="bf16")._command("allreduce", 2, Path("there"))
    assert halves[halves.index("--send-as") + 1] == "bf16"
    shards = PlanCommand(recipe="digits", update="sharded")._command("allreduce", 2, Path("there"))
    assert shards[shards.index("--update") + 1] == "sharded"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_answer_on_a_fresh_clone(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """A probe, and runs that score it: all of it works; its figures are nothing to test."""
    file = tmp_path / "plan.json"
    code, out, err = call(capsys, "digits", "-n", "1,2", "--steps", "12", "--verify", "--json", file)
    assert code == 0, err
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [row["run"] for row in record["scores"]] == ["solo x1", "ps x2", "allreduce x2"]
    assert all(row["measured_step_ms"] > 0 and row["predicted"]["step_ms"] > 0 for row in record["scores"])
    assert "allreduce x2" in out
