"""What a run is told, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain import checkpoint, tables
from dtrain.config import TrainConfig
from dtrain.errors import DataError, UsageError
from dtrain.recipes import build
from dtrain.runs import check, train
from dtrain.spec import RunSpec
from tests.small import differences

SMALL = RunSpec(recipe="digits", options=("width=4",), progress=False, steps=30, log_every=4)

REQUIRED = [
    *("recipe", "backend", "workers", "epochs", "steps", "samples_per_s", "step_ms", "compute_ms"),
    *("exposed_comm_ms", "bytes_sent_per_step", "loss", "accuracy"),
]


def run(spec: RunSpec, workers: int = 2, **more: Any) -> dict[str, Any]:
    """Train on threads; the summary, which all workers have alike."""
    found = dtrain.run(train, spec, workers=workers, backend="threads", timeout_s=60.0, **more)
    assert all(summary.keys() == found[0].keys() for summary in found)
    assert len({json.dumps(summary["loss"]) for summary in found}) == 1
    return found[0]


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# -- what it is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ("width",)}, "--option width: give name=value"),
        ({"options": ("=4",)}, "--option : give name=value"),
        ({"options": ("depth=4",)}, "recipe 'digits' has no option 'depth'; it has: width"),
        ({"options": ("width=0",)}, "width='0': must be a whole number of at least 1"),
        ({"recipe": "faces"}, "recipe 'faces' is unknown: choose one of digits, fashion, text, synthetic"),
        ({"dtype": "int8"}, "dtype is 'int8'; it is one of float32, float64, bfloat16, float16"),
        ({"data": "here"}, "it reads no files"),
        ({"seed": -1}, "seed=-1: must be in 0"),
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"steps": None, "epochs": 0}, "epochs is 0: give 1 or more"),
        ({"steps": 3, "epochs": 3}, "epochs is 3, steps 3: give one of them"),
        ({"global_batch": 0}, "global_batch is 0, micro_batch None: a batch has at least one sample"),
        ({"micro_batch": 0}, "micro_batch 0: a batch has at least one sample"),
        ({"log_every": 0}, "log_every is 0: give 1 or more"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0: give more than 0"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm is nan: give more than 0"),
        ({"bucket_mb": -1.0}, "bucket_mb is -1.0: give more than 0"),
        ({"lr": -0.1}, "lr is -0.1: give 0 or more"),
        ({"lr": math.nan}, "lr is nan: give 0 or more"),
        ({"amp": "fp8"}, "amp is 'fp8': one of off, bf16, fp16"),
        ({"norm_batch": "host"}, "norm_batch is 'host': worker, global, or a number"),
        ({"num_data_workers": -1}, "num_workers is -1"),
        ({"device": "gpu"}, "device is 'gpu': give auto, cpu, cuda or cuda:N"),
        ({"resume": True}, "--resume needs --run-dir"),
        ({"tensorboard": True}, "--tensorboard needs --run-dir"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], said: str) -> None:
    """An error names the field, the value and the remedy, before anything is trained."""
    spec = dataclasses.replace(SMALL, **change)
    with pytest.raises(UsageError) as caught:
        run(spec)
    assert said in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    """The remedy is a look at what is."""
    with pytest.raises(UsageError, match="device is 'cuda', and this torch sees no CUDA device: see `dtrain doctor`"):
        run(dataclasses.replace(SMALL, device="cuda"))


@pytest.mark.parametrize("every", ["0", "-3", "day", ""])
def test_when_to_save_is_an_epoch_or_a_number(every: str, tmp_path: Path) -> None:
    """Or never."""
    with pytest.raises(UsageError, match=f"checkpoint_every is '{every}': `epoch`, `never`, or a number of steps"):
        run(dataclasses.replace(SMALL, checkpoint_every=every, run_dir=str(tmp_path)))


def test_what_is_not_said_is_the_recipes() -> None:
    """Its batch and its epochs, unless there are steps."""
    recipe = build("digits")
    config = RunSpec(recipe="digits").train_config(recipe)
    assert (config.epochs, config.steps) == (recipe.epochs, None)
    config = RunSpec(recipe="digits", steps=3).train_config(recipe)
    assert (config.epochs, config.steps) == (None, 3)


def test_a_configuration_says_how_long() -> None:
    """By epochs or by steps, not by neither."""
    with pytest.raises(UsageError, match="epochs is None, steps None: give one of them"):
        TrainConfig()
    with pytest.raises(UsageError, match="seed is -1"):
        TrainConfig(steps=1, seed=-1)


# -- what it leaves ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run directory, and the summary that was returned."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "one"
    return folder, run(dataclasses.replace(SMALL, run_dir=str(folder), checkpoint_every="10"))


def test_a_run_leaves_its_files(left: tuple[Path, dict[str, Any]]) -> None:
    """And nothing else."""
    names = {"config.json", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoints"}
    names |= {"steps.jsonl", "trace.json"}
    assert {path.name for path in left[0].iterdir()} == names
    assert checkpoint.steps(left[0] / "checkpoints") == [10, 20, 30]


def test_the_summary_has_the_figures(left: tuple[Path, dict[str, Any]]) -> None:
    """The same in the file as returned; numbers where numbers are due."""
    folder, summary = left
    assert strict((folder / "summary.json").read_text()) == summary
    assert [name for name in REQUIRED if name not in summary] == []
    assert (summary["recipe"], summary["backend"], summary["workers"]) == ("digits", "threads", 2)
    assert (summary["steps"], summary["dtype"]) == (30, "float32")
    assert summary["epochs"] == round((22 * 64 + 29 + 7 * 64) / 1437, 3)  # 23 steps make an epoch of 1437
    assert 0 < summary["compute_ms"] < summary["step_ms"]
    assert 0 < summary["accuracy"] <= 1
    assert all(math.isfinite(summary[n]) for n in ("loss", "train_loss", "ratio", "samples_per_s", "seconds"))
    assert [w["bytes_sent_per_step"] for w in summary["per_worker"]] == [summary["bytes_sent_per_step"]] * 2
    assert "device0_extra_memory_bytes" not in summary


def test_the_summary_says_what_memory_is_for(left: tuple[Path, dict[str, Any]]) -> None:
    """Momentum is as large as the parameters, gradients too; the process has had at least all of it."""
    memory = left[1]["memory"]
    parameters = sum(p.numel() * 4 for p in SMALL.build().model.parameters())
    assert (memory["parameters_bytes"], memory["optimizer_bytes"]) == (parameters, parameters)
    assert memory["gradients_bytes"] == parameters
    assert memory["peak_bytes"] > sum(n for name, n in memory.items() if name != "peak_bytes")


def test_who_was_late_is_told_for_each_worker(left: tuple[Path, dict[str, Any]]) -> None:
    """All of what was waited is somebody's fault."""
    late = left[1]["late"]
    assert len(late) == 2
    assert all(worker["cost_s"] >= 0 for worker in late)
    assert sum(worker["steps"] for worker in late) <= left[1]["steps"]
    config = strict((left[0] / "config.json").read_text())
    assert config["servers"] == 0


def test_a_run_can_look_at_its_batch_norm(tmp_path: Path) -> None:
    """diagnosis.json has every layer; without a run directory nothing is looked at."""
    run(dataclasses.replace(SMALL, steps=4, run_dir=str(tmp_path / "run"), diagnose_batches=3))
    diagnosis = strict((tmp_path / "run" / "diagnosis.json").read_text())
    layers = [m for m in SMALL.build().model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(diagnosis["layers"]) == len(layers)
    with pytest.raises(UsageError, match="diagnose_batches is -1"):
        run(dataclasses.replace(SMALL, steps=4, diagnose_batches=-1))


def test_speed_counts_the_samples_that_there_were(tmp_path: Path) -> None:
    """Not a whole global batch for a ragged one; over the time of the steps, without evaluation and saving."""
    summary = run(dataclasses.replace(SMALL, log_every=1, run_dir=str(tmp_path)))
    seconds = sum(line["step_ms"] for line in lines(tmp_path) if "step_ms" in line) / 1e3
    assert summary["samples_per_s"] == pytest.approx((22 * 64 + 29 + 7 * 64) / seconds, rel=1e-9)
    assert seconds <= summary["seconds"]


def test_the_log_is_json_with_growing_steps(left: tuple[Path, dict[str, Any]]) -> None:
    """Records every four steps and at the end, metrics after the epoch and at the end."""
    found = lines(left[0])
    assert [(line["step"], "metrics" in line) for line in found] == [
        *((step, False) for step in (4, 8, 12, 16, 20)),
        *((23, True), (24, False), (28, False), (30, False), (30, True)),
    ]
    assert found[-1]["metrics"]["accuracy"] == left[1]["accuracy"]
    assert found[-2]["loss"] == left[1]["train_loss"]


def test_the_configuration_says_what_was_asked_for(left: tuple[Path, dict[str, Any]]) -> None:
    """With what the recipe filled in, and the versions."""
    config = strict((left[0] / "config.json").read_text())
    assert (config["recipe"], config["options"], config["steps"], config["epochs"]) == ("digits", ["width=4"], 30, None)
    assert (config["global_batch"], config["backend"], config["workers"]) == (64, "threads", 2)
    assert config["device"] in ("cpu", "cuda:0")
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["dtrain"] == dtrain.__version__


def test_the_weights_are_the_models(left: tuple[Path, dict[str, Any]]) -> None:
    """Loadable into the recipe's model, and those of the last checkpoint."""
    weights = checkpoint.load_tensors(left[0] / "model.safetensors")
    build("digits", width=4).model.load_state_dict(weights)
    saved = checkpoint.load(left[0] / "checkpoints").groups["model"]
    config = strict((left[0] / "config.json").read_text())
    names = saved.keys() - set(config["buffers"])
    assert not differences({n: weights[n] for n in names}, {n: saved[n] for n in names})


def test_a_run_without_a_directory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its summary."""
    monkeypatch.chdir(tmp_path)
    assert run(SMALL)["steps"] == 30
    assert list(tmp_path.iterdir()) == []


def test_a_short_run_has_all_figures(tmp_path: Path) -> None:
    """Also with fewer steps than there are between two records."""
    spec = dataclasses.replace(SMALL, steps=2, log_every=100, run_dir=str(tmp_path), checkpoint_every="never")
    summary = run(spec)
    assert [name for name in REQUIRED if name not in summary] == []
    assert math.isfinite(summary["train_loss"])
    assert [line["step"] for line in lines(tmp_path)] == [2, 2]
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_that_is_no_number_keeps_the_files_readable(tmp_path: Path) -> None:
    """null stands for it; the table says nan."""
    spec = dataclasses.replace(SMALL, lr=1e30, steps=8, run_dir=str(tmp_path))
    summary = run(spec)
    assert not math.isfinite(summary["train_loss"])
    written = strict((tmp_path / "summary.json").read_text())
    assert written["train_loss"] is None
    assert lines(tmp_path)[-2]["loss"] is None
    if not math.isfinite(summary["loss"]):
        assert "nan" in tables.run(written)
    assert tables.run(summary)


def test_tensorboard_files(tmp_path: Path) -> None:
    """In the run directory."""
    pytest.importorskip("tensorboard")
    run(dataclasses.replace(SMALL, steps=4, tensorboard=True, run_dir=str(tmp_path)))
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents*"))) == 1


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """And a log in which each step is once; speed and times are those of the steps it made itself."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(dataclasses.replace(SMALL, run_dir=str(whole)))
    spec = dataclasses.replace(SMALL, run_dir=str(parts), checkpoint_every="5")
    _cut_off(spec, parts)
    summary = run(dataclasses.replace(spec, resume=True))
    a, b = (checkpoint.load_tensors(f / "model.safetensors") for f in (whole, parts))
    assert not differences(a, b)
    assert summary["steps"] == 30
    found = lines(parts)
    assert [line["step"] for line in found] == [line["step"] for line in lines(whole)]
    assert [line.get("loss") for line in found[-2:]] == [line.get("loss") for line in lines(whole)[-2:]]


def _cut_off(spec: RunSpec, run_dir: Path) -> None:
    """Train in a process of its own, which ends at once when it has saved step 10."""
    code = (
        "import os, dtrain\n"
        "from dtrain import checkpoint\n"
        "from dtrain.runs import train\nfrom dtrain.spec import RunSpec\n"
        "save = checkpoint.save\n"
        "def then_die(root, step, groups, keep):\n"
        "    save(root, step, groups, keep=keep)\n"
        "    if step == 10: os._exit(9)\n"
        "checkpoint.save = then_die\n"
        f"dtrain.run(train, {spec!r}, workers=2, backend='threads')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 9, done.stderr
    assert checkpoint.steps(run_dir / "checkpoints") == [5, 10]


def test_nothing_to_resume(tmp_path: Path) -> None:
    """No checkpoint, or one at the end already."""
    spec = dataclasses.replace(SMALL, run_dir=str(tmp_path), resume=True, steps=4)
    with pytest.raises(DataError, match="no checkpoint here"):
        run(spec)
    run(dataclasses.replace(spec, resume=False))
    before = {n: (tmp_path / n).read_text() for n in ("summary.json", "config.json", "metrics.jsonl")}
    with pytest.raises(DataError, match="checkpoint is at step 4 already; raise --epochs or --steps"):
        run(spec)
    with pytest.raises(DataError, match="checkpoint is at step 4 already; raise --epochs or --steps"):
        check(spec, 2)
    assert {n: (tmp_path / n).read_text() for n in before} == before


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """What to resume a run of four steps with."""
    spec = dataclasses.replace(SMALL, run_dir=str(tmp_path_factory.mktemp("four") / "run"), steps=4)
    run(spec)
    return dataclasses.replace(spec, resume=True, steps=6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ("width=8",)}, "options is ['width=8'], and the run in {dir} has ['width=4']"),
        ({"dtype": "float64"}, "dtype is 'float64', and the run in {dir} has 'float32'"),
        ({"seed": 1}, "seed is 1, and the run in {dir} has 0"),
        ({"global_batch": 32}, "global_batch is 32, and the run in {dir} has 64"),
        ({"norm_batch": "global"}, "norm_batch is 'global', and the run in {dir} has 'worker'"),
        ({"lr": 0.7}, "lr is 0.7, and the run in {dir} has 0.1"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm is 1.0, and the run in {dir} has None"),
        ({"amp": "bf16"}, "amp is 'bf16', and the run in {dir} has 'off'"),
        ({"recipe": "synthetic", "options": ()}, "recipe is 'synthetic', and the run in {dir} has 'digits'"),
    ],
)
def test_a_resumed_run_is_told_the_same(four_steps: RunSpec, change: dict[str, Any], said: str) -> None:
    """And a refusal leaves what was there; it is the same before processes are started and in a worker."""
    spec = dataclasses.replace(four_steps, **change)
    file = Path(str(spec.run_dir), "config.json")
    before = file.read_text()
    for refuse in (lambda: check(spec, 2), lambda: run(spec)):
        with pytest.raises(UsageError) as caught:
            refuse()
        assert said.format(dir=spec.run_dir) in str(caught.value)
        assert "give the same, or another --run-dir" in str(caught.value)
    assert file.read_text() == before


def test_a_resumed_run_says_so(four_steps: RunSpec, capsys: pytest.CaptureFixture[str]) -> None:
    """On worker 0, and that the schedule was another's; the recipe's own learning rate may be named."""
    spec = dataclasses.replace(four_steps, progress=True, lr=0.1)
    check(spec, 2)
    assert run(spec)["steps"] == 6
    assert capsys.readouterr().err.splitlines() == [
        "dtrain: global batch 64 = 2 workers x 32 samples; learning rate 0.1; SGD's noise scale 21.45",
        f"dtrain: resuming {spec.run_dir} at step 4 of 6",
        "dtrain: this run is now 6 steps; up to step 4 its learning rate was planned for 4 steps",
    ]
    assert strict(Path(str(spec.run_dir), "config.json").read_text())["steps"] == 6


# -- the update on one device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
def test_an_update_on_one_device_trains_the_same_weights(workers: int, tmp_path: Path) -> None:
    """To the bit; and what that device carries more than each other one is what the method says.

    In a step it sends the parameters to n-1 others and receives n-1 gradients; each other one sends a gradient and
    receives the parameters. A gradient has one more number a parameter tensor than the parameters, and one for the
    worker's share of the samples. It alone holds the momentum, as large as the parameters.
    """
    spec = dataclasses.replace(SMALL, steps=8)
    one = run(dataclasses.replace(spec, run_dir=str(tmp_path / "one")), workers, devices=["cpu"] * workers)
    run(dataclasses.replace(spec, run_dir=str(tmp_path / "all")), workers)
    weights = [checkpoint.load_tensors(tmp_path / n / "model.safetensors") for n in ("one", "all")]
    assert not differences(*weights)
    tensors = list(build("digits", width=4).model.parameters())
    parameter_bytes = sum(4 * p.numel() for p in tensors)
    gradient_bytes = parameter_bytes + 4 * (len(tensors) + 1)
    others = workers - 1
    assert one["device0_extra_memory_bytes"] == parameter_bytes
    assert one["device0_extra_bytes_sent_per_step"] == others * parameter_bytes - gradient_bytes
    assert one["device0_extra_bytes_received_per_step"] == others * gradient_bytes - parameter_bytes
    assert one["bytes_sent_per_step"] == others * parameter_bytes
    text = tables.run(one)
    assert "Worker 0's device updates for all" in text
    assert f"\n\n{tables.RATIO}\n{tables.SPEED}\n{tables.THREADS}" in text


# -- how well it learns -----------------------------------------------------------------------------------------------


def test_digits_are_learnt(tmp_path: Path) -> None:
    """`dtrain train digits` on two threads: 97 % of the test images, in seconds."""
    file = tmp_path / "summary.json"
    command = [
        *(sys.executable, "-m", "dtrain", "train", "digits", "-n", "2", "--backend", "threads"),
        *("--run-dir", str(tmp_path / "run"), "--json", str(file)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = strict(file.read_text())
    assert summary["accuracy"] >= 0.97
    assert f"{100 * summary['accuracy']:.2f} %" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert summary["epochs"] == 12


@pytest.mark.parametrize("every", ["never", "epoch", "3"])
def test_when_to_save_is_understood_before_the_run(every: str) -> None:
    """What a run takes, the look at it beforehand takes too."""
    check(dataclasses.replace(SMALL, checkpoint_every=every), 2)


# --- a run that is started again and again by the same command


def again(folder: Path, steps: int) -> tuple[dict[str, Any], str]:
    """The summary, and the file of the weights as it is afterwards."""
    spec = dataclasses.replace(SMALL, run_dir=str(folder), auto_resume=True, steps=steps, checkpoint_every="4")
    (summary,) = dtrain.run(train, spec, workers=1)
    return summary, (folder / "model.safetensors").read_bytes().hex()


def test_auto_resume_begins_goes_on_and_ends(tmp_path: Path) -> None:
    began, short = again(tmp_path, 8)
    assert began["steps"] == 8
    ended, same = again(tmp_path, 8)
    assert (ended["steps"], ended["seconds"], same) == (8, began["seconds"], short)  # it had ended
    longer, weights = again(tmp_path, 12)
    assert longer["steps"] == 12
    assert weights != short


def test_auto_resume_finishes_what_was_killed_after_its_last_commit(tmp_path: Path) -> None:
    """What an earlier, shorter run has left is not taken for its result."""
    again(tmp_path, 8)
    old = {name: (tmp_path / name).read_bytes() for name in ("summary.json", "model.safetensors")}
    _, weights = again(tmp_path, 12)
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    assert again(tmp_path, 12)[1] == weights
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 12
    for name in old:
        (tmp_path / name).unlink()
    summary, finished = again(tmp_path, 12)
    assert finished == weights
    assert summary["backend"] in tables.run(summary)


def test_auto_resume_says_where(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--auto-resume needs --run-dir"):
        dtrain.run(train, dataclasses.replace(SMALL, auto_resume=True), workers=1)
    both = dataclasses.replace(SMALL, auto_resume=True, resume=True, run_dir=str(tmp_path))
    with pytest.raises(UsageError, match="give one of them"):
        dtrain.run(train, both, workers=1)
