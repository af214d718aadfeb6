"""LARS and LAMB: as the papers have them, as others have written them, and as torch wants an optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from dtrain import optim
from dtrain.errors import UsageError
from dtrain.optim import BLOCK, LAMB, LARS, Layerwise, in_memory, squares, total_norm

SHAPES = [(40, 60), (7, 3, 3, 3), (60,), (1,), ()]
STEPS = 6
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-14}


def parameters(dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    source = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(s, generator=source, dtype=torch.float64).to(dtype)) for s in shapes]


def give(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients that depend on the step only."""
    source = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=source, dtype=torch.float64) * scale).to(p.dtype)


def train(
    make: Callable[[list[Any]], torch.optim.Optimizer],
    params: Sequence[Parameter] | None = None,
    rates: Sequence[float] = (1.0,) * STEPS,
    first: int = 0,
) -> list[Tensor]:
    """The parameters after steps whose learning rate is multiplied by `rates`. Matrices are the first group."""
    params = parameters() if params is None else params
    groups = [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() <= 1]}]
    optimizer = make(groups)
    base = [group["lr"] for group in optimizer.param_groups]
    for step, rate in enumerate(rates, start=first):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * rate
        give(params, step)
        optimizer.step()
    return [p.detach() for p in params]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], **tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


def differ(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return any((a - b).abs().max() > 1e-4 for a, b in zip(found, wanted, strict=True))


def plain(group: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The groups of `train`, the second with these settings."""
    return [group[0], {**group[1], **changes}]  # type: ignore[index]


# -- norms ------------------------------------------------------------------------------------------------------------

tensors = st.lists(st.integers(0, 5 * BLOCK), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(tensors, st.data(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_norms_have_the_same_bits_however_tensors_are_cut(sizes: list[int], data: st.DataObject, dtype: torch.dtype):
    """At multiples of BLOCK from their start, in whatever memory, with any number of threads."""
    flat = torch.randn(sum(sizes) + 1, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)
    flat = flat.to(dtype)[1:]
    sums = squares(flat, sizes)
    assert sums.shape == (sum(-(-n // BLOCK) for n in sizes),)
    found = []
    for part in flat.split(sizes):
        cuts = data.draw(st.lists(st.integers(0, part.numel() // BLOCK).map(lambda n: n * BLOCK)))
        places = sorted({0, *cuts, part.numel()})
        for a, b in pairwise(places):
            found.append(squares(part[a:b].clone(), [b - a]))
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.float64), *found]), sums)
    assert total_norm(found) == total_norm([sums])
    wanted = float(flat.double().norm())
    assert total_norm([sums]) == pytest.approx(wanted, rel=1e-12 if dtype == torch.float64 else 1e-6, abs=1e-300)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_norms_have_the_same_bits_for_any_number_of_threads(threads: Callable[[int], None]):
    flat = torch.randn(300 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    found = set()
    for count in (1, 2, 3):
        threads(count)
        found.add(total_norm([squares(flat, [flat.numel()])]))
    assert len(found) == 1


def test_norms_of_what_is_not_finite_say_so():
    assert total_norm([]) == total_norm([squares(torch.zeros(0), [0])]) == 0.0
    assert math.isnan(total_norm([squares(torch.tensor([1.0, math.nan]), [2])]))
    assert total_norm([squares(torch.tensor([1.0, -math.inf]), [2])]) == math.inf


def test_elements_come_in_the_order_of_memory():
    x = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    assert torch.equal(in_memory(x, x), torch.arange(24.0))
    assert in_memory(x, x).data_ptr() == x.data_ptr()
    assert torch.equal(in_memory(x.contiguous(), x), torch.arange(24.0))
    gaps = torch.arange(8.0)[::2]
    assert torch.equal(in_memory(gaps, gaps), torch.tensor([0.0, 2.0, 4.0, 6.0]))
    repeated = torch.tensor([[1.0], [2.0]]).expand(2, 3)  # as the gradient of a sum
    assert torch.equal(in_memory(repeated, torch.empty(3, 2).t()), torch.tensor([1.0, 2.0] * 3))


# -- an independent implementation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_that_of_pytorch_optimizer(nesterov: bool, momentum: float, decay: float):
    """Which has no eps, and does not decay vectors."""
    if nesterov and not momentum:
        return
    kw: dict[str, Any] = {"lr": 3.0, "momentum": momentum, "trust_coefficient": 0.02, "nesterov": nesterov}
    rates = [0.1, 0.5, 1.0, 1.0, 0.1, 0.01]
    ours = train(lambda g: LARS(plain(g, weight_decay=0.0), weight_decay=decay, eps=0.0, **kw), rates=rates)
    theirs = train(lambda g: pytorch_optimizer.LARS(g, weight_decay=decay, foreach=False, **kw), rates=rates)
    same(ours, theirs)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lamb_is_that_of_pytorch_optimizer(decay: float):
    """Which adapts all tensors, clamps at 10, adds eps to the update's norm, and corrects the rate for bias alone."""
    kw: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": decay, "eps": 0.0}
    params = parameters()
    assert params[0].norm() > 40 > 10 > params[2].norm() > 0
    ours = train(lambda g: LAMB(g, bias_correction=False, max_weight_norm=10.0, adapt=True, **kw), params)
    theirs = train(lambda g: pytorch_optimizer.Lamb(g, weight_decouple=False, foreach=False, adam_debias=True, **kw))
    same(ours, theirs)
    rates = [1 / (1 - 0.8**t) for t in range(1, STEPS + 1)]
    ours = train(lambda g: LAMB(g, bias_correction=False, max_weight_norm=10.0, adapt=True, **kw), rates=rates)
    same(ours, train(lambda g: pytorch_optimizer.Lamb(g, weight_decouple=False, foreach=False, **kw)))


# -- the papers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["rate outside", "rate inside"])
def test_lars_is_algorithm_1(inside: bool):
    """Of You et al. 2017; with the rate outside of the momentum too."""
    rates = [1.0, 1.0, 0.1, 0.1, 2.0, 0.5]
    lr, m, beta, eta, eps = 2.0, 0.8, 0.03, 0.01, 1e-3
    ours = train(
        lambda g: LARS(g, lr, m, weight_decay=beta, trust_coefficient=eta, eps=eps, lr_in_momentum=inside, adapt=True),
        rates=rates,
    )
    weights = [p.detach().clone() for p in parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        give(weights, step)
        for w, v in zip(weights, velocities, strict=True):
            assert w.grad is not None
            lam = eta * w.norm() / (w.grad.norm() + beta * w.norm() + eps)
            inner, outer = (rate * lr, 1.0) if inside else (1.0, rate * lr)
            v.copy_(m * v + inner * lam * (w.grad + beta * w))
            w.sub_(outer * v)
    same(ours, weights)


def test_where_the_rate_changes_old_gradients_count_at_the_new_one():
    """Goyal et al. 2017, remark 2; while it stays, the paper's form is the same."""
    kw: dict[str, Any] = {"lr": 2.0, "trust_coefficient": 0.05, "weight_decay": 0.01}
    both = [lambda g, inside=inside: LARS(g, lr_in_momentum=inside, **kw) for inside in (False, True)]
    same(*(train(make) for make in both))
    assert differ(*(train(make, rates=[1.0, 1.0, 0.0]) for make in both))
    before = train(both[0], rates=[1.0, 1.0])
    same(train(both[0], rates=[1.0, 1.0, 0.0]), before)  # nothing moves at a rate of 0
    assert differ(train(both[1], rates=[1.0, 1.0, 0.0]), before)


@pytest.mark.parametrize("limit", [None, 5.0])
def test_lamb_is_algorithm_2(limit: float | None):
    """Of You et al. 2020."""
    rates = [1.0, 1.0, 0.1, 0.1, 2.0, 0.5]
    lr, (beta1, beta2), eps, decay = 0.02, (0.7, 0.9), 1e-3, 0.1
    ours = train(
        lambda g: LAMB(g, lr, (beta1, beta2), eps, decay, max_weight_norm=limit, adapt=True),
        rates=rates,
    )
    weights = [p.detach().clone() for p in parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t, rate in enumerate(rates, start=1):
        give(weights, t - 1)
        for w, m, v in zip(weights, first, second, strict=True):
            assert w.grad is not None
            m.copy_(beta1 * m + (1 - beta1) * w.grad)
            v.copy_(beta2 * v + (1 - beta2) * w.grad**2)
            r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            phi = w.norm() if limit is None else w.norm().clamp(max=limit)
            step = r + decay * w
            w.sub_(rate * lr * phi / step.norm() * step)
    same(ours, weights)


def test_tensors_without_a_ratio_make_the_steps_of_sgd_and_adamw():
    rates = [1.0, 0.5, 0.5, 2.0]
    sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    adam: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}
    for nesterov in (False, True):
        ours = train(lambda g: LARS(g, adapt=False, nesterov=nesterov, **sgd), rates=rates)  # noqa: B023
        same(ours, train(lambda g: torch.optim.SGD(g, nesterov=nesterov, **sgd), rates=rates))  # noqa: B023
    adamw = train(lambda g: torch.optim.AdamW(g, **adam), rates=rates)
    same(train(lambda g: LAMB(g, adapt=False, **adam), rates=rates), adamw)
    usual = train(lambda g: LAMB(g, **adam), rates=rates)
    same(usual[2:], adamw[2:])  # vectors
    assert all(differ([a], [b]) for a, b in zip(usual[:2], adamw[:2], strict=True))
    each = train(lambda g: LAMB(plain(g, adapt=True), **adam), rates=rates)
    assert all(differ([a], [b]) for a, b in zip(each, adamw, strict=True))


def test_a_ratio_of_nothing_is_1():
    lars = {"weight_decay": 0.0, "trust_coefficient": 0.5, "eps": 0.0}
    assert [LARS.ratio(lars, *norms) for norms in ((0.0, 2.0), (2.0, 0.0), (3.0, 2.0))] == [1.0, 1.0, 0.75]
    assert LARS.ratio({**lars, "weight_decay": 0.5}, 2.0, 0.0) == 1.0  # 0.5 * 2 / (0.5 * 2)
    assert LARS.ratio({**lars, "weight_decay": 0.25}, 2.0, 0.0) == 2.0
    assert [LAMB.ratio({"max_weight_norm": 2.5}, *norms) for norms in ((0.0, 2.0), (2.0, 0.0), (3.0, 2.0))] == [
        1,
        1,
        1.25,
    ]
    weight = Parameter(torch.zeros(3, 3))
    weight.grad = torch.ones(3, 3)
    LARS([weight], lr=0.5, momentum=0.0).step()
    assert torch.equal(weight.detach(), torch.full((3, 3), -0.5))


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e6))
def test_lars_does_not_see_the_scale_of_the_loss(scale: float):
    found = []
    for s in (1.0, scale):
        params = parameters(shapes=SHAPES[:2])
        optimizer = LARS(params, lr=1.0, trust_coefficient=0.1, eps=0.0)
        for step in range(2):
            give(params, step, s)
            optimizer.step()
        found.append(params)
    same(*found, rtol=1e-10, atol=1e-12)


# -- as torch has it --------------------------------------------------------------------------------------------------

BOTH: list[Any] = [
    pytest.param(lambda g: LARS(g, lr=1.0, weight_decay=0.01, trust_coefficient=0.1), id="LARS"),
    pytest.param(lambda g: LAMB(g, lr=0.01, weight_decay=0.01), id="LAMB"),
]
both = pytest.mark.parametrize("make", BOTH)


@both
def test_states_round_trip(make: Callable[[Any], Layerwise]):
    undisturbed = parameters()
    optimizer = make(undisturbed)
    for step in range(4):
        if step == 2:
            values, state = [p.detach().clone() for p in undisturbed], copy.deepcopy(optimizer.state_dict())
        give(undisturbed, step)
        optimizer.step()
    resumed = [Parameter(v) for v in values]
    other = make(resumed)
    other.load_state_dict(state)
    for step in range(2, 4):
        give(resumed, step)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed, undisturbed, strict=True))
    assert {k for s in state["state"].values() for k in s} in (
        {"momentum_buffer"},
        {"step", "exp_avg", "exp_avg_sq"},
    )


@both
def test_groups_have_settings_of_their_own(make: Callable[[Any], Layerwise]):
    params = parameters(shapes=[(4, 4)] * 3)
    optimizer = make([{"params": params[:1]}, {"params": params[1:2], "lr": 0.0}])
    optimizer.add_param_group({"params": params[2:], "lr": 0.0, "weight_decay": 5.0})
    before = [p.detach().clone() for p in params]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step else 0.0)
    give(params, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    schedule.step()
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [False, True, True]


@both
def test_a_closure_is_called_with_gradients_and_leaves_no_graph(make: Callable[[Any], Layerwise]):
    layer = nn.Linear(3, 3).double()
    optimizer = make(layer.parameters())
    x, calls = torch.ones(2, 3, dtype=torch.float64), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == [True, True]
    assert all(p.is_leaf and p.requires_grad for p in layer.parameters())
    assert not any(t.requires_grad for s in optimizer.state.values() for t in s.values())


@both
def test_gradients_stay_and_parameters_without_one_too(make: Callable[[Any], Layerwise]):
    params = parameters()
    optimizer = make(params)
    give(params, 0)
    params[0].grad = None
    before, grads = params[0].detach().clone(), [copy.deepcopy(p.grad) for p in params]
    optimizer.step()
    assert torch.equal(params[0].detach(), before)
    assert params[0] not in optimizer.state
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(grads, params, strict=True))


@both
def test_the_order_of_memory_does_not_matter(make: Callable[[Any], Layerwise]):
    usual = train(make)
    params = parameters()
    params[1] = Parameter(params[1].detach().contiguous(memory_format=torch.channels_last))
    params[0] = Parameter(params[0].detach().t().contiguous().t())
    same(train(make, params), usual)
    base = torch.zeros(40, 120, dtype=torch.float64)
    params = parameters()
    base[:, ::2] = params[0].detach()
    params[0] = Parameter(base[:, ::2])
    same(train(make, params), usual)


@both
def test_tensors_of_one_device_can_be_looked_at_together(
    make: Callable[[Any], Layerwise], monkeypatch: pytest.MonkeyPatch
):
    """As it is done on a GPU: all norms first, then all moves."""
    usual = train(make)
    monkeypatch.setattr(optim, "_turns", lambda parameters: [parameters] if parameters else [])
    monkeypatch.setattr(optim, "_norms", lambda flats: optim._norms_at_once(flats) if flats else [])
    same(train(make), usual)


@both
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same(make: Callable[[Any], Layerwise]):
    mixed = [Parameter(p.detach().cuda() if i % 2 else p.detach()) for i, p in enumerate(parameters())]
    same([p.cpu() for p in train(make, mixed)], train(make))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_halves_do_not_overflow(make: Callable[[Any], Layerwise], dtype: torch.dtype):
    """Jia et al. 2018, section 3.1: 2400 squares of 250 and more are beyond float16, and so is their norm here."""
    weight = parameters(dtype)[0]
    start = weight.detach().clone()
    optimizer = make([weight])
    weight.grad = torch.full_like(weight, 3000.0)
    assert float(weight.grad.double().norm()) > 65504
    group = {**optimizer.param_groups[0], "lr": 1.0}
    update = optimizer.direct(weight, weight.grad, group)
    if isinstance(optimizer, LARS):
        norm = total_norm([squares(update.view(-1), [update.numel()])])
        assert norm == pytest.approx(float(weight.grad.double().norm()), rel=1e-6)
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert 0 < float((weight.detach() - start).abs().max()) < 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: LARS(p, lr=-1.0), "lr is -1.0"),
        (lambda p: LARS(p, lr=math.nan), "lr is nan"),
        (lambda p: LARS(p, lr=1.0, momentum=1.0), "momentum has 1.0"),
        (lambda p: LARS(p, lr=1.0, momentum=0.0, nesterov=True), "nesterov is True with momentum 0"),
        (lambda p: LARS(p, lr=1.0, trust_coefficient=-1.0), "trust_coefficient"),
        (lambda p: LARS([{"params": p, "weight_decay": -1.0}], lr=1.0), "weight_decay"),
        (lambda p: LAMB(p, betas=(0.9, 1.0)), "betas has 1.0"),
        (lambda p: LAMB(p, eps=-1.0), "eps"),
        (lambda p: LAMB(p, max_weight_norm=0.0), "max_weight_norm is 0.0"),
        (lambda p: LAMB([Parameter(torch.zeros(2, dtype=torch.complex64))]), "complex64"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[Any], Any], said: str):
    with pytest.raises(UsageError, match=said):
        make([Parameter(torch.zeros(2, 2))])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        LAMB(table.parameters()).step()
