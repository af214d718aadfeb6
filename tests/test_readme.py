"""What the README shows is what runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("dtrain ")]


def test_the_loop_trains_and_equals_the_plain_loop_on_one_worker():
    """The `+` side of the diff, run as it stands, makes the model that a plain loop over the same batches makes."""
    code = "\n".join(line[1:] for line in blocks("diff")[0].splitlines() if not line.startswith("-"))
    data = TensorDataset(torch.randn(150, 5, dtype=torch.float64), torch.randint(0, 3, (150,)))
    model, plain = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "data": data, "optimizer": optimizer, "F": F}
    exec(code, names)  # noqa: S102  (our own README)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for epoch in range(3):
        for (x, y), _ in dtrain.Loader(data, global_batch=64).batches(epoch):
            other.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            other.step()
    torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=1e-12)
    names["replica"].close()


def test_the_trainer_trains():
    code = next(block for block in blocks("python") if "Trainer(" in block)
    data = TensorDataset(torch.randn(40, 5), torch.randint(0, 3, (40,)))
    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    names = {
        "dtrain": dtrain,
        "comm": dtrain.connect(),
        "model": model,
        "F": F,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": dtrain.Loader(data, global_batch=64),
    }
    exec(code, names)  # noqa: S102  (our own README)
    assert not torch.equal(before, model.weight)
    names["trainer"].replica.close()


def test_a_function_runs_as_three_workers():
    code = next(block for block in blocks("python") if "dtrain.run(" in block)
    names = {"dtrain": dtrain}
    exec(code.replace("dtrain.run(", "found = dtrain.run("), names)  # noqa: S102  (our own README)
    assert names["found"] == [0, 10, 20]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    words = shlex.split(command)[1:]
    own, rest = cli._split_launch(words)
    parsed = tyro.cli(cli._COMMANDS[own[0]][0], args=own[1:])
    assert parsed is not None
    assert bool(rest) == (own[0] == "launch")


def test_files_that_are_linked_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (Path(__file__).parent.parent / link).exists()] == []
