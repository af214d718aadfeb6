"""The page of benchmark results: from records, with whatever became of each script, and pictures of each kind."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .browser import CHROMIUM, Browser

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
ELSEWHERE = re.compile(r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]+|url\((?!#)[^)]*\)|@import|<script""", re.I)

sys.path.insert(0, str(SCRIPTS))
page: ModuleType = importlib.import_module("page")
pictures: ModuleType = importlib.import_module("pictures")
sys.path.remove(str(SCRIPTS))


def ratio(case: str, baseline: str = "DDP", **more: object) -> dict[str, object]:
    figures = {"ratio_median": 0.918, "ratio_min": 0.8, "ratio_max": 1.25, "contender_ms": 91.8, "baseline_ms": 100.0}
    return {"case": case, "contender": "dtrain ps", "baseline": baseline, **figures, "rounds": 8, **more}


def way(name: str, *seconds: float) -> dict[str, object]:
    counts = {"steps": [[5, 2]], "dropped": [[0, 3]], "staleness": [{"0": 5}, {"0": 1, "2": 1}]}
    return {"way": name, "seconds": list(seconds), "median_s": sorted(seconds)[len(seconds) // 2], **counts}


def summed(contender: str, **more: object) -> dict[str, object]:
    figures = {"median_ms": 4.5, "min_ms": 3.25, "ratio": 1.0, "gb_s": 0.1}
    return {"workers": 2, "bytes": 1024, "contender": contender, **figures, **more}


def published(what: str, figure: float, unit: str) -> dict[str, object]:
    return {
        "what": what,
        "gpus": 8,
        "published": figure,
        "predicted": 1.04 * figure,
        "unit": unit,
        "sources": ["a book"],
    }


FORESEEN = {"measured_ms": 100.0, "predicted_ms": 95.0, "low_ms": 90.0, "high_ms": 101.0}
ROWS = {
    "step": [ratio("mlp, batch 64"), ratio("mlp, batch 64", "DDP, bucket views")],
    "meter": [ratio("mlp, ps", "plain", goal=1.03)],
    "norm": [ratio("(32, 64)", "plain", goal=None), ratio("(8, 64)", "plain", goal=1.25)],
    "stragglers": [way("synchronous", 6.0, 7.5, 6.5), way("asynchronous", 3.2), way("SSP, s = 3", float("nan"))],
    "predict": [
        {"backend": "ps", **FORESEEN},
        {"backend": "allreduce", **{name: 20 * ms for name, ms in FORESEEN.items()}},
    ],
    "published": [
        published("ResNet-50, batch 64, Horovod, V100", 2450.0, "images/s"),
        published("VGG-16, all-reduce, P100", 0.68, "efficiency"),
    ],
    "sync": [summed("ps shm"), summed("gloo"), summed("gloo", workers=4, bytes=10485760)],
    "links": [summed("gloo", rate="200mbit", bound_ms=4.0, of_bound=0.89)],
    "links_step": [summed("DDP", rate="200mbit", bound_ms=4.0, of_bound=0.89, compute_ms=12.0)],
    "memory": [{"case": "digits", "ratio": 1.7, "ratio_handed_back": 1.1}],
    "hosts": [{"case": "ring", "rate": "50mbit", "of_rate": 0.97}],
}

ABOUT = {
    "commit": "0123456789ab",
    "date": "2026-01-02",
    "versions": {"torch": "9.9.9"},
    "hardware": {"processor": "Abacus", "cores": 2, "memory_gib": 24, "gpus": [], "load_average": 1.25},
}


def record(folder: Path, name: str, rows: object, **more: object) -> Path:
    file = folder / f"{name}.json"
    command = f"python benchmarks/{name}.py --quick --json /somewhere/{name}.json"
    file.write_text(json.dumps({"command": command, **ABOUT, "rows": rows, **more}), encoding="utf-8")
    return file


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit status of the command, and the page that it has made."""
    monkeypatch.setattr(sys, "argv", ["page.py", *map(str, arguments), "--into", str(folder)])
    with pytest.raises(SystemExit) as ended:
        page.main()
    return int(ended.value.code or 0), (folder / "index.html").read_text(encoding="utf-8")


def test_a_page_has_figures_commands_and_circumstances_and_nothing_from_elsewhere(tmp_path, monkeypatch):
    files = [
        record(tmp_path, "stragglers", ROWS["stragglers"], workers=4),
        record(
            tmp_path, "step", ROWS["step"], run={"seconds": 41.0, "load_average": 0.5, "busy": 0.75, "stolen": 0.02}
        ),
    ]
    code, html = make(tmp_path, monkeypatch, *files)
    assert code == 0
    assert html.index(">Training step: dtrain ps<") < html.index(">One slow worker<")
    for figure in ("0.918", "0.800", "1.250", "91.8", "100.0", "DDP, bucket views", "6.50", "0.49", "nan"):
        assert f">{figure}</" in html
    for command in ("step", "stragglers"):
        assert f"<code>python benchmarks/{command}.py --quick</code>" in html
    assert "A training step against" in html  # as the script says of itself
    for fact in ("0123456789ab", "2026-01-02", "torch 9.9.9", "Abacus, 2 cores, 24 GiB, no GPU", "workers 4"):
        assert fact in html
    for doing in ("load average 1.25", "load average 0.5, processors 75", "2.0\N{NO-BREAK SPACE}% stolen"):
        assert doing in html
    assert html.count("<svg") == 2
    assert ELSEWHERE.findall(html) == []


def test_pictures_that_scripts_draw_themselves_are_inside_the_page(tmp_path, monkeypatch):
    errors = {"seed": 0, "running": 14.25, "precise": 13.5}
    sizes = [{"part": "norm batch", "norm_batch": size, **errors} for size in (2, 4, None)]
    rows = [*sizes, {"part": "momentum 0.01", "epoch": 1, "batch": 13.0, **errors}]
    file = record(tmp_path, "norm_batch", rows, recipe="digits", samples=100, epochs=1, seeds=1)
    code, html = make(tmp_path, monkeypatch, file)
    assert code == 0
    assert ">14.25 (14.25 to 14.25)</td>" in html
    assert ELSEWHERE.findall(html) == []
    (drawn,) = re.findall(r'src="(data:image/svg[^"]+)"', html)
    file.with_suffix(".png").write_bytes(b"drawn when it was measured")
    _, html = make(tmp_path, monkeypatch, file)
    assert drawn not in html
    assert f'src="data:image/png;base64,{base64.b64encode(b"drawn when it was measured").decode()}"' in html


def test_what_a_script_did_not_measure_is_said(tmp_path, monkeypatch):
    _, html = make(tmp_path, monkeypatch, record(tmp_path, "sync", ROWS["sync"], absent={"MPI": "is not installed"}))
    assert "Absent: MPI: is not installed." in html
    assert ">3.250</td>" in html


def test_rows_that_the_script_does_not_read_are_shown_as_they_are(tmp_path, monkeypatch):
    files = [record(tmp_path, "norm", [{"contender": "ghost 8", "ratio_median": 0.75}])]
    _, html = make(tmp_path, monkeypatch, *files, record(tmp_path, "other", [{"name": "<b>", "some_ms": 3.5}]))
    assert "norm.py does not read its record: KeyError" in html
    assert "the page does not know other.py" in html
    assert ">0.75</td>" in html
    assert ">3.5</td>" in html
    assert "&lt;b&gt;" in html


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it_whole_on_a_phone_and_asks_for_nothing_else(tmp_path, monkeypatch):
    long = "a_name_without_any_place_to_break_it_" * 8
    files = [record(tmp_path, kind, rows, settings=long) for kind, rows in ROWS.items()]
    failed = record(tmp_path, "scaling", [], run={"seconds": 3.0, "failed": long})
    make(tmp_path, monkeypatch, *files, failed)
    with Browser() as browser:
        for width, scheme in ((360, "light"), (1200, "dark")):
            browser.open(tmp_path / "index.html", width=width, scheme=scheme)
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.said == []
            assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
            assert browser.ask("document.querySelectorAll('svg').length") == len(ROWS)


def test_something_else_is_no_record(tmp_path, monkeypatch, capsys):
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["page.py", str(tmp_path / "list.json"), "--into", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        page.main()
    assert "list.json is no record of a benchmark" in capsys.readouterr().err


GOOD = """'''Measures well.'''
import argparse, json
flags = argparse.ArgumentParser()
flags.add_argument("--quick", action="store_true")
flags.add_argument("--json")
told = flags.parse_args()
assert told.quick
open(told.json, "w").write(json.dumps({"command": "good", "rows": [{"found_ms": 12.5}]}))
"""
HALF = """'''Comes half of the way.'''
import json, sys
rows = {"command": "half", "rows": [{"found_ms": 7.25}], "failed": {"8 workers": "no such host"}}
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(rows))
sys.exit("1 run failed")
"""
BAD = """'''Has no luck.'''
import sys
print("halfway")
sys.exit("no luck with <this> machine\\n")
"""


def run_made_up(scripts: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Records of scripts that go well, fail, come half of the way, take too long, leave nothing, are not possible, and
    are not there."""
    scripts.mkdir()
    for name, text in {
        "bad": BAD,
        "good": GOOD,
        "half": HALF,
        "slow": "import subprocess, sys\nsubprocess.run(['sleep', '60'])",
        "silent": "",
        "far": "raise SystemExit(3)",
    }.items():
        (scripts / f"{name}.py").write_text(text, encoding="utf-8")
    (scripts / "emulation.py").write_text("def available(): return 'needs root'", encoding="utf-8")
    monkeypatch.setattr(page, "HOSTS", "emulation")
    names = ["bad", "good", "half", "slow", "silent", "missing", "far"]
    monkeypatch.setattr(page, "SCRIPTS", {name: page.Script(name, hosts=name == "far") for name in names})
    runs = [page.Run(name, name) for name in names]
    found: list[dict[str, object]] = page.run_all(runs, into, limit_s=5.0, scripts=scripts)
    return found


def test_what_fails_is_named_with_its_reason_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    into = tmp_path / "into"
    records = run_made_up(tmp_path / "scripts", into, monkeypatch)
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["bad"].endswith("failed: no luck with <this> machine")
    assert said["good"].endswith("ok")
    assert said["half"].endswith("failed: 1 run failed")
    assert said["slow"].endswith("failed: it still ran after 5 s")
    assert said["silent"].endswith("failed: it left no record that can be read")
    assert "absent: there is no " in said["missing"]
    assert said["far"].endswith("absent: needs root")
    assert (into / "bad.out").read_text(encoding="utf-8") == "halfway\n"
    assert [json.loads((into / f"{name}.json").read_text(encoding="utf-8")) for name in said] == records
    html = page.render([(record, None) for record in records], tmp_path / "scripts")
    assert '<span class="bad">failed</span>: no luck with &lt;this&gt; machine' in html
    assert "7 records: 1 measured, 4 failed, 2 not possible here." in html
    assert "Has no luck." in html
    assert ">12.5<" in html
    assert ">7.25<" in html
    assert "Failed: 8 workers: no such host." in html
    assert records[1]["command"].endswith("good.py --quick")
    assert 0 <= records[1]["run"]["busy"] <= 1
    assert 5 <= records[3]["run"]["seconds"] < 60


@pytest.mark.parametrize(("ends", "code"), [({"seconds": 1.0}, 0), ({"absent": "no root"}, 0), ({"failed": "no"}, 1)])
def test_the_exit_status_tells_whether_a_script_failed(tmp_path, monkeypatch, ends, code):
    monkeypatch.setattr(page, "run_all", lambda runs, *_, **__: [{"command": "x.py", "rows": [], "run": ends}])
    assert make(tmp_path, monkeypatch, "--run", "--only", "sync")[0] == code


@pytest.mark.parametrize("kind", sorted(pictures.KINDS))
def test_a_picture_of_each_kind(kind, tmp_path):
    rows = ROWS[kind]
    for name in ("picture.svg", "picture.png"):
        pictures.save(kind, rows, pictures.target(str(tmp_path / name)))
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    plain = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert "#fe01" not in plain, "a colour that only the page has"
    inside = str(pictures.embed(kind, rows, "b0"))
    assert inside.startswith("<svg")
    assert "#fe01" not in inside
    assert "var(--muted)" in inside
    assert ELSEWHERE.findall(inside) == []


def test_no_picture_is_drawn_unless_asked_for():
    pictures.save("step", [], None)
    with pytest.raises(Exception, match=r"ends with \.png or \.svg"):
        pictures.target("picture.gif")


def test_tables_are_read_as_they_were_printed():
    text = "Of rates\ncase     ms  error %\n-------  --  -------\nmlp 1 M  12  -\nmlp 2 M   7  1.5\n\nnothing\n"
    (found,) = page.parse(text)
    assert found.caption == "Of rates"
    assert found.head == ["case", "ms", "error %"]
    assert found.rows == [["mlp 1 M", "12", "-"], ["mlp 2 M", "7", "1.5"]]
    assert found.figures == [False, True, True]


def test_each_script_is_known_to_the_page_or_is_a_helper():
    def measures(file: Path) -> bool:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)

    modules = {file.stem: measures(file) for file in SCRIPTS.glob("*.py")}
    unknown = {name for name, has_main in modules.items() if has_main} - page.SCRIPTS.keys() - page.HELPERS
    assert unknown == set(), "put it into SCRIPTS of page.py, or into HELPERS"
    assert not page.SCRIPTS.keys() & page.HELPERS
    assert modules.keys() >= page.HELPERS
    assert {run.script for run in page.RUNS} == page.SCRIPTS.keys()
    assert pictures.KINDS.keys() <= page.SCRIPTS.keys()


def test_every_record_in_the_repository_is_read_by_its_script():
    for file in sorted((SCRIPTS / "results").glob("*.json")):
        found = page.read(file)
        tables, notes = page.tables_of(page.script_of(found), found)
        assert tables, file.name
        assert notes == [], file.name
