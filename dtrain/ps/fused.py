"""The sum of several arrays into all of them in one pass, compiled by numba where that is installed.

numpy adds two arrays at a time: with 4 workers it reads or writes 15 numbers for each sum, in caches mostly; here it is
8. Additions are the same ones in the same order, and so are the bits: who sums may change over at any time.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Kernel = Callable[[tuple[Any, ...]], None]
"""Writes the sum of flat numpy arrays, in their order, into each of them; other threads run meanwhile."""

DTYPES = ("float32", "float64")
MOST = 8
"""Arrays: the processor follows no more streams well, and a kernel of more takes seconds to compile."""

_lock = threading.Lock()
_kernels: dict[tuple[str, int], Kernel | None] = {}


def kernel(dtype: str, count: int) -> Kernel | None:
    """What sums so many arrays of that type; None where there is no such, or not yet.

    It is compiled when it is first asked for, by a thread that takes a second, in which sums are slow. (numba could
    keep it for the next run, in a file that it unpickles; that is not used.)
    """
    key = (dtype, count)
    with _lock:
        if key not in _kernels:
            _kernels[key] = None
            if dtype in DTYPES and 2 <= count <= MOST and importlib.util.find_spec("numba") is not None:
                threading.Thread(target=_prepare, args=key, name="dtrain-compile").start()
        return _kernels[key]


def _prepare(dtype: str, count: int) -> None:
    try:
        made = _compile(dtype, count)
    except Exception as error:  # whatever a numba says that does not fit this Python, numpy or processor
        log.warning("numba cannot compile sums (%s: %s): numpy adds, in more passes", type(error).__name__, error)
        return
    with _lock:
        _kernels[dtype, count] = made


def _compile(dtype: str, count: int) -> Kernel | None:
    import numba
    from numba.extending import overload

    if getattr(numba.config, "DISABLE_JIT", 0):
        return None

    def added(arrays: Any, i: int) -> Any:
        """The sum of all arrays at i."""

    def put(arrays: Any, i: int, value: Any) -> None:
        """Write a value into all arrays at i."""

    def added_for(arrays: Any, i: Any) -> Any:
        if arrays.count == 1:
            return lambda arrays, i: arrays[0][i]
        return lambda arrays, i: added(arrays[:-1], i) + arrays[-1][i]

    def put_for(arrays: Any, i: Any, value: Any) -> Any:
        def into_one(arrays: Any, i: int, value: Any) -> None:
            arrays[0][i] = value

        def into_more(arrays: Any, i: int, value: Any) -> None:
            arrays[0][i] = value
            put(arrays[1:], i, value)

        return into_one if arrays.count == 1 else into_more

    def sum_into_all(arrays: Any) -> None:
        for i in range(len(arrays[0])):
            put(arrays, i, added(arrays, i))

    overload(added, strict=False)(added_for)  # unrolled for the number of arrays, as if it were written out
    overload(put, strict=False)(put_for)
    array = numba.types.Array(getattr(numba.types, dtype), 1, "C")
    compiled: Kernel = numba.njit([numba.types.void(numba.types.UniTuple(array, count))], nogil=True)(sum_into_all)
    return compiled
