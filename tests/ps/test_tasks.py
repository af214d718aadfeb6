"""Work in pieces, shared between threads."""

from __future__ import annotations

import time

import pytest

from dtrain.ps.tasks import Pool, Task


@pytest.mark.parametrize("how", ["finish", "advance"])
def test_an_error_in_a_piece_reaches_the_caller(how: str):
    pool = Pool(2)

    def do(number: int) -> None:
        time.sleep(0.001)
        if number == 3:
            raise ValueError("at 3")

    task = Task(20, do, pool=pool)
    with pytest.raises(ValueError, match="at 3"):
        task.finish() if how == "finish" else task.advance(10.0)
    done: list[int] = []
    Task(100, done.append, pool=pool).finish()  # the helpers have survived
    pool.close()
    assert sorted(done) == list(range(100))
