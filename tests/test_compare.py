"""Do two backends train the same model? The comparison says so in figures that mean what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain import checkpoint, compare, env, tables
from dtrain.compare import max_difference
from dtrain.errors import DataError, UsageError
from dtrain.spec import RunSpec

pytestmark = pytest.mark.timeout(300)  # four backends one after the other take 100 s of processors, which others share

ALL = "solo,threads,ps,allreduce"
PAIRS = {"solo,threads", "solo,ps", "solo,allreduce", "threads,ps", "threads,allreduce", "ps,allreduce"}
PROMISED = {"step_ms", "compute_ms", "exposed_comm_ms", "bytes_sent_per_step", "loss", "accuracy"}

DTRAIN = [sys.executable, "-m", "dtrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dtrain"]


def compared(folder: Path, *arguments: str, by: list[str] = DTRAIN) -> tuple[dict[str, Any], str]:
    """What `dtrain compare digits` wrote, and what it printed."""
    file = folder / "compared.json"
    command = [*by, "compare", "digits", *arguments, "--json", str(file), "--run-dir", str(folder / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text(), parse_constant=pytest.fail), done.stdout


# -- the acceptance run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Four backends with four workers: ragged batches, accumulation, clipping, batch norm over all workers."""
    folder = tmp_path_factory.mktemp("four")
    how = "--workers 4 --dtype float64 --steps 30 --global-batch 50 --micro-batch 4 --clip-grad-norm 1.0"
    return folder, *compared(folder, "--backends", ALL, *how.split())


def test_four_backends_train_one_model(four: tuple[Path, dict[str, Any], str]) -> None:
    """To rounding in float64; the parameter server and threads to the bit."""
    result = four[1]
    assert result["max_abs_weight_diff"] <= 1e-10
    assert result["pairs"].keys() == PAIRS
    assert result["max_abs_weight_diff"] == max(result["pairs"].values())
    assert result["pairs"]["threads,ps"] == 0.0
    assert "threads,ps" in result["bitwise"]


def test_the_figures_are_those_of_the_help(four: tuple[Path, dict[str, Any], str]) -> None:
    """Every name that `dtrain compare --help` promises, for each backend."""
    _, result, text = four
    done = subprocess.run([*DTRAIN, "compare", "--help"], capture_output=True, text=True, timeout=60, check=True)
    promised = done.stdout
    names = {"recipe", "workers", "dtype", "steps", "max_abs_weight_diff", "pairs", "bitwise", "runs"}
    assert [n for n in names | PROMISED if n not in promised] == []
    assert names <= result.keys()
    assert (result["recipe"], result["workers"], result["dtype"], result["steps"]) == ("digits", 4, "float64", 30)
    assert list(result["runs"]) == ALL.split(",")
    for backend, run in result["runs"].items():
        assert run.keys() >= PROMISED
        assert backend in text
        assert ("ratio" in run) == (backend != "solo")
        assert run["loss"] == pytest.approx(result["runs"]["solo"]["loss"], rel=1e-9)
        assert run["accuracy"] == result["runs"]["solo"]["accuracy"]
    assert "threads and ps" in text
    assert f"{result['max_abs_weight_diff']:.1e}" in text


def test_what_is_sent_is_what_each_method_sends(four: tuple[Path, dict[str, Any], str]) -> None:
    """A ring moves 2(n-1)/n of what a worker of a parameter server sends; one worker sends nothing."""
    sent = {backend: run["bytes_sent_per_step"] for backend, run in four[1]["runs"].items()}
    assert sent["solo"] == 0
    assert sent["allreduce"] == pytest.approx(1.5 * sent["ps"], rel=1e-3)  # whole bytes of each message


def test_the_difference_is_that_of_the_files(four: tuple[Path, dict[str, Any], str]) -> None:
    """Over parameters: running statistics of batch norm are no weights, but they are in the files."""
    folder, result, _ = four
    one, two = (checkpoint.load_tensors(folder / "runs" / b / "model.safetensors") for b in ("solo", "allreduce"))
    names = [n for n in one if "running" not in n and "num_batches" not in n]
    assert len(names) < len(one)
    largest = max((one[n] - two[n]).abs().max().item() for n in names)
    assert result["pairs"]["solo,allreduce"] == largest


def test_float32_is_bitwise_where_the_order_of_adding_is(tmp_path: Path) -> None:
    """Threads and the parameter server both add in worker order."""
    result, _ = compared(tmp_path, "--backends", "threads,ps", "-n", "3", "--steps", "10")
    assert result["dtype"] == "float32"
    assert (result["bitwise"], result["max_abs_weight_diff"]) == (["threads,ps"], 0.0)


def test_a_norm_batch_is_the_same_for_one_worker_and_four(tmp_path: Path) -> None:
    """Ghost groups of 8 in the forward of one worker are pairs of workers with 4 samples each."""
    how = "--dtype float64 --steps 8 --global-batch 32 --micro-batch 4 --norm-batch 8 -n 4"
    result, text = compared(tmp_path, "--backends", ALL, *how.split())
    assert result["norm_batch"] == "8"
    assert result["max_abs_weight_diff"] <= 1e-10
    assert "threads,ps" in result["bitwise"]
    assert "--norm-batch 8" in text


def test_inside_a_job_of_torchruns(tmp_path: Path) -> None:
    """Its processes are the workers, and process 0 makes the other runs."""
    how = "--dtype float64 --steps 8 --global-batch 50 --micro-batch 4 --clip-grad-norm 1.0"
    result, text = compared(tmp_path, "--backends", ALL, *how.split(), by=TORCHRUN)
    assert result["workers"] == 2
    assert result["max_abs_weight_diff"] <= 1e-10
    assert "threads,ps" in result["bitwise"]
    assert result["pairs"].keys() == PAIRS
    assert list(result["runs"]) == ALL.split(",")
    assert text.count("Run directories:") == 1


# -- without processes ------------------------------------------------------------------------------------------------

SPEC = RunSpec(recipe="digits", options=("width=4",), steps=3, dtype="float64", norm_batch="global", progress=False)


def never(backend: str, spec: RunSpec) -> list[str]:
    raise AssertionError("no process should be started")


@pytest.mark.parametrize("backends", [[], ["ps"], ["ps", "ps"], ["ps", "threads", "ps"]])
def test_two_backends_at_least_each_once(backends: list[str], tmp_path: Path) -> None:
    """There is nothing to compare otherwise."""
    with pytest.raises(UsageError, match="give two or more, each once"):
        compare.compare(SPEC, backends, 2, tmp_path, never)


def test_in_a_job_what_one_process_runs_alone_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other processes would wait for it at the next backend's start, and give up."""
    order: list[str] = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert env.in_job()
    monkeypatch.setattr(compare, "_in_job", lambda spec, backend, workers, timeout_s: order.append(backend))
    assert compare.compare(SPEC, ["solo", "ps", "threads", "allreduce"], 2, tmp_path, never) is None
    assert order == ["ps", "allreduce", "solo", "threads"]


def test_one_worker_gets_the_micro_batches_that_others_share(tmp_path: Path) -> None:
    """Batch norm sees micro-batches, so that of one worker is as large as those of all together."""
    ones = {b: compare._one(RunSpec(recipe="digits", micro_batch=4), b, 3, tmp_path) for b in ("solo", "ps")}
    assert (ones["solo"].micro_batch, ones["ps"].micro_batch) == (12, 4)
    assert compare._one(SPEC, "solo", 3, tmp_path).micro_batch is None
    assert ones["ps"].checkpoint_every == "never"


# -- the difference ---------------------------------------------------------------------------------------------------


def test_the_largest_difference_of_any_weight() -> None:
    """Absolute, over all tensors, in float64 whatever their type."""
    a = {"x": torch.zeros(2, 2), "y": torch.tensor(1.0), "none": torch.empty(0, 3)}
    b = {"x": torch.tensor([[0.0, -3.0], [1.0, 0.0]]), "y": torch.tensor(1.5), "none": torch.empty(0, 3)}
    assert max_difference(a, b) == 3.0
    assert max_difference(a, a) == 0.0
    assert max_difference({}, {}) == 0.0
    halves = {"x": torch.tensor([60000.0], dtype=torch.float16)}, {"x": torch.tensor([-60000.0], dtype=torch.float16)}
    assert max_difference(*halves) == 120_000.0  # which float16 cannot hold


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_infinitely_far_apart(bad: float) -> None:
    """Also where both are the same: two runs that diverged have not trained the same model."""
    good, gone = {"x": torch.ones(3), "y": torch.ones(1)}, {"x": torch.tensor([1.0, bad, 1.0]), "y": torch.ones(1)}
    assert max_difference(good, gone) == math.inf
    assert max_difference(gone, good) == math.inf
    assert max_difference(gone, gone) == math.inf


def test_runs_of_different_models_cannot_be_compared() -> None:
    """The names that only one has are named."""
    with pytest.raises(DataError, match=r"different weights: \['y', 'z'\]"):
        max_difference({"x": torch.ones(1), "y": torch.ones(1)}, {"x": torch.ones(1), "z": torch.ones(1)})
    with pytest.raises(DataError, match=r"x is \(1,\) in one run and \(2,\) in the other"):
        max_difference({"x": torch.ones(1)}, {"x": torch.ones(2)})


def test_the_same_bits() -> None:
    """Minus zero is not zero; one NaN is itself."""
    same = compare._same_bits
    assert same({"x": torch.tensor([math.nan, 1.0])}, {"x": torch.tensor([math.nan, 1.0])})
    assert not same({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)})
    assert not same({"x": torch.ones(2)}, {"x": torch.ones(2, dtype=torch.float64)})


# -- the table --------------------------------------------------------------------------------------------------------


def columns(text: str) -> list[list[str]]:
    """Cells of a table, cut where its rule has gaps: none may reach into a gap."""
    lines = text.splitlines()
    rule = next(line for line in lines if line.startswith("-"))
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    ends = [*(s - 2 for s in starts[1:]), len(rule)]
    at = lines.index(rule)
    table = [lines[at - 1], *lines[at + 1 :][: next((i for i, x in enumerate(lines[at + 1 :]) if not x), None)]]
    for line in table:
        assert len(line) <= len(rule)
        assert all(line[e : e + 2].strip() == "" for e in ends[:-1])
    return [[line[s:e].strip() for s, e in zip(starts, ends, strict=True)] for line in table]


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    """The first to the left, the others to the right."""
    text = tables.table(["name", "n"], [["a", "1"], ["long name", "1000000"]])
    assert text.splitlines() == [
        "name             n",
        "---------  -------",
        "a                1",
        "long name  1000000",
    ]
    assert tables.table(["a", "b"], []) == "a  b\n-  -"


def result_of(**runs: dict[str, Any]) -> dict[str, Any]:
    run = {"step_ms": 1.5, "compute_ms": 1.0, "exposed_comm_ms": 0.25, "ratio": 4.0, "bytes_sent_per_step": 2e6}
    run |= {"samples_per_s": 1234.5, "loss": 0.5, "accuracy": 0.9712}
    pairs = {"ps,allreduce": 0.0}
    rest = {"steps": 30, "dtype": "float64", "max_abs_weight_diff": 0.0, "pairs": pairs, "bitwise": ["ps,allreduce"]}
    return rest | {"runs": {name: run | more for name, more in runs.items()}}


def test_a_row_for_each_backend() -> None:
    """Units in the head."""
    head, *rows = columns(tables.comparison(result_of(ps={}, allreduce={"step_ms": 12345.678})))
    assert head[:6] == ["backend", "step ms", "compute ms", "exposed comm ms", "ratio", "MB sent/step"]
    assert rows[0] == ["ps", "1.50", "1.00", "0.25", "4.0", "2.000", "1234", "0.5000", "97.12 %"]
    assert rows[1][:2] == ["allreduce", "12345.68"]


def test_what_is_missing_and_what_is_no_number_show() -> None:
    """A dash for what was not measured; nan for a loss that is none, from memory or from a file."""
    text = tables.comparison(result_of(ps={"loss": math.nan, "accuracy": 0.1}, allreduce={"loss": None}))
    assert [row[7] for row in columns(text)[1:]] == ["nan", "nan"]
    result = result_of(ps={"perplexity": math.inf}, allreduce={})
    for name in ("ratio", "compute_ms", "exposed_comm_ms", "accuracy"):
        del result["runs"]["allreduce"][name]
    head, ps, allreduce = columns(tables.comparison(result))
    assert head[-2:] == ["accuracy", "perplexity"]
    assert ps[-1] == "inf"
    assert [allreduce[i] for i in (2, 3, 4, 8, 9)] == ["-"] * 5


def test_the_verdict_in_words() -> None:
    """Bit for bit, or how far apart, and who is equal."""
    result = result_of(ps={}, allreduce={})
    assert tables.verdict(result).startswith("Same model, bit for bit")
    result |= {"max_abs_weight_diff": 1.5e-15, "pairs": {"ps,allreduce": 1.5e-15, "threads,ps": 0.0}}
    result["bitwise"] = ["threads,ps"]
    said = "two runs, ps and allreduce, after 30 steps in float64: 1.5e-15. Equal bit for bit: threads and ps."
    assert said in tables.verdict(result)
    result |= {"max_abs_weight_diff": math.inf, "pairs": {"ps,allreduce": math.inf}, "bitwise": ["ps,allreduce"]}
    assert "not a number" in tables.verdict(result)
