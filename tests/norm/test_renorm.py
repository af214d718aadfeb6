"""Batch renormalisation against the formulas of the paper, and against plain batch norm where r = 1 and d = 0."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain import norm
from dtrain.errors import UsageError
from dtrain.norm.modes import no_update
from dtrain.norm.renorm import BatchRenorm, renorm
from tests.norm.test_sync import OPTIONS, SHAPES, Net, close, data, identities, plain_layer, run

TRACKED = {name: options for name, options in OPTIONS.items() if options.get("track_running_stats", True)}
AT_ONCE: dict[str, Any] = {"warmup": 0, "r_steps": 0, "d_steps": 0}


def by_formula(layer: Any, x: Tensor, r_max: float, d_max: float) -> Tensor:
    """Algorithm 1, with torch's running variance, by autograd: r and d are detached."""
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(dims)
    sigma_b = ((x - mean.view(shape)).square().mean(dims) + layer.eps).sqrt()
    sigma = (layer.running_var + layer.eps).sqrt()
    r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / sigma).clamp(-d_max, d_max).detach()
    normalised = (x - mean.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
    if layer.weight is None:
        return normalised
    return normalised * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("limits", [(1.5, 0.5), (3.0, 5.0), (100.0, 100.0)], ids=["clipped", "paper", "not clipped"])
@pytest.mark.parametrize("options", TRACKED.values(), ids=list(TRACKED))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_equals_the_formulas(
    kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], limits: tuple[float, float]
) -> None:
    """Output, gradients, and running statistics, which are those of torch's layer, over several steps."""
    make, shape = kind
    plain, reference = plain_layer(make, **options), plain_layer(make, **options)
    layer: Any = renorm(plain_layer(make, **options), r_max=limits[0], d_max=limits[1], **AT_ONCE)
    weights = data(shape, 9)
    for seed in range(3):
        x = data(shape, seed).requires_grad_()
        wanted = by_formula(reference, x, *limits)
        (wanted * weights).sum().backward()
        y, dx = run(layer, x.detach(), weights)
        reference.load_state_dict(copy.deepcopy(plain.state_dict()))
        plain(x.detach())
        reference.load_state_dict(plain.state_dict())
        close(y, wanted.detach(), 1e-12)
        assert x.grad is not None
        close(dx, x.grad, 1e-12)
        for name, buffer in plain.named_buffers():
            close(layer.get_buffer(name), buffer, 1e-12)
    for parameter, other in zip(layer.parameters(), reference.parameters(), strict=True):
        close(parameter.grad, other.grad, 1e-12)
    close(layer.eval()(x), plain.eval()(x), 1e-12)


def test_training_is_evaluation_within_the_limits() -> None:
    """What the kind is for: y is computed by the running averages, whatever the batch."""
    layer: Any = renorm(plain_layer(nn.BatchNorm2d), r_max=1e6, d_max=1e6, **AT_ONCE)
    x = data((3, 4, 2, 2))
    evaluated = copy.deepcopy(layer).eval()(x)
    close(layer.train()(x), evaluated, 1e-12)


@pytest.mark.parametrize("options", TRACKED.values(), ids=list(TRACKED))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_warm_up_is_plain_batch_norm(kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any]) -> None:
    """Output, gradients, buffers and evaluation, to 1e-12."""
    make, shape = kind
    plain = plain_layer(make, **options)
    layer: Any = renorm(copy.deepcopy(plain), warmup=3, r_steps=10, d_steps=10)
    plain.num_batches_tracked.zero_()  # type: ignore[operator, union-attr]
    for seed in range(3):
        for a, b in zip(
            run(layer, data(shape, seed), data(shape, 9)), run(plain, data(shape, seed), data(shape, 9)), strict=True
        ):
            close(a, b, 1e-12)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, 1e-12)
    for name, buffer in plain.named_buffers():
        close(layer.get_buffer(name), buffer, 1e-12)
    assert not torch.allclose(layer(data(shape)), plain(data(shape))), "the warm-up is over"


def test_schedule() -> None:
    """The limits by update: none in the warm-up, then linear, then constant; and they are those that are used."""
    layer: Any = renorm(
        nn.BatchNorm1d(1, momentum=0.0, affine=False, eps=1e-12).double(), warmup=2, r_steps=6, d_steps=4
    )
    r_max = [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    d_max = [0.0, 0.0, 2.5, 5.0, 5.0, 5.0, 5.0]
    for r, d in zip(r_max, d_max, strict=True):
        assert [float(limit) for limit in layer.limits()] == [r, d]
        wide, narrow = (torch.tensor([[90.0], [110.0]]).double() * s for s in (1, -1e-3))
        before = copy.deepcopy(layer.state_dict())
        assert layer(wide).flatten().tolist() == pytest.approx([-r + d, r + d])
        layer.load_state_dict(before)
        # Mean -0.1 and deviation 0.01 against 0 and 1: the scale is limited from below, the shift is not or wholly.
        assert layer(narrow).flatten().tolist() == pytest.approx([1 / r - min(d, 0.1), -1 / r - min(d, 0.1)])


def test_the_schedule_goes_on_from_a_state_dict() -> None:
    """The count of updates is in the state dict; the limits are at once whole where nothing grows."""
    one = renorm(nn.Sequential(nn.BatchNorm1d(4)).double(), warmup=1, r_steps=8, d_steps=4)
    for seed in range(5):
        one(data((6, 4), seed))
    other = renorm(nn.Sequential(nn.BatchNorm1d(4)).double(), warmup=1, r_steps=8, d_steps=4)
    other.load_state_dict(one.state_dict())
    close(one(data((6, 4), 7)), other(data((6, 4), 7)), 0)
    whole: Any = renorm(nn.BatchNorm1d(4), r_max=2.0, d_max=0.5, **AT_ONCE)
    assert [float(limit) for limit in whole.limits()] == [2.0, 0.5]


@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives(affine: bool) -> None:
    """gradcheck and gradgradcheck, r and d held: momentum 0, and limits that every channel meets."""
    layer: Any = renorm(plain_layer(nn.BatchNorm1d, affine=affine, momentum=0.0), r_max=1.1, d_max=0.1, **AT_ONCE)

    def apply(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return torch.func.functional_call(layer, named, (x,))  # type: ignore[no-any-return]

    inputs = [data((5, 4, 2)).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    r, d = layer.correction(inputs[0].mean((0, 2)), inputs[0].var((0, 2), correction=0))
    assert all(math.isclose(float(v), 1.1) for v in r)
    assert all(math.isclose(float(v), 0.1) for v in d)
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    """The output has the input's type; statistics are summed in float32, also at mean 1000."""
    x = (data((64, 4, 5)) * 8 + 1000).to(dtype)
    layer: Any = renorm(plain_layer(nn.BatchNorm1d, torch.float32), **AT_ONCE)
    wide: Any = renorm(plain_layer(nn.BatchNorm1d), **AT_ONCE)
    weights = data((64, 4, 5), 9)
    y, dx = run(layer, x, weights.to(dtype))
    wanted, wanted_dx = run(wide, x.double(), weights)
    assert y.dtype is dx.dtype is dtype
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.05)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=0.05, atol=0.01)
    torch.testing.assert_close(layer.running_mean.double(), wide.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running_var.double(), wide.running_var, rtol=1e-4, atol=0)


def test_without_updates() -> None:
    """Under `no_update` outputs are as in training; averages, and with them the schedule, stay where they are."""
    model = renorm(nn.Sequential(plain_layer(nn.BatchNorm1d)), **AT_ONCE)
    before = copy.deepcopy(model.state_dict())
    with no_update(model):
        y = model(data((6, 4)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    close(y, model(data((6, 4))), 0)


def test_channels_last_and_transposed() -> None:
    """The layout in memory does not matter."""
    x = data((6, 4, 3, 2))
    y: Any = renorm(plain_layer(nn.BatchNorm2d), **AT_ONCE)(x)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        close(renorm(plain_layer(nn.BatchNorm2d), **AT_ONCE)(other), y, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    """A GPU computes what the CPU does."""
    x, weights = data((6, 4, 3, 2)), data((6, 4, 3, 2), 9)
    here, there = (renorm(plain_layer(nn.BatchNorm2d), r_max=1.5, d_max=0.5, **AT_ONCE) for _ in range(2))
    for a, b in zip(run(there.cuda(), x.cuda(), weights.cuda()), run(here, x, weights), strict=True):
        close(a.cpu(), b)
    for a, b in zip(there.buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_too_few_values() -> None:
    """One value a channel is refused as torch does, none is let through, and neither changes the averages."""
    layer: Any = renorm(plain_layer(nn.BatchNorm1d), **AT_ONCE)
    mean = layer.running_mean.clone()
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(data((1, 4)))
    assert layer(data((0, 4))).shape == (0, 4)
    assert torch.equal(layer.running_mean, mean)


def test_conversion_there_and_back() -> None:
    """No tensor and no key changes; a shared layer stays one; a deep copy goes on by itself."""
    model = Net()
    keys, tensors, types = list(model.state_dict()), identities(model), [type(m) for m in model.modules()]
    assert renorm(model, **AT_ONCE) is model
    assert renorm(model, r_max=2.0, **AT_ONCE) is model
    assert isinstance(model.shared, BatchRenorm)
    assert model.shared is model.again
    assert model.shared.r_max == 2.0
    assert (list(model.state_dict()), identities(model)) == (keys, tensors)
    twin = copy.deepcopy(model)
    close(twin(data((5, 4))), model(data((5, 4))), 0)
    twin(data((5, 4), 1))
    assert int(twin.shared.num_batches_tracked) == int(model.shared.num_batches_tracked) + 2  # type: ignore[arg-type]
    norm.revert(model)
    assert [type(m) for m in model.modules()] == types
    assert (list(model.state_dict()), identities(model)) == (keys, tensors)
    assert not {"r_max", "warmup"} & set(vars(model.shared))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"r_max": 0.5}, "r_max is 0.5"),
        ({"d_max": -1.0}, "d_max -1.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 30000}, "warmup is the smallest"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], said: str) -> None:
    """Named, and nothing is converted."""
    with pytest.raises(UsageError, match=said):
        renorm(Net(), **arguments)


def test_a_layer_without_averages_is_refused() -> None:
    """There is nothing to correct towards."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UsageError, match="1 keeps no running averages"):
        renorm(model)
    assert type(model[0]) is nn.BatchNorm1d


def corrected() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    return renorm(model, warmup=0, r_steps=0, d_steps=0)  # type: ignore[return-value]


@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
def test_compiled_gradients() -> None:
    """r and d are those of the forward, though the averages have moved on when backward runs."""
    torch._dynamo.reset()
    found = []
    for backend in (None, "aot_eager"):
        model = corrected()
        x = data((16, 3))
        (model if backend is None else torch.compile(model, backend=backend))(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        close(a, b, 1e-10)


def test_gradient_checkpointing_is_refused_once_there_is_a_correction() -> None:
    model = corrected()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        checkpoint(model, data((16, 3)).requires_grad_(), use_reentrant=False).square().sum().backward()


def test_weight_without_bias() -> None:
    layer = renorm(plain_layer(nn.BatchNorm1d, bias=False))
    reference = plain_layer(nn.BatchNorm1d, bias=False)
    for found, wanted in zip(*(run(m, data((6, 4)), data((6, 4), 1)) for m in (layer, reference)), strict=True):
        close(found, wanted, 1e-12)
