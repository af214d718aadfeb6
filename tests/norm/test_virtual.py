"""Virtual batch norm against statistics computed example by example, and what it promises: examples by themselves."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - that models go through it is what is tested
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain import norm
from dtrain.errors import UsageError
from dtrain.norm.virtual import VirtualBatchNorm, virtual
from tests.norm.test_sync import OPTIONS, SHAPES, Net, close, data, identities, plain_layer, run

REFERENCE = 5


def by_formula(layer: Any, reference: Tensor, x: Tensor, *, include: bool) -> Tensor:
    """Each example by the plain statistics of the reference batch, to which it is added."""
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    rows = []
    for row in x.split(1):
        batch = torch.cat([reference, row]) if include else reference
        mean, variance = batch.mean(dims), batch.var(dims, correction=0)
        y = (row - mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()
        rows.append(y if layer.weight is None else y * layer.weight.view(shape) + layer.bias.view(shape))
    return torch.cat(rows)


@pytest.mark.parametrize("include", [True, False], ids=["include", "reference only"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_equals_the_formula(
    kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], include: bool
) -> None:
    """Output and gradients, in training and in evaluation; running statistics stay as they are."""
    make, shape = kind
    plain: Any = plain_layer(make, **options)
    reference, x, weights = data((REFERENCE, *shape[1:]), 3), data(shape).requires_grad_(), data(shape, 9)
    wanted = by_formula(plain, reference, x, include=include)
    (wanted * weights).sum().backward()
    layer: Any = virtual(plain_layer(make, **options), reference, include=include)
    for mode in (True, False):
        layer.zero_grad()
        y, dx = run(layer.train(mode), x.detach(), weights)
        close(y, wanted.detach(), 1e-12)
        assert x.grad is not None
        close(dx, x.grad, 1e-12)
        for parameter, other in zip(layer.parameters(), plain.parameters(), strict=True):
            close(parameter.grad, other.grad, 1e-11)
    for name, buffer in plain.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer)


def deep() -> nn.Sequential:
    """Two layers of batch norm, between others."""
    torch.manual_seed(0)
    parts = [
        nn.Conv1d(4, 4, 1),
        plain_layer(nn.BatchNorm1d),
        nn.Tanh(),
        nn.Conv1d(4, 4, 1),
        plain_layer(nn.BatchNorm1d),
    ]
    return nn.Sequential(*parts).double()


@pytest.mark.parametrize("include", [True, False], ids=["include", "reference only"])
def test_a_deep_model(include: bool) -> None:
    """The reference batch goes through by itself: later layers see it normalised by its own statistics. Gradients of
    all parameters go through it too."""
    reference, x, plain = data((REFERENCE, 4, 3), 3), data((2, 4, 3)), deep()
    at_reference, at_x = reference, x
    for part in plain:
        if isinstance(part, nn.BatchNorm1d):
            at_x = by_formula(part, at_reference, at_x, include=include)
            mean, variance = at_reference.mean((0, 2)), at_reference.var((0, 2), correction=0)
            at_reference = (at_reference - mean.view(1, -1, 1)) / (variance.view(1, -1, 1) + part.eps).sqrt()
            at_reference = at_reference * part.weight.view(1, -1, 1) + part.bias.view(1, -1, 1)
        else:
            at_x, at_reference = part(at_x), part(at_reference)
    at_x.square().sum().backward()
    model = virtual(deep(), reference, include=include)
    y = model(x)
    y.square().sum().backward()
    close(y, at_x, 1e-11)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        close(parameter.grad, other.grad, 1e-10)  # type: ignore[arg-type]


def test_examples_do_not_depend_on_each_other() -> None:
    """Alone, in a batch, in another order, beside other values: the same; and an empty batch is one too."""
    model = virtual(deep(), data((REFERENCE, 4, 3), 3))
    x = data((6, 4, 3))
    y = model(x)
    for row in range(6):
        close(model(x[row : row + 1]), y[row : row + 1], 1e-12)
    close(model(x.flip(0)), y.flip(0), 1e-12)
    close(model(torch.cat([x[:2], 100 * x]))[:2], y[:2], 1e-12)
    assert model(x[:0]).shape == (0, 4, 3)


@pytest.mark.parametrize("include", [True, False], ids=["include", "reference only"])
def test_second_derivatives(include: bool) -> None:
    """gradcheck and gradgradcheck, with respect to input, weight and bias."""
    layer = virtual(plain_layer(nn.BatchNorm1d), data((3, 4, 2), 3), include=include)

    def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    inputs = [data((2, 4, 2)).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_far_from_zero() -> None:
    """Float32 at mean 1000 and deviation 0.1: as good as the inputs allow."""
    reference, x = (((data((30, 4, 5), seed) - 3) / 2 * 0.1 + 1000).float() for seed in (3, 0))
    wanted = by_formula(plain_layer(nn.BatchNorm1d), reference.double(), x.double(), include=True)
    layer = virtual(plain_layer(nn.BatchNorm1d, torch.float32), reference)
    close(layer(x).double(), wanted, 4e-3)


def test_half_precision_inputs() -> None:
    """The output has the input's type; the reference batch keeps its own between forwards."""
    reference, x = data((REFERENCE, 4, 3), 3).float(), data((6, 4, 3)).float()
    layer = virtual(plain_layer(nn.BatchNorm1d, torch.float32), reference)
    wanted = layer(x)
    half = layer(x.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0.02, atol=0.05)
    assert torch.equal(layer(x), wanted)


def test_conversion_there_and_back() -> None:
    """No tensor and no key changes; a shared layer stays one; after `revert` the reference batch is out of the way."""
    model, x = Net(), data((6, 4))
    keys, tensors, types = list(model.state_dict()), identities(model), [type(m) for m in model.modules()]
    wanted = copy.deepcopy(model)(x)
    assert virtual(model, data((REFERENCE, 4), 3)) is model
    assert isinstance(model.shared, VirtualBatchNorm)
    assert model.shared is model.again
    assert (list(model.state_dict()), identities(model)) == (keys, tensors)
    assert len(model(x)) == 6
    norm.revert(model)
    assert [type(m) for m in model.modules()] == types
    assert (list(model.state_dict()), identities(model)) == (keys, tensors)
    assert not {"reference", "include"} & set(vars(model.shared))
    close(model(x), wanted, 0)
    seen: list[tuple[int, ...]] = []
    model.inner.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    model(x)
    assert seen == [(6, 4)]


def test_another_reference_batch() -> None:
    """The last one counts, and hooks of earlier ones are gone, also where `revert` was in between, or a part's."""
    for between in (lambda model: model, norm.revert):
        model = virtual(between(virtual(deep(), data((3, 4, 3), 8))), data((REFERENCE, 4, 3), 3))
        close(model(data((2, 4, 3))), virtual(deep(), data((REFERENCE, 4, 3), 3))(data((2, 4, 3))), 0)
        assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    inner: Any = deep()
    virtual(inner[1], data((2, 4, 3)))
    outer = nn.Sequential(virtual(inner, data((3, 4, 3), 8)))
    virtual(outer, data((REFERENCE, 4, 3), 3))
    assert not inner._forward_pre_hooks
    close(outer(data((2, 4, 3))), virtual(deep(), data((REFERENCE, 4, 3), 3))(data((2, 4, 3))), 0)


def test_a_part_with_a_reference_batch_of_its_own() -> None:
    """A part converted after the whole has its own, through which the whole's goes as examples, if a layer needs it."""
    whole: Any = virtual(
        nn.Sequential(nn.Sequential(plain_layer(nn.BatchNorm1d)), plain_layer(nn.BatchNorm1d)), data((3, 4), 8)
    )
    virtual(whole[0], data((REFERENCE, 4), 3))
    x, plain = data((2, 4)), plain_layer(nn.BatchNorm1d)
    between = by_formula(plain, data((REFERENCE, 4), 3), torch.cat([data((3, 4), 8), x]), include=True)
    close(whole(x), by_formula(plain, between[:3], between[3:], include=True), 1e-12)
    model: Any = virtual(Odd(), data((3, 4), 8))
    model.bn = virtual(model.bn, data((REFERENCE, 4), 3))
    assert len(model(x, "no layer of the whole's is left, which takes one tensor")) == 2


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]  # noqa: S301


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
def test_copies(twin: Callable[[nn.Module], nn.Module]) -> None:
    """A copy has the reference batch, and hooks of its own, that go when it gets another."""
    model = virtual(deep(), data((REFERENCE, 4, 3), 3))
    other = twin(model)
    x = data((2, 4, 3))
    wanted = model(x)
    close(other(x), wanted, 0)
    virtual(other, data((REFERENCE, 4, 3), 4))
    assert not torch.allclose(other(x), wanted)
    assert len(other._forward_pre_hooks) == 1
    close(model(x), wanted, 0)


def test_hooks_of_the_user_see_the_examples_only() -> None:
    """On the model, before and after the conversion."""
    model, seen = deep(), []
    model.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    virtual(model, data((REFERENCE, 4, 3), 3))
    model.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    model(data((2, 4, 3)))
    assert seen == [2, 2]


class Odd(nn.Module):
    """Takes and gives what it is told to."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.bn, self.give = nn.BatchNorm1d(4).double(), give

    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.give(self.bn(x))


def test_inputs_and_outputs_that_cannot_be_cut() -> None:
    """Refused in the forward, with what to do; and the next forward is a good one."""
    reference, x = data((REFERENCE, 4), 3), data((2, 4))
    model = virtual(Odd(), reference)
    wanted = model(x)
    calls: list[Callable[[], Any]] = [lambda: model(x, 1), lambda: model(x=x), lambda: model(), lambda: model([x])]
    for call in calls:
        with pytest.raises(UsageError, match="one tensor, and nothing else"):
            call()
    with pytest.raises(UsageError, match=r"shape \(2, 3\) does not go with"):
        model(x[:, :3])
    close(model(x), wanted, 0)
    for give, shape in ((lambda y: (y, y), "tuple"), (lambda y: y.sum(0), r"\(4,\)"), (lambda y: y.sum(), r"\(\)")):
        with pytest.raises(UsageError, match=f"{shape} has no row for each of 7"):
            virtual(Odd(give), reference)(x)


def test_an_error_in_the_forward() -> None:
    """It comes out as it is, and nothing is left of that forward."""
    fails = [True]

    def give(y: Tensor) -> Tensor:
        if fails.pop():
            raise ZeroDivisionError
        return y

    model: Any = virtual(Odd(give), data((REFERENCE, 4), 3))
    with pytest.raises(ZeroDivisionError):
        model(data((2, 4)))
    with pytest.raises(UsageError, match="without its model"):
        model.bn(data((7, 4)))
    fails.append(False)
    assert len(model(data((2, 4)))) == 2


def test_refused_reference_batches() -> None:
    """Less than two samples."""
    for reference in (torch.zeros(1, 4), torch.zeros(0, 4), torch.zeros(4)):
        with pytest.raises(UsageError, match="at least 2 samples"):
            virtual(Net(), reference)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    """What backward computes again is what forward computed."""

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.saving = deep(), True

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=reentrant) if self.saving else self.inner(x)

    gradients = []
    for saving in (True, False):
        model: Any = virtual(Saving(), data((REFERENCE, 4, 3), 3))
        model.saving = saving
        y, dx = run(model, data((2, 4, 3)), data((2, 4, 3), 9))
        gradients.append([y, dx, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-12)


def test_threads() -> None:
    """Two forwards of one model at a time do not take each other's reference batch off."""
    both = threading.Barrier(2, timeout=5)

    def give(y: Tensor) -> Tensor:
        both.wait()
        return y

    model = virtual(Odd(give), data((REFERENCE, 4), 3))
    found: dict[int, Tensor] = {}

    def body(count: int) -> None:
        found[count] = model(data((count, 4)))

    threads = [threading.Thread(target=body, args=(count,)) for count in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {count: len(y) for count, y in found.items()} == {1: 1, 3: 3}


def test_rows_that_are_no_samples_are_refused() -> None:
    """Which of them are the reference's is not known."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.reshape(-1, 3)).reshape(x.shape)  # type: ignore[no-any-return]

    model = virtual(Folded(), torch.randn(6, 5, 3))
    with pytest.raises(UsageError, match="is given 40 rows, where the model has 8 samples"):
        model(torch.randn(2, 5, 3))
