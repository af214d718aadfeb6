"""Claims of the literature: their arithmetic, what each compares, and that README.md says what the records say."""

from __future__ import annotations

import collections
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dtrain import recipes
from dtrain.errors import DataError

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "claims"
BEFORE = list(sys.path)

sys.path.insert(0, str(SCRIPTS))
claim: ModuleType = importlib.import_module("claim")
draw: ModuleType = importlib.import_module("draw")
run: ModuleType = importlib.import_module("run")
tasks: ModuleType = importlib.import_module("tasks")
CLAIMS: dict[str, ModuleType] = {name: importlib.import_module(name) for name in run.scripts()}
sys.path[:] = BEFORE

RECORDS = run.records(run.RESULTS)

EXAMPLE = """
import sys
sys.path.insert(0, {scripts!r})
import tasks
import torch
from claim import Check, Claim, Place, Verdict, gap, interval, main, values
from draw import dots, slide
from dtrain import recipes

def cases(quick):
    return [{{"case": "many", "steps": 12}}, {{"case": "few", "steps": 2}}]

def measure(case, seed, place):
    return place.run(trained, case, seed)

def trained(comm, case, seed):
    recipe = recipes.build("digits", seed=seed, width=2)
    losses = tasks.Losses()
    tasks.train(comm, recipe.model, recipe.train, optimizer=lambda model: tasks.sgd(model, 0.05), global_batch=32,
                seed=seed, steps=case["steps"], log_every=1, hooks=[losses])
    return [{{"workers": comm.world_size, "threads": torch.get_num_threads(), "last": losses.losses[-1],
              "no number": float("nan")}}]

def judge(rows):
    less = gap(rows, "last", {{"case": "many"}}, {{"case": "few"}})
    return Verdict(f"{{less:.3f}}", [Check("learns", less.mean < 0), Check("is nought", less.mean == 0)])

def picture(rows, ink):
    drawn, (axes,) = slide(ink, "More steps, less loss")
    names = ["many", "few"]
    dots(axes, ink, names, [interval(values(rows, "last", case=n)) for n in names], [ink("run0")] * 2, ".2f")
    return drawn

CLAIM = Claim(number="99", name="example", title="More steps are better", source="nobody", about="A test.",
              cases=cases, measure=measure, judge=judge, picture=picture)
if __name__ == "__main__":
    main(CLAIM)
"""


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_an_interval_is_students():
    found = claim.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of two degrees of freedom at 97.5 %
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert f"{found:.1f}" == "2.0 ± 2.5"
    assert f"{claim.interval([0.5, 0.5]):+.2f}" == "+0.50 ± 0.00"


def test_one_value_has_no_interval_and_infinity_is_no_error():
    assert f"{claim.interval([3.25]):.1f}" == "3.2"
    assert math.isnan(claim.interval([1.0, math.nan]).half)
    assert claim.interval([1.0, math.inf]).mean == math.inf


def test_what_is_above_zero_is_so_as_a_whole():
    assert claim.interval([1.0, 1.1, 1.2]).above_zero
    assert not claim.interval([0.1, 1.0, 2.0]).above_zero  # its mean is
    assert claim.interval([0.1]).above_zero
    assert not claim.interval([-0.1]).above_zero


def test_a_gap_pairs_the_seeds():
    rows = [{"case": "a", "seed": s, "x": 10.0 * s + 1} for s in (1, 2, 3)]
    rows += [{"case": "b", "seed": s, "x": 10.0 * s} for s in (3, 1, 2)]
    found = claim.gap(rows, "x", {"case": "a"}, {"case": "b"})
    assert (found.mean, found.half) == (1.0, 0.0)
    assert claim.values(rows, "x", case="b") == [10.0, 20.0, 30.0]
    assert math.isnan(claim.values([{"seed": 0, "x": None}], "x")[0])


@pytest.mark.parametrize(
    ("met", "word"),
    [([True, True], "holds"), ([True, False], "holds partly"), ([False, False], "does not hold here")],
)
def test_the_verdict_counts_its_checks(met: list[bool], word: str):
    assert claim.Verdict("", [claim.Check("", one) for one in met]).word == word


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A claim that takes a second, as a module."""
    (tmp_path / "example.py").write_text(EXAMPLE.format(scripts=str(SCRIPTS)), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "example", raising=False)
    module = importlib.import_module("example")
    monkeypatch.delitem(sys.modules, "example")
    return module


def test_a_claim_from_its_cases_to_its_record(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record, picture = tmp_path / "record.json", tmp_path / "picture.png"
    flags = ["--seeds", "2", "--jobs", "1", "--backend", "threads", "--workers", "2"]
    claim.main(example.CLAIM, [*flags, "--json", str(record), "--picture", str(picture)])
    said = capsys.readouterr()
    found = json.loads(record.read_text(encoding="utf-8"))
    where = [(row["case"], row["seed"], row["workers"]) for row in found["rows"]]
    assert where == [(case, claim.FIRST_SEED + k, 2) for case in ("many", "few") for k in (0, 1)]
    assert all(row["no number"] is None and row["threads"] == 1 for row in found["rows"])
    assert found["verdict"] == "holds partly"
    assert [check["met"] for check in found["checks"]] == [True, False]
    assert found["measured"] in said.out
    assert {"command", "commit", "versions", "hardware", "seeds", "seconds", "processor_seconds"} <= set(found)
    assert "example 4/4: " in said.err
    assert picture.read_bytes()[:4] == b"\x89PNG"

    changed = {**found, "rows": [{**row, "last": 1.0} for row in found["rows"]]}
    record.write_text(json.dumps(changed), encoding="utf-8")
    claim.main(example.CLAIM, ["--from", str(record), "--json", str(record)])
    again = json.loads(record.read_text(encoding="utf-8"))
    assert [check["met"] for check in again["checks"]] == [False, True]
    assert (again["command"], again["seconds"]) == (found["command"], found["seconds"])


@pytest.mark.slow
def test_a_script_in_processes_of_its_own_measures_the_same(example: ModuleType, tmp_path: Path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(tmp_path / "example.py"), "--seeds", "2", "--jobs", "2", "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    seeds = [claim.FIRST_SEED, claim.FIRST_SEED + 1]
    assert rows == claim.collect(example.CLAIM, example.cases(False), seeds, claim.Place(), 1)[0]


def test_flags_that_cannot_be_meant_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        claim.main(next(iter(CLAIMS.values())).CLAIM, ["--seeds", "0"])
    assert "1 or more" in capsys.readouterr().err


def test_a_record_of_another_claim_is_refused(tmp_path: Path):
    (tmp_path / "record").write_text('{"claim": "0"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="no record of claim"):
        claim.main(next(iter(CLAIMS.values())).CLAIM, ["--from", str(tmp_path / "record")])


# -- the claims that there are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]):
    one = CLAIMS[name].CLAIM
    assert one.name == name
    assert re.fullmatch(r"\d+[a-z]?", one.number)
    for quick in (True, False):
        names = [json.dumps(case, sort_keys=True) for case in one.cases(quick)]
        assert len(set(names)) == len(names) > 0
    with pytest.raises(SystemExit) as end:
        claim.main(one, ["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert one.source in said
    assert "--quick" in said


def test_no_two_claims_have_one_number():
    numbers = collections.Counter(module.CLAIM.number for module in CLAIMS.values())
    assert max(numbers.values()) == 1


# -- the table --------------------------------------------------------------------------------------------------------


def made_up(number: str, name: str, **more: Any) -> dict[str, Any]:
    checks = [{"text": "seen", "met": True}, {"text": "not seen", "met": False}]
    own = {"claim": number, "name": name, "title": f"A {name}", "source": "x", "measured": "1 | 2", "checks": checks}
    return {**own, "verdict": "holds partly", "seeds": [1, 2, 3], "quick": False, "seconds": 125, **more}


def test_the_table_has_a_line_a_record_and_no_cell_too_many():
    lines = run.table([made_up("1", "law"), made_up("2", "rule", verdict="holds")]).splitlines()
    assert len(lines) == 4
    assert lines[2] == "| 1 | A law | x | 1 \\| 2 | **holds partly** (1 of 2) |"
    assert "**holds** (1 of 2)" in lines[3]
    text = run.sections([made_up("1", "law", quick=True)])
    assert "`benchmarks/claims/law.py`, quick, 3 seeds, 2 min: **holds partly**" in text
    assert "- **no**: not seen" in text
    assert "(results/law.png)" in text


def test_claims_are_ordered_by_number(tmp_path: Path):
    for number in ("10", "2", "1c", "1", "1b"):
        (tmp_path / f"x{number}.json").write_text(json.dumps(made_up(number, "x")), encoding="utf-8")
    assert [record["claim"] for record in run.records(tmp_path)] == ["1", "1b", "1c", "2", "10"]


def test_the_readme_says_what_the_records_say():
    text = run.README.read_text(encoding="utf-8")
    assert run.filled(text, RECORDS) == text, "python benchmarks/claims/run.py --table"
    assert run.filled(f"a{run.BEGIN}b{run.END}c", []).startswith("a" + run.BEGIN)


FAKE = """
import json, sys
record = {record!r}
if "--fail" in record:
    sys.exit(3)
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({{**record, "seen": sys.argv[1:]}}, file)
"""


def test_all_claims_are_run_and_the_table_is_made_of_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, record in (("law", made_up("2", "law")), ("rule", made_up("1", "rule")), ("wrong", {"--fail": 1})):
        (tmp_path / f"{name}.py").write_text(FAKE.format(record=record), encoding="utf-8")
    (tmp_path / "claim.py").write_text("raise SystemExit(9)", encoding="utf-8")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{run.BEGIN}\nstale\n{run.END}\nafter\n", encoding="utf-8")
    for constant, value in (("HERE", tmp_path), ("README", readme), ("RESULTS", results)):
        monkeypatch.setattr(run, constant, value)

    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--seeds", "2", "--into", str(tmp_path / "quick")])
    with pytest.raises(SystemExit, match="failed: wrong"):
        run.main()
    assert json.loads((tmp_path / "quick" / "law.json").read_text())["seen"][:3] == ["--quick", "--seeds", "2"]
    assert "stale" in readme.read_text(encoding="utf-8")  # which has full runs only
    assert capsys.readouterr().out.count("**holds partly**") == 2

    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "law", "rule"])
    run.main()
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.index("| 1 | A rule") < text.index("| 2 | A law")
    assert "stale" not in text
    monkeypatch.setattr(sys, "argv", ["run.py", "--table"])
    run.main()
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("record", RECORDS, ids=[record["name"] for record in RECORDS])
def test_a_record_is_what_its_rows_give(record: dict[str, Any]):
    verdict = CLAIMS[record["name"]].CLAIM.judge(record["rows"])
    assert claim.told(verdict) == {key: record[key] for key in ("verdict", "measured", "checks")}
    assert (run.RESULTS / f"{record['name']}.png").read_bytes()[:4] == b"\x89PNG"
    assert not record["quick"]


# -- parts of single claims -------------------------------------------------------------------------------------------


def test_where_fashion_is_absent_digits_stand_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    build = recipes.build

    def absent(name: str, **more: Any) -> Any:
        if name == "fashion":
            raise DataError("no files")
        return build(name, **more)

    monkeypatch.setattr(recipes, "build", absent)
    found = tasks.images.__wrapped__(100, 50)
    assert found.name == "digits"
    assert (len(found.train), len(found.test)) == (100, 50)
    assert "no files" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "own"), [(1, True), (1, False), (2, False), (8, False)])
def test_a_worker_has_few_classes_and_the_global_batch_all(classes: int, own: bool):
    module = CLAIMS["worker_data"]
    labels = torch.arange(200) % 10
    order = module.order(labels, classes=classes, own=own, steps=5, seed=1)
    found = labels[order].view(5, module.WORKERS, module.EACH)
    for step in range(5):
        assert torch.bincount(found[step].flatten(), minlength=10).tolist() == [8] * 10
        for worker in range(module.WORKERS):
            assert len(found[step, worker].unique()) == classes
    same = all(torch.equal(found[0, 3].sort().values, found[step, 3].sort().values) for step in range(5))
    assert same == own
    assert len(order[:160].unique()) == 160  # nothing comes twice before all of a class have come


def test_fits_tell_a_logarithm_from_a_power():
    fits = CLAIMS["train_longer"].fits
    steps = [2.0**k for k in range(4, 11)]
    log, power, _ = fits(steps, [1 + 2 * math.log(t) for t in steps])
    assert log < 1e-9 < power
    log, power, exponent = fits(steps, [3 * t**0.4 for t in steps])
    assert power < 1e-9 < log
    assert exponent == pytest.approx(0.4)


def test_updates_of_the_papers_schedules():
    module = CLAIMS["grow_batch"]
    assert module.paper_updates() == (78125, 29139, 6405, 2302)


def test_titles_of_slides_have_lines_of_one_length():
    text = "As many updates, and the large batch is as good as the small one"
    first, second = draw._balanced(text, 58).splitlines()
    assert abs(len(first) - len(second)) < 12
    assert draw._balanced("short", 58) == "short"
