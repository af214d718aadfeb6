"""Sizes, shapes and behaviour of the networks."""

import pytest
import torch
from torch import nn

from dtrain.errors import UsageError
from dtrain.recipes.resnet import Block, ResNet
from dtrain.recipes.sequence import LSTM, Transformer


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (50, 25_557_032)])
def test_resnet_has_the_published_number_of_parameters(depth: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(ResNet(depth)) == count


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("half", 16), ("small", 32)])
def test_the_stem_decides_the_side_of_the_first_stage(stem: str, side: int) -> None:
    model = ResNet(18, width=2, classes=5, stem=stem, in_channels=1)
    assert model.stem(torch.zeros(2, 1, 32, 32)).shape == (2, 2, side, side)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_calm_blocks_begin_as_their_shortcuts() -> None:
    model = ResNet(18, width=2, calm=True)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == 8
    x = torch.rand(3, 2, 8, 8)
    assert torch.equal(blocks[0](x), x)


@pytest.mark.parametrize("options", [{"depth": 34}, {"stem": "large"}])
def test_resnet_refuses_what_it_has_not(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=name):
        ResNet(**options)  # type: ignore[arg-type]


def sequence_models() -> list[nn.Module]:
    return [LSTM(11, hidden=8, layers=2), Transformer(11, hidden=8, layers=2, heads=2, length=6)]


@pytest.mark.parametrize("model", sequence_models(), ids=["lstm", "transformer"])
def test_logits_do_not_see_what_comes_later(model: nn.Module) -> None:
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 6, 11)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-5


def test_forget_gates_start_open() -> None:
    model = LSTM(5, hidden=3, layers=2)
    for layer in range(2):
        bias = getattr(model.lstm, f"bias_ih_l{layer}") + getattr(model.lstm, f"bias_hh_l{layer}")
        assert bias.tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UsageError, match="hidden=10: must be a multiple of heads=4"):
        Transformer(5, hidden=10, layers=1, heads=4, length=3)
