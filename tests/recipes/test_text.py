"""The text recipe: how a text becomes tokens, samples and a baseline."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.errors import DataError
from dtrain.recipes import build
from dtrain.recipes.data import BatchedData
from dtrain.recipes.text import encode


def written(path: Path, content: bytes) -> str:
    (path / "text").write_bytes(content)
    return str(path / "text")


def test_tokens_are_characters_and_zero_is_the_rest() -> None:
    corpus = encode("abcabcabcaxxxxxxxx" + "b?", limit=256)
    assert corpus.vocabulary == 5  # a, b, c, x and the rest
    assert corpus.train.tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 4, 4, 4, 4, 4, 4, 4, 4]
    assert corpus.test.tolist() == [2, 0]


def test_the_rarest_characters_share_a_token() -> None:
    corpus = encode("aaaabbbccd" * 10, limit=3)
    assert corpus.vocabulary == 3
    assert corpus.train[:10].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]


def test_characters_beyond_16_bits_count_once() -> None:
    assert len(encode("é😀" * 10, limit=9).train) == 18


def test_samples_cover_each_part_once_without_overlap(tmp_path: Path) -> None:
    alphabet = "".join(chr(ord("a") + i % 26) for i in range(1000))
    recipe = build("text", data=written(tmp_path, alphabet.encode()), length=7, hidden=4)
    assert isinstance(recipe.train, BatchedData)
    assert isinstance(recipe.test, BatchedData)
    assert (len(recipe.train), len(recipe.test)) == (899 // 7, 99 // 7)
    inputs, targets = recipe.train.batch(torch.arange(len(recipe.train)))
    expected = [1 + i % 26 for i in range(899)]
    assert inputs.flatten().tolist() == expected[: inputs.numel()]
    assert targets.flatten().tolist() == expected[1 : inputs.numel() + 1]
    inputs, _ = recipe.test.batch(torch.arange(1))
    assert inputs.tolist() == [[1 + i % 26 for i in range(900, 907)]]


def test_the_baseline_is_that_of_the_text(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(ord("a"), ord("i"), 30_000).astype(np.uint8).tobytes()
    assert build("text", data=written(tmp_path, noise), hidden=4).notes["trigram_perplexity"] == pytest.approx(
        8, rel=0.03
    )


def test_perplexity_is_of_the_mean_loss() -> None:
    finish = build("text", hidden=4).finish
    assert finish({"loss": 2.0, "accuracy": 0.5}) == {
        "loss": 2.0,
        "accuracy": 0.5,
        "perplexity": pytest.approx(np.exp(2.0)),
    }
    assert finish({"loss": 1e4})["perplexity"] == float("inf")


def test_the_default_text_is_sizeable_english() -> None:
    recipe = build("text", hidden=4)
    assert isinstance(recipe.train, BatchedData)
    assert len(recipe.train) > 4000
    assert 4 < recipe.notes["trigram_perplexity"] < 7


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    content = "abc" * 300
    plain = build("text", data=written(tmp_path, content.encode()), hidden=4)
    marked = build("text", data=written(tmp_path, content.encode("utf-8-sig")), hidden=4)
    assert torch.equal(plain.train[0][0], marked.train[0][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 characters are too few"),
        (b"x" * 649, "649 characters are too few .* pieces of 64: give at least 650"),
        (b"x" * 700 + b"\xff" + b"x" * 700, "byte 700 is not UTF-8"),
    ],
)
def test_a_bad_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        build("text", data=path)


def test_the_shortest_text_that_will_do(tmp_path: Path) -> None:
    recipe = build("text", data=written(tmp_path, b"x" * 650), hidden=4)
    assert len(recipe.test) == 1  # type: ignore[arg-type]


def test_a_text_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Is a directory"):
        build("text", data=str(tmp_path))
    with pytest.raises(DataError, match="No such file"):
        build("text", data=str(tmp_path / "missing"))


def test_a_python_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="--data"):
        build("text")
