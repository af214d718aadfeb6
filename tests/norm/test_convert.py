"""One knob: what a norm batch means for any micro-batch and number of workers, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dtrain import norm
from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.norm.convert import Sharing, sharing
from dtrain.norm.layer import layers, swap
from tests.norm.test_sync import close, data, on_threads, plain_layer, run


@pytest.mark.parametrize(
    ("norm_batch", "micro_batch", "workers", "wanted"),
    [
        ("worker", None, 4, Sharing()),
        ("global", None, 4, Sharing(workers=4)),
        (8, 32, 4, Sharing(ghost=8)),
        (31, 32, 4, Sharing(ghost=31)),
        (32, 32, 4, Sharing(workers=1)),
        (64, 32, 4, Sharing(workers=2)),
        (128, 32, 4, Sharing(workers=4)),
        (32, 32, 1, Sharing()),
    ],
)
def test_how_it_is_had(norm_batch: int | str, micro_batch: int | None, workers: int, wanted: Sharing) -> None:
    assert sharing(norm_batch, world_size=workers, micro_batch=micro_batch) == wanted


@pytest.mark.parametrize(
    ("norm_batch", "micro_batch", "workers", "words"),
    [
        (256, 32, 4, "only 128 samples on all workers together"),
        (48, 32, 4, "32, 64, 128, or 'global'"),
        (96, 32, 4, "do not give that"),
        (64, 32, 3, "Possible here: less than 32 .ghost groups., 32, 96"),
        (8, None, 4, "say how many samples"),
        (0, 32, 4, "a number of samples"),
        (-1, 32, 4, "a number of samples"),
        ("all", 32, 4, "worker, global"),
    ],
)
def test_what_cannot_be_had(norm_batch: int | str, micro_batch: int | None, workers: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sharing(norm_batch, world_size=workers, micro_batch=micro_batch)


@pytest.mark.parametrize("shares", [(4, 4, 4, 4), (1, 7, 5, 3), (0, 8, 8, 0)])
def test_groups_of_workers(shares: tuple[int, ...]) -> None:
    """Each pair of workers normalises by its own samples; the running statistics are everybody's, on everybody."""
    x, weights = data((16, 4, 3, 2)), data((16, 4, 3, 2), 9)
    half = [sum(shares[:2]), sum(shares[2:])]
    reference, whole = plain_layer(nn.BatchNorm2d), plain_layer(nn.BatchNorm2d)
    parts = [run(reference, a, b) for a, b in zip(x.split(half), weights.split(half), strict=True)]
    whole(x)

    def body(comm: Backend) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        layer = norm.convert(plain_layer(nn.BatchNorm2d), norm_batch=8, micro_batch=4, comm=comm)
        y, dx = run(layer, x.split(shares)[comm.rank], weights.split(shares)[comm.rank])
        return y, dx, [p.grad for p in layer.parameters() if p.grad is not None], list(layer.buffers())

    found = on_threads(body, workers=4)
    close(torch.cat([f[0] for f in found]), torch.cat([p[0] for p in parts]))
    close(torch.cat([f[1] for f in found]), torch.cat([p[1] for p in parts]))
    for mine, theirs in zip(zip(*(f[2] for f in found), strict=True), reference.parameters(), strict=True):
        assert theirs.grad is not None
        close(torch.stack(mine).sum(0), theirs.grad)
    for worker in found:
        for a, b in zip(worker[3], whole.buffers(), strict=True):
            close(a.double(), b.double())


@pytest.mark.parametrize("norm_batch", [2, 4, 8, 16])
def test_a_norm_batch_means_the_same_for_one_worker_and_four(norm_batch: int) -> None:
    """The same samples share statistics whether a worker has 16 or four workers have 4 each."""
    x, weights = data((16, 4, 5)), data((16, 4, 5), 1)
    alone = norm.convert(plain_layer(nn.BatchNorm1d), norm_batch=norm_batch, micro_batch=16)
    wanted = run(alone, x, weights)

    def body(comm: Backend) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        layer = norm.convert(plain_layer(nn.BatchNorm1d), norm_batch=norm_batch, micro_batch=4, comm=comm)
        found = run(layer, x.split(4)[comm.rank], weights.split(4)[comm.rank])
        with norm.merged_statistics(layer, comm):
            return found, [b.clone() for b in layer.buffers()]

    found = on_threads(body, workers=4)
    for number in (0, 1):
        close(torch.cat([f[0][number] for f in found]), wanted[number])


def test_kinds_replace_each_other_and_go_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False)))
    shared = model[1]
    model.append(shared)
    before = copy.deepcopy(model.state_dict())
    objects = list(map(id, [*model.parameters(), *model.buffers()]))
    for norm_batch in (2, "global", 8, "worker", 4):
        norm.convert(model, norm_batch=norm_batch, micro_batch=8)
        assert model[1] is model[3]
        assert list(map(id, [*model.parameters(), *model.buffers()])) == objects
    norm.revert(model)
    assert [type(layer) for layer in layers(model).values()] == [nn.BatchNorm1d] * 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_a_model_that_cannot_be_converted_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LazyBatchNorm1d())
    with pytest.raises(UsageError, match="1 is a LazyBatchNorm1d"):
        norm.convert(model, norm_batch=2, micro_batch=8)
    assert type(model[0]) is nn.BatchNorm1d


def test_swap_of_a_layer_by_itself() -> None:
    assert type(swap(nn.BatchNorm2d(3), lambda layer, path: nn.Identity())) is nn.Identity
