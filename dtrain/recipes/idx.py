"""Reads idx files of bytes, in which MNIST and Fashion-MNIST come (LeCun, The MNIST Database).

A file is two zero bytes, a type (8: unsigned byte), the number of dimensions, then each dimension as a
big-endian 32-bit number, then the elements, the last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from dtrain.errors import DataError

_MAX_BYTES = 1 << 30  # what a header may claim; Fashion-MNIST has 47 million


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array in an idx file of bytes with that many dimensions; unpacked if the name ends in .gz.

    Raises DataError, naming the file, when it cannot be read or is not exactly such a file.
    """
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            return _parse(file, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file again") from error


def _parse(file: IO[bytes], path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    magic = file.read(4)
    if magic != bytes((0, 0, 8, dimensions)):
        wanted = f"0000080{dimensions}"
        raise DataError(f"{path}: starts with {magic.hex() or 'nothing'}, an idx file of this kind with {wanted}")
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path}: ends inside the header; get the file again")
    shape = struct.unpack(f">{dimensions}I", header)
    size = math.prod(shape)
    if not 0 < size <= _MAX_BYTES:
        raise DataError(f"{path}: claims the shape {shape}: must have between 1 and {_MAX_BYTES} elements")
    content = file.read(size + 1)
    if len(content) != size:
        found = f"only {len(content)}" if len(content) < size else "more"
        raise DataError(f"{path}: the shape {shape} needs {size} bytes, the file has {found}; get the file again")
    writable = bytearray(content)  # as torch asks of an array that it is to share
    return np.frombuffer(writable, np.uint8).reshape(shape)
