"""The benchmark scripts run, and say what they are meant to say. Their figures are nothing to test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

import common  # noqa: E402

sys.path.remove(str(SCRIPTS))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def test_sync_measures_every_transport_beside_gloo(tmp_path: Path) -> None:
    done = run(SCRIPTS / "sync.py", "--numel", 256, 3000, "--workers", 2, "--rounds", 3, "--json", tmp_path / "record")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record").read_text(encoding="utf-8"))
    measured = {(row["bytes"], row["contender"]) for row in record["rows"]}
    for nbytes in (1024, 12000):
        assert measured >= {(nbytes, name) for name in ("ps ipc", "ps tcp", "allreduce", "gloo")}
        assert ((nbytes, "ps shm") in measured) != ("ps shm" in record["absent"])
    for row in record["rows"]:
        assert row["rounds"] == 3
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["contender"] != "gloo" or row["ratio"] == 1
    for name in ("MPI", "DeepSpeed"):  # measured, or said to be absent: never an error
        assert ((1024, name) in measured) != (f"absent: {name}: " in done.stdout)


@pytest.mark.parametrize(
    "script",
    [
        "step.py",
        "sync.py",
        "norm.py",
        "norm_batch.py",
        "memory.py",
        "hosts.py",
        "links.py",
        "links_step.py",
        "noise.py",
    ],
)
def test_help(script: str) -> None:
    done = run(SCRIPTS / script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "--json" in done.stdout


def test_norm_measures_kinds_alone_and_a_synchronised_layer_over_two_workers(tmp_path: Path) -> None:
    few = ("--kind", "ghost 8", "frozen", "renorm", "--rounds", 2)
    done = run(SCRIPTS / "norm.py", "--quick", *few, "--json", tmp_path / "record")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "record").read_text(encoding="utf-8"))["rows"]
    alone = [row for row in rows if "waiting_ms" not in row]
    assert {(row["contender"], row["goal"]) for row in alone} == {("ghost 8", 1.25), ("frozen", 1.0), ("renorm", 2.0)}
    assert len({row["case"] for row in alone}) == 2
    together = [row for row in rows if "waiting_ms" in row]
    assert [row["contender"] for row in together] == ["sync, 2 workers, ps", "sync, 2 workers, allreduce"]
    for row in rows:
        assert row["rounds"] == 2
        assert row["contender_ms"] > 0
    for row in together:
        assert 0 < row["waiting_ms"] < row["contender_ms"]


def test_norm_batch_trains_by_norm_batch_and_where_the_average_lags(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "record", "--picture", tmp_path / "picture.png")
    done = run(SCRIPTS / "norm_batch.py", "--quick", *files)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record").read_text(encoding="utf-8"))
    assert record["recipe"] == "digits"
    by_size = {row["norm_batch"]: row for row in record["rows"] if row["part"] == "norm batch"}
    assert set(by_size) == {2, 32, None}
    assert by_size[32]["running"] < by_size[2]["running"]
    late = [row for row in record["rows"] if row["part"] != "norm batch"]
    assert [row["epoch"] for row in late] == [1, 2]
    assert late[0]["precise"] < late[0]["running"]
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_memory_measures_what_it_predicts() -> None:
    predicted, found = (
        json.loads(run(SCRIPTS / "memory.py", "--child", kind, json.dumps(["digits", {}, samples])).stdout)
        for kind, samples in (("predict", [64]), ("measure", 64))
    )
    for part in ("parameters_bytes", "gradients_bytes", "optimizer_bytes", "buckets_bytes"):
        assert found[part] == predicted[0][part]
    assert found["growth_bytes"] > 0.3 * predicted[0]["activations_bytes"]


@pytest.mark.slow
def test_links_compares_every_wiring_with_its_bound(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "record", "--picture", tmp_path / "picture.png")
    done = run(SCRIPTS / "links.py", "--quick", *files)
    if "cannot emulate hosts" in done.stderr or "emulated hosts need" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = {row["contender"]: row for row in json.loads((tmp_path / "record").read_text(encoding="utf-8"))["rows"]}
    m_over_b_ms = 2e6 / (50e6 / 8) * 1e3
    factors = {"gloo": 1, "allreduce": 1, "ps 1 apart": 2, "ps 2 apart": 1, "ps 2 together": 1}  # 2 (n-1)/n is 1
    assert {name: row["bound_ms"] / m_over_b_ms for name, row in rows.items()} == pytest.approx(factors)
    for row in rows.values():
        assert row["rounds"] == 3
        assert row["of_bound"] == pytest.approx(row["bound_ms"] / row["median_ms"])
        assert 0 < row["of_bound"] < 1.3  # what passes at once after a pause is 30 ms worth of the link
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_step_over_links_comes_to_the_same_weights_by_all_ways(tmp_path: Path) -> None:
    """The script compares them; a step takes as long as its computing, or its sending, at least."""
    files = ("--json", tmp_path / "record", "--picture", tmp_path / "picture.png")
    done = run(SCRIPTS / "links_step.py", "--quick", *files)
    if "cannot emulate hosts" in done.stderr or "emulated hosts need" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "record").read_text(encoding="utf-8"))["rows"]
    ways = ["DDP", "allreduce", "sharded", "sharded early", "ps 2 apart", "server 2 apart", "server 2 apart early"]
    assert [row["contender"] for row in rows] == ways
    for row in rows:
        assert row["median_ms"] >= row["compute_ms"] == pytest.approx(160.0, rel=1e-3)  # 1 MB at 50 Mbit/s
        assert row["of_bound"] == pytest.approx(row["bound_ms"] / row["median_ms"])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 12, 15])
def test_the_interval_of_a_median(count: int) -> None:
    """A number of any distribution lies below its median every second time: all ways in which that can go."""
    low, high = common.median_interval(range(count))
    assert (low, high) == (count - 1 - high, count - 1 - low)
    missed = [sum(below) <= low or sum(below) >= high + 1 for below in product((0, 1), repeat=count)]
    chance = sum(missed) / 2**count
    assert chance <= 0.05 or (low, high) == (0, count - 1)
    narrower = 2 * sum(math.comb(count, k) for k in range(low + 2)) / 2**count
    assert narrower > 0.05 or low + 1 > count // 2
