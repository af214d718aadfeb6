"""Frozen batch norm is torch's layer in evaluation, in whatever mode, and plain again when asked."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 - of what this test made
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.norm.convert import convert, revert
from dtrain.norm.frozen import FrozenBatchNorm, freeze
from dtrain.norm.layer import PLAIN, NormLayer
from dtrain.norm.renorm import BatchRenorm, renorm
from tests.norm.test_sync import SHAPES, Net, close, data, identities, plain_layer, run

OPTIONS: dict[str, dict[str, Any]] = {"affine": {}, "not affine": {"affine": False}, "cumulative": {"momentum": None}}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_equals_torch_in_evaluation(shape: Any, options: dict[str, Any], training: bool) -> None:
    """Outputs, gradients of input and parameters; buffers do not change."""
    plain, frozen = plain_layer(shape[0], **options).eval(), freeze(plain_layer(shape[0], **options)).train(training)
    before = copy.deepcopy(frozen.state_dict())
    x, weights = data(shape[1]), data(shape[1], 9)
    for got, wanted in zip(run(frozen, x, weights), run(plain, x, weights), strict=True):
        close(got, wanted, atol=1e-12)
    for a, b in zip(frozen.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), frozen.state_dict().values(), strict=True))


def test_gradcheck() -> None:
    layer, x = freeze(plain_layer(nn.BatchNorm1d)), data((3, 4)).requires_grad_()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("count", [0, 1])
def test_few_samples(count: int) -> None:
    """Nothing is estimated: one sample will do, or none."""
    layer = freeze(plain_layer(nn.BatchNorm1d))
    assert layer(data((count, 4))).shape == (count, 4)


def test_half_precision_inputs() -> None:
    layer = freeze(plain_layer(nn.BatchNorm2d, torch.float32))
    x = data((3, 4, 2, 2)).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
    wanted = plain_layer(nn.BatchNorm2d).eval()(x.detach().double())
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)


def test_convert_and_revert_change_no_tensor() -> None:
    """Same keys, same objects, frozen once or twice; a shared layer stays one."""
    model = Net()
    keys, tensors, types = list(model.state_dict()), identities(model), [type(m) for m in model.modules()]
    for _ in range(2):
        assert freeze(model) is model
        assert identities(model) == tensors
        assert list(model.state_dict()) == keys
        assert isinstance(model.shared, FrozenBatchNorm)
        assert model.shared is model.again
        assert isinstance(model.inner[1], FrozenBatchNorm)
    revert(model)
    assert vars(model.shared).keys() == vars(nn.BatchNorm1d(4)).keys()
    assert [type(m) for m in model.modules()] == types
    assert identities(model) == tensors
    model(data((5, 4)))
    assert model.inner[1].num_batches_tracked == 1


def four() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(3)], nn.BatchNorm1d(2))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (*PLAIN, NormLayer))]


@pytest.mark.parametrize(("start", "frozen"), [(None, "1111"), ("0.1", "1111"), ("1.1", "0111"), ("3", "0001")])
def test_from_a_layer_on(start: str | None, frozen: str) -> None:
    model = freeze(four(), start=start)
    assert "".join(str(int(isinstance(layer, FrozenBatchNorm))) for layer in norms(model)) == frozen


def test_a_start_within_a_module() -> None:
    """The first layer in the module, and all after it."""
    model = freeze(four(), start="1")
    assert [isinstance(layer, FrozenBatchNorm) for layer in norms(model)] == [False, True, True, True]


def test_unknown_start() -> None:
    model = four()
    with pytest.raises(UsageError, match=r"'1.0', or is in it: 0.1, 1.1, 2.1, 3$"):
        freeze(model, start="1.0")
    assert not any(isinstance(m, FrozenBatchNorm) for m in model.modules())
    with pytest.raises(UsageError, match="or is in it: none"):
        freeze(nn.Linear(2, 2), start="a")


def test_nothing_to_freeze() -> None:
    """A layer without statistics is refused, and nothing is half frozen; unless it lies before the start."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match=r"^1 keeps no running statistics"):
        freeze(model, affine=True)
    assert type(model[0]) is nn.BatchNorm1d
    assert model[0].weight.requires_grad
    freeze(model, start="2")
    with pytest.raises(UsageError, match="1 is a LazyBatchNorm1d"):
        freeze(nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d()))


def learns(layer: nn.Module) -> list[bool]:
    return [p.requires_grad for p in layer.parameters()]


def test_affine_stops_and_learns_again() -> None:
    """As it was, after freezing any number of times and ways; what did not learn before does not learn after."""
    model = four()
    model[1][1].bias.requires_grad_(False)
    model(torch.randn(4, 2)).sum().backward()
    freeze(model, start="1.1", affine=True)
    freeze(model, affine=True)
    freeze(model)
    assert [learns(layer) for layer in norms(model)] == [[False, False]] * 4
    assert all(p.grad is None for layer in norms(model) for p in layer.parameters())
    assert all(learns(model[i][0]) == [True, True] for i in range(3))
    revert(model)
    assert [learns(layer) for layer in norms(model)] == [[True, True], [True, False]] + [[True, True]] * 2


def test_frozen_first_then_affine_too() -> None:
    model = freeze(freeze(four()), affine=True)
    assert learns(model[3]) == [False, False]
    assert learns(revert(model)[3]) == [True, True]


def test_affine_of_layers_without() -> None:
    layer = freeze(nn.BatchNorm1d(2, affine=False), affine=True)
    assert type(revert(layer)) is nn.BatchNorm1d


def test_becomes_another_kind() -> None:
    """`convert` leaves it frozen; as another kind it is thawed: it updates and learns again."""
    model = convert(freeze(four(), affine=True), norm_batch=2, micro_batch=4)
    assert all(type(layer) is FrozenBatchNorm for layer in norms(model))
    model = renorm(model)
    assert all(type(layer) is BatchRenorm for layer in norms(model))
    assert learns(model[3]) == [True, True]
    model(torch.randn(4, 2))
    assert model[3].num_batches_tracked == 1


def test_copies() -> None:
    """A deep copy and a pickled one are frozen alike, and revert alike."""
    model, x = freeze(four(), affine=True), torch.randn(4, 2)
    stored = io.BytesIO(pickle.dumps(model))
    for copied in (copy.deepcopy(model), pickle.load(stored)):  # noqa: S301
        assert torch.equal(copied.train()(x), model.eval()(x))
        assert learns(revert(copied)[3]) == [True, True]
    assert learns(model[3]) == [False, False]


def test_state_dicts_fit_both_ways() -> None:
    frozen, plain = freeze(Net()), Net()
    plain.shared.running_mean.fill_(2)
    frozen.load_state_dict(plain.state_dict())
    assert torch.equal(frozen.train()(data((5, 4))), plain.eval()(data((5, 4))))


def test_shape() -> None:
    with pytest.raises(ValueError, match="takes"):
        freeze(nn.BatchNorm1d(4))(torch.zeros(4))
