"""What a server is told of an optimizer, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dtrain.errors import ProtocolError, UsageError
from dtrain.optim import LAMB, LARS
from dtrain.ps import optimizers
from dtrain.ps.optimizers import decode_hyper, decode_spec, encode_spec, hyper, spec_of


class Mine(torch.optim.SGD):
    pass


def parameter() -> list[Parameter]:
    return [Parameter(torch.zeros(3, 3))]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.optim.LBFGS(parameter()), "several times"),
        (lambda: torch.optim.SparseAdam(parameter()), "sparse"),
        (lambda: Mine(parameter()), "not a class of torch.optim"),
        (lambda: type("Adam", (torch.optim.Adam,), {})(parameter()), "not a class of torch.optim"),
        (lambda: type("LARS", (LARS,), {})(parameter(), lr=0.1), "not a class of torch.optim or dtrain.optim"),
        (lambda: torch.optim.Adam(parameter(), differentiable=True), "differentiable=True"),
        (lambda: torch.optim.Adam([{"params": parameter(), "capturable": True}]), "capturable=True in group 0"),
        (lambda: torch.optim.SGD(parameter(), lr=math.inf), "lr is inf"),
        (lambda: _with("momentum", "x"), "momentum is 'x'"),
        (lambda: _with("nesterov", 1), "nesterov is 1"),
    ],
)
def test_an_optimizer_that_servers_cannot_step_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        spec_of(make())


def _with(key: str, value: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameter(), lr=0.1)
    optimizer.param_groups[0][key] = value
    return optimizer


def test_tensors_become_numbers_and_the_keys_of_schedulers_stay_behind():
    optimizer = torch.optim.Adam(parameter(), lr=torch.tensor(0.5), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    [group] = hyper(optimizer)
    assert group["lr"] == 0.5
    assert type(group["lr"]) is float
    assert group["betas"] == [0.5, 0.75]
    assert not {"initial_lr", "params", "foreach", "fused", "capturable"} & group.keys()
    assert spec_of(optimizer).groups[0]["betas"] == (0.5, 0.75)


def adam(**changes: Any) -> list[Any]:
    spec = encode_spec(spec_of(torch.optim.Adam(parameter())))
    spec[1][0].update(changes)
    return spec


def lamb(**changes: Any) -> list[Any]:
    spec = encode_spec(spec_of(LAMB(parameter())))
    spec[1][0].update(changes)
    return spec


@pytest.mark.parametrize("changes", [{}, {"adapt": True}, {"adapt": False, "max_weight_norm": 10.0}])
def test_lamb_can_be_told(changes):
    found = decode_spec(json.loads(json.dumps(lamb(**changes))))
    assert found == spec_of(LAMB(parameter(), **changes))
    assert (found.layerwise, found.whole) == (True, False)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        ["Adam"],
        ["Optimizer", []],
        ["LBFGS", [{}]],
        ["__init__", [{}]],
        [["Adam"], [{}]],
        ["Adam", []],
        ["Adam", {}],
        ["Adam", [[]]],
        ["SGD", adam()[1]],
        adam(lr="0.1"),
        adam(lr=True),
        adam(lr=None),
        adam(lr=math.nan),
        adam(lr=-1.0),
        adam(lr=10**400),
        adam(betas=[0.9]),
        adam(betas=[0.9, 2.0]),
        adam(betas=0.9),
        adam(betas=[0.9, None]),
        adam(amsgrad=0),
        adam(fused=True),
        adam(params=[]),
        lamb(adapt=0),
        lamb(adapt="yes"),
        lamb(max_weight_norm="x"),
        lamb(max_weight_norm=-1.0),
        lamb(lr=None),
        ["LARS", lamb()[1]],
        ["Muon", [{**encode_spec(spec_of(torch.optim.Muon(parameter())))[1][0], "ns_steps": 10**6}]],
        ["Muon", [{**encode_spec(spec_of(torch.optim.Muon(parameter())))[1][0], "adjust_lr_fn": "x"}]],
    ],
    ids=repr,
)
def test_a_spec_that_cannot_be_meant_is_refused(data):
    with pytest.raises(ProtocolError):
        decode_spec(data)


@pytest.mark.parametrize(
    ("name", "kw", "changes", "said"),
    [
        ("Adam", {}, {"amsgrad": True}, "amsgrad of group 0 was False"),
        ("RMSprop", {}, {"momentum": 0.9}, "momentum of group 0"),
        ("Adam", {}, {"lr": math.inf}, "lr is inf"),
        ("Adam", {}, {"extra": 1}, "exactly"),
    ],
)
def test_hyperparameters_that_cannot_be_meant_are_refused(name, kw, changes, said):
    optimizer = optimizers.CLASSES[name][0](parameter(), **kw)
    spec, data = spec_of(optimizer), hyper(optimizer)
    assert decode_hyper(spec, data) == spec.groups
    with pytest.raises(ProtocolError, match=said):
        decode_hyper(spec, [{**data[0], **changes}])
    with pytest.raises(ProtocolError, match="2 groups"):
        decode_hyper(spec, data * 2)
