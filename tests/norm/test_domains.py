"""Batch norm for each domain: one plain layer a domain, as far as anyone can tell."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - that models go through it is what is tested
import threading
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import norm
from dtrain.errors import UsageError
from dtrain.norm.domains import DomainBatchNorm, domain, per_domain
from dtrain.norm.layer import layers
from dtrain.norm.modes import no_update
from tests.norm.test_sync import OPTIONS, SHAPES, Net, close, data, identities, plain_layer, run

NAMES = ["day", "night"]
VISITS = ["day", "night", "night", "day", "night"]


@pytest.mark.parametrize("affine", ["shared", "separate"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_equals_a_plain_layer_for_each_domain(
    kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], affine: str
) -> None:
    """Outputs, gradients and statistics, domains in any order, in training and in evaluation."""
    make, shape = kind
    plain: dict[str, Any] = {name: plain_layer(make, **options) for name in NAMES}
    if affine == "shared":
        plain["night"].weight, plain["night"].bias = plain["day"].weight, plain["day"].bias
    layer: Any = per_domain(plain_layer(make, **options), NAMES, affine=affine)
    untouched = {name: b.clone() for name, b in layer.named_buffers(recurse=False)}
    for mode in (True, False):
        layer.train(mode)
        for seed, name in enumerate(VISITS):
            wanted = run(plain[name].train(mode), data(shape, seed), data(shape, 9))
            with domain(name):
                got = run(layer, data(shape, seed), data(shape, 9))
            for a, b in zip(got, wanted, strict=True):
                close(a, b, 1e-12)
    for name in NAMES:
        for key, buffer in plain[name].named_buffers():
            close(layer.get_buffer(f"domains.{name}.{key}"), buffer, 1e-12)
        for key, parameter in plain[name].named_parameters():
            mine = layer.get_parameter(key if affine == "shared" else f"domains.{name}.{key}")
            close(mine.grad, parameter.grad, 1e-12)
    for key, buffer in untouched.items():
        assert torch.equal(layer.get_buffer(key), buffer)


def test_state_dict_keys() -> None:
    """The layer's own stay as they are; the domains' come after; nothing twice."""
    own = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    shared = per_domain(nn.BatchNorm1d(4), NAMES)
    separate = per_domain(nn.BatchNorm1d(4), NAMES, affine="separate")
    kept = [f"domains.{name}.{key}" for name in NAMES for key in own]
    assert list(shared.state_dict()) == own + [key for key in kept if "weight" not in key and "bias" not in key]
    assert list(separate.state_dict()) == own + kept
    assert [name for name, _ in shared.named_parameters()] == own[:2]


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_conversion_there_and_back(affine: str) -> None:
    """No tensor of the model changes; a shared layer stays one; `revert` gives the statistics of before."""
    model = Net()
    keys, tensors, types = list(model.state_dict()), identities(model), [type(m) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    originals = [*layers(model).values()]
    model.shared.eval()
    assert per_domain(model, ["one", "two"], affine=affine) is model
    with pytest.raises(UsageError, match="what it has learnt would be lost"):
        norm.convert(model)
    norm.revert(model)
    model.shared.eval()
    assert per_domain(model, NAMES, affine=affine) is model
    assert isinstance(model.shared, DomainBatchNorm)
    assert model.shared is model.again
    assert not model.shared.training
    assert not any(m.training for m in model.shared.modules())
    assert all(type(layer) is DomainBatchNorm for layer in layers(model).values())
    assert [key for key in model.state_dict() if "domains" not in key] == keys
    assert not any("one" in key for key in model.state_dict())
    assert {name: i for name, i in identities(model).items() if "domains" not in name} == tensors
    assert not any(list(layer.children()) for layer in originals)
    with domain("night"):
        model.train()(data((6, 4)))
    assert norm.revert(model) is model
    assert [type(m) for m in model.modules()] == types
    assert (list(model.state_dict()), identities(model)) == (keys, tensors)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_copies_and_state_dicts(affine: str) -> None:
    """A deep copy, a pickled one, and a fresh model with the state dict compute the same, and go on by themselves."""
    model = per_domain(Net(), NAMES, affine=affine)
    with domain("day"):
        model(data((6, 4)))
    fresh = per_domain(Net(), NAMES, affine=affine)
    fresh.load_state_dict(model.state_dict())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh]  # noqa: S301
    with domain("day"):
        wanted = model.eval()(data((6, 4), 1))
        for twin in twins:
            close(twin.eval()(data((6, 4), 1)), wanted, 0)
            twin.train()(data((6, 4), 2))
        close(model(data((6, 4), 1)), wanted, 0)
    with domain("night"):
        assert not torch.allclose(model(data((6, 4), 1)), wanted)


def test_the_innermost_domain_counts() -> None:
    """Nested, and again the outer one after, also where the body raises."""
    layer: Any = per_domain(plain_layer(nn.BatchNorm1d), NAMES)
    counts = {name: layer.get_buffer(f"domains.{name}.num_batches_tracked") for name in NAMES}
    start = {name: int(count) for name, count in counts.items()}

    def fail() -> None:
        with domain("night"):
            layer(data((5, 4)))
            raise ZeroDivisionError

    with domain("day"):
        with pytest.raises(ZeroDivisionError):
            fail()
        layer(data((5, 4)))
        layer(data((5, 4)))
    assert {name: int(count) - start[name] for name, count in counts.items()} == {"day": 2, "night": 1}


def test_threads_do_not_disturb_each_other() -> None:
    """Each is in its own domain, at the same time; a new thread is in none."""
    layer: Any = per_domain(plain_layer(nn.BatchNorm1d, affine=False), NAMES).eval()
    with torch.no_grad():
        for number, name in enumerate(NAMES):
            layer.get_buffer(f"domains.{name}.running_mean").fill_(number)
            layer.get_buffer(f"domains.{name}.running_var").fill_(1)
    both, found = threading.Barrier(2, timeout=5), {}

    def body(name: str) -> None:
        with pytest.raises(UsageError, match="no domain is set"):
            layer(torch.zeros(2, 4).double())
        with domain(name):
            both.wait()
            found[name] = float(layer(torch.zeros(2, 4).double())[0, 0])
            both.wait()

    with domain("night"):
        threads = [threading.Thread(target=body, args=(name,)) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert {name: round(value) for name, value in found.items()} == {"day": 0, "night": -1}


def test_unknown_domains() -> None:
    """None set, and one that is not there: both name those that are, in evaluation too, and nothing is counted."""
    model = per_domain(Net(), NAMES)
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        with pytest.raises(UsageError, match=r"no domain is set.*day, night"):
            model.train(mode)(data((5, 4)))
        with domain("dusk"), pytest.raises(UsageError, match=r"no domain 'dusk'.*day, night"):
            model(data((5, 4)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("domains", "said"),
    [
        ([], "at least one"),
        ("day", "a list"),
        (["day", "day"], "different"),
        (["a.b"], "'a.b' cannot name"),
        (["1st"], "'1st' cannot name"),
        (["train"], "'train' cannot name"),
        (["items"], "'items' cannot name"),
        (["class"], "'class' cannot name"),
    ],
)
def test_refused_names(domains: list[str], said: str) -> None:
    """Before anything is converted."""
    with pytest.raises(UsageError, match=said):
        per_domain(Net(), domains)


def test_refused_affine() -> None:
    """Another word."""
    with pytest.raises(UsageError, match="affine is True: one of shared, separate"):
        per_domain(Net(), NAMES, affine=True)  # type: ignore[arg-type]


def test_without_updates() -> None:
    """`no_update` reaches the domains' statistics: outputs by batch or by them, and they stay as they are."""
    model, plain = per_domain(nn.Sequential(plain_layer(nn.BatchNorm1d)), NAMES), plain_layer(nn.BatchNorm1d)
    before = copy.deepcopy(model.state_dict())
    x = data((6, 4))
    with domain("day"):
        with no_update(model):
            close(model(x), copy.deepcopy(plain)(x), 1e-12)
        with no_update(model, use="running"):
            close(model(x), plain.eval()(x), 1e-12)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_frozen_weights_stay_frozen() -> None:
    """Separate weights are trained where the layer's were."""
    layer = nn.BatchNorm1d(4).requires_grad_(False)
    assert not any(p.requires_grad for p in per_domain(layer, NAMES, affine="separate").parameters())


def test_half_precision_inputs() -> None:
    """bfloat16 inputs, float32 statistics."""
    layer: Any = per_domain(plain_layer(nn.BatchNorm2d, torch.float32), NAMES)
    plain: Any = plain_layer(nn.BatchNorm2d, torch.float32)
    x = data((6, 4, 3, 2)).to(torch.bfloat16)
    with domain("day"):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, plain(x))
    assert torch.equal(layer.get_buffer("domains.day.running_var"), plain.running_var)
