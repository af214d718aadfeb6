"""What holds for every recipe: determinism, types, empty batches, options."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dtrain.errors import DataError, UsageError
from dtrain.recipes import Recipe, build, names
from dtrain.recipes.data import BatchedData
from dtrain.recipes.tasks import warmup_cosine

from .idx_files import write_fashion

SMALL: dict[str, tuple[str, dict[str, object]]] = {
    "digits": ("digits", {"width": 4}),
    "fashion": ("fashion", {"width": 2}),
    "lstm": ("text", {"hidden": 8}),
    "transformer": ("text", {"model": "transformer", "hidden": 8, "heads": 2, "layers": 1}),
    "synthetic mlp": ("synthetic", {"hidden": 16, "classes": 7}),
    "synthetic resnet": ("synthetic", {"model": "resnet", "image": 32, "classes": 7}),
    "synthetic lstm": ("synthetic", {"model": "lstm", "hidden": 8, "classes": 7}),
    "synthetic transformer": ("synthetic", {"model": "transformer", "hidden": 8, "heads": 2, "classes": 7}),
}


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> "Maker":
    name, options = SMALL[request.param]
    path = None
    if name == "fashion":
        write_fashion(tmp_path)
        path = str(tmp_path)
    elif name == "text":
        (tmp_path / "text").write_text("the cat sat on the mat, and then it ate. " * 60)
        path = str(tmp_path / "text")
    return Maker(name, path, options)


class Maker:
    def __init__(self, name: str, path: str | None, options: dict[str, object]) -> None:
        self.name, self.path, self.options = name, path, options

    def __call__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Recipe:
        return build(self.name, seed=seed, dtype=dtype, data=self.path, **self.options)


def first(recipe: Recipe, count: int) -> tuple[Tensor, ...]:
    assert isinstance(recipe.train, BatchedData)
    return recipe.train.batch(torch.arange(count))


def same(a: Recipe, b: Recipe) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True)) and all(
        torch.equal(x, y) for x, y in zip(first(a, 8), first(b, 8), strict=True)
    )


def test_a_seed_decides_everything_and_leaves_the_global_state(small: Maker) -> None:
    before = torch.get_rng_state()
    one, other, different = small(seed=3), small(seed=3), small(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, other)
    assert not same(one, different)
    torch.rand(5)
    assert same(one, small(seed=3))


def test_threads_may_build_at_once(small: Maker) -> None:
    built: list[Recipe] = []
    threads = [threading.Thread(target=lambda: built.append(small(seed=3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 3
    assert same(built[0], built[1])
    assert same(built[0], built[2])


def test_dtype_is_that_of_parameters_and_floats(small: Maker) -> None:
    single, double = small(), small(dtype=torch.float64)
    for a, b in zip(single.model.parameters(), double.model.parameters(), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b)
    for tensor in first(double, 4):
        assert tensor.dtype in (torch.float64, torch.int64)
    loss = double.loss(double.model, first(double, 4))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(single.loss(single.model, first(single, 4)).double(), loss, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_goes_forward_and_backward(small: Maker) -> None:
    recipe = small()
    recipe.model.train()
    recipe.loss(recipe.model, first(recipe, 0)).backward()
    for name, parameter in recipe.model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, buffer in recipe.model.named_buffers():
        assert buffer.isfinite().all(), name


def test_losses_are_means_and_scores_are_sums(small: Maker) -> None:
    recipe = small(dtype=torch.float64)
    recipe.model.eval()
    batch = first(recipe, 6)
    apart = [tuple(tensor[i : i + 1] for tensor in batch) for i in range(6)]
    scores = recipe.score(recipe.model, batch)
    losses = [recipe.loss(recipe.model, sample) for sample in apart]
    torch.testing.assert_close(recipe.loss(recipe.model, batch), torch.stack(losses).mean())
    torch.testing.assert_close(scores["loss"], torch.stack(losses).sum())
    for key, total in scores.items():
        torch.testing.assert_close(
            total, sum(recipe.score(recipe.model, sample)[key] for sample in apart), rtol=1e-6, atol=1e-9
        )
    means = {key: total.item() / 6 for key, total in scores.items()}
    assert recipe.headline in recipe.finish(means)


def test_a_few_steps_lower_the_loss(small: Maker) -> None:
    recipe = small()
    batch = first(recipe, 32)
    optimizer = recipe.optimizer(recipe.model.parameters())
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = recipe.loss(recipe.model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_digits_reach_the_accuracy_they_are_there_for() -> None:
    recipe = build("digits")
    assert isinstance(recipe.train, BatchedData)
    assert isinstance(recipe.test, BatchedData)
    assert (len(recipe.train), len(recipe.test)) == (1437, 360)
    assert recipe.schedule is not None
    draw = torch.Generator().manual_seed(0)
    batches = [
        indices
        for _ in range(recipe.epochs)
        for indices in torch.randperm(1437, generator=draw).split(recipe.global_batch)
    ]
    optimizer = recipe.optimizer(recipe.model.parameters())
    schedule = recipe.schedule(optimizer, len(batches))
    for indices in batches:
        optimizer.zero_grad()
        recipe.loss(recipe.model, recipe.train.batch(indices)).backward()
        optimizer.step()
        schedule.step()
    recipe.model.eval()
    right = recipe.score(recipe.model, recipe.test.batch(torch.arange(360)))["accuracy"]
    assert right / 360 >= 0.97


def test_the_split_of_digits_is_the_same_for_every_seed() -> None:
    one, other = build("digits", seed=0), build("digits", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first(one, 9), first(other, 9), strict=True))


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        build("digits")


def test_synthetic_samples_take_memory_once() -> None:
    recipe = build("synthetic", samples=10**9, hidden=8, layers=1, classes=3)
    assert isinstance(recipe.train, BatchedData)
    floats, labels = recipe.train.batch(torch.tensor([0, 10**9 - 1]))
    assert floats.shape == (2, 8)
    assert labels.max() < 3


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [("mlp", 18e6, 20e6), ("resnet", 11.6e6, 11.7e6), ("lstm", 18e6, 20e6), ("transformer", 19e6, 21e6)],
)
def test_synthetic_models_have_their_size(model: str, low: float, high: float) -> None:
    recipe = build("synthetic", model=model)
    assert low < sum(parameter.numel() for parameter in recipe.model.parameters()) < high


def test_names_are_all_in_the_error() -> None:
    assert names() == ("digits", "fashion", "text", "synthetic")
    with pytest.raises(UsageError, match="'digit' is unknown: choose one of digits, fashion, text, synthetic"):
        build("digit")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"hidden": 3}, "'digits' has no option 'hidden'; it has: width"),
        ("digits", {"width": 0}, "width=0: must be a whole number of at least 1"),
        ("digits", {"width": "wide"}, "width='wide': must be a whole number"),
        ("digits", {"width": 1.5}, "width=1.5: must be a whole number"),
        ("digits", {"width": True}, "width=True: must be a whole number"),
        ("digits", {"data": "/x"}, "data='/x': it reads no files; only fashion and text do"),
        ("digits", {"seed": -1}, "seed=-1: must be in 0"),
        ("digits", {"dtype": torch.int32}, "dtype=torch.int32: must be a floating-point type"),
        ("synthetic", {"model": "cnn"}, "model 'cnn' is unknown: choose one of mlp, resnet"),
        (
            "synthetic",
            {"depth": 18},
            "with model mlp has no option 'depth'; it has: .*samples.*hidden, layers",
        ),
        ("synthetic", {"model": "resnet", "depth": 20}, "depth=20: must be one of 18, 50"),
        ("synthetic", {"model": "resnet", "image": 16}, "image=16: must be at least 32"),
        ("synthetic", {"model": "transformer", "heads": 7}, "hidden=512: must be a multiple of heads=7"),
        ("text", {"model": "gru"}, "model 'gru' is unknown: choose one of lstm, transformer"),
        ("text", {"heads": 2}, "with model lstm has no option 'heads'; it has: .*length.*hidden, layers"),
        ("text", {"vocabulary": 1}, "vocabulary=1: must be at least 2"),
    ],
)
def test_options_that_cannot_be_meant(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **options)  # type: ignore[arg-type]


def test_numbers_may_come_as_text() -> None:
    assert same(build("digits", width="4"), build("digits", width=4))


@pytest.mark.parametrize("field", ["global_batch", "epochs"])
def test_a_recipe_is_checked_when_made(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field}=0: must be at least 1"):
        replace(build("digits"), **{field: 0})  # type: ignore[arg-type]


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 99)
    rates = []
    for _ in range(99):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] > 0
    assert schedule.get_last_lr()[0] == pytest.approx(0)
