"""Schedules of progress, warm-up, and the batch that grows instead."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import UsageError
from dtrain.largebatch import Schedule, constant, cosine, decay, grow, polynomial, steady, steps, updates, warm_up

EPOCHS = st.floats(0, 12, allow_nan=False)
SMITH = decay([60, 120, 160], 0.2)
"""1711.00489, section 5.1."""


def test_shapes() -> None:
    """Where each begins, passes and ends."""
    assert [constant()(t) for t in (0, 99)] == [1, 1]
    assert [decay([3, 6])(t) for t in (0, 2.99, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [cosine(10)(t) for t in (0, 5, 10, 11)] == pytest.approx([1, 0.5, 0, 0])
    assert [polynomial(10)(t) for t in (0, 5, 10, 11)] == pytest.approx([1, 0.25, 0, 0])


def test_warm_up_begins_with_the_small_batches_rate() -> None:
    """Goyal et al. 2017, section 2.2: from 1/k in equal steps to 1, then the schedule; and it multiplies one."""
    warm = warm_up(decay([8]), 5, start=1 / 32)
    found = [warm(t) for t in (0, 1, 2, 5, 7, 8)]
    assert found == pytest.approx([1 / 32, 1 / 32 + 31 / 160, 1 / 32 + 62 / 160, 1, 1, 0.1])
    assert warm_up(constant(), 0)(0) == 1
    assert warm_up(cosine(10), 2)(1) == pytest.approx(0.5 * cosine(10)(1))


@pytest.mark.parametrize("schedule", [decay([2, 4, 9], 0.2), cosine(12), polynomial(12), warm_up(cosine(12), 3)])
@given(epochs=EPOCHS, batch=st.integers(1, 300), growth=st.integers(1, 50))
def test_growing_keeps_the_noise_scale(schedule: Schedule, epochs: float, batch: int, growth: int) -> None:
    """rate / batch is the schedule's at every moment (1711.00489, section 3); and neither is out of bounds."""
    found = grow(schedule, batch=batch, max_batch=growth * batch, after=3.0)(epochs)
    assert found.factor / found.batch == pytest.approx(schedule(epochs) / batch, rel=1e-12, abs=1e-300)
    assert batch <= found.batch <= growth * batch
    assert found.factor <= 1 + 1 / (2 * batch) + 1e-12  # a batch is rounded to a whole number


@given(epochs=EPOCHS, multiple=st.integers(1, 9))
def test_batches_of_whole_micro_batches(epochs: float, multiple: int) -> None:
    course = grow(cosine(12), batch=4 * multiple, max_batch=101, multiple_of=multiple)
    assert course(epochs).batch % multiple == 0
    assert course(epochs).batch <= 101


def test_a_decay_becomes_growth_and_the_rest_is_rate() -> None:
    """Each division by 5 is a multiplication by 5, up to the cap."""
    course = grow(SMITH, batch=128, max_batch=5120)
    found = [course(t) for t in (0, 59.99, 60, 120, 160)]
    assert [s.batch for s in found] == [128, 128, 640, 3200, 5120]
    assert [s.factor for s in found] == pytest.approx([1, 1, 1, 1, 0.32])


def test_a_smooth_schedule_grows_in_jumps() -> None:
    """A cosine doubles the batch a few times; the rate makes up for the rest at every moment."""
    course = grow(cosine(12), batch=8, max_batch=100, jump=2.0, multiple_of=4)
    found = [course(t / 100) for t in range(1200)]
    assert sorted({s.batch for s in found}) == [8, 16, 32, 64, 100]
    assert all(s.factor / s.batch == pytest.approx(cosine(12)(t / 100) / 8) for t, s in enumerate(found))
    fives = grow(SMITH, batch=128, max_batch=5120, jump=5.0)
    assert [fives(t).batch for t in (0, 60, 120, 160)] == [128, 640, 3200, 5120]


def test_hybrid() -> None:
    """Once the batch, then the rate."""
    course = grow(decay([30, 60, 80]), batch=8192, max_batch=81920)
    assert [course(t).batch for t in (0, 30, 60, 80)] == [8192, 81920, 81920, 81920]
    assert [course(t).factor for t in (0, 30, 60, 80)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("first", "most", "carry", "count"),
    [
        (128, 128, True, 78125),
        (128, 128, False, 78124),
        (128, 5120, True, 29139),
        (128, 5120, False, 29139),
        (640, 5120, True, 6405),
        (3200, 5120, False, 2302),
    ],
)
def test_updates_of_the_papers_schedules(first: int, most: int, carry: bool, count: int) -> None:
    """CIFAR-10's 50,000 images for 200 epochs (1711.00489, figure 5: 80000, 29000, below 6500, below 2500)."""
    course = grow(SMITH, batch=first, max_batch=most)
    assert updates(course, samples=50_000, milestones=[60, 120, 160, 200], carry=carry) == count


@given(samples=st.integers(1, 200), batch=st.integers(1, 50), epochs=st.integers(1, 5))
def test_steps_of_a_batch_that_stays(samples: int, batch: int, epochs: int) -> None:
    assert steps(steady(constant(), batch), samples=samples, epochs=epochs) == epochs * math.ceil(samples / batch)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: decay([2, 2]), "milestones"),
        (lambda: decay([0]), "milestones"),
        (lambda: decay([1], 1.0), "factor is 1.0"),
        (lambda: decay(30), "milestones is 30: give a list"),  # type: ignore[arg-type]
        (lambda: cosine(0), "epochs is 0"),
        (lambda: polynomial(1, 0), "power is 0"),
        (lambda: warm_up(constant(), -1), "-1 epochs"),
        (lambda: warm_up(constant(), 1, 2), "from 2"),
        (lambda: grow(constant(), batch=8, max_batch=4), "max_batch is 4"),
        (lambda: grow(constant(), batch=0, max_batch=4), "batch is 0"),
        (lambda: grow(constant(), batch=8, max_batch=16, multiple_of=3), "multiple_of is 3"),
        (lambda: grow(cosine(2), batch=8, max_batch=16, after=3), "above 0"),
        (lambda: grow(constant(), batch=8, max_batch=16, jump=0.5), "jump is 0.5"),
        (lambda: steady(constant(), 0), "batch is 0"),
    ],
)
def test_what_cannot_be_meant(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wrong()
