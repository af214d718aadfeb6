"""What optimizers keep: from servers to torch, to other servers, and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.errors import ProtocolError, UsageError
from dtrain.ps import optimizers
from dtrain.ps.optimizers import spec_of
from dtrain.ps.pieces import Piece
from dtrain.ps.states import merge_states, split_state
from dtrain.ps.update import ShardOptimizer
from tests.ps.stepping import CASES, IDS, SHAPES, STEPS, Model, Servers, same_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "kw"), CASES, ids=IDS)
def test_states_round_trip_and_training_goes_on(name, kw):
    """Servers -> torch's own optimizer, servers of another number -> as if nothing had been."""
    dtype = torch.float32
    undisturbed = Servers(Model(name, kw, dtype), 2)
    undisturbed.run(range(2))
    state, parameters = undisturbed.state(), [p.clone() for p in undisturbed.parameters()]
    undisturbed.run(range(2, STEPS))

    def resumed(flags: dict[str, Any]) -> Model:
        model = Model(name, kw, dtype, **flags)
        with torch.no_grad():
            for p, value in zip(model.parameters, parameters, strict=True):
                p.copy_(value)
        return model

    servers = Servers(resumed({}), 3)
    servers.load(state)
    same_state(servers.state(), state)
    servers.run(range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(servers.parameters(), undisturbed.parameters(), strict=True))
    same_state(servers.state(), undisturbed.state())

    plain = resumed(optimizers.CLASSES[name][1])
    full = plain.optimizer.state_dict()
    plain.optimizer.load_state_dict(
        {**full, "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state.items()}}
    )
    same_state(plain.optimizer.state_dict()["state"], state)
    plain.run(range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, undisturbed.parameters(), strict=True))


def test_what_torch_has_kept_comes_back_from_servers():
    own = Model("Adam", {"lr": 0.1, "amsgrad": True})
    own.run(range(STEPS))
    state = own.optimizer.state_dict()["state"]
    servers = Servers(Model("Adam", {"lr": 0.1, "amsgrad": True}), 5)
    servers.load(state)
    same_state(servers.state(), state)
    assert sum(shard.state_bytes for *_, shard in servers.shards) >= 3 * 8 * sum(map(math.prod, SHAPES))


def shard(name: str = "Adam", numel: int = 6, **kw: Any) -> ShardOptimizer:
    spec = spec_of(optimizers.CLASSES[name][0]([Parameter(torch.zeros(3, 3))], **kw))
    return ShardOptimizer(spec, [Piece(0, 0, 0, numel, (2, numel // 2))], torch.zeros(numel))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Adam", {"exp_avg": torch.zeros(5)}, "exp_avg"),
        ("Adam", {"exp_avg": torch.zeros(6, dtype=torch.float64)}, "float64"),
        ("Adam", {"step": torch.zeros(1)}, "step"),
        ("Adam", {"step": torch.zeros((), dtype=torch.int64)}, "step"),
        ("Adam", {"mine": torch.zeros(6)}, "mine"),
        ("Adafactor", {"row_var": torch.zeros(3)}, "row_var"),
        ("Adafactor", {"variance": torch.zeros(6)}, "variance"),
        ("Muon", {"momentum_buffer": torch.zeros(2, 3)}, "momentum_buffer"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name, changes, said):
    optimizer = shard(name)
    optimizer.step(torch.ones(6), [True])
    [state] = optimizer.state()
    with pytest.raises(ProtocolError, match=said):
        optimizer.load([{**state, **changes}])
    with pytest.raises(ProtocolError, match="2 pieces"):
        optimizer.load([state, state])
    if name == "Adam":
        with pytest.raises(ProtocolError, match="keeps"):
            optimizer.load([{"step": torch.tensor(1.0)}])


def test_states_that_do_not_make_up_a_parameter_are_refused():
    like = {0: torch.empty(6)}

    def part(start: int, step: float, **more: Tensor) -> tuple[Piece, dict[str, Tensor]]:
        return Piece(0, 0, start, 3), {"step": torch.tensor(step), "exp_avg": torch.zeros(3), **more}

    assert merge_states([part(3, 1.0), part(0, 1.0)], like)[0]["exp_avg"].shape == (6,)
    for parts, said in [
        ([part(3, 1.0)], "begins at 3"),
        ([part(0, 1.0)], "3 elements of 6"),
        ([part(0, 1.0), part(3, 2.0)], "differ in step"),
        ([part(0, 1.0), part(3, 1.0, x=torch.zeros(3))], "differ"),
    ]:
        with pytest.raises(ProtocolError, match=said):
            merge_states(parts, like)
    with pytest.raises(UsageError, match="another model"):
        split_state({0: {"exp_avg": torch.zeros(5)}}, [Piece(0, 0, 0, 6)], like)
