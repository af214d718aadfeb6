"""A model tied to a backend: what `.grad` holds after backward, whatever the model and the loop do; misuse is refused.

Most tests run on `threads`, where a job takes milliseconds and a worker's function may be local.
"""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.comm.base import Backend
from dtrain.errors import CommError, LayoutError, UsageError
from dtrain.replica import Replica, replicate
from tests.conftest import everywhere

PROCESSES = ["ps", "allreduce"]


@pytest.fixture(autouse=True, params=[4.0, 1e-6], ids=["in-buckets", "direct"])
def sent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: small gradients travel in buckets; and each from where it lies, as large ones do."""
    monkeypatch.setitem(replicate.__kwdefaults__, "direct_mb", request.param)


def on_threads(fn: Callable[[Backend], Any], workers: int = 2) -> list[Any]:
    return everywhere(fn, backend="threads", workers=workers, timeout_s=5.0)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(rank: int, dtype: torch.dtype = torch.float64, count: int = 4) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def alone(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], workers: int = 2) -> list[Tensor | None]:
    """Mean over workers of each one's gradient, by torch alone; None where nobody has one."""
    model = copy.deepcopy(model)
    (sum(loss(model, batch(r)) for r in range(workers)) / workers).backward()
    return grads(model)


def assert_grads(got: list[Tensor | None], wanted: list[Tensor | None], atol: float = 1e-14) -> None:
    assert [g is None for g in got] == [w is None for w in wanted]
    for g, w in zip(got, wanted, strict=True):
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=0, atol=atol)


def square(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().mean()


# --- the start


class Odd(nn.Module):
    """Parameters and buffers of several kinds."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3, 2), float(rank)))
        self.t = nn.Parameter(torch.full((2, 3), rank + 0.5).t())  # not contiguous
        self.low = nn.Parameter(torch.full((5,), rank, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.full((2,), float(rank)), requires_grad=False)
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("mask", torch.tensor([rank == 0, True]))
        self.register_buffer("hidden", torch.tensor([rank * 1j]), persistent=False)


def start(comm: Backend) -> dict[str, list[Any]]:
    model = Odd(comm.rank)
    before = {name: id(p) for name, p in model.named_parameters()}
    replicate(model, comm)
    assert before == {name: id(p) for name, p in model.named_parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().to(torch.complex64).flatten().tolist() for name, t in tensors}


@pytest.mark.parametrize("backend", ["threads", *PROCESSES])
def test_everyone_starts_from_worker_0(backend: str) -> None:
    """Parameters and buffers of every type and layout become worker 0's, in place."""
    model = Odd(0)
    expected = {n: t.detach().to(torch.complex64).flatten().tolist() for n, t in model.named_parameters()}
    expected |= {n: t.to(torch.complex64).flatten().tolist() for n, t in model.named_buffers()}
    assert everywhere(start, backend=backend, workers=3) == [expected] * 3


def test_the_model_stays_what_it_was() -> None:
    """No wrapper: class, state-dict keys and parameters' names are as before."""

    def body(comm: Backend) -> None:
        model, twin = mlp(), mlp()
        replicate(model, comm)
        assert type(model) is nn.Sequential
        assert list(model.state_dict()) == list(twin.state_dict())
        assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]

    on_threads(body)


DIFFERENT: dict[str, Callable[[int], nn.Module]] = {
    "0.weight": lambda rank: nn.Sequential(nn.Linear(3 + rank, 2)),
    "1.weight": lambda rank: nn.Sequential(nn.Linear(3, 2), *[nn.Linear(2, 2)] * rank),
    "1.running_mean": lambda rank: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False).to(KINDS[rank])),
}
KINDS = [torch.float32, torch.float64]


def tie(comm: Backend, name: str) -> str:
    try:
        replicate(DIFFERENT[name](comm.rank), comm)
    except LayoutError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("backend", ["threads", *PROCESSES])
def test_models_that_differ(backend: str, name: str) -> None:
    """Every worker raises a LayoutError that names the first tensor that differs, and what each worker has."""
    for text in everywhere(tie, name, backend=backend):
        assert name in text
        assert "worker 0 has" in text
        assert "worker 1 has" in text


def test_arguments_are_checked() -> None:
    """Sizes above 0, a known `update`, and a backend that can do it; real, dense tensors."""

    def refused(model: nn.Module, words: str, **arguments: Any) -> None:
        with pytest.raises(UsageError, match=words):
            everywhere(lambda comm: replicate(model, comm, **arguments), backend="solo")

    refused(mlp(), "bucket_mb", bucket_mb=0.0)
    refused(mlp(), "first_bucket_mb", first_bucket_mb=-1.0)
    refused(mlp(), "update", update="some")
    refused(mlp(), "solo", update="first")
    refused(nn.Linear(2, 2, dtype=torch.complex64), "weight is complex")
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(2).to_sparse())
    refused(sparse, "table is sparse")


# --- models


class Branches(nn.Module):
    """Three layers; a forward uses those it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, use: list[int]) -> Tensor:
        return sum((self.layers[i](x) for i in use), start=x)  # type: ignore[no-any-return]


def branches(comm: Backend) -> tuple[list[Any], list[Any]]:
    """Worker 0 uses layer 0, worker 1 layers 0 and 1; nobody uses layer 2."""
    model = Branches()
    replicate(model, comm, bucket_mb=1e-5, first_bucket_mb=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    model(batch(comm.rank), [0, 1][: comm.rank + 1]).square().mean().backward()
    got = grads(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)]
    return [None if g is None else g.numpy() for g in got], moved


@pytest.mark.parametrize("backend", ["threads", *PROCESSES])
def test_unused_parameters(backend: str) -> None:
    """A parameter that some workers used has the mean over all of them; one that nobody used has no gradient, so that
    weight decay does not move it."""
    model = Branches()
    uses = [[0], [0, 1]]
    (sum(model(batch(r), uses[r]).square().mean() for r in range(2)) / 2).backward()
    for got, moved in everywhere(branches, backend=backend):
        assert_grads([None if g is None else torch.from_numpy(g) for g in got], grads(model))
        assert moved == [True, True, True, True, False, False]


def test_unused_parameters_with_zeroed_gradients() -> None:
    """With `zero_grad(set_to_none=False)` gradients of nobody's parameters are zeros, as in torch."""

    def body(comm: Backend) -> None:
        model = Branches()
        replicate(model, comm)
        model(batch(comm.rank), [0, 1, 2]).square().mean().backward()
        model.zero_grad(set_to_none=False)
        model(batch(comm.rank), [0]).square().mean().backward()
        got = grads(model)
        twin = Branches()
        assert_grads(got[:2], alone(twin, lambda m, x: m(x, [0]).square().mean())[:2])
        assert all(g is not None and not g.any() for g in got[2:])

    on_threads(body)


def test_tied_parameters() -> None:
    """A parameter under two names counts once and gets both uses' gradient."""

    def body(comm: Backend) -> None:
        model = tied()
        replicate(model, comm)
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), alone(tied(), square))

    on_threads(body)


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)))
    model[2].weight = model[0].weight
    return model


def test_frozen_and_unfrozen() -> None:
    """The set of trainable parameters may change between steps: the next forward lays the buckets out anew."""

    def body(comm: Backend) -> None:
        model = mlp()
        model[0].requires_grad_(False)
        replicate(model, comm)
        for trainable in (False, True, False, True):
            model[0].requires_grad_(trainable)
            model.zero_grad()
            square(model, batch(comm.rank)).backward()
            assert_grads(grads(model), alone(model, square))

    on_threads(body)


@pytest.mark.parametrize("was_trainable", [False, True])
def test_unfrozen_after_the_forward(was_trainable: bool) -> None:
    """A gradient that no bucket expected is not summed: the step, or the backward before, refuses and names it."""

    def body(comm: Backend) -> None:
        model = mlp()
        model[0].requires_grad_(was_trainable)
        replicate(model, comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model[0].requires_grad_(False)
        model(batch(comm.rank))
        model[0].requires_grad_(True)
        loss = model[2](model[1](model[0](batch(comm.rank)))).square().mean()  # not through the model's own forward

        def step() -> None:
            loss.backward()
            optimizer.step()

        with pytest.raises(UsageError, match=r"0\.(weight|bias).*unfr"):
            step()

    on_threads(body)


def test_several_parameter_groups_and_optimizers() -> None:
    """Groups and optimizers are the user's business: what counts is `.grad`."""

    def body(comm: Backend) -> list[Tensor]:
        model = mlp()
        replicate(model, comm)
        groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": [model[2].weight], "weight_decay": 0.1}]
        optimizers = [torch.optim.SGD(groups, lr=0.1), torch.optim.Adam([model[2].bias])]
        for _ in range(3):
            square(model, batch(comm.rank)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    one, two = on_threads(body)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters(dtype: torch.dtype) -> None:
    """Half-precision gradients are weighted in their type, added over workers in single precision and rounded once."""

    def body(comm: Backend) -> None:
        model = mlp(dtype=dtype)
        replicate(model, comm)
        square(model, batch(comm.rank, dtype)).backward()
        single = []
        for rank in range(2):
            twin = mlp(dtype=dtype)
            square(twin, batch(rank, dtype)).backward()
            single.append(grads(twin))
        for got, a, b in zip(grads(model), *single, strict=True):
            assert got is not None
            assert got.dtype is dtype
            assert a is not None
            assert b is not None
            assert torch.equal(got, ((a / 2).float() + (b / 2).float()).to(dtype))

    on_threads(body)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=t) for t in (torch.float32, torch.float64, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


def test_several_types() -> None:
    """Types have buckets of their own; a model may mix them."""

    def body(comm: Backend) -> None:
        model = Mixed()
        expected = alone(model, square)
        replicate(model, comm)
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), expected, atol=1e-7)

    on_threads(body)


def test_autocast_and_grad_scaler() -> None:
    """A scaled loss gives scaled global gradients; one worker's overflow makes every worker skip the step."""

    def body(comm: Backend) -> tuple[list[Tensor], float]:
        model = mlp(dtype=torch.float32)
        replica = replicate(model, comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = square(model, batch(comm.rank, torch.float32))
            if step == 2 and comm.rank == 1:
                loss = loss * float("inf")
            replica.backward(scaler.scale(loss), samples=4)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert skipped == (step == 2)
        replica.check()
        return [p.detach() for p in model.parameters()], scaler.get_scale()

    (one, scale), (two, other_scale) = on_threads(body)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert scale == other_scale == 512.0


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in backward, and a layer on either side."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.reentrant: bool | None = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(x)
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("explicit", [False, True], ids=["loss.backward", "replica.backward"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant: bool, explicit: bool) -> None:
    """Activations computed again inside backward change no gradient, nested backward included."""

    def body(comm: Backend) -> None:
        model = Checkpointed(reentrant)
        replica = replicate(model, comm, bucket_mb=1e-5, first_bucket_mb=1e-5)
        twin = copy.deepcopy(model)
        twin.reentrant = None
        expected = alone(twin, square)
        for _ in range(2):
            loss = square(model, batch(comm.rank))
            if explicit:
                replica.backward(loss, samples=4)
            else:
                loss.backward()
            assert_grads(grads(model), expected)
            model.zero_grad()
        with replica.no_sync():
            square(model, batch(comm.rank)).backward()
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), [2 * e for e in expected if e is not None])

    on_threads(body)


def test_the_whole_model_checkpointed() -> None:
    """The recomputation may go through the model's own forward, twice in one backward."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, lambda m, x: square(m, x) + square(m, x + 1))
        replicate(model, comm, bucket_mb=1e-5, first_bucket_mb=1e-5)
        x = batch(comm.rank).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False).square().mean()
        z = checkpoint(model, x + 1, use_reentrant=False).square().mean()
        (y + z).backward()
        assert_grads(grads(model), expected)

    on_threads(body)


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")  # of the compiler's own making
@pytest.mark.parametrize("first", ["compile", "replicate", "in place"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled(compiler: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled before or after it was tied to the backend, a model gives the same gradients; names are its own."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()

    def body(comm: Backend) -> None:
        torch._inductor.config.compile_threads = 1
        model = mlp()
        expected = alone(model, square)
        if first == "compile":
            used = torch.compile(model, backend=compiler)
            replica = replicate(used, comm)
        else:
            replica = replicate(model, comm)
            used = torch.compile(model, backend=compiler)
            if first == "in place":
                model.compile(backend=compiler)
                used = model
        for _ in range(2):
            model.zero_grad()
            square(used, batch(comm.rank)).backward()
            assert_grads(grads(model), expected, atol=1e-12)
        with replica.no_sync():
            square(used, batch(comm.rank)).backward()
        square(used, batch(comm.rank)).backward()
        assert_grads(grads(model), [3 * e for e in expected if e is not None], atol=1e-12)
        model.zero_grad()
        model[0].requires_grad_(False)
        square(used, batch(comm.rank)).backward()
        assert_grads(grads(model), alone(model, square), atol=1e-12)
        replica.check()

    on_threads(body)


def test_compiled_names() -> None:
    """A worker that compiles its model and one that does not hold the same tensors."""

    def body(comm: Backend) -> None:
        model = mlp()
        replicate(torch.compile(model, backend="eager") if comm.rank else model, comm)  # type: ignore[arg-type]

    on_threads(body)


# --- loops


def test_two_losses() -> None:
    """Two backwards in a step add up, each with its own part of the model, with and without samples."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, lambda m, x: square(m, x) + m[0](x).mean() + square(m, x + 1))
        for explicit in (False, True):
            replica = replicate(model, comm, bucket_mb=1e-5, first_bucket_mb=1e-5)
            x = batch(comm.rank)
            for loss in (square(model, x), model[0](x).mean(), square(model, x + 1)):
                if explicit:
                    replica.backward(loss, samples=4, total=8)
                else:
                    loss.backward()
            assert_grads(grads(model), expected)
            model.zero_grad()
            replica.close()

    on_threads(body)


def test_retain_graph() -> None:
    """A graph may be gone through twice."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, lambda m, x: 2 * square(m, x))
        replicate(model, comm)
        loss = square(model, batch(comm.rank))
        loss.backward(retain_graph=True)
        loss.backward()
        assert_grads(grads(model), expected)

    on_threads(body, workers=2)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    """Zeroed gradients, and those that were removed, start from nothing."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        replica = replicate(model, comm)
        for _ in range(3):
            square(model, batch(comm.rank)).backward()
            assert_grads(grads(model), expected)
            model.zero_grad(set_to_none=to_none)
        for _ in range(2):  # micro-batches of 4 samples, their total unknown
            replica.backward(square(model, batch(comm.rank)), samples=4, sync=False)
            replica.backward(square(model, batch(comm.rank)), samples=4)
            assert_grads(grads(model), expected)
            model.zero_grad(set_to_none=to_none)

    on_threads(body)


def test_a_step_that_was_given_up() -> None:
    """`zero_grad()` after some micro-batches forgets their samples too."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        replica = replicate(model, comm)
        replica.backward(square(model, batch(comm.rank)), samples=4 + 10 * comm.rank, sync=False)
        model.zero_grad()
        replica.backward(square(model, batch(comm.rank)), samples=4)
        assert_grads(grads(model), expected)

    on_threads(body)


def test_evaluation_between_steps() -> None:
    """A forward without gradients, or under no_sync and never gone back through, changes nothing."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        replica = replicate(model, comm)
        with replica.no_sync():
            model(batch(9))
        with torch.no_grad():
            model(batch(9))
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), expected)

    on_threads(body)


def test_a_worker_without_a_loss() -> None:
    """A worker with no samples passes None and takes part with weight zero, on every micro-batch."""

    def body(comm: Backend) -> None:
        model, twin = mlp(), mlp()
        replica = replicate(model, comm)
        square(twin, batch(1, count=8)).backward()
        for total in (8.0, None):
            for half in (slice(0, 4), slice(4, 8)):
                loss = square(model, batch(1, count=8)[half]) if comm.rank == 1 else None
                replica.backward(loss, samples=4 if comm.rank == 1 else 0, total=total, sync=half.stop == 8)
            assert_grads(grads(model), grads(twin))
            model.zero_grad()

    on_threads(body, workers=3)


# --- misuse


def test_step_on_gradients_of_one_worker() -> None:
    """`optimizer.step()` when every backward ran under `no_sync()` is refused; after a reduced one it is not."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = replicate(model, comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        with replica.no_sync():
            square(model, batch(comm.rank)).backward()
        with pytest.raises(UsageError, match="no_sync"):
            optimizer.step()
        stranger.step()
        square(model, batch(comm.rank)).backward()
        optimizer.step()
        replica.check()

    on_threads(body)


def test_forward_and_backward_on_either_side_of_no_sync() -> None:
    """A forward under `no_sync()` with its backward outside is refused, and the next step is well again."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        replica = replicate(model, comm)
        with replica.no_sync():
            loss = square(model, batch(comm.rank))
        with pytest.raises(UsageError, match="no_sync"):
            loss.backward()
        model.zero_grad()
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), expected)

    on_threads(body)


Step = list[dict[str, Any]]
MIXTURES: dict[str, Step] = {
    "samples, then none": [{"samples": 4, "sync": False}, {}],
    "none, then samples": [{"sync": False}, {"samples": 4}],
    "samples, then samples and total": [{"samples": 4, "sync": False}, {"samples": 4, "total": 16}],
    "total, then samples alone": [{"samples": 4, "total": 16, "sync": False}, {"samples": 4}],
    "total, then none": [{"samples": 4, "total": 16, "sync": False}, {}],
    "total without samples": [{"total": 8}],
    "negative samples": [{"samples": -1, "total": 8}],
    "more than all": [{"samples": 9, "total": 8}],
    "a total of nothing": [{"samples": 0, "total": 0}],
    "no samples anywhere": [{"samples": 0}],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_numbers_that_cannot_be_meant(name: str) -> None:
    """Samples that are given sometimes, negative ones, more than there are, or none at all: refused, not guessed."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        replica = replicate(model, comm)
        *before, last = MIXTURES[name]
        for arguments in before:
            replica.backward(square(model, batch(comm.rank)), **arguments)
        with pytest.raises(UsageError, match=r"samples|total"):
            replica.backward(square(model, batch(comm.rank)), **last)
        model.zero_grad()
        replica.backward(square(model, batch(comm.rank)), samples=4)
        assert_grads(grads(model), expected)

    on_threads(body)


def test_accumulation_on_top_of_global_gradients() -> None:
    """Micro-batches of unknown total on top of what was summed already have no right scale: refused."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = replicate(model, comm)
        replica.backward(square(model, batch(comm.rank)), samples=4)
        with pytest.raises(UsageError, match="zero_grad"):
            replica.backward(square(model, batch(comm.rank)), samples=4, sync=False)

    on_threads(body)


def test_sparse_gradient() -> None:
    """A sparse gradient is refused, with the parameter's name and the remedy."""

    def body(comm: Backend) -> None:
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
        replicate(model, comm)
        with pytest.raises(UsageError, match=r"0\.weight.*sparse=False"):
            model(torch.tensor([1, 2])).sum().backward()

    on_threads(body)


def test_check_names_what_differs() -> None:
    """`check()` raises on every worker and names the first tensor that differs, and the workers that differ."""

    def body(comm: Backend) -> None:
        model = nn.Sequential(mlp(), nn.BatchNorm1d(2))
        replica = replicate(model, comm)
        replica.check(buffers=True)
        with torch.no_grad():
            model[0][2].weight[0, 0] += comm.rank * 1e-12
        with pytest.raises(LayoutError, match=r"0\.2\.weight .*workers 1, 2 differ from worker 0"):
            replica.check()
        with torch.no_grad():
            model[0][2].weight.zero_()
        replica.check()
        model[1].running_var += comm.rank == 2  # type: ignore[operator]
        replica.check()
        with pytest.raises(LayoutError, match=r"1\.running_var .*worker 2 differs from worker 0"):
            replica.check(buffers=True)

    on_threads(body, workers=3)


class Fragile(torch.autograd.Function):
    """Its backward fails when the model says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: FragileModel) -> Tensor:
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if ctx.model.broken:
            raise RuntimeError("broken backward")
        return dy, None


class FragileModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](Fragile.apply(self.net[:2](x), self))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("bucket_mb", [1e-5, 25.0], ids=["some under way", "none under way"])
@pytest.mark.parametrize("explicit", [False, True], ids=["loss.backward", "replica.backward"])
@pytest.mark.parametrize("again", ["forward", "backward alone"])
def test_exception_inside_backward(explicit: bool, bucket_mb: float, again: str) -> None:
    """A backward that raised half-way leaves the replica fit for the next one, transfers under way or not."""

    def body(comm: Backend) -> None:
        model = FragileModel()
        expected = alone(model, square)
        replica = replicate(model, comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)

        def backward(loss: Tensor) -> None:
            if explicit and again == "forward":
                replica.backward(loss, samples=4)
            else:
                loss.backward(retain_graph=True)

        for _ in range(2):
            model.broken = True
            loss = square(model, batch(comm.rank))
            with pytest.raises(RuntimeError, match="broken backward"):
                backward(loss)
            model.broken = False
            model.zero_grad()
            backward(square(model, batch(comm.rank)) if again == "forward" else loss)
            assert_grads(grads(model), expected)
            model.zero_grad()

    on_threads(body)


@pytest.mark.parametrize("sync", [True, False])
def test_exception_inside_a_micro_batch(sync: bool) -> None:
    """The samples of a step that failed are not counted in the next."""

    def body(comm: Backend) -> None:
        model = FragileModel()
        expected = alone(model, square)
        replica = replicate(model, comm)
        replica.backward(square(model, batch(comm.rank)), samples=4, sync=False)
        model.broken = True
        with pytest.raises(RuntimeError, match="broken backward"):
            replica.backward(square(model, batch(comm.rank)), samples=30 * comm.rank, sync=sync)
        model.broken = False
        model.zero_grad()
        replica.backward(square(model, batch(comm.rank)), samples=4, sync=False)
        replica.backward(square(model, batch(comm.rank)), samples=4)
        assert_grads(grads(model), expected)

    on_threads(body)


def test_worker_that_fails_in_backward() -> None:
    """Where one worker's backward raises and ends it, the other gets a CommError out of its own backward."""
    told = []

    def body(comm: Backend) -> None:
        model = mlp()
        replicate(model, comm)
        if comm.rank == 1:
            raise ArithmeticError("out of luck")
        try:
            square(model, batch(comm.rank)).backward()
        except CommError as error:
            told.append(str(error))

    with pytest.raises(ArithmeticError, match="out of luck"):
        on_threads(body)
    assert "worker 1" in told[0]
    assert "out of luck" in told[0]


# --- the end


def test_close() -> None:
    """After `close()` gradients are local again and steps are not looked at; closing twice is fine."""

    def body(comm: Backend) -> None:
        model, twin = mlp(), mlp()
        replica = replicate(model, comm)
        square(model, batch(comm.rank)).backward()
        with replica.no_sync():
            square(model, batch(comm.rank)).backward()
        model.zero_grad()
        replica.close()
        replica.close()
        square(model, batch(comm.rank)).backward()
        square(twin, batch(comm.rank)).backward()
        assert_grads(grads(model), grads(twin))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not model._forward_pre_hooks
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    on_threads(body)


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_kept_alive(closed: bool) -> None:
    """The model and its buffers can be collected, after `close()` and without it."""

    def body(comm: Backend) -> tuple[weakref.ref[nn.Module], weakref.ref[Replica]]:
        model = mlp()
        replica = replicate(model, comm)
        square(model, batch(comm.rank)).backward()
        if closed:
            replica.close()
        return weakref.ref(model), weakref.ref(replica)

    refs = on_threads(body)
    gc.collect()
    assert all(ref() is None for pair in refs for ref in pair)


def test_replicas_of_two_models() -> None:
    """Two models in one loop do not disturb each other."""

    def body(comm: Backend) -> None:
        one, two = mlp(1), mlp(2)
        replica, other = replicate(one, comm), replicate(two, comm)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, two)]
        with replica.no_sync():
            square(one, batch(comm.rank)).backward()
        square(two, batch(comm.rank)).backward()
        optimizers[1].step()
        with pytest.raises(UsageError):
            optimizers[0].step()
        (square(one, batch(comm.rank)) + square(two, batch(comm.rank))).backward()
        for optimizer in optimizers:
            optimizer.step()
        replica.check()
        other.check()

    on_threads(body)


# --- update="first"


@pytest.mark.parametrize("loop", ["one backward", "two backwards", "accumulation", "zeroed in place", "no_sync"])
def test_update_first(loop: str) -> None:
    """Worker 0 alone steps and hands its parameters out: the result is that of `update="worker"`."""
    steps_taken: list[int] = []

    def body(comm: Backend, update: str) -> list[Tensor]:
        model = mlp()
        replica = replicate(model, comm, update=update, bucket_mb=1e-5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for number in range(3):
            first, second = batch(comm.rank + 10 * number), batch(comm.rank + 100 * number, count=2 + comm.rank)
            if loop == "no_sync":
                with replica.no_sync():
                    square(model, second).backward()
            elif loop != "one backward":
                replica.backward(square(model, second), samples=len(second), sync=loop != "accumulation")
            if loop == "no_sync":
                square(model, first).backward()
            else:
                replica.backward(square(model, first), samples=4)
            if replica.updates:
                optimizer.step()
                steps_taken.append(comm.rank)
            replica.publish()
            model.zero_grad(set_to_none=loop != "zeroed in place")
        replica.check()
        return [p.detach().clone() for p in model.parameters()]

    workers = {update: on_threads(lambda comm, u=update: body(comm, u), workers=3) for update in ("worker", "first")}  # type: ignore[misc]
    assert sorted(steps_taken) == [0] * 6 + [1] * 3 + [2] * 3
    for worker in workers["first"]:
        for got, wanted in zip(worker, workers["worker"][0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


# -- memory that autograd shares, and memory formats ------------------------------------------------------------------


class SumOfTwo(nn.Module):
    """Two flat parameters whose gradients are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Parameter(torch.randn(64, dtype=torch.float64))
        self.delta = nn.Parameter(torch.randn(64, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] @ (self.base.view(1, 64) + self.delta.view(1, 64))


class Positions(nn.Module):
    """A parameter whose gradient is a view of what backward still reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 8, dtype=torch.float64)
        self.position = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.position[None]).square()


@pytest.mark.parametrize("kind", [SumOfTwo, Positions])
def test_gradients_that_share_memory(kind: type[nn.Module]) -> None:
    """A gradient that is a view of memory with other readers is copied before it is scaled and summed."""

    def body(comm: Backend) -> None:
        model = kind()
        expected = alone(model, square)
        replicate(model, comm)
        square(model, batch(comm.rank)).backward()
        assert_grads(grads(model), expected)

    on_threads(body)


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last(fused: bool) -> None:
    """Gradients have the strides of their parameters, on which fused optimizers count."""

    def train(model: nn.Module, comm: Backend | None) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        for step in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 3, 5, 5, generator=generator).contiguous(memory_format=torch.channels_last)
            (model(x) if comm is None else model(x[comm.rank :: 2])).square().mean().backward()
            assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2))
        return model.to(memory_format=torch.channels_last)

    def body(comm: Backend) -> list[Tensor]:
        model = make()
        replicate(model, comm)
        return train(model, comm)

    for got, wanted in zip(on_threads(body)[1], train(make(), None), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


# -- tied again, tied twice, grown ------------------------------------------------------------------------------------


def test_a_model_that_is_tied_again() -> None:
    """The new tie replaces the old one, whose handle is of no use any more."""

    def body(comm: Backend) -> None:
        model = mlp()
        expected = alone(model, square)
        old = replicate(model, comm)
        new = replicate(model, comm)
        new.backward(square(model, batch(comm.rank)), samples=4, total=8)
        assert_grads(grads(model), expected)
        with pytest.raises(UsageError, match="tied again"):
            old.backward(square(model, batch(comm.rank)))

    on_threads(body)


def test_what_cannot_be_tied() -> None:
    """A part of a model that is tied; one object for two workers."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = replicate(model, comm)
        with pytest.raises(UsageError, match="as part of another model"):
            replicate(model[0], comm)
        replica.close()

    on_threads(body)
    model = mlp()
    with pytest.raises((UsageError, CommError), match="share one model object"):
        on_threads(lambda comm: replicate(model, comm))


def test_two_models_in_one_backward() -> None:
    """Each has its own gradients, in whatever order their layers come on a worker."""

    def body(comm: Backend) -> None:
        a, b = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
        ra, rb = replicate(a, comm), replicate(b, comm)
        x = torch.ones(1, 3, dtype=torch.float64)
        (a(x) + 2 * b(x) if comm.rank else 2 * b(x) + a(x)).sum().backward()
        assert a.weight.grad is not None
        assert b.weight.grad is not None
        assert a.weight.grad.unique().tolist() == [1.0]
        assert b.weight.grad.unique().tolist() == [2.0]
        ra.close()
        rb.close()

    on_threads(body)


def test_parameters_that_came_later() -> None:
    """check() names what came into the model after it was tied."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = replicate(model, comm)
        model[2] = nn.Linear(4, 2).double()
        with pytest.raises(UsageError, match=r"2\.weight came into the model after replicate"):
            replica.check()

    on_threads(body)


def test_create_graph() -> None:
    """Second-order terms would be lost in the sum: refused."""

    def body(comm: Backend) -> None:
        model = mlp()
        replicate(model, comm)
        with pytest.raises(UsageError, match="create_graph"):
            square(model, batch(comm.rank)).backward(create_graph=True)

    on_threads(body)


@pytest.mark.parametrize("sync", [True, False])
def test_shares_that_do_not_add_up(sync: bool) -> None:
    """Every worker says that all samples are its own: refused at the first step, on every worker."""

    def body(comm: Backend) -> None:
        model = mlp()
        replica = replicate(model, comm)
        if not sync:
            replica.backward(square(model, batch(comm.rank)), samples=4, total=8, sync=False)
        loss = square(model, batch(comm.rank))
        with pytest.raises(UsageError, match=r"add up to 2\.00 times total"):
            replica.backward(loss, samples=4, total=4 if sync else 8)

    on_threads(body)
