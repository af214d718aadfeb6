"""Fashion-MNIST: reading idx files, good and bad, and the recipe made of them."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.errors import DataError
from dtrain.recipes import build
from dtrain.recipes.data import BatchedData
from dtrain.recipes.idx import read_idx

from .idx_files import idx, write, write_fashion

REAL = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_array_comes_back(tmp_path: Path, suffix: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write(tmp_path / f"a{suffix}", idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / f"a{suffix}", 3), array)


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00\x08\x01" + GOOD[4:], "starts with 00000801, an idx file of this kind with 00000803"),
        (b"PNG!", "starts with 504e4721"),
        (GOOD[:10], "ends inside the header"),
        (GOOD[:-1], r"\(2, 3, 4\) needs 24 bytes, the file has only 23"),
        (GOOD + b"x", "needs 24 bytes, the file has more"),
        (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "must have between 1 and 1073741824"),
        (GOOD[:4] + bytes(12), r"claims the shape \(0, 0, 0\)"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"images{suffix}"
    write(path, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{message}"):
        read_idx(path, 3)


PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize("content", [b"not gzip", PACKED[:-12], PACKED[:20] + b"?" * 30], ids=["no", "cut", "damaged"])
def test_damaged_packing_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_idx(path, 3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_normalised_over_the_training_part(tmp_path: Path, suffix: str) -> None:
    write_fashion(tmp_path, suffix=suffix)
    recipe = build("fashion", data=str(tmp_path), dtype=torch.float64, width=2)
    assert isinstance(recipe.train, BatchedData)
    images, labels = recipe.train.batch(torch.arange(64))
    assert images.shape == (64, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(64)]
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert recipe.model(images[:2]).shape == (2, 10)
    assert len(recipe.test) == 20  # type: ignore[arg-type]


def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: not found.*apt-get install dataset-fashion-mnist"):
        build("fashion", data=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((64, 8, 8)), r"images of \(8, 8\) pixels: must be \(28, 28\)"),
        ("t10k-labels-idx1-ubyte", np.zeros(19), "19 labels for the 20 images of t10k-images-idx3-ubyte"),
        ("train-labels-idx1-ubyte", np.full(64, 10), r"label 10: must be in 0\.\.9"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, file: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], message: str
) -> None:
    write_fashion(tmp_path)
    write(tmp_path / file, idx(array.astype(np.uint8)))
    with pytest.raises(DataError, match=f"{file}: {message}"):
        build("fashion", data=str(tmp_path))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the package dataset-fashion-mnist is not installed in {REAL}")
def test_the_real_files() -> None:
    recipe = build("fashion")
    assert isinstance(recipe.train, BatchedData)
    assert len(recipe.train) == 60_000
    assert len(recipe.test) == 10_000  # type: ignore[arg-type]
    _, labels = recipe.train.batch(torch.arange(60_000)[:10])
    assert labels.tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # ankle boot, T-shirt, T-shirt, dress, ...
