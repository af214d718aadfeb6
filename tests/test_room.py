"""Whether a recipe fits in a memory: `dtrain plan --memory`."""

from __future__ import annotations

import json

import pytest

from dtrain.errors import UsageError
from dtrain.room import room
from dtrain.spec import RunSpec
from tests.test_plan import PROFILE, call


@pytest.fixture(scope="module")
def digits():
    return room(RunSpec(recipe="digits"), "2GiB", packs=True)


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(digits):
    assert digits.fits(digits.largest)
    assert not digits.fits(digits.largest + 1)
    needed = digits.process_bytes + digits.footprint.at(digits.largest).peak_bytes
    assert 0.999 * 2**31 < needed <= 2**31


def test_the_process_itself_counts_on_the_processor(digits):
    assert 50e6 < digits.process_bytes < 2**31
    assert "is the process itself" in digits.words(8)
    assert digits.words(8).endswith("Those of 8 fit.")
    assert "do not fit: give --micro-batch" in digits.words(digits.largest + 1)


def test_servers_that_step_keep_the_state():
    here = room(RunSpec(recipe="digits"), "2GiB", packs=True).footprint
    there = room(RunSpec(recipe="digits", update="server"), "2GiB", packs=True).footprint
    assert (here.optimizer_bytes, there.optimizer_bytes) == (here.parameters_bytes, 0)


def test_workers_share_the_state_where_each_steps_a_part():
    here, there = (
        room(RunSpec(recipe="digits", update=update), "2GiB", packs=True, workers=4).footprint
        for update in ("worker", "sharded")
    )
    assert there.optimizer_bytes == -(-here.optimizer_bytes // 4)


def test_halves_come_on_top_of_gradients():
    here, there = (
        room(RunSpec(recipe="digits", send_as=kind), "2GiB", packs=True).footprint for kind in ("same", "bf16")
    )
    assert there.gradients_bytes == here.gradients_bytes
    assert there.direct_bytes + there.buckets_bytes > here.direct_bytes + here.buckets_bytes


def test_mixed_precision_saves_less_of_each_sample():
    options = {"recipe": "synthetic", "options": ("hidden=64", "layers=4", "classes=10")}
    full, mixed = (room(RunSpec(**options, amp=amp), "2GiB", packs=True) for amp in ("off", "bf16"))
    assert mixed.footprint.activations.each < 0.7 * full.footprint.activations.each
    assert mixed.footprint.parameters_bytes == full.footprint.parameters_bytes


def test_a_memory_that_is_too_small_or_cannot_be_meant():
    with pytest.raises(UsageError, match=r"memory is 1\.00 MiB, and a micro-batch of one sample needs"):
        room(RunSpec(recipe="digits"), "1MiB", packs=True)
    with pytest.raises(UsageError, match="memory is 'much': give a size such as 24GiB"):
        room(RunSpec(recipe="digits"), "much", packs=True)


def test_the_command_says_it_in_words_and_in_figures(capsys, tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    files = ("--profile", tmp_path / "profile.json", "--json", tmp_path / "plan.json")
    code, out, _ = call(capsys, "digits", *files, "--memory", "2GiB", "-n", "1,2")
    assert code == 0
    assert "Memory: of 2.00 GiB for each worker" in out
    assert "most at one moment" in out
    record = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert record["memory"]["memory_bytes"] == 2**31
    assert record["memory"]["micro_batch"] == 64  # one worker's
    assert record["memory"]["largest_micro_batch"] > 64
    assert record["memory"]["parts"]["parameters_bytes"] > 0
    assert any(line.startswith("Memory: ") for line in record["words"])


def test_the_command_refuses_what_does_not_fit(capsys, tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    code, out, err = call(capsys, "digits", "--profile", tmp_path / "profile.json", "--memory", "1MiB")
    assert (code, out) == (64, "")
    assert "needs" in " ".join(err.split())
