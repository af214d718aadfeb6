"""The examples do what their texts say, with fewer epochs than they have by default."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from dtrain import examples
from dtrain.examples import domains, finetune, fully_sharded, gan, qlearning, shifted

SEEDS = ["0", pytest.param("1", marks=pytest.mark.slow)]


def test_every_example_is_tested() -> None:
    names = {module.name for module in pkgutil.iter_modules(examples.__path__)}
    assert names == {m.__name__.rpartition(".")[2] for m in (domains, finetune, fully_sharded, gan, qlearning, shifted)}


@pytest.mark.parametrize("name", ["domains", "finetune", "gan", "qlearning", "shifted"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` is the text of the example, which names the command and says what to expect."""
    module = importlib.import_module(f"dtrain.examples.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"python -m dtrain.examples.{name}" in text
    assert "Expect:" in text


@pytest.mark.parametrize("seed", SEEDS)
def test_gan(seed: str) -> None:
    """With no_update the discriminator's statistics are those of real data, and without they are not."""
    found = gan.main(["--seed", seed, "--epochs", "3"])
    assert found["distance with"] < 0.1
    assert found["distance with"] < found["distance without"] / 2
    assert found["change with"] < found["change without"] / 3


@pytest.mark.parametrize("seed", SEEDS)
def test_domains(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics for each domain: both are recognised; plain ones, of batches in turn: one is not."""
    found = domains.main(["--seed", seed, "--epochs", "2"])
    worst = {name: min(found[f"{name}, {d}"] for d in domains.DOMAINS) for name in ("plain", "mixed", "per domain")}
    assert worst["per domain"] > 90
    assert worst["mixed"] > 90
    assert worst["plain"] < 75
    assert f"{worst['per domain']:.1f} %" in capsys.readouterr().out


@pytest.mark.parametrize("seed", SEEDS)
def test_finetune(seed: str) -> None:
    """Frozen statistics survive batches of 2; with 8 there is not much between them."""
    found = finetune.main(["--seed", seed])
    assert found["before"] < 60
    assert found["frozen 2"] > 80
    assert found["unfrozen 2"] < found["frozen 2"] - 15
    assert found["unfrozen 8"] > 80


@pytest.mark.parametrize("seed", SEEDS)
def test_shifted(seed: str) -> None:
    """Statistics of the new images bring brightened digits back, and not inverted ones."""
    found = shifted.main(["--seed", seed, "--epochs", "3"])
    assert found["clean"] > 95
    assert found["brightened before"] < 50
    assert found["brightened after"] > 75
    assert found["inverted after"] < 50


@pytest.mark.parametrize("seed", SEEDS)
def test_qlearning(seed: str) -> None:
    """Targets with precise statistics are nearer the exact values."""
    found = qlearning.main(["--seed", seed, "--steps", "450"])
    assert found["early precise"] < 0.9 * found["early running"]
    assert found["end precise"] < 0.5 * found["end running"]


def test_fully_sharded() -> None:
    """Three ways to keep the state train the same model; what each worker keeps is what ZeRO's formulas say."""
    for kept, formula, apart in fully_sharded.main(["--epochs", "1"]).values():
        assert kept == pytest.approx(formula, rel=0.01)
        assert apart < 1e-12


def test_exact_values() -> None:
    """Of value iteration: going right is best, and worth more the nearer the end; Bellman's equation holds."""
    world = qlearning.Corridor(0)
    q = world.exact()
    assert (q[:, 1] > q[:, 0]).all()
    assert (q[1:, 1] > q[:-1, 1]).all()
    last = qlearning.ROOMS - 1
    out, back = 1 + 0.9 * q[0].max(), 0.9 * q[last - 1].max()
    assert q[last, 1] == pytest.approx(float(0.9 * out + 0.1 * back), abs=1e-5)
