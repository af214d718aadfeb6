"""LARS and LAMB on servers: one loop's result, the workers' bits, and any servers' the same, where tensors are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dtrain
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.errors import DtrainError
from dtrain.optim import BLOCK, LAMB, LARS
from dtrain.ps import server
from tests import test_pushes as pushing
from tests.conftest import remembered
from tests.parity import test_server_update as parity
from tests.parity.test_laws import largest_difference, same_bits, state_of
from tests.parity.test_server_update import (
    WORKERS,
    Case,
    Conv,
    Tied,
    of,
    plain,
    train,
)
from tests.ps.serving import Running, all_of, own_socket, workers_of


@pytest.fixture(autouse=True)
def brief_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LAST_WORDS_S", 0.3)


pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


def model_of(case: Case, rank: int = 0) -> Any:
    """With weights from a generator of its own: workers are threads here, and share torch's."""
    model, source = case.model().to(case.dtype), torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.2, 0.2, generator=source)
    return model


@pytest.fixture(scope="module", autouse=True)
def own_generators() -> Iterator[None]:
    mlp, begin = pushing.mlp, pushing.mlp().state_dict()

    def the_same(dtype: torch.dtype = torch.float64) -> nn.Sequential:
        model = mlp(dtype)
        model.load_state_dict(begin)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "model_of", model_of)
        patch.setattr(pushing, "mlp", the_same)
        yield


def groups(model: Any) -> torch.optim.Optimizer:
    """Three groups, with what each has of its own; in another order than the model's."""
    return LAMB(
        [
            {"params": [*model.layers[2].parameters(), model.scale], "lr": 0.02, "betas": (0.8, 0.9), "adapt": True},
            {"params": [*model.layers[0].parameters(), *model.never.parameters()], "weight_decay": 0.0},
            {"params": [*model.optional.parameters(), *model.layers[1].parameters()], "max_weight_norm": 2.0},
        ],
        lr=0.01,
        weight_decay=0.1,
    )


lars = of(LARS, lr=1.0, weight_decay=0.01, trust_coefficient=0.05)
lamb = of(LAMB, lr=0.01, weight_decay=0.1)
CASES = {
    "lars": Case(optimizer=lars, halve_every=2),
    "lars, nesterov, rate inside": Case(
        optimizer=of(LARS, lr=1.0, nesterov=True, lr_in_momentum=True, trust_coefficient=0.05), halve_every=2
    ),
    "lars, clipped": Case(optimizer=lars, clip=0.05),
    "lamb": Case(optimizer=lamb, epochs=3),
    "lamb, clipped": Case(optimizer=lamb, clip=0.05, pieces=(5, 1, 3), shares=(2, 0, 5)),
    "groups and a schedule": Case(optimizer=groups, clip=0.05, halve_every=2, epochs=3),
    "used by none": Case(optimizer=lamb, optional=lambda step, rank: step % 2 == 0),
    "used by some, late": Case(optimizer=lars, optional=lambda step, rank: rank == step - 2, clip=0.1),
    "empty shares": Case(optimizer=lars, shares=(0, 1, 0)),
    "frozen and unfrozen": Case(optimizer=groups, freeze=((), (0, 1), (0, 1), (1,), ()), clip=0.1),
    "tied and transposed": Case(model=Tied, optimizer=lamb),
    "batch norm": Case(model=Conv, optimizer=of(LARS, lr=1.0, trust_coefficient=0.05, adapt=True)),
    "one bucket": Case(optimizer=lars, halve_every=2, bucket_mb=8.0),
    "many buckets": Case(optimizer=lars, halve_every=2, bucket_mb=1e-4),
    "float32": Case(optimizer=lamb, dtype=torch.float32, clip=0.1),
    "float16": Case(optimizer=lars, dtype=torch.float16),
}
JOBS: dict[str, dict[str, Any]] = {
    "1 server": {"servers": 1},
    "2 servers, sockets only": {"servers": 2, "lanes": "off"},
    "3 servers": {"servers": 3},
    "3 servers, whole tensors": {"servers": 3, "on_loss": "drop"},
}


def job(
    fn: Callable[[Backend], Any], folder: Path, servers: int, workers: int = WORKERS, lanes: str = "auto", **terms: Any
) -> list[Any]:
    """What each worker returns, with servers in threads."""
    running = [
        Running(own_socket(folder), workers, server=s, num_servers=servers, timeout_s=30.0, **terms)
        for s in range(servers)
    ]

    def work(comm: Any) -> Any:
        try:
            return fn(comm)
        finally:
            comm.close()

    joined = workers_of(",".join(r.address for r in running), workers, lanes=lanes, timeout_s=30.0)
    try:
        return all_of(*(lambda comm=comm: work(comm) for comm in joined))  # type: ignore[misc]
    finally:
        ended = [r.ended() for r in running]
        print("servers:", ended)  # shown where a test fails


QUICK = ("lars", "lamb, clipped", "groups and a schedule")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]

Trained = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What a case ends with in a job, on each worker. All quick cases are run at once, and all others."""

    @remembered
    def run(name: str, quick: bool) -> list[dict[str, Any]]:
        cases = {n: case for n, case in CASES.items() if (n in QUICK) is quick}
        folder = tmp_path_factory.mktemp("s")
        return job(lambda comm: {n: train(comm, case) for n, case in cases.items()}, folder, **JOBS[name])

    return lambda name, case: [worker[case] for worker in run(name, case in QUICK)]


@pytest.mark.parametrize("name", ALL)
def test_servers_step_as_one_loop_does(name: str, trained: Trained) -> None:
    """In float64, to 1e-12, also where the mean gradient is clipped first."""
    one, dtype = plain(CASES[name]), CASES[name].dtype
    assert largest_difference(one, state_of(model_of(CASES[name]))) > 1e-3
    for run in JOBS:
        for worker in trained(run, name):
            assert largest_difference(worker, one) <= LIMITS[dtype]


LIMITS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.02}


@pytest.mark.parametrize("name", ALL)
def test_servers_do_not_change_a_bit(name: str, trained: Trained) -> None:
    """Nor does it matter whether tensors are cut and norms agreed on, or whole ones are placed."""
    first, *others = [worker for run in JOBS for worker in trained(run, name)]
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("name", [n for n in ALL if CASES[getattr(n, "values", (n,))[0]].clip is None])
def test_servers_step_as_workers_do(name: str, trained: Trained) -> None:
    """With one processor thread, to the bit; torch's clipping adds the norm up in another order."""
    case = replace(CASES[name], update="worker")
    found = dtrain.run(train, case, workers=WORKERS, timeout_s=30.0)
    assert all(same_bits(worker, trained("3 servers", name)[0]) for worker in found)


@pytest.mark.slow
def test_buckets_do_not_change_a_bit(trained: Trained) -> None:
    lars = trained("3 servers", "lars")[0]
    assert same_bits(trained("3 servers", "one bucket")[0], lars)
    assert same_bits(trained("3 servers", "many buckets")[0], lars)


def test_tensors_are_cut(own_temporary_directory: Path) -> None:
    """Or the above would show little: three servers have parts of the same tensor, at multiples of a block."""

    def body(comm: Backend) -> tuple[list[set[int]], str]:
        model = model_of(CASES["lars"])
        replica = replicate(comm, model, lars(model))
        hosted: Any = replica.pushes._hosted  # type: ignore[union-attr]
        starts = [{p.start for r in layout.ranges for _, p in r.pieces} for layout in hosted._layouts]
        return starts, hosted._layouts[0].whole

    cut, whole = (job(body, own_temporary_directory, 3, 1, on_loss=on_loss)[0] for on_loss in ("fail", "drop"))
    assert not cut[1]
    assert all(start % BLOCK == 0 for starts in cut[0] for start in starts)
    assert sum(bool(starts - {0}) for starts in cut[0]) >= 2
    assert whole == ([{0}] * 3, True)


def replicate(comm: Backend, model: nn.Module, optimizer: torch.optim.Optimizer, **rules: Any) -> Any:
    update = dtrain.ServerUpdate(optimizer=optimizer, **rules)
    return dtrain.replicate(model, comm, bucket_mb=0.05, first_bucket_mb=0.05, update=update)


# -- steps that are not of all workers: no tensor is cut, and each server decides -------------------------------------


def small_lars(model: nn.Module) -> torch.optim.Optimizer:
    return LARS(model.parameters(), lr=1.0, weight_decay=0.01, trust_coefficient=0.05)


def small_lamb(model: nn.Module) -> torch.optim.Optimizer:
    return LAMB(model.parameters(), lr=0.01, weight_decay=0.1)


either = pytest.mark.parametrize("make", [small_lars, small_lamb])


@either
@pytest.mark.parametrize("name", ["plain", "all of it"])
def test_stale_gradients_are_applied_as_written(name: str, make: Any, own_temporary_directory: Path) -> None:
    """Each a step of its own; damped, compensated and clipped."""
    rules = pushing.TURNS[name]
    expected = pushing.one_after_the_other(
        5, make, rules.get("damping", False), rules.get("delay_compensation", 0.0), rules.get("clip_grad_norm")
    )
    found = job(lambda comm: pushing.take_turns(comm, 5, make, **rules), own_temporary_directory, 2)
    assert all(pushing.distance(values, expected) <= 1e-12 for _, values in found)


@either
def test_the_first_gradients_make_the_step(
    make: Any, own_temporary_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one backup worker of three, each step is the mean over the samples of two, clipped."""
    monkeypatch.setattr(pushing, "sgd", make)  # what the workers are given
    one = pushing.Alone(make)
    for step, ranks in enumerate(pushing.PARTS):
        batches = [pushing.batch(10 * step + r, pushing.COUNTS[r]) for r in ranks]
        one.step(torch.cat(batches), 0.05)
    found = job(lambda comm: pushing.late_comers(comm, tmp_path, 0.05), own_temporary_directory, 2)
    assert sum(dropped for _, dropped, _, _ in found) == len(pushing.PARTS)
    assert all(pushing.distance(values, pushing.values(one.model)) <= 1e-12 for *_, values in found)


# -- states -----------------------------------------------------------------------------------------------------------


@either
def test_states_move_from_servers_to_workers_and_back(make: Any, own_temporary_directory: Path) -> None:
    """Two steps by servers, two by a worker alone, and two by servers of another number are six by one loop."""

    def on_servers(state: dict[str, Any], first: int) -> Callable[[Backend], Any]:
        def body(comm: Backend) -> Any:
            model = pushing.mlp()
            optimizer = make(model)
            if state:
                model.load_state_dict(state["model"])
            replica = replicate(comm, model, optimizer)
            if state:
                replica.pushes.restore(state["optimizer"])
            for step in range(first, first + 2):
                replica.backward(pushing.square(model, pushing.batch(step)))
                replica.publish()
            kept = replica.pushes.optimizer_state() if comm.rank == 0 else {}
            collectives.barrier(comm)
            return {"model": copy.deepcopy(model.state_dict()), "optimizer": kept}

        return body

    begun = job(on_servers({}, 0), own_temporary_directory, 3, 2)[0]
    one = pushing.Alone(make)
    one.model.load_state_dict(begun["model"])
    one.optimizer.load_state_dict({**one.optimizer.state_dict(), "state": begun["optimizer"]})
    for step in (2, 3):
        one.step(pushing.batch(step))
    middle = {"model": one.model.state_dict(), "optimizer": one.optimizer.state_dict()["state"]}
    end = job(on_servers(middle, 4), own_temporary_directory, 2, 2)[0]
    whole = pushing.Alone(make)
    for step in range(6):
        whole.step(pushing.batch(step))
    expected = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()["state"]}
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)


def test_settings_that_differ_are_found(own_temporary_directory: Path) -> None:
    """Where a rate alone differs, worker 0's counts, as with any optimizer; a trust ratio that differs ends the job."""

    def body(comm: Backend) -> None:
        model = pushing.mlp()
        optimizer = small_lars(model)
        replica = replicate(comm, model, optimizer)
        optimizer.param_groups[0]["trust_coefficient"] *= 1 + comm.rank
        replica.backward(pushing.square(model, pushing.batch(0)))
        replica.publish()

    with pytest.raises(DtrainError, match="workers 0 and 1 passed on different trust ratios"):
        job(body, own_temporary_directory, 2, 2)
