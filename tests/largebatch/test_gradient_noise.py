"""The gradient noise scale of a run: what hooks see is what a loop over pieces computes, on every backend.

Starting processes costs about a second, so one job a backend runs all cases; the tests look at what its workers had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain
from dtrain.comm.base import Backend
from dtrain.comm.solo import Solo
from dtrain.errors import DataError, UsageError
from dtrain.largebatch.gradient_noise import Estimates, GradientNoise, one_group
from dtrain.largebatch.gradient_squares import SecondMoments, square, squares
from dtrain.largebatch.noise_estimate import Sums, estimate
from dtrain.recipes.data import TensorData
from dtrain.replica import replicate
from tests.conftest import everywhere, remembered

WORKERS, STEPS, BATCH = 3, 4, 20
BACKENDS = ["threads", "ps", "allreduce"]
MODEL_GROUPS = ["body", "head"]


@dataclass(frozen=True, kw_only=True)
class Case:
    shares: tuple[int, ...] = (1, 1, 1)
    """Weights of the workers' shares."""
    pieces: tuple[int, ...] = (1,)
    """Weights of the micro-batches of a step."""
    tell_total: bool = True
    tell_samples: bool = True
    adam: bool = False
    loss_scale: bool = False
    every: int = 1


CASES = {
    "workers": Case(),
    "ragged": Case(shares=(1, 5, 2)),
    "empty shares": Case(shares=(3, 0, 1)),
    "micro-batches": Case(pieces=(1, 1)),
    "ragged micro-batches": Case(shares=(2, 0, 5), pieces=(5, 1, 3)),
    "total unknown": Case(shares=(1, 5, 2), pieces=(3, 2), tell_total=False),
    "not told": Case(shares=(1, 1, 1), tell_samples=False),
    "adam": Case(shares=(1, 5, 2), pieces=(3, 2), adam=True),
    "loss scale": Case(shares=(1, 5, 2), pieces=(3, 2), loss_scale=True),
    "every second": Case(every=2),
}


class Tied(nn.Module):
    """A layer that is used twice, a frozen one, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"twice": nn.Linear(5, 5), "frozen": nn.Linear(5, 5), "unused": nn.Linear(5, 5)})
        self.head = nn.Linear(5, 1)
        self.body["frozen"].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body["twice"](x))
        return self.head(torch.tanh(self.body["twice"](self.body["frozen"](x))))


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied().to(dtype)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return x, 2 + torch.randn(BATCH, 1, generator=generator, dtype=torch.float64)


def portions(positions: range, weights: Sequence[int]) -> list[range]:
    ends = [sum(weights[: i + 1]) * len(positions) // sum(weights) for i in range(len(weights))]
    return [positions[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def cuts(case: Case, workers: int) -> list[list[range]]:
    """By micro-batch and worker: the positions in the batch."""
    batch = range(BATCH if case.tell_samples else BATCH // WORKERS * WORKERS)
    shares = case.shares if workers > 1 else (1,)
    return [portions(piece, shares) for piece in portions(batch, case.pieces)]


def scale_of(step: int) -> float:
    return 2.0 ** (step % 3 * 4)


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01) if case.adam else torch.optim.SGD(model.parameters(), lr=0.05)


# --- what workers do


def run_case(comm: Backend, case: Case) -> Estimates:
    model = model_of()
    optimizer = optimizer_of(case, model)
    now = [0]
    noise = GradientNoise(
        model,
        comm,
        every=case.every,
        optimizer=optimizer if case.adam else None,
        loss_scale=(lambda: scale_of(now[0])) if case.loss_scale else None,
        samples=None if case.tell_samples else BATCH // WORKERS,
    )
    replica = replicate(model, comm)
    replica.observe(noise)
    pieces = cuts(case, comm.world_size)
    for step in range(STEPS):
        now[0] = step
        x, y = batch_of(step)
        optimizer.zero_grad()
        for number, shares in enumerate(pieces):
            mine = shares[comm.rank]
            told: dict[str, Any] = {"samples": len(mine)} if case.tell_samples else {}
            if case.tell_total and case.tell_samples:
                told["total"] = BATCH
            loss = F.mse_loss(model(x[mine.start : mine.stop]), y[mine.start : mine.stop])
            if case.loss_scale:
                loss = loss * scale_of(step)
            replica.backward(loss, **told, sync=number == len(pieces) - 1)
        if case.loss_scale:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= scale_of(step)
        optimizer.step()
    return noise.estimate()


def work(comm: Backend) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {name: asdict(run_case(comm, case)) for name, case in CASES.items()}


@remembered
def ran(backend: str) -> list[dict[str, dict[str, Any]]]:
    return everywhere(work, backend=backend, workers=WORKERS, timeout_s=60.0)


# --- the same by a loop over pieces


@remembered
def direct(name: str) -> Estimates:
    case = CASES[name]
    model = model_of()
    optimizer = optimizer_of(case, model)
    parameters = [(n.partition(".")[0], p) for n, p in model.named_parameters()]
    steps: dict[str, list[Sums]] = {"body": [], "head": [], "": []}
    for step in range(STEPS):
        x, y = batch_of(step)
        pieces = [piece for shares in cuts(case, WORKERS) for piece in shares if len(piece)]
        total = sum(map(len, pieces))
        sums = {group: [0.0, 0.0] for group in steps}
        mean = [torch.zeros_like(p) for _, p in parameters]
        for piece in pieces:
            loss = F.mse_loss(model(x[piece.start : piece.stop]), y[piece.start : piece.stop])
            gradients = torch.autograd.grad(loss, [p for _, p in parameters if p.requires_grad], allow_unused=True)
            found = iter(gradients)
            for slot, (group, p) in enumerate(parameters):
                gradient = next(found) if p.requires_grad else None
                if gradient is not None:
                    mean[slot] += gradient * len(piece) / total
                    square = divided(case, optimizer, p, gradient).square().sum().item() * len(piece) / total
                    sums[group][0] += square
                    sums[""][0] += square
        for (group, p), gradient in zip(parameters, mean, strict=True):
            square = divided(case, optimizer, p, gradient).square().sum().item()
            sums[group][1] += square
            sums[""][1] += square
            p.grad = gradient.clone() if p.requires_grad else None
        if (step + 1) % case.every == 0 and not (case.adam and step == 0):
            for group, (own, of_mean) in sums.items():
                steps[group].append(Sums(pieces=len(pieces), samples=total, of_pieces=own, of_mean=of_mean))
        optimizer.step()
    groups = {group: estimate(steps[group]) for group in MODEL_GROUPS}
    return Estimates(whole=estimate(steps[""]), groups=groups, skipped=int(case.adam))


def divided(case: Case, optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor:
    if not case.adam:
        return gradient
    state = optimizer.state.get(parameter)
    if not state:
        return torch.zeros_like(gradient)
    return gradient / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_close(found[key], value, tolerance)
    elif isinstance(expected, float):
        assert found == expected or math.isclose(found, expected, rel_tol=tolerance) or found != found != expected
    else:
        assert found == expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_see_what_a_loop_over_pieces_computes(backend, name):
    found = ran(backend)[0][name]
    expected = asdict(direct(name))
    assert expected["whole"]["steps"] == {"every second": 2, "adam": 3}.get(name, 4)
    assert 0 < expected["whole"]["scale"] < math.inf
    assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_workers_have_the_same_figures_to_the_bit(backend):
    first, *others = ran(backend)
    assert others == [first] * (WORKERS - 1)


def test_ps_and_threads_have_the_same_bits_and_allreduce_to_rounding():
    assert ran("ps") == ran("threads")
    assert_close(ran("allreduce")[0], ran("threads")[0], 1e-11)


def test_groups_add_up_to_the_whole():
    found = ran("threads")[0]["ragged micro-batches"]
    for name in ("noise", "square"):
        parts = [found["groups"][group][name] for group in MODEL_GROUPS]
        assert math.isclose(sum(parts), found["whole"][name], rel_tol=1e-12)


# --- one worker


class Loop:
    """One worker that makes steps of pieces of 4 samples each."""

    def __init__(
        self, comm: Backend | None = None, *, pieces: int = 3, dtype: torch.dtype = torch.float64, **more: Any
    ):
        self.model = model_of(dtype)
        self.pieces = pieces
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        comm = comm or Solo()
        self.noise = GradientNoise(self.model, comm, **{"every": 1, **more})
        self.replica = replicate(self.model, comm)
        self.replica.observe(self.noise)

    def pass_back(self, step: int, piece: int, factor: float = 1.0) -> None:
        x, y = (t[4 * piece : 4 * piece + 4].to(self.model.head.weight.dtype) for t in batch_of(step))
        loss = F.mse_loss(self.model(x), y) * factor
        self.replica.backward(loss, samples=4, total=4 * self.pieces, sync=piece == self.pieces - 1)

    def step(self, number: int, factor: float = 1.0) -> None:
        for piece in range(self.pieces):
            self.pass_back(number, piece, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, numbers: range) -> Loop:
        for number in numbers:
            self.step(number)
        return self


def test_one_piece_is_said_to_be_too_few():
    found = Loop(pieces=1).steps(range(3)).noise.estimate()
    assert "more workers, or micro-batches" in str(found.whole)
    assert found.skipped == 0


def test_only_every_kth_step_is_measured_and_the_hooks_are_gone_then():
    loop = Loop(every=3)
    hooks = []
    for number in range(7):
        loop.pass_back(number, 0)
        hooks.append(bool(loop.model.head.weight._backward_hooks))
        loop.pass_back(number, 1)
        loop.pass_back(number, 2)
        assert not loop.model.head.weight._backward_hooks
        loop.optimizer.zero_grad()
    assert hooks == [False, False, True, False, False, True, False]
    assert loop.noise.estimate().whole.steps == 2


def test_hooks_change_no_gradient():
    def gradients(observed: bool) -> list[Tensor]:
        loop = Loop(every=1 if observed else 100)
        for piece in range(3):
            loop.pass_back(0, piece)
        return [p.grad for p in loop.model.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_the_window_forgets_the_oldest_whether_asked_or_not():
    often, once, short = Loop(window=4), Loop(window=4), Loop(window=100)
    for number in range(10):
        often.step(number)
        once.step(number)
        often.noise.estimate()
        if number == 5:
            short.noise.reset()
        short.step(number)
    assert often.noise.estimate() == once.noise.estimate()
    assert once.noise.estimate().whole.steps == 4
    assert short.steps(range(0)).noise.estimate().whole.steps == 5


def test_saved_and_resumed_it_goes_on():
    whole = Loop(every=2, window=5).steps(range(14))
    first = Loop(every=2, window=5).steps(range(7))
    state = first.noise.state()
    second = Loop(every=2, window=5)
    second.model.load_state_dict(first.model.state_dict())
    second.noise.load(state)
    second.steps(range(7, 14))
    assert second.noise.estimate() == whole.noise.estimate()
    assert second.noise.state() == whole.noise.state()
    first.steps(range(7, 9))  # the state is a copy
    assert state["count"] == 7
    assert len(state["rows"]) == 3


def test_a_state_of_other_groups_is_refused():
    state = Loop(group=one_group).noise.state()
    with pytest.raises(DataError, match=r"groups \['all'\].*\['body', 'head'\]"):
        Loop().noise.load(state)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(factor):
    loop, clean = Loop(), Loop()
    loop.step(0)
    clean.step(0)
    for piece in range(3):
        loop.pass_back(1, piece, factor)
    loop.optimizer.zero_grad()
    loop.step(2)
    clean.step(2)
    found = loop.noise.estimate()
    assert found == replace(clean.noise.estimate(), skipped=1)


def test_a_step_on_top_of_another_is_left_out():
    loop = Loop()
    loop.step(0)
    for number in (1, 2):
        for piece in range(3):
            loop.pass_back(number, piece)
    loop.optimizer.zero_grad()
    found = loop.noise.estimate()
    assert (found.whole.steps, found.skipped) == (2, 1)


def test_gradients_of_zero_may_stay():
    loop, fresh = Loop(), Loop()
    for number in range(3):
        loop.step(number)
        fresh.step(number)
        for p in loop.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    loop.step(3)
    fresh.step(3)
    found = loop.noise.estimate()
    assert found.skipped == 0
    assert math.isclose(found.whole.scale, fresh.noise.estimate().whole.scale, rel_tol=1e-9)


def test_a_step_that_failed_is_begun_anew():
    def fail(_: Tensor) -> None:
        raise RuntimeError("no")

    loop, clean = Loop(), Loop()
    loop.pass_back(0, 0)
    loop.pass_back(0, 1)
    handle = loop.model.body["twice"].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        loop.pass_back(0, 2)
    handle.remove()
    loop.optimizer.zero_grad()
    loop.steps(range(4))
    assert loop.noise.estimate() == clean.steps(range(4)).noise.estimate()


def test_a_parameter_that_gets_two_gradients_in_one_backward_spoils_the_step():
    """As with reentrant checkpointing, where a backward runs inside another."""
    loop = Loop()
    loop.noise.begin(1.0, 4)
    weight = loop.model.head.weight
    for _ in range(2):
        (weight * 1.0).sum().backward()
    loop.noise.begin(1.0, 4)
    loop.noise.end()
    loop.optimizer.zero_grad()
    loop.step(0)
    found = loop.noise.estimate()
    assert (found.whole.steps, found.skipped) == (1, 1)


def test_without_samples_it_says_what_to_tell():
    loop = Loop(pieces=1)
    x, y = batch_of(0)
    with pytest.raises(UsageError, match=r"backward\(samples=, total=\)"):
        loop.replica.backward(F.mse_loss(loop.model(x), y))


def test_of_another_model_nothing_is_measured():
    loop = Loop(pieces=2)
    stranger = GradientNoise(model_of(), Solo(), every=1)
    loop.replica.observe(stranger)
    loop.step(0)
    found = stranger.estimate()
    assert (found.whole.steps, found.skipped) == (0, 1)
    assert "a Replica has to observe it, with this model" in str(found)


def test_what_cannot_observe_and_what_does_already():
    loop = Loop(pieces=2)
    for wrong in (3, loop.noise):
        with pytest.raises(UsageError, match="cannot observe, or does already"):
            loop.replica.observe(wrong)


def test_ends_of_an_interval_are_plain_numbers():
    """As they become rates of an optimizer, which is saved without NumPy's types."""
    loop = Loop(pieces=2)
    for step in range(6):
        loop.step(step)
    whole = loop.noise.estimate().whole
    assert {type(whole.low), type(whole.high), type(whole.scale)} == {float}


def test_servers_that_update_are_refused():
    def start(comm: Backend) -> None:
        model = model_of()
        replicate(model, comm, update="first").observe(GradientNoise(model, comm))

    with pytest.raises(UsageError, match="update='worker'"):
        dtrain.run(start, workers=2, backend="threads")


@pytest.mark.parametrize("wrong", [{"every": 0}, {"window": 0}, {"samples": 0}])
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        GradientNoise(model_of(), Solo(), **wrong)


def test_a_model_without_parameters_and_an_optimizer_without_moments_are_refused():
    with pytest.raises(UsageError, match="no parameters"):
        GradientNoise(nn.ReLU(), Solo())
    model = model_of()
    with pytest.raises(UsageError, match="SGD, which keeps no second moments"):
        GradientNoise(model, Solo(), optimizer=torch.optim.SGD(model.parameters(), lr=1))


def test_half_precision_gradients_are_measured_in_float32():
    exact = Loop().steps(range(5)).noise.estimate().whole
    half = Loop(dtype=torch.bfloat16).steps(range(5)).noise.estimate().whole
    assert math.isclose(half.noise, exact.noise, rel_tol=0.05)
    assert math.isclose(half.square, exact.square, rel_tol=0.15)


# --- it finds what is there


def test_it_finds_the_noise_scale_of_made_up_gradients():
    """The gradient of |w - x|² / 2 is w - x: d = 50, and the truth is known."""

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w - x).square().sum(1).mean() / 2

    def measure(comm: Backend) -> Estimates:
        model = Distance()
        noise = GradientNoise(model, comm, every=1, window=250)
        replica = replicate(model, comm)
        replica.observe(noise)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(250):
            model.w.grad = None
            for last in (False, True):
                x = torch.randn(8, 50, generator=generator, dtype=torch.float64) * 1.5
                replica.backward(model(x), samples=8, total=64, sync=last)
        return noise.estimate()

    whole = dtrain.run(measure, workers=4, backend="threads")[0].whole
    square = float(torch.linspace(-1, 1, 50, dtype=torch.float64).square().sum())
    assert math.isclose(whole.noise, 50 * 1.5**2, rel_tol=0.02)
    assert math.isclose(whole.square, square, rel_tol=0.02)
    assert math.isclose(whole.scale, 50 * 1.5**2 / square, rel_tol=0.02)
    assert whole.low < 50 * 1.5**2 / square < whole.high


def test_it_finds_the_noise_scale_of_a_network_on_its_training_set():
    """Digits, drawn without repetition by a Loader; the truth is from each sample's own gradient."""
    recipe = dtrain.recipes.build("digits")
    data = TensorData(*(t[:400] for t in recipe.train.batch(torch.arange(400))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = GradientNoise(model, Solo(), every=1, window=1000)
    replica = replicate(model, Solo())
    replica.observe(noise)
    loader = dtrain.Loader(data, global_batch=50, micro_batch=5)
    for epoch in range(3 + 20):
        if epoch == 3:  # the parameters stay from here on
            noise.reset()
            optimizer.param_groups[0]["lr"] = 0.0
        for (x, y), share in loader.batches(epoch):
            if share["sync"]:
                replica.backward(F.cross_entropy(model(x), y), **share)
                optimizer.step()
                optimizer.zero_grad()
            else:
                replica.backward(F.cross_entropy(model(x), y), **share)
    x, y = data.batch(torch.arange(400))
    own = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), p)])
        for p in [list(model.parameters())]
        for i in range(400)
    ])  # fmt: skip
    mean = own.mean(0)
    variance = float(own.var(0).sum())
    found = noise.estimate(population=400).whole
    assert found.steps == 160
    assert math.isclose(found.noise, variance, rel_tol=0.05)
    assert math.isclose(found.square, float(mean @ mean), rel_tol=0.1)
    assert found.low < variance / float(mean @ mean) < found.high
    of_source = noise.estimate().whole.scale
    assert math.isclose(1 / of_source, 1 / found.scale - 1 / 400, rel_tol=1e-9)


# --- squares


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3_000_001),
        lambda: torch.randn(64, 64, 7, 7).to(memory_format=torch.channels_last),
        lambda: torch.randn(300, 700).t(),
        lambda: torch.randn(600, 700)[:, ::2],
        lambda: torch.randn(300, 700)[:, :500],
        lambda: torch.randn(300).unsqueeze(1).expand(300, 7),
        lambda: torch.randn(7).expand(300, 7),
        lambda: torch.randn(200_000).half(),
        lambda: torch.randn(200_000, dtype=torch.float64),
        lambda: torch.randn(2**16),
        lambda: torch.randn(2**16 + 1),
        lambda: torch.randn(()),
        lambda: torch.randn(0, 3),
    ],
)
def test_squares_are_right_to_the_last_digits(make: Callable[[], Tensor]):
    torch.manual_seed(0)
    tensor = make()
    exact = tensor.double().square().sum().item()
    for found in (square(tensor), *squares([tensor, tensor, torch.ones(2)])[:2]):
        assert math.isclose(float(found), exact, rel_tol=4e-6 if tensor.dtype != torch.float64 else 1e-13)


def test_squares_of_one_number_again_and_again():
    """Each addition is rounded the same way, which is the worst there is."""
    for value in torch.rand(20, generator=torch.Generator().manual_seed(0)):
        found = float(square(value.expand(1000, 200)))
        assert math.isclose(found, 200_000 * value.item() ** 2, rel_tol=4e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_do_not_depend_on_the_address(dtype: torch.dtype):
    """Or a resumed run would measure another noise scale than the one that went on."""
    for count in (5, 1000, 5000):
        memory = torch.empty(count + 32, dtype=dtype)
        numbers = torch.randn(count, dtype=dtype)
        assert len({square(memory[start : start + count].copy_(numbers)) for start in range(32)}) == 1


def test_a_plain_norm_would_not_do():
    """Why `square` sums in chunks: the reason goes when this fails."""
    tensor = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = tensor.double().norm().item()
    assert abs(torch.linalg.vector_norm(tensor).item() / exact - 1) > 1e-5


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_for_adam_divide_as_its_step_does(dtype: torch.dtype, amsgrad: bool):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((), (0, 2), (400, 410), (2, 3, 5, 5))]
    parameters[3].data = parameters[3].data.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(parameters, lr=0.1, betas=(0.9, 0.98), eps=1e-3, amsgrad=amsgrad)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-2
        optimizer.step()
    second = SecondMoments(optimizer)
    for p in parameters:
        state = optimizer.state[p]
        v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"].double() / (1 - 0.98**3)
        for gradient in (
            torch.randn_like(p),
            torch.randn(p.shape, dtype=dtype),
            torch.randn((), dtype=dtype).expand(p.shape),
        ):
            exact = (gradient.double() / (v.sqrt() + 1e-3)).square().sum().item()
            found = second.square(p, gradient)
            assert found is not None
            assert math.isclose(float(found), exact, rel_tol=1e-6 if dtype == torch.float32 else 1e-13)
    assert second.square(nn.Parameter(torch.ones(2)), torch.ones(2)) is None
