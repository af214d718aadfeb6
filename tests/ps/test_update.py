"""Optimizers on ranges: the same bits for any number of servers, and what torch's own optimizer does."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from dtrain.errors import UsageError
from dtrain.optim import squares, total_norm
from dtrain.ps.optimizers import ELEMENTWISE, LAYERWISE, WHOLE, OptimizerSpec, spec_of
from dtrain.ps.pieces import Piece, chunks, cut
from dtrain.ps.placement import place
from dtrain.ps.update import ShardOptimizer
from tests.ps.stepping import CASES, IDS, STEPS, Model, Servers, flat, same_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "kw"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_servers_computes_the_same_bits_and_what_torch_does(name, kw, dtype):
    own = Model(name, kw, dtype)
    own.run(range(STEPS))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    one = None
    for num_servers in (1, 2, 3, 5):
        servers = Servers(Model(name, kw, dtype), num_servers, limit=2048 * num_servers)
        servers.run(range(STEPS))
        parameters = servers.parameters()
        if one is None:
            one = parameters, servers.state()
        assert all(torch.equal(a, b) for a, b in zip(parameters, one[0], strict=True)), num_servers
        same_state(servers.state(), one[1])
    for a, b in zip(one[0], own.parameters, strict=True):
        torch.testing.assert_close(a, b.detach(), **tolerance)
    same_state(one[1], own.optimizer.state_dict()["state"], **tolerance)


@pytest.mark.parametrize(("name", "kw"), [case for case in CASES if case[0] in LAYERWISE], ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_trust_ratios_have_the_same_bits_on_workers_and_on_servers_cut_or_whole(name, kw, dtype):
    own = Model(name, kw, dtype)
    own.run(range(STEPS))
    for num_servers, whole in ((1, False), (3, False), (1, True), (3, True)):
        servers = Servers(Model(name, kw, dtype), num_servers, limit=2048, whole=whole)
        assert servers.halves is not whole
        assert any(p.shape is None for *_, shard in servers.shards for p in shard.pieces) is not whole
        servers.run(range(STEPS))
        assert all(torch.equal(a, b) for a, b in zip(servers.parameters(), own.parameters, strict=True))
        same_state(servers.state(), own.optimizer.state_dict()["state"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_half_precision_does_not_depend_on_the_number_of_servers(name, dtype):
    kw = {"lr": 0.01, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    found = []
    for num_servers in (1, 3):
        servers = Servers(Model(name, kw, dtype), num_servers)
        servers.run(range(STEPS))
        found.append(servers.parameters())
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*found, strict=True))


def test_every_optimizer_of_torch_is_known():
    classes = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert classes - {"LBFGS", "SparseAdam"} == ELEMENTWISE | WHOLE
    assert {name for name, _ in CASES} == ELEMENTWISE | WHOLE | LAYERWISE


def test_pieces_that_do_not_fit_are_refused():
    spec = OptimizerSpec("Muon", spec_of(torch.optim.Muon([Parameter(torch.zeros(3, 3))])).groups)
    for pieces in ([], [Piece(0, 0, 0, 5, (5,))], [Piece(0, 1, 0, 6, (2, 3))], [Piece(0, 0, 0, 6)]):
        with pytest.raises(UsageError):
            ShardOptimizer(spec, pieces, torch.zeros(6))


# -- norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norm_has_the_same_bits_for_any_cuts(dtype):
    model = Model("Adam", {"lr": 0.1}, dtype)
    gradients = [g for g in model.gradients(2) if g is not None]
    buffer = torch.cat([flat(g) for g in gradients])
    tensors = [Piece(i, 0, 0, g.numel(), tuple(g.shape)) for i, g in enumerate(gradients)]
    norms, sums = set(), []
    for num_servers in (1, 2, 3, 5):
        [ranges] = place([[p.numel for p in tensors]], [dtype.itemsize], num_servers)
        sums = []
        for r in ranges:
            pieces = cut(tensors, r.start, r.stop)
            for c in chunks(pieces, 3000 * num_servers, 128):
                sums.append(squares(buffer[r.start + c.start : r.start + c.stop], [p.numel for p in c.pieces], 128))
        norms.add(total_norm(sums))
    one = [
        squares(buffer[o : o + 128], [p.numel for p in cut(tensors, o, o + 128)], 128) for o in range(0, 19_968, 128)
    ]
    first = 19_650 // 128  # full blocks of the first tensor
    assert torch.equal(torch.cat(one)[:first], torch.cat(sums)[:first])
    [norm] = norms
    expected = torch.linalg.vector_norm(buffer.double())
    assert norm == pytest.approx(float(expected), rel=1e-14 if dtype == torch.float64 else 1e-7)
    for p, g in zip(model.parameters, gradients, strict=True):
        p.grad = g
    clipped = torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
    assert norm == pytest.approx(float(clipped), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_norm_that_is_not_finite_says_so():
    for value in (math.nan, math.inf):
        gradient = torch.tensor([1.0, value])
        assert not math.isfinite(total_norm([squares(gradient, [2], 128)]))
    assert total_norm([]) == 0.0
