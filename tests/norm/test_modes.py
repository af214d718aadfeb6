"""Forwards within `no_update` change no running statistic, and normalise by what they are told to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.norm.convert import convert
from dtrain.norm.frozen import freeze
from dtrain.norm.modes import no_update
from tests.norm.test_sync import SHAPES, close, data, on_threads, plain_layer

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "ghost": lambda layer: convert(layer, norm_batch=4, micro_batch=11),
    "synchronised": lambda layer: convert(layer, norm_batch="global"),
}
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "not affine": {"affine": False}, "cumulative": {"momentum": None}}


def normalised(layer: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()  # type: ignore[operator]
    return y if layer.weight is None else y * layer.weight.view(shape) + layer.bias.view(shape)  # type: ignore[operator, union-attr]


def by_batch(layer: nn.Module, x: Tensor, group: int) -> Tensor:
    dims = [0, *range(2, x.dim())]
    return torch.cat([normalised(layer, p, p.mean(dims), p.var(dims, correction=0)) for p in x.split(group)])


def by_running(layer: nn.Module, x: Tensor) -> Tensor:
    return normalised(layer, x, layer.running_mean, layer.running_var)  # type: ignore[arg-type]


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_leaves_statistics_alone(kind: str, shape: Any, options: dict[str, Any], training: bool) -> None:
    """In every mode of the model; after it, layers update as before."""
    layer = KINDS[kind](plain_layer(shape[0], **options)).train(training)
    x, before = data(shape[1]), copy.deepcopy(layer.state_dict())
    with no_update(layer):
        close(layer(x), by_batch(layer, x, 4 if kind == "ghost" else 11))
    with no_update(layer, use="running"):
        close(layer(x), by_running(layer, x))
    assert same_state(layer, before)
    assert layer.training is training
    assert layer.track_running_stats is True
    layer.train()(x)
    assert not same_state(layer, before)


def test_only_batch_norm_changes_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Dropout())
    model[2].eval()
    with no_update(model, use="running"):
        assert [m.training for m in model] == [True, False, False]
    assert [m.training for m in model] == [True, True, False]


def test_nested_and_broken() -> None:
    """The inner context counts within; each puts back what it found, also where the body raises."""
    layer = plain_layer(nn.BatchNorm1d)
    x, before = data((11, 4)), copy.deepcopy(layer.state_dict())
    with no_update(layer, use="running"):
        with no_update(layer, use="batch"):
            close(layer(x), by_batch(layer, x, 11))
        close(layer(x), by_running(layer, x))
        with pytest.raises(ZeroDivisionError), no_update(layer, use="batch"):
            raise ZeroDivisionError
        close(layer(x), by_running(layer, x))
    assert same_state(layer, before)
    assert layer.training
    assert layer.track_running_stats


def test_train_within_does_not_update() -> None:
    """A call of `.train()` within changes what is normalised by, but nothing is taken in."""
    layer = plain_layer(nn.BatchNorm1d)
    before = copy.deepcopy(layer.state_dict())
    with no_update(layer, use="running"):
        layer.train()(data((11, 4)))
    assert same_state(layer, before)


def test_shared_and_frozen_layers() -> None:
    """A layer in two places gets its own settings back; a frozen one normalises by its statistics whatever is said."""
    shared = plain_layer(nn.BatchNorm1d)
    model = nn.Sequential(shared, shared)
    with no_update(model):
        model(data((5, 4)))
    assert shared.track_running_stats
    frozen = freeze(plain_layer(nn.BatchNorm1d))
    with no_update(frozen, use="batch"):
        close(frozen(data((5, 4))), by_running(frozen, data((5, 4))))


def test_layers_without_statistics() -> None:
    layer = plain_layer(nn.BatchNorm1d, track_running_stats=False)
    with no_update(layer):
        close(layer(data((11, 4))), by_batch(layer, data((11, 4)), 11))
    assert layer.track_running_stats is False
    model = nn.Sequential(nn.BatchNorm1d(4), layer)
    with pytest.raises(UsageError, match=r"^1 keeps no running"), no_update(model, use="running"):
        pass
    assert model[0].track_running_stats


def test_unknown_word() -> None:
    with pytest.raises(UsageError, match="use is 'none': one of batch, running"), no_update(nn.ReLU(), use="none"):
        pass


def test_gradients_are_those_of_training() -> None:
    """With "batch" the gradient goes through the batch's statistics: a constant added to the input has none."""
    layer, x = plain_layer(nn.BatchNorm1d), data((11, 4)).requires_grad_()
    with no_update(layer):
        (layer(x) * data((11, 4), 3)).sum().backward()
    assert x.grad is not None
    close(x.grad.sum(0), torch.zeros(4, dtype=torch.float64))


def test_synchronised_over_workers() -> None:
    """With "batch" by the batch of all workers; with "running" nothing is sent, so that a worker may be alone."""
    whole = data((12, 4))

    def body(comm: Backend) -> tuple[Tensor, dict[str, Tensor]]:
        layer = convert(plain_layer(nn.BatchNorm1d), comm=comm)
        with no_update(layer):
            y = layer(whole.split([2, 9, 1])[comm.rank])
        if comm.rank == 0:
            with no_update(layer, use="running"):
                layer(whole)
        return y.detach(), layer.state_dict()

    workers = on_threads(body)
    plain = plain_layer(nn.BatchNorm1d)
    close(torch.cat([y for y, _ in workers]), by_batch(plain, whole, 12).detach())
    assert all(same_state(plain, state) for _, state in workers)
