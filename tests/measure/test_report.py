"""`dtrain report`: what it writes, and what it says where it cannot."""

from __future__ import annotations

import html
import json
import re
import sys

import pytest

from dtrain import cli, measure
from dtrain.measure import runfiles
from dtrain.measure.report import overview, render
from dtrain.measure.runfiles import numbers

from .made_runs import DIAGNOSIS, change, make_run, write

EVIL = "<script>alert(1)</script>\"'&$x_{1}$ {{ 7*7 }} \u202e"


def report(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *map(str, arguments)])
    return int(stop.value.code or 0)


def text_of(page: str) -> str:
    """What a reader sees: without tags, styles and pictures."""
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A run with everything, and its page; tests only look."""
    folder = make_run(tmp_path_factory.mktemp("rich") / "run")
    write(folder, "diagnosis.json", DIAGNOSIS)
    change(
        folder,
        "summary.json",
        memory={"activations_bytes": 30e6, "buckets_bytes": 10e6, "peak_bytes": 33e6},
        staleness=[{"0": 3, "1": 1}],
    )
    assert report(folder) == 0
    return folder, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The page of two runs side by side; tests only look."""
    folder = tmp_path_factory.mktemp("two")
    one, other = make_run(folder / "one"), make_run(folder / "two", seed=1, workers=4, scale=0.6, global_batch=128)
    assert report(one, other, "--output", folder / "all.html") == 0
    return (folder / "all.html").read_text(encoding="utf-8")


def test_a_run_has_a_page_with_every_picture(rich):
    _, page = rich
    assert page.startswith("<!DOCTYPE html>")
    titles = re.findall(r"<h4>(.*?)</h4>", page)
    assert len(titles) == 13  # 4 curves, bars, steps, 2 timelines, lanes, late, staleness, batch norm, memory
    assert page.count("<svg ") == 13 + 2  # timelines for a phone
    assert len(page) < 500_000


def test_every_figure_of_the_summary_is_in_the_text(rich):
    folder, page = rich
    text = text_of(page)
    summary = json.loads((folder / "summary.json").read_text())
    shown = numbers(summary)
    for rank, row in enumerate(summary["per_worker"]):
        shown |= {f"worker {rank} {name}": value for name, value in row.items()}
    assert len(shown) > 40
    assert {name: value for name, value in shown.items() if f" {value:.6g} " not in text} == {}


def test_the_page_asks_for_nothing_from_elsewhere(rich):
    _, page = rich
    assert "<script" not in page
    links = set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s>]+)', page))
    assert {link for link in links if not link.startswith(("#", "data:,"))} == set()
    assert "default-src 'none'" in page


def test_ids_are_used_once(two):
    ids = re.findall(r'\bid="([^"]+)"', two)
    assert len(ids) == len(set(ids))
    assert {"run-A", "run-B"} <= set(ids)


def test_pictures_are_in_the_colours_of_the_page_alone(rich):
    _, page = rich
    pictures = "".join(re.findall(r"<svg\b.*?</svg>", page, flags=re.S))
    assert re.findall(r"(?:fill|stroke): ?#[0-9a-f]+", pictures) == []
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", page))
    light, dark = page.split(":root {")[1:3]
    assert {name for name in used if f"--{name}:" not in light or f"--{name}:" not in dark} == set()


def test_batch_norm_memory_and_staleness_are_shown_where_they_are(rich):
    text = text_of(rich[1])
    assert "features.1.norm: its mean is off." in text
    assert "Most memory is for activations: 30.0 MB; at most 33.0 MB are in use at once" in text
    assert "Gradients were 0.250 steps behind on average, 1 at most" in text


def test_strings_of_users_are_text_not_markup(tmp_path):
    folder = make_run(tmp_path / "<b>bold&", recipe=EVIL, backend=EVIL, options=[EVIL], **{EVIL: EVIL})
    layer = {**DIAGNOSIS["layers"][0], "path": EVIL, "findings": {EVIL: EVIL}}
    write(folder, "diagnosis.json", {**DIAGNOSIS, "layers": [layer]})
    change(folder, "summary.json", memory={EVIL: 5e6, "other": 1e6}, **{EVIL: EVIL, "notes": {EVIL: [EVIL]}})
    other = tmp_path / "other"
    other.mkdir()
    write(other, "config.json", {"recipe": EVIL, "seed": EVIL})
    report(folder, other, "--output", tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "$x_{1}$ {{ 7*7 }}" in page
    assert EVIL in html.unescape(page)


def test_several_runs_give_a_table_and_their_differences(two):
    text = text_of(two)
    assert "2 runs side by side" in text
    assert "What is different setting A B workers 2 4 global_batch 64 128" in text
    assert "B has the shortest step" in text
    assert '<td class="strong">128</td>' in two
    assert "The ratio" in text.partition("Does it pay?")[2][:40]


def test_a_page_goes_where_its_runs_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "config.json", {"recipe": "digits"})
    assert report("one") == 0
    assert report("one", "two") == 0
    assert capsys.readouterr().out == "Report: one/report.html\nReport: report.html\n"
    assert (tmp_path / "one" / "report.html").exists()
    assert (tmp_path / "report.html").exists()


def test_equal_configurations_are_said_to_be_so(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "config.json", {"recipe": "digits", "run_dir": name})
    report(tmp_path / "one", tmp_path / "two", "--output", tmp_path / "all.html")
    assert "The configurations are the same." in (tmp_path / "all.html").read_text(encoding="utf-8")


def test_an_old_run_gives_a_page_that_says_what_is_not_there(run):
    for name in ("steps.jsonl", "trace.json"):
        (run / name).unlink()
    summary = json.loads((run / "summary.json").read_text())
    new = ("late", "efficiency", "wait_ms", "transfer_ms", "codec_ms", "rest_ms", "hidden_comm_ms")
    write(run, "summary.json", {name: value for name, value in summary.items() if name not in new})
    assert report(run) == 0
    text = text_of((run / "report.html").read_text(encoding="utf-8"))
    assert "There is no steps.jsonl" in text
    assert "There is no trace.json" in text
    assert "Curves over time are left out" in text
    assert "Loss fell from" in text


@pytest.mark.parametrize("kept", ["config.json", "summary.json", "metrics.jsonl"])
def test_any_one_file_gives_a_page(run, kept):
    for file in run.iterdir():
        if file.name != kept:
            file.unlink()
    assert report(run) == 0
    assert "What is not here" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["text", 7, None, [[]], {"a": {}}])
def test_fields_of_another_type_are_no_crash(run, value):
    write(run, "diagnosis.json", DIAGNOSIS)
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    odd = [{**row, **dict.fromkeys(list(row)[2:][i % 9 :: 3], value)} for i, row in enumerate(rows)]
    (run / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    files = [{name: json.loads((run / name).read_text()) for name in ("config.json", "summary.json", "trace.json")}]
    files.append({"diagnosis.json": DIAGNOSIS})
    for name, fields in (item for group in files for item in group.items()):
        one = dict.fromkeys(list(fields)[::2], value)
        write(run, name, {**fields, **one})
    assert isinstance(render([runfiles.read(run)]), str)
    for name, fields in (item for group in files for item in group.items()):
        write(run, name, dict.fromkeys(fields, value))
    assert isinstance(render([runfiles.read(run)]), str)


def test_a_diverged_run_is_said_to_have_diverged(run):
    change(run, "summary.json", loss=None)
    for name in ("steps.jsonl", "trace.json", "metrics.jsonl"):
        (run / name).unlink()
    report(run)
    assert "the training diverged" in text_of((run / "report.html").read_text(encoding="utf-8"))


def test_a_plan_is_shown_against_the_run(run, tmp_path):
    plan = {"backend": "ps", "workers": 2, "batch": 32.0, "step_ms": 15.0, "step_ms_low": 12.0, "step_ms_high": 15.5}
    for name in ("steps.jsonl", "trace.json", "metrics.jsonl"):
        (run / name).unlink()
    write(tmp_path, "plan.json", {"predictions": [plan], "about": ["Other programs were at work.", 7]})
    assert report(run, "--plan", tmp_path / "plan.json") == 0
    text = text_of((run / "report.html").read_text(encoding="utf-8"))
    assert "Predicted 15.0 ms (12.0 to 15.5); measured" in text
    assert "Other programs were at work." in text
    write(tmp_path, "plan.json", {"predictions": []})
    assert report(run, "--plan", tmp_path / "plan.json") == 0
    assert "The prediction is left out" in text_of((run / "report.html").read_text(encoding="utf-8"))


def test_the_same_run_gives_the_same_page(rich):
    folder, page = rich
    assert render([runfiles.read(folder)]) == page


def test_a_long_run_gives_a_small_page(run):
    row = json.loads((run / "steps.jsonl").read_text().splitlines()[0])
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    many = range(1, 8_001)
    (run / "steps.jsonl").write_text("".join(json.dumps({**row, "step": i, "start_s": i / 50}) + "\n" for i in many))
    lines = (json.dumps({**record, "step": i, "samples": 64 * i, "loss": (i * 7919 % 1000) / 1e3}) + "\n" for i in many)
    (run / "metrics.jsonl").write_text("".join(lines))
    report(run)
    assert (run / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 64, "no run is given"),
        (["nowhere"], 65, "nowhere is no directory"),
        (["run", "--output", "no/such/place.html"], 64, "no/such/place.html"),
        (["run", "--output", "."], 64, "--output ."),
        (["run", "--plan", "none.json"], 65, "none.json cannot be read"),
        (["run", "--plan", "run/metrics.jsonl"], 65, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(run.parent)
    assert report(*arguments) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_remedy(run, monkeypatch, capsys, package):
    monkeypatch.delattr(measure, "report", raising=False)
    for name in [name for name in sys.modules if name.startswith("dtrain.measure.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert report(run) == 64
    assert "pip install 'dtrain[report]'" in capsys.readouterr().err


def test_what_reads_alike_is_not_called_better():
    write = "{:.1f}".format
    assert overview._best([1.01, 1.02], 1, write) == set()
    assert overview._best([1.01, None, 2.0, 2.01], 1, write) == {2, 3}
    assert overview._best([1.0, 2.0], -1, write) == {0}
    assert overview._best([1.0, 2.0], 0, write) == set()


def with_noise(run, **fields):
    """Rows of metrics.jsonl with what `NoiseScale`, `AdaptBatch` or `Steer` add to them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for at, row in enumerate(rows):
        row |= {name: value(at) for name, value in fields.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_batch_that_follows_the_noise_is_drawn_with_its_reasons(run):
    with_noise(
        run,
        noise_scale=lambda at: 30.0 * 2**at,
        noise_low=lambda at: 20.0 * 2**at,
        noise_high=lambda at: None if at % 2 else 50.0 * 2**at,
        global_batch=lambda at: 64 if at < 3 else 256,
    )
    change(run, "summary.json", decisions=[{"step": 20, "batch": 256, "reason": "1 x noise scale 240 & more"}, "odd"])
    page = render([runfiles.read(run)])
    assert "Batch and noise" in page
    assert "The global batch went from 64 to 256 samples" in page
    assert "1 x noise scale 240 &amp; more" in page
    assert "{&#34;step&#34;" not in page  # no raw JSON among the figures


def test_a_noise_scale_alone_and_a_batch_that_stays(run):
    assert "Batch and noise" not in render([runfiles.read(run)])
    with_noise(run, global_batch=lambda at: 64)
    assert "Batch and noise" not in render([runfiles.read(run)])
    with_noise(run, noise_scale=lambda at: 0.0 if at == 0 else 120.0, noise_low=lambda at: 0.0)
    assert "The noise scale came to 120 samples" in render([runfiles.read(run)])
