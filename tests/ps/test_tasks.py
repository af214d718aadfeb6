"""Work in pieces, shared between threads."""

from __future__ import annotations

import pytest

from dtrain.ps.tasks import Pool, Task


@pytest.mark.parametrize("turns", ["finish", "advance"])
def test_an_error_in_a_piece_reaches_the_caller(turns: str):
    pool = Pool(2)

    def do(number: int) -> None:
        if number == 3:
            raise ValueError("at 3")

    task = Task(100, do, pool=pool)
    with pytest.raises(ValueError, match="at 3"):
        while True:
            task.finish() if turns == "finish" else task.advance(0.01)
    done: list[int] = []
    Task(100, done.append, pool=pool).finish()  # the helpers have survived
    pool.close()
    assert sorted(done) == list(range(100))
