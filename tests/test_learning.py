"""Flags of large batches: what they make, what they say, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain import recipes
from dtrain.errors import UsageError
from dtrain.largebatch import LAMB, LARS
from dtrain.learning import describe, make_optimizer, make_schedule, rate_factor
from dtrain.runs import train
from dtrain.spec import RunSpec
from dtrain.steering import AdaptBatch, NoiseScale, Steer


def made(**fields: Any) -> tuple[Any, torch.optim.Optimizer, Any, list[Any]]:
    spec = RunSpec(recipe="digits", **fields)
    recipe = spec.build()
    optimizer = make_optimizer(spec, recipe, recipe.model)
    loader = dtrain.Loader(recipe.train, global_batch=spec.global_batch or recipe.global_batch, world_size=2)
    scheduler, hooks = make_schedule(spec, recipe, optimizer, spec.train_config(recipe), loader, 100)
    return describe(spec, recipe, optimizer, loader), optimizer, scheduler, hooks


def test_without_flags_a_run_is_the_recipes() -> None:
    """Its optimizer, its schedule, no hook."""
    text, optimizer, scheduler, hooks = made()
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    assert scheduler is not None
    assert hooks == []
    assert text == "global batch 64 = 2 workers x 32 samples; learning rate 0.1; SGD's noise scale 21.45"


@pytest.mark.parametrize(("rule", "rate"), [("linear", 1.6), ("sqrt", 0.4), ("none", 0.1)])
def test_the_rate_is_scaled_and_all_is_said(rule: str, rate: float) -> None:
    """Effective batch, scale factor and warm-up in one line."""
    text, optimizer, scheduler, (hook,) = made(
        global_batch=1024, lr_scaling=rule, schedule="decay", milestones=(6.0, 9.0), warmup_epochs=2.0, grow_batch=4096
    )
    assert scheduler is None
    assert isinstance(hook, Steer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert "global batch 1024 = 2 workers x 512 samples" in text
    assert f"learning rate {rate:.4g}" in text
    assert ("from batch 64" in text) == (rule != "none")
    assert f"a warm-up of 2 epochs from {0.1 if rule != 'none' else 0:.4g}" in text
    assert "grows to 4096" in text


def test_a_base_batch_of_ones_own() -> None:
    spec = RunSpec(recipe="digits", lr=0.2, global_batch=512, base_batch=128, lr_scaling="linear")
    assert rate_factor(spec, recipes.build("digits")) == 4
    assert made(lr=0.2, global_batch=512, base_batch=128, lr_scaling="linear")[1].param_groups[0]["initial_lr"] == 0.8


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("lars", LARS),
        ("lamb", LAMB),
    ],
)
def test_optimizers(name: str, kind: type) -> None:
    """Two groups where there is weight decay, of which one has none."""
    _, optimizer, _, _ = made(optimizer=name, lr=0.01, weight_decay=0.02)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert all(group["initial_lr"] == 0.01 for group in optimizer.param_groups)
    if name in ("sgd", "lars"):
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert made(optimizer=name, lr=0.01, momentum=0.5)[1].param_groups[0]["momentum"] == 0.5


def test_without_momentum_there_is_none_of_nesterovs() -> None:
    """A server makes the optimizer anew, and torch refuses the one without the other."""
    for momentum in (None, 0.5, 0.0):
        (group,) = made(momentum=momentum)[1].param_groups
        assert group["nesterov"] == (momentum != 0)
        torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=group["momentum"], nesterov=group["nesterov"])


def test_hooks_for_the_noise() -> None:
    assert isinstance(made(noise_scale=True)[3][0], NoiseScale)
    (hook,) = made(schedule="cosine", adapt_batch=512, noise_scale=True)[3]
    assert isinstance(hook, AdaptBatch)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "lars"}, "optimizer is lars: give its learning rate, --lr"),
        ({"optimizer": "adam", "lr": 0.1, "momentum": 0.9}, "momentum is 0.9, which Adam has not"),
        ({"grow_batch": 128}, "grow_batch is 128 with the recipe's schedule"),
        ({"warmup_epochs": 1.0}, "give --schedule"),
        ({"schedule": "decay"}, "needs --milestones"),
        ({"schedule": "cosine", "milestones": (1.0,)}, "no other schedule has them"),
        ({"schedule": "cosine", "grow_batch": 128, "adapt_batch": 128}, "both given"),
        ({"base_batch": 0}, "base_batch is 0"),
        ({"schedule": "cosine", "grow_batch": 32}, "max_batch is 32 and batch 64"),
        ({"schedule": "cosine", "adapt_batch": 32}, "no multiple of"),
        ({"schedule": "cosine", "grow_batch": 128, "steps": 9}, "give --epochs"),
        ({"schedule": "cosine", "decay_by": 0.5}, "decay_by is 0.5 with schedule 'cosine'"),
        ({"schedule": "constant", "grow_batch": 128}, "nothing falls"),
        ({"base_batch": 32}, "base_batch is 32 without lr_scaling"),
        ({"momentum": 1.0}, "momentum is 1.0: 0 or more, and below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: 0 or more"),
    ],
)
def test_what_cannot_be_meant(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"update": "sharded", "noise_scale": True}, "noise_scale with update=sharded"),
        ({"update": "server", "schedule": "cosine", "adapt_batch": 128}, "adapt_batch with update=server"),
        ({"update": "server", "staleness": "2", "schedule": "cosine", "grow_batch": 128}, "do not wait for each other"),
        ({"dtype": "bfloat16", "curvature_samples": 10}, "curvature_samples with dtype bfloat16"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_start(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RunSpec(recipe="digits", **wrong).check_loss("ps")


def test_a_smooth_schedule_changes_the_batch_a_few_times() -> None:
    """To multiples of what the workers compute at once."""
    _, _, _, (hook,) = made(schedule="cosine", grow_batch=512)
    sizes = [hook._course(t / 100).batch for t in range(1200)]
    assert 4 <= len(set(sizes)) <= 8
    assert all(size % 64 == 0 for size in sizes)


def test_a_finished_run_that_is_started_again_keeps_its_summary(tmp_path: Path) -> None:
    """Also where its last checkpoint was made at its last step, before the end of the epoch was seen."""
    fields: dict[str, Any] = {"recipe": "digits", "options": ("width=2",), "epochs": 2, "global_batch": 512}
    spec = RunSpec(**fields, run_dir=str(tmp_path / "run"), checkpoint_every="3", progress=False, auto_resume=True)
    first = dtrain.run(train, spec, workers=2, backend="threads")[0]
    again = dtrain.run(train, spec, workers=2, backend="threads")[0]
    assert again["train_loss"] == first["train_loss"]
    assert again["steps"] == first["steps"] == 6


def test_curvature_at_the_end() -> None:
    """Positive at a minimum's side; the largest eigenvalue is no more than the trace of a convex loss would have it."""
    spec = RunSpec(recipe="digits", options=("width=2",), steps=30, curvature_samples=100, progress=False)
    first, second = dtrain.run(train, spec, workers=2, backend="threads")
    found = first["curvature"]
    assert found == second["curvature"]
    assert found["samples"] == 100
    assert found["eigenvalues"] == sorted(found["eigenvalues"], reverse=True)
    assert found["eigenvalues"][0] > max(found["residuals"]) > 0
    assert found["sharpness"] > 0


def test_a_run_that_grows_is_resumed_by_its_files(tmp_path: Path) -> None:
    """To the same weights; other flags are refused; records tell the batch."""
    fields: dict[str, Any] = {
        **{
            "recipe": "digits",
            "options": ("width=2",),
            "schedule": "decay",
            "milestones": (1.0, 2.0),
            "grow_batch": 128,
        },
        **{"noise_scale": True, "progress": False, "log_every": 5, "epochs": 3},
    }

    def run(folder: str, **more: Any) -> dict[str, Any]:
        spec = RunSpec(**{**fields, "run_dir": str(tmp_path / folder), **more})
        return dtrain.run(train, spec, workers=2, backend="threads")[0]

    whole = run("whole")
    run("parts", epochs=1)
    resumed = run("parts", resume=True)
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["noise_scale"]["steps"] == whole["noise_scale"]["steps"] > 0
    records = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert {r["global_batch"] for r in records if "global_batch" in r} == {64, 128}
    assert all("noise_scale" in r for r in records if "loss" in r and "metrics" not in r)
    with pytest.raises(UsageError, match="grow_batch is 256"):
        run("parts", resume=True, grow_batch=256)
