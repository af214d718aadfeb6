"""Rules of the learning rate, and the remarks of Goyal et al. 2017 as facts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dtrain.data import Loader
from dtrain.errors import UsageError
from dtrain.largebatch import LARS, correct_momentum, parameter_groups, scale, zero_last_norms
from dtrain.recipes.resnet import Block, ResNet
from tests.small import Points, make_model, mean_square


@pytest.mark.parametrize(("rule", "factor"), [("linear", 32.0), ("sqrt", 32**0.5), ("none", 1.0)])
def test_rules(rule: str, factor: float) -> None:
    """From a batch of 256 to one of 8192."""
    assert scale(8192, 256, rule) == pytest.approx(factor)
    assert scale(8, 256, rule) == pytest.approx(1 / factor)


@pytest.mark.parametrize("wrong", [(8, 8, "cubic"), (0, 8, "linear"), (8, 0, "linear"), (8, -1, "sqrt")])
def test_rules_that_cannot_be_meant(wrong: tuple[float, float, str]) -> None:
    with pytest.raises(UsageError, match=r"rule is|batch is"):
        scale(*wrong)


def test_linear_scaling_of_a_step_is_k_steps_where_the_gradient_stays() -> None:
    """Section 2.1, equations 3 and 4: on a loss whose gradient is the same everywhere, they are equal."""
    direction = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ends = []
    for batch, count in ((1, 8), (8, 1)):
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1 * scale(batch, 1))
        for _ in range(count):
            optimizer.zero_grad()
            (w @ direction).backward()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-14, atol=0)


def test_groups_for_weight_decay() -> None:
    """Every trained parameter once; only matrices and kernels are decayed."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.LayerNorm(2))
    model[3].bias.requires_grad_(False)
    groups = parameter_groups(model, 1e-4)
    decayed, plain = ({id(p) for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert decayed == {id(model[0].weight), id(model[3].weight)}
    assert plain == {id(p) for p in (model[0].bias, *model[1].parameters(), *model[4].parameters())}
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    torch.optim.SGD(groups, lr=0.1).step()


def one_step(loss_times: float, lr: float, weight_decay: float) -> list[Tensor]:
    model = make_model("plain", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    (mean_square(model, Points(8)[:8]) * loss_times).backward()  # type: ignore[index]
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_remark_1_to_scale_the_loss_is_not_to_scale_the_rate() -> None:
    """Section 3: it is the same without weight decay, and not with it."""
    for decay, same in ((0.0, True), (0.1, False)):
        pairs = zip(one_step(4.0, 0.05, decay), one_step(1.0, 0.2, decay), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in pairs) is same


def reference(rates: list[float], gradients: list[Tensor], momentum: float) -> Tensor:
    """w after steps of equation 9 of the paper: u = m u + g, w = w - lr u."""
    w, u = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for rate, gradient in zip(rates, gradients, strict=True):
        u = momentum * u + gradient
        w = w - rate * u
    return w


class RateInside(torch.optim.Optimizer):
    """v = m v + lr g, w = w - v: equation 10 without its correction."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                v.mul_(0.9).add_(p.grad, alpha=group["lr"])
                p.sub_(v)


@pytest.mark.parametrize("kind", ["torch", "inside", "inside, corrected"])
def test_remark_2_momentum_correction(kind: str) -> None:
    """Rates that change: torch's SGD is equation 9; with the rate inside, it is only with the correction."""
    generator = torch.Generator().manual_seed(0)
    rates = [0.1, 0.4, 0.4, 1.6, 0.02]
    gradients = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in rates]
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=rates[0], momentum=0.9) if kind == "torch" else RateInside([w], rates[0])
    for rate, gradient in zip(rates, gradients, strict=True):
        if kind == "inside, corrected":
            correct_momentum(optimizer, rate / optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = rate
        w.grad = gradient.clone()
        optimizer.step()
    equal = torch.allclose(w.detach(), reference(rates, gradients, 0.9), rtol=1e-12, atol=1e-14)
    assert equal is (kind != "inside")


def test_lars_with_the_rate_inside_and_the_correction_is_lars_without() -> None:
    """Its default form is the corrected one."""
    generator = torch.Generator().manual_seed(0)
    rates = [0.1, 0.4, 0.02]
    gradients = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in rates]
    ends = []
    for inside in (True, False):
        w = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        optimizer = LARS([w], lr=rates[0], lr_in_momentum=inside, trust_coefficient=0.1)
        for rate, gradient in zip(rates, gradients, strict=True):
            if inside:
                correct_momentum(optimizer, rate / optimizer.param_groups[0]["lr"])
            optimizer.param_groups[0]["lr"] = rate
            w.grad = gradient.clone()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_momentum_that_needs_no_correction() -> None:
    w = torch.zeros(1, requires_grad=True)
    with pytest.raises(UsageError, match="needs no correction"):
        correct_momentum(torch.optim.SGD([w], lr=0.1, momentum=0.9), 2.0)
    with pytest.raises(UsageError, match="LARS keeps the learning rate out"):
        correct_momentum(LARS([w], lr=0.1), 2.0)
    with pytest.raises(UsageError, match="factor is 0"):
        correct_momentum(RateInside([w], 0.1), 0.0)


def test_remark_3_and_4_one_shuffle_cut_over_workers() -> None:
    """Workers' samples of a step are the one worker's, so the mean over the global batch is the one worker's."""
    orders = {}
    for workers in (1, 4):
        loaders = [Loader(Points(40), global_batch=8, rank=r, world_size=workers, seed=5) for r in range(workers)]
        epochs = [[m.batch[0] for s in loader.epoch(1) for m in s.micro_batches] for loader in loaders]
        orders[workers] = [torch.cat(parts) for parts in zip(*epochs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(orders[1], orders[4], strict=True))


class Basic(nn.Module):
    """As torchvision's BasicBlock: own layers, then a shortcut in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)
        return out


def test_residual_blocks_begin_as_their_shortcuts() -> None:
    """Section 5.1: only the last norm of the residual branch is zero, and the block gives what the shortcut gives."""
    model = nn.Sequential(Basic(), Basic())
    assert zero_last_norms(model, Basic) == 2
    x = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(model[0](x), model[0].downsample(x))
    assert all((n.weight == 1).all() for m in model for n in (m.bn1, m.downsample[1]))  # type: ignore[union-attr]


def test_of_the_recipes_network_it_is_what_the_recipe_does() -> None:
    """Its blocks keep the residual branch in a part of their own."""
    torch.manual_seed(0)
    model = ResNet(18, width=4, classes=3, stem="half", in_channels=1)
    calm = ResNet(18, width=4, classes=3, stem="half", in_channels=1, calm=True)
    plain = copy.deepcopy(model)
    assert zero_last_norms(model, Block) == 8
    for (name, p), q, before in zip(model.named_parameters(), calm.parameters(), plain.parameters(), strict=True):
        zero = bool((q == 0).all()) and q.ndim == 1 and not bool((before == 0).all())
        assert bool((p == 0).all()) == (zero or bool((before == 0).all())), name


def test_a_model_without_such_blocks() -> None:
    with pytest.raises(UsageError, match="no block of class Basic"):
        zero_last_norms(nn.Linear(1, 1), Basic)
    with pytest.raises(UsageError, match="Linear has no batch norm"):
        zero_last_norms(nn.Sequential(nn.Linear(1, 1)), nn.Linear)
