"""Makes small idx files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, *, suffix: str = "", train: int = 64, test: int = 20) -> None:
    """The four files of a data set whose images are noise around their label."""
    draw = np.random.default_rng(0)
    for part, samples in (("train", train), ("t10k", test)):
        labels = (np.arange(samples) % 10).astype(np.uint8)
        images = draw.integers(0, 60, (samples, 28, 28)) + 20 * labels[:, None, None]
        write(folder / f"{part}-images-idx3-ubyte{suffix}", idx(np.minimum(images, 255).astype(np.uint8)))
        write(folder / f"{part}-labels-idx1-ubyte{suffix}", idx(labels))
