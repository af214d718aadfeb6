"""Parameters that servers keep: who waits for whom, what is counted, what is refused, and what else may hold them.

Checks that need several workers run one after the other in one job of processes. Where an order matters, workers wait
for each other by files or barriers; nothing is left to time.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain import ServerUpdate, replicate
from dtrain.checkpoint import load_tensors, save_tensors
from dtrain.comm import collectives
from dtrain.comm.base import Backend
from dtrain.errors import LayoutError, UsageError
from dtrain.optim import LARS
from dtrain.ps import lanes
from dtrain.ps.client import ParameterServer
from dtrain.replica import Replica
from tests.conftest import remembered
from tests.ps.serving import Running, all_of, own_socket, workers_of

pytestmark = pytest.mark.timeout(300)  # the first test waits for a whole job, which other tests may slow down

WORKERS = 3
WAIT_S = 20.0
CHECKS: dict[str, Callable[[Backend, Path], Any]] = {}


def check(fn: Callable[[Backend, Path], Any]) -> Callable[[Backend, Path], Any]:
    """Run this as each worker of the job, with a folder of its own; the test of it gets what the workers return."""
    CHECKS[fn.__name__] = fn
    return fn


def run_checks(comm: Backend, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for name, fn in CHECKS.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        collectives.barrier(comm)
        found[name] = fn(comm, place)
    found["closing"] = closing(comm)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checks")
    return remembered(
        lambda: dtrain.run(run_checks, folder, workers=WORKERS, backend="ps", servers=2, timeout_s=2 * WAIT_S)
    )


@pytest.fixture
def results(job: Callable[[], list[dict[str, Any]]], request: pytest.FixtureRequest) -> list[Any]:
    """What each worker has returned from the check of the test's name."""
    name = request.function.__name__.removeprefix("test_")
    return [worker[name] for worker in job()]


def say(folder: Path, what: str) -> None:
    (folder / what).touch()


def said(folder: Path, what: str) -> bool:
    return (folder / what).exists()


def wait_for(folder: Path, *words: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not all(said(folder, what) for what in words):
        assert time.monotonic() < deadline, f"nobody said {words} in {folder}"
        time.sleep(0.002)


# -- a thing to train -------------------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 2)).to(dtype)


def batch(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def tie(comm: Backend, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **rules: Any) -> Replica:
    update = ServerUpdate(optimizer=optimizer or sgd(model), **rules)
    return replicate(model, comm, update=update, bucket_mb=0.03, first_bucket_mb=0.01)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Alone:
    """The same model with torch alone."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer] = sgd) -> None:
        self.model = mlp()
        self.optimizer = make(self.model)

    def steps(self, count: int) -> None:
        """Of the batches of all workers together."""
        for step in range(count):
            self.step(torch.cat([batch(10 * step + r) for r in range(WORKERS)]))

    def step(self, x: Tensor, clip: float | None = None) -> None:
        square(self.model, x).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def refused(words: str, call: Callable[[], object]) -> str:
    """Whether a call is refused by these words; else what happens, in words."""
    try:
        call()
    except UsageError as error:
        return "" if words in str(error) else str(error)
    return "accepted"


# -- who waits for whom -----------------------------------------------------------------------------------------------


def run_ahead(comm: Backend, folder: Path, steps: int, **rules: Any) -> tuple[Replica, nn.Module]:
    """Worker 2 makes its first step when the others have said that they may go no further; or have made all steps."""
    model = mlp()
    replica = tie(comm, model, **rules)
    bound = rules["staleness"]
    free = steps if bound is None else bound  # steps that may be over before worker 2's first is
    for step in range(steps):
        if comm.rank == 2 and step == 0:
            wait_for(folder, *(f"worker {r} has made {free}" for r in range(2)))
            time.sleep(0.2)
            early = [r for r in range(2) if said(folder, f"worker {r} has made {free + 1}")]
            assert not early, f"{early} did not wait"
        replica.backward(square(model, batch(10 * step + comm.rank)), samples=4, total=12)
        report = replica.publish()
        assert report is not None
        assert report.counted == 1
        say(folder, f"worker {comm.rank} has made {step + 1}")
    collectives.barrier(comm)
    return replica, model


@check
def nobody_is_more_than_s_steps_ahead(comm: Backend, folder: Path) -> Any:
    found = []
    for bound in (1, 3):
        place = folder / str(bound)
        place.mkdir(exist_ok=True)
        replica, model = run_ahead(comm, place, 6, staleness=bound)
        assert replica.pushes is not None
        replica.pushes.refresh()
        replica.check()
        found.append((bound, dict(replica.pushes.staleness), replica.pushes.dropped, values(model)))
    return found


def test_nobody_is_more_than_s_steps_ahead(results: list[Any]) -> None:
    """With staleness s, a worker gets the parameters for its next step when the slowest is s steps behind, no later and
    no sooner; every gradient is a step, whose staleness is counted; afterwards all have the same."""
    for worker in results:
        for bound, staleness, dropped, _ in worker:
            assert sum(staleness.values()) == 6
            assert dropped == 0
            assert max(staleness) <= (WORKERS - 1) * (2 * bound + 1)
    for (bound, staleness, *_), one, two in zip(*results[::-1], strict=True):
        assert max(staleness) >= 2 * bound, "worker 2's first gradient comes after the others' steps"
        assert equal(one[3], two[3])


@check
def nobody_waits(comm: Backend, folder: Path) -> Any:
    replica, _ = run_ahead(comm, folder, 5, staleness=None)
    assert replica.pushes is not None
    replica.pushes.refresh()
    replica.check()
    return dict(replica.pushes.staleness), replica.pushes.steps


def test_nobody_waits(results: list[Any]) -> None:
    """Without a bound, two workers make all their steps while the third has not begun."""
    assert [steps for _, steps in results] == [5, 5, 5]
    assert max(results[2][0]) == 10


def take_turns(comm: Backend, rounds: int, make: Callable[[nn.Module], torch.optim.Optimizer], **rules: Any) -> Any:
    """Workers step one after the other; the order changes from round to round."""
    model = mlp()
    optimizer = make(model)
    replica = tie(comm, model, optimizer, staleness=None, **rules)
    reports = []
    for number in range(rounds):
        for rank in turns(number):
            collectives.barrier(comm)
            if rank == comm.rank:
                optimizer.param_groups[0]["lr"] *= 0.9
                replica.backward(square(model, batch(10 * number + rank)), samples=2 + rank, total=9)
                reports.append(replica.publish())
    collectives.barrier(comm)
    assert replica.pushes is not None
    replica.pushes.refresh()
    return [r.staleness for r in reports if r], values(model)


def turns(number: int) -> tuple[int, ...]:
    return list(itertools.permutations(range(WORKERS)))[number]


def one_after_the_other(
    rounds: int,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    damping: bool,
    compensation: float,
    clip: float | None,
) -> list[Tensor]:
    """The same by hand: a server's parameters, and each worker's copy of them of some earlier time."""
    server, worker = mlp(), mlp()
    optimizer = make(server)
    copies, versions, rates = [values(server)] * WORKERS, [0] * WORKERS, [optimizer.param_groups[0]["lr"]] * WORKERS
    version = 0
    for number in range(rounds):
        for rank in turns(number):
            with torch.no_grad():
                for p, c in zip(worker.parameters(), copies[rank], strict=True):
                    p.copy_(c)
            worker.zero_grad()
            square(worker, batch(10 * number + rank)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(worker.parameters(), clip)
            rates[rank] *= 0.9
            optimizer.param_groups[0]["lr"] = rates[rank] / (max(1, version - versions[rank]) if damping else 1)
            for p, q, c in zip(server.parameters(), worker.parameters(), copies[rank], strict=True):
                assert q.grad is not None
                p.grad = q.grad + compensation * q.grad * q.grad * (p.detach() - c)
            optimizer.step()
            version += 1
            copies[rank], versions[rank] = values(server), version
    return copies[rank]


TURNS: dict[str, Any] = {
    "plain": {},
    "damping": {"damping": True},
    "compensation": {"delay_compensation": 2.0},
    "clipped": {"clip_grad_norm": 0.05},
    "all of it": {"damping": True, "delay_compensation": 0.5, "clip_grad_norm": 0.1},
}


@check
def stale_gradients_are_applied_as_written(comm: Backend, folder: Path) -> Any:
    return {
        (name, make.__name__): take_turns(comm, 5, make, **rules)
        for name, rules in TURNS.items()
        for make in (sgd, adam)
    }


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("name", TURNS)
def test_stale_gradients_are_applied_as_written(name: str, make: Any, results: list[Any]) -> None:
    """Each a step of its own, by each worker's rate at that time; divided by its staleness; corrected by what others
    changed; clipped as this worker's own mean."""
    rules = TURNS[name]
    expected = one_after_the_other(
        5, make, rules.get("damping", False), rules.get("delay_compensation", 0.0), rules.get("clip_grad_norm")
    )
    for worker in results:
        assert distance(worker[name, make.__name__][1], expected) <= 1e-12
    staleness = [worker[name, make.__name__][0] for worker in results]
    assert [s[0] for s in staleness] == [0, 1, 2]
    if name != "plain":
        assert distance(expected, one_after_the_other(5, make, False, 0.0, None)) > 1e-6


@check
def a_worker_without_samples_makes_no_step_of_its_own(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model, staleness=None)
    moved = []
    for rank in (0, 1):
        collectives.barrier(comm)
        before = values(model)
        if comm.rank == rank:
            count = 4 if rank == 0 else 0
            replica.backward(square(model, batch(0, count)), samples=count, total=4)
            replica.publish()
            moved.append(not equal(values(model), before))
    collectives.barrier(comm)
    assert replica.pushes is not None
    replica.pushes.refresh()
    return values(model)


def test_a_worker_without_samples_makes_no_step_of_its_own(results: list[Any]) -> None:
    """Its gradient is no gradient: neither momentum nor weight decay moves by it."""
    one = Alone()
    one.step(batch(0))
    assert all(distance(worker, values(one.model)) <= 1e-14 for worker in results)


# -- backup workers ---------------------------------------------------------------------------------------------------

COUNTS = (2, 5, 3)  # samples of the workers
PARTS = ((0, 1), (0, 1), (1, 2), (0, 2))
"""Who is in time for each step; the third waits until it is over."""


def late_comers(comm: Backend, folder: Path, clip: float | None) -> Any:
    model = mlp()
    replica = tie(comm, model, backup_workers=1, clip_grad_norm=clip)
    assert replica.pushes is not None
    reports = []
    for step, ranks in enumerate(PARTS):
        if comm.rank not in ranks:
            wait_for(folder, *(f"worker {r} has made {step}" for r in ranks))
        count = COUNTS[comm.rank]
        replica.backward(square(model, batch(10 * step + comm.rank, count)), samples=count, total=sum(COUNTS))
        report = replica.publish()
        assert report is not None
        reports.append((report.counted, report.version))
        say(folder, f"worker {comm.rank} has made {step}")
        # a late one is told of all steps that were made meanwhile
        assert replica.pushes.steps >= step + 1
        collectives.barrier(comm)
    replica.pushes.refresh()
    replica.check()
    return reports, replica.pushes.dropped, dict(replica.pushes.staleness), values(model)


@check
def the_first_gradients_make_the_step(comm: Backend, folder: Path) -> Any:
    found = {}
    for clip in (None, 0.05):
        place = folder / str(clip)
        place.mkdir(exist_ok=True)
        found[clip] = late_comers(comm, place, clip)
    return found


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_first_gradients_make_the_step(clip: float | None, results: list[Any]) -> None:
    """With one backup worker of three, a step is the mean over the samples of the two that come first; the third's
    gradient is dropped, and counted as such."""
    one = Alone()
    for step, ranks in enumerate(PARTS):
        one.step(torch.cat([batch(10 * step + r, COUNTS[r]) for r in ranks]), clip)
    for rank, worker in enumerate(results):
        reports, dropped, staleness, found = worker[clip]
        assert distance(found, values(one.model)) <= 1e-12
        assert reports == [(2 if rank in ranks else 0, step + 1) for step, ranks in enumerate(PARTS)]
        assert dropped == sum(rank not in ranks for ranks in PARTS)
        assert staleness == {0: len(PARTS) - dropped}


@check
def a_late_worker_goes_on_with_the_others(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model, backup_workers=1)
    assert replica.pushes is not None
    if comm.rank == 2:
        wait_for(folder, "worker 0 has made 3")
    while replica.pushes.steps < 3:
        replica.backward(square(model, batch(comm.rank)), samples=4, total=12)
        report = replica.publish()
    assert report is not None
    say(folder, f"worker {comm.rank} has made 3")
    collectives.barrier(comm)
    replica.pushes.refresh()
    replica.check()
    return replica.pushes.dropped, report.version


def test_a_late_worker_goes_on_with_the_others(results: list[Any]) -> None:
    """One that was late by three steps learns so at once."""
    assert results == [(0, 3), (0, 3), (1, 3)]


# -- between steps ----------------------------------------------------------------------------------------------------


@check
def the_state_of_the_optimizer_is_torchs(comm: Backend, folder: Path) -> Any:
    model = mlp()
    optimizer = adam(model)
    replica = tie(comm, model, optimizer)
    assert replica.pushes is not None
    for step in range(3):
        replica.backward(square(model, batch(10 * step + comm.rank)))
        replica.publish()
    state = replica.pushes.optimizer_state() if comm.rank == 0 else {}
    nbytes = replica.pushes.state_bytes()
    return state, nbytes, dict(optimizer.state), replica.pushes.table()


def test_the_state_of_the_optimizer_is_torchs(results: list[Any]) -> None:
    """Numbered and shaped as the optimizer's own state dict has it; kept once, and nothing of it on workers."""
    one = Alone(adam)
    one.steps(3)
    expected = one.optimizer.state_dict()["state"]
    state = results[0][0]
    assert state.keys() == expected.keys()
    for number, kept in expected.items():
        assert state[number].keys() == kept.keys()
        for key, t in kept.items():
            torch.testing.assert_close(state[number][key], t, rtol=0, atol=1e-14, check_dtype=False)
    elements = sum(p.numel() for p in one.model.parameters())
    for _, nbytes, own, table in results:
        assert own == {}
        assert 2 * 8 * elements <= nbytes <= 2 * 8 * elements + 1000
        assert "whole parameters" in table


@check
def frozen_parameters_keep_their_state(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model, staleness=1)
    assert replica.pushes is not None
    for step in range(6):
        model[2].requires_grad_(step not in (2, 3))
        before = replica.pushes.steps
        for rank in range(WORKERS):
            collectives.barrier(comm)
            if rank == 0:
                model(batch(0))  # all lay out anew here, if anything has changed
            if rank == comm.rank:
                replica.backward(square(model, batch(10 * step + comm.rank)), samples=4, total=12)
                replica.publish()
        assert replica.pushes.steps == before + 1
        collectives.barrier(comm)
        replica.pushes.refresh()
    state = replica.pushes.optimizer_state() if comm.rank == 0 else {}
    return sorted(state), values(model)


def test_frozen_parameters_keep_their_state(results: list[Any]) -> None:
    """Laying out anew amid asynchronous steps loses neither parameters that others have changed nor momenta."""
    server, worker = Alone(), mlp()
    for step in range(6):
        for m in (server.model, worker):
            m[2].requires_grad_(step not in (2, 3))
        # refreshed after each step, and anew where others have laid out
        copies = values(server.model)
        for rank in range(WORKERS):
            with torch.no_grad():
                for p, c in zip(worker.parameters(), copies, strict=True):
                    p.copy_(c)
            worker.zero_grad()
            square(worker, batch(10 * step + rank)).backward()
            for p, q in zip(server.model.parameters(), worker.parameters(), strict=True):
                p.grad = q.grad
            server.optimizer.step()
    assert results[0][0] == list(range(6))
    assert all(distance(found, values(server.model)) <= 1e-12 for _, found in results)


@check
def worker_0s_parameters_can_be_handed_over(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model)
    assert replica.pushes is not None
    replica.backward(square(model, batch(comm.rank)))
    replica.publish()
    other = {name: t + 0.1 * (comm.rank + 1) for name, t in mlp().state_dict().items()}
    model.load_state_dict(other)
    loud = refused("was changed here", lambda: replica.backward(square(model, batch(comm.rank))))
    replica.pushes.restore({})
    for step in range(2):
        replica.backward(square(model, batch(10 * step + comm.rank)))
        replica.publish()
    return loud, values(model)


def test_worker_0s_parameters_can_be_handed_over(results: list[Any]) -> None:
    """What was loaded into a tied model is not lost in silence: it is refused, or handed over to the servers."""
    one = Alone()
    with torch.no_grad():
        for p in one.model.parameters():
            p += 0.1
    one.steps(2)
    for loud, found in results:
        assert loud == ""
        assert distance(found, values(one.model)) <= 1e-12


# -- what else may hold the parameters --------------------------------------------------------------------------------


@check
def parameters_in_shared_memory_are_parameters(comm: Backend, folder: Path) -> Any:
    model = mlp()
    before = {name: id(p) for name, p in model.named_parameters()}
    optimizer = sgd(model)
    replica = tie(comm, model, optimizer)
    replica.backward(square(model, batch(comm.rank)))
    replica.publish()
    kept, twin = {n: t.clone() for n, t in model.state_dict().items()}, copy.deepcopy(model)
    save_tensors(folder / f"{comm.rank}", model.state_dict())
    replica.backward(square(model, batch(10 + comm.rank)))
    replica.publish()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(before.values())
    assert not twin._forward_pre_hooks or all(h._method is None for h in twin._forward_pre_hooks.values())
    square(twin, batch(0)).backward()  # a copy is tied to nothing
    torch.optim.SGD(twin.parameters(), lr=0.0).step()
    again = mlp()
    again.load_state_dict(load_tensors(folder / f"{comm.rank}"))
    assert equal(values(again), list(kept.values()))
    assert equal(values(twin), list(kept.values()))
    assert not equal(values(model), list(kept.values()))
    sizes = [t.untyped_storage().nbytes() == t.nbytes for t in copy.deepcopy(model).state_dict().values()]
    return all(sizes), values(model)


def test_parameters_in_shared_memory_are_parameters(results: list[Any]) -> None:
    """The same objects for model and optimizer; copies, state dicts and files hold what was, and not what comes."""
    one = Alone()
    one.steps(2)
    for own_memory, found in results:
        assert own_memory
        assert distance(found, values(one.model)) <= 1e-12


@check
def parameters_that_were_moved_go_on(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model)
    for step in range(3):
        if step == 1:
            model.share_memory()  # as torch.multiprocessing does with what is put into a queue
        replica.backward(square(model, batch(10 * step + comm.rank)))
        replica.publish()
    return values(model)


def test_parameters_that_were_moved_go_on(results: list[Any]) -> None:
    """Sending parameters to another process moves their memory: they still follow the servers."""
    one = Alone()
    one.steps(3)
    assert all(distance(found, values(one.model)) <= 1e-12 for found in results)


def memory_of(tensor: Tensor) -> str:
    """Which file's memory a tensor lies in: device and inode, as the kernel has them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, device, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return f"{device} {inode}"
    raise AssertionError("a tensor that lies nowhere")


def maps_of(pid: int) -> set[str]:
    return {" ".join(line.split()[3:5]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}


@check
def parameters_of_one_host_are_one(comm: Backend, folder: Path) -> Any:
    if not (isinstance(comm, ParameterServer) and comm.shares):
        return None
    found = {}
    for name, rules in {"joint": {}, "clipped": {"clip_grad_norm": 0.1}, "free": {"staleness": None}}.items():
        model = mlp()
        replica = tie(comm, model, **rules)
        for step in range(2):
            replica.backward(square(model, batch(10 * step + comm.rank)), samples=4, total=4 * WORKERS)
            replica.publish()
        there = [{memory_of(p) for p in model.parameters()}]
        there += [maps_of(link.welcome.pid) for link in comm.links if link.welcome is not None]
        found[name] = there
        replica.close()
        collectives.barrier(comm)
    return found


def test_parameters_of_one_host_are_one(results: list[Any]) -> None:
    """Where steps are joint, workers read the memory that servers keep the parameters in; else each has its own."""
    if results[0] is None:
        pytest.skip("no /dev/shm on this system")
    for name in ("joint", "clipped"):
        first = results[0][name][0]
        assert all(found[name][0] == first for found in results)
        assert all(first <= server for found in results for server in found[name][1:])
    free = [found["free"][0] for found in results]
    assert all(not free[i] & free[j] for i in range(WORKERS) for j in range(i))


@check
def what_a_worker_writes_by_hand_is_its_own(comm: Backend, folder: Path) -> Any:
    model = mlp()
    replica = tie(comm, model)
    for step in range(3):
        for parameter in model.parameters():  # as programs do that exchange weights for averaged ones for a while
            parameter.data.mul_(2.0 + comm.rank)
        collectives.barrier(comm)
        scaled = [p.detach().clone() for p in model.parameters()]
        collectives.barrier(comm)
        for parameter in model.parameters():
            parameter.data.div_(2.0 + comm.rank)
        assert equal([p * (2.0 + comm.rank) for p in values(model)], scaled)
        replica.backward(square(model, batch(10 * step + comm.rank)))
        replica.publish()
    replica.close()
    found = values(model)
    collectives.barrier(comm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(comm.rank)
    collectives.barrier(comm)
    return found, all(bool((p == comm.rank).all()) for p in model.parameters())


def test_what_a_worker_writes_by_hand_is_its_own(results: list[Any]) -> None:
    """Others never see it, and the next step makes an end of it; when the replica is closed the parameters are free."""
    one = Alone()
    one.steps(3)
    for found, own in results:
        assert own
        assert distance(found, values(one.model)) <= 1e-12


@check
def a_compiled_model(comm: Backend, folder: Path) -> Any:
    model = mlp()
    used: Any = torch.compile(model, backend="eager")
    replica = tie(comm, used, sgd(model))
    for step in range(3):
        replica.backward(square(used, batch(10 * step + comm.rank)))
        replica.publish()
    return values(model)


def test_a_compiled_model(results: list[Any]) -> None:
    """It reads the parameters where they are."""
    one = Alone()
    one.steps(3)
    assert all(distance(found, values(one.model)) <= 1e-12 for found in results)


def closing(comm: Backend) -> Any:
    """The last of the job."""
    model = mlp()
    optimizer = sgd(model)
    replica = tie(comm, model, optimizer)
    replica.backward(square(model, batch(comm.rank)))
    replica.publish()
    found = values(model)
    collectives.barrier(comm)
    comm.close()
    same = equal(values(model), found)
    with torch.no_grad():
        model(batch(0))
    replica.close()
    square(model, batch(0)).backward()
    optimizer.step()
    return same, values(model), found


def test_closing(results: list[Any]) -> None:
    """After the backend was closed the parameters are there as they were, and can be used and trained alone."""
    one = Alone()
    one.steps(1)
    expected = values(one.model)
    for same, later, found in results:
        assert same
        assert distance(found, expected) <= 1e-12
        assert not equal(later, found)


# -- misuse -----------------------------------------------------------------------------------------------------------


@check
def misuse(comm: Backend, folder: Path) -> Any:
    model = mlp()
    optimizer = sgd(model)
    replica = tie(comm, model, optimizer)
    assert replica.pushes is not None
    found: dict[str, str] = {}

    def loss(step: int) -> Tensor:
        return square(model, batch(10 * step + comm.rank))

    assert replica.publish() is None
    found["step before"] = refused("steps are made elsewhere", optimizer.step)
    replica.backward(loss(0), samples=4)
    assert all(p.grad is None for p in model.parameters())
    found["step"] = refused("steps are made elsewhere", optimizer.step)
    found["twice"] = refused("a backward before publish()", lambda: replica.backward(loss(0), samples=4))
    found["twice, micro-batch"] = refused(
        "a backward before publish()", lambda: replica.backward(loss(0), samples=4, sync=False)
    )
    found["twice, plain"] = refused("a backward before publish()", lambda: loss(0).backward())
    with replica.no_sync():
        found["twice, no_sync"] = refused("a backward before publish()", lambda: loss(0).backward())
    found["refresh"] = refused("call publish() first", replica.pushes.refresh)
    found["restore"] = refused("call publish() first", lambda: replica.pushes.restore({}))  # type: ignore[union-attr]
    found["state"] = refused("call publish() first", replica.pushes.optimizer_state)
    found["look"] = refused("look_for_nonfinite", replica.look_for_nonfinite)
    replica.publish()
    found["step after"] = refused("steps are made elsewhere", optimizer.step)
    loss(1).backward()
    replica.publish()
    collectives.barrier(comm)
    return found, values(model)


def test_misuse(results: list[Any]) -> None:
    """Each is refused in words, and none of them leaves a trace: the steps are those of torch alone."""
    one = Alone()
    one.steps(2)
    for found, parameters in results:
        assert not {name: text for name, text in found.items() if text}
        assert distance(parameters, values(one.model)) <= 1e-12


class Own(torch.optim.SGD):
    """Somebody's own optimizer."""


@check
def what_servers_cannot_do(comm: Backend, folder: Path) -> Any:
    model = mlp()
    parameters = list(model.parameters())
    found = {}
    for name, words, optimizer in (
        ("lbfgs", "LBFGS", torch.optim.LBFGS(parameters)),
        ("sparse", "sparse gradients", torch.optim.SparseAdam(parameters)),
        ("own", "Own", Own(parameters, lr=0.1)),
        ("lacking", "the optimizer does not have it", torch.optim.SGD(parameters[1:], lr=0.1)),
        ("stranger", "does not train", torch.optim.SGD([*parameters, nn.Parameter(torch.ones(1))], lr=0.1)),
    ):
        found[name] = refused(words, lambda optimizer=optimizer: tie(comm, model, optimizer))  # type: ignore[misc]
    found["backup"] = refused("leave one at least", lambda: tie(comm, model, backup_workers=WORKERS))
    replica = tie(comm, model, staleness=2)
    found["total"] = refused("without total=", lambda: replica.backward(square(model, batch(0)), samples=4))
    other = mlp()
    second = tie(comm, other)
    found["displaced"] = refused("another model is kept", lambda: replica.backward(square(model, batch(0))))
    second.backward(square(other, batch(comm.rank)))
    second.publish()
    collectives.barrier(comm)
    return found, values(other)


def test_what_servers_cannot_do(results: list[Any]) -> None:
    """Optimizers that servers cannot step, and rules that cannot be meant, are refused before anything is sent."""
    one = Alone()
    one.steps(1)
    for found, parameters in results:
        assert not {name: text for name, text in found.items() if text}
        assert distance(parameters, values(one.model)) <= 1e-12


def test_a_backend_without_servers() -> None:
    """Says which has them."""

    def body(comm: Backend) -> str:
        return refused("has none", lambda: tie(comm, mlp()))

    assert dtrain.run(body, workers=2, backend="threads") == ["", ""]
    assert dtrain.run(body, workers=1, backend="solo") == [""]


@pytest.mark.parametrize(
    "rules",
    [
        {"staleness": -1},
        {"backup_workers": -1},
        {"backup_workers": 1, "staleness": 1},
        {"backup_workers": 1, "staleness": None},
        {"damping": True},
        {"delay_compensation": 0.1},
        {"delay_compensation": -1.0, "staleness": 1},
        {"delay_compensation": float("nan"), "staleness": 1},
        {"clip_grad_norm": 0.0},
    ],
)
def test_rules_that_cannot_be_meant(rules: dict[str, Any]) -> None:
    """Are refused when they are written down."""
    with pytest.raises(UsageError):
        ServerUpdate(optimizer=sgd(mlp()), **rules)


class Detached(nn.Module):
    """Uses a weight where autograd does not see it, deeper than where it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) @ self.last.weight.detach()
        return self.last(x)  # type: ignore[no-any-return]


def in_threads(fn: Callable[[Backend], Any], folder: Path) -> tuple[list[Any], list[Exception]]:
    """With a server in a thread: what each of two workers returned, and what they raised."""
    running = Running(own_socket(folder), 2)
    errors: list[Exception] = []

    def work(comm: Any) -> Any:
        try:
            return fn(comm)
        except Exception as error:
            errors.append(error)
            return None
        finally:
            comm.close()

    workers = workers_of(running.address)
    found = all_of(*(lambda w=w: work(w) for w in workers))  # type: ignore[misc]
    running.ended()
    return found, errors


JOINT: dict[str, dict[str, Any]] = {
    "early": {},
    "clipped": {"clip_grad_norm": 0.1},
    "with trust ratios": {"optimizer": lambda model: LARS(model.parameters(), lr=0.1, momentum=0.9)},
}


@pytest.mark.skipif(not lanes.available(), reason="no /dev/shm on this system")
@pytest.mark.parametrize("rules", JOINT.values(), ids=list(JOINT))
def test_servers_step_in_the_memory_that_workers_read(rules: dict[str, Any], own_temporary_directory: Path) -> None:
    """Whoever knows the segment has the newest values at once: servers keep no copy of their own."""
    running = Running(own_socket(own_temporary_directory), 2)
    given = dict(rules)
    make = given.pop("optimizer", sgd)

    def work(comm: Any) -> Any:
        model = mlp()
        replica = tie(comm, model, make(model), **given)
        for step in range(2):
            replica.backward(square(model, batch(10 * step + comm.rank)), samples=4, total=8)
            replica.publish()
        collectives.barrier(comm)
        held, segments = running.server._held, set(running.server._segments.values())
        found = [
            any(s.bytes.data_ptr() <= held.values(b).data_ptr() < s.bytes.data_ptr() + s.nbytes for s in segments)
            for b in range(len(replica.pushes._buckets))  # type: ignore[union-attr]
        ]
        kept = torch.cat([held.values(b) for b in range(len(found))])
        newest = torch.cat([p.detach().flatten() for b in replica.pushes._buckets for p in b.parameters])  # type: ignore[union-attr]
        collectives.barrier(comm)
        comm.close()
        return found, torch.equal(kept, newest)

    results = all_of(*(lambda w=w: work(w) for w in workers_of(running.address)))  # type: ignore[misc]
    assert running.ended() is None
    for found, same in results:  # type: ignore[misc]
        assert all(found)
        assert same


def test_a_weight_that_is_used_detached(own_temporary_directory: Path) -> None:
    """Servers may write it while backward still needs it: autograd says so, and nobody trains on something wrong."""

    def body(comm: Backend) -> None:
        torch.manual_seed(0)
        model = Detached()
        replica = replicate(
            model, comm, bucket_mb=1e-5, first_bucket_mb=1e-5, update=ServerUpdate(optimizer=sgd(model))
        )
        replica.backward(square(model, batch(comm.rank)))

    _, errors = in_threads(body, own_temporary_directory)
    assert any("modified by an inplace operation" in str(error) for error in errors)


def test_a_graph_that_is_used_after_the_step(own_temporary_directory: Path) -> None:
    """As with an optimizer's own step: it belongs to parameters that are no more."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = tie(comm, model)
        loss = square(model, batch(comm.rank))
        loss.backward(retain_graph=True)
        replica.publish()
        loss.backward()

    _, errors = in_threads(body, own_temporary_directory)
    assert any("modified by an inplace operation" in str(error) for error in errors)


def test_shares_that_do_not_add_up(own_temporary_directory: Path) -> None:
    """A Loader without rank and world_size would give every worker the whole batch, and n times the gradient."""

    def body(comm: Backend) -> str:
        model = mlp()
        replica = tie(comm, model)
        return refused("2.00 times total", lambda: replica.backward(square(model, batch(0)), samples=4, total=4))

    found, errors = in_threads(body, own_temporary_directory)
    assert (found, errors) == (["", ""], [])


DIFFERENT: dict[str, Callable[[int, nn.Module], dict[str, Any]]] = {
    "optimizers": lambda rank, model: {"optimizer": [sgd, adam][rank](model)},
    "rates": lambda rank, model: {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1 + rank)},
    "groups": lambda rank, model: {
        "optimizer": torch.optim.SGD(list(model.parameters())[:: 1 - 2 * rank], lr=0.1),
    },
    "staleness": lambda rank, model: {"staleness": 1 + rank},
    "backup workers": lambda rank, model: {"backup_workers": rank},
    "clipping": lambda rank, model: {"clip_grad_norm": 1.0 if rank else None},
    "damping": lambda rank, model: {"staleness": 1, "damping": bool(rank)},
    "compensation": lambda rank, model: {"staleness": 1, "delay_compensation": float(rank)},
}


def test_workers_that_differ(own_temporary_directory: Path) -> None:
    """A LayoutError on every worker, before the first step."""

    def job(name: str) -> list[Exception]:
        def body(comm: Backend) -> None:
            model = mlp()
            given = DIFFERENT[name](comm.rank, model)
            tie(comm, model, given.pop("optimizer", None), **given)

        return in_threads(body, own_temporary_directory)[1]

    for errors in all_of(*(lambda name=name: job(name) for name in DIFFERENT)):  # type: ignore[misc]
        assert [type(error) for error in errors] == [LayoutError] * 2
        assert all("optimizer or rules" in str(error) for error in errors)


def test_nothing_to_train(own_temporary_directory: Path) -> None:
    """A model of which nothing is trained is tied, and says so when it is to be trained."""

    def body(comm: Backend) -> str:
        model = mlp().requires_grad_(False)
        replica = tie(comm, model)
        return refused("nothing to train", lambda: replica.backward(None, samples=1, total=2))

    found, errors = in_threads(body, own_temporary_directory)
    assert (found, errors) == (["", ""], [])
