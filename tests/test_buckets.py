"""Cutting parameters into buckets: every trainable one once, last first, types apart, the first bucket small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from dtrain.buckets import Bucket, Direct, describe, plan
from dtrain.errors import UsageError

TYPES = [torch.float32, torch.float64, torch.bfloat16]
KB = 1024


def named(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[tuple[str, Parameter]]:
    return [(f"p{i}", Parameter(torch.zeros(n, dtype=dtype))) for i, n in enumerate(sizes)]


def nbytes(parameter: Parameter) -> int:
    return parameter.numel() * parameter.element_size()


@given(
    kinds=st.lists(st.tuples(st.integers(0, 600), st.sampled_from(TYPES), st.booleans()), max_size=25),
    bucket_bytes=st.integers(1, 2 * KB),
    first_bytes=st.integers(1, 2 * KB),
)
@settings(max_examples=150, deadline=None)
def test_plan(kinds: list[tuple[int, torch.dtype, bool]], bucket_bytes: int, first_bytes: int) -> None:
    """Whatever the sizes: each trainable parameter once, in reverse order within a type; a bucket is closed as soon as
    it has reached its size, and a parameter of at least that size stands alone."""
    parameters = [(f"p{i}", Parameter(torch.zeros(n, dtype=t), requires_grad=g)) for i, (n, t, g) in enumerate(kinds)]
    plans = plan(parameters, bucket_bytes=bucket_bytes, first_bytes=first_bytes)
    members = [i for p in plans for i in p.members]
    assert sorted(members) == [i for i, (_, p) in enumerate(parameters) if p.requires_grad]
    for dtype in TYPES:
        of_type = [i for p in plans if p.dtype == dtype for i in p.members]
        assert of_type == sorted(of_type, reverse=True)
    for bucket_plan in plans:
        assert bucket_plan.members
        sizes = [nbytes(parameters[i][1]) for i in bucket_plan.members]
        assert all(parameters[i][1].dtype == bucket_plan.dtype for i in bucket_plan.members)
        assert sum(sizes[:-1]) < bucket_bytes
        assert len(sizes) == 1 or max(sizes) < bucket_bytes


def test_first_bucket_is_small() -> None:
    """The bucket that backward fills first is closed early, so that it leaves early."""
    plans = plan(named([256] * 12), bucket_bytes=4 * KB, first_bytes=2 * KB)  # parameters of 1 KiB
    assert [p.members for p in plans] == [(11, 10), (9, 8, 7, 6), (5, 4, 3, 2), (1, 0)]


def test_large_tensor_has_a_bucket_to_itself() -> None:
    """A tensor as large as a bucket does not wait for its small neighbours, nor they for it."""
    plans = plan(named([10, 10, 5000, 10, 10]), bucket_bytes=4 * KB, first_bytes=1)
    assert [p.members for p in plans] == [(4,), (3,), (2,), (1, 0)]


def test_large_gradient_travels_from_where_it_lies() -> None:
    """No copy: the sum is made in the memory of `.grad`, whatever its strides were; a bucket comes last."""
    parameters = named([4, 2, 6])
    plans = plan(parameters, bucket_bytes=10**6, first_bytes=10**6, direct_bytes=16)
    assert [(p.members, p.direct) for p in plans] == [((2,), True), ((0,), True), ((1,), False)]
    assert plan(named([6]), bucket_bytes=1, first_bytes=1, direct_bytes=1)[-1].members == ()
    message, (_, large) = Direct(plans[0], parameters), parameters[2]
    large.grad = torch.arange(6.0)
    lies_at = large.grad.data_ptr()
    message.put(0, 0.5)
    assert message.full
    assert message.seal(0.5) == []
    assert message.flat.data_ptr() == large.grad.data_ptr() == lies_at
    assert message.flat.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    message.reset()
    large.grad = None
    assert message.seal(0.5) == [0]
    assert message.flat.tolist() == [0.0] * 6
    message.grant(0)
    assert large.grad is not None


def test_complex_parameter() -> None:
    """The gradient of a complex parameter cannot be summed here: refused by name."""
    with pytest.raises(UsageError, match="p0 is complex"):
        plan(named([2], torch.complex64), bucket_bytes=1, first_bytes=1)


def test_describe() -> None:
    """One line a tensor: name, shape and type."""
    assert describe([("a.w", torch.zeros(2, 3)), ("n", torch.tensor(1))]) == ["a.w (2, 3) float32", "n () int64"]


def bucket_of(sizes: list[int]) -> tuple[Bucket, list[Parameter]]:
    parameters = named(sizes)
    (one,) = plan(parameters, bucket_bytes=10**6, first_bytes=10**6)
    empty = lambda n, dtype, device: torch.empty(n, dtype=dtype, device=device)  # noqa: E731
    return Bucket(one, parameters, empty, flags=len(sizes)), [p for _, p in parameters]


def test_gradients_lie_in_the_buffer() -> None:
    """After `put`, `.grad` is a view of the buffer with the gradient times the scale; nothing is copied again."""
    bucket, (a, b) = bucket_of([2, 3])
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    bucket.put(0, 0.5)  # slot 0 is the last parameter
    assert not bucket.full
    bucket.put(1, 0.5)
    assert bucket.full
    assert bucket.seal(0.5) == []
    bucket.flags.fill_(1)
    assert bucket.flat.tolist() == [1.5, 2.0, 2.5, 0.5, 1.0, 1.0, 1.0]  # gradients, then the flags
    bucket.flat.mul_(2)
    assert a.grad.tolist() == [1.0, 2.0]
    bucket.reset()
    bucket.put(1, 10.0)
    assert a.grad.tolist() == [10.0, 20.0]
    with pytest.raises(UsageError, match="p0 received two gradients"):
        bucket.put(1, 1.0)


def test_parameters_without_a_gradient() -> None:
    """What this worker has no gradient for travels as zeros; `.grad` is set where another worker had one."""
    bucket, (a, b, c) = bucket_of([1, 1, 1])
    c.grad = torch.ones(1)
    bucket.put(0, 1.0)
    absent = bucket.seal(1.0)
    assert absent == [1, 2]
    assert bucket.flat[:3].tolist() == [1.0, 0.0, 0.0]
    bucket.flat[:3] += torch.tensor([1.0, 7.0, 0.0])  # another worker, which used b too
    bucket.grant(1)
    assert a.grad is None
    assert b.grad is not None
    assert b.grad.tolist() == [7.0]
    assert c.grad.tolist() == [2.0]
