"""Synchronised batch norm: on workers' shares it computes what torch's batch norm computes on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain import norm
from dtrain.comm.base import Backend, Done, Traffic
from dtrain.comm.solo import Solo
from dtrain.errors import CommError, LayoutError, UsageError
from dtrain.norm import convert
from dtrain.norm.merge import merge_statistics
from dtrain.norm.moments import merge, moments
from dtrain.norm.sync import SyncBatchNorm
from tests.conftest import everywhere

WORKERS = 3
SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "1d, two dimensions": (nn.BatchNorm1d, (11, 4)),
    "1d, three dimensions": (nn.BatchNorm1d, (11, 4, 5)),
    "2d": (nn.BatchNorm2d, (11, 4, 3, 2)),
    "3d": (nn.BatchNorm3d, (11, 4, 2, 3, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "affine": {},
    "not affine": {"affine": False},
    "cumulative average": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "other eps and momentum": {"eps": 1e-2, "momentum": 0.3},
}
SHARES = {"equal": (4, 4, 3), "unequal": (1, 8, 2), "empty": (0, 11, 0)}


def on_threads(fn: Callable[[Backend], Any], workers: int = WORKERS) -> list[Any]:
    return everywhere(fn, backend="threads", workers=workers, timeout_s=5.0)


class Silent:
    """A backend of three workers that must not be used."""

    name, rank, world_size = "silent", 0, 3

    def __init__(self) -> None:
        self.traffic = Traffic()

    def empty(self, numel: int, dtype: torch.dtype, key: str, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, flat: Tensor, key: str) -> Done:
        raise AssertionError(f"{key} was sent")

    def close(self) -> None:
        return None


def plain_layer(kind: type[nn.Module], dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A layer whose parameters and buffers are not the initial ones."""
    layer = kind(4, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def data(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3


def run(layer: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, for the loss sum(y * weights)."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("shares", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", SHAPES.values(), ids=list(SHAPES))
def test_equals_batch_norm_on_the_whole_batch(
    kind: tuple[type[nn.Module], tuple[int, ...]], options: dict[str, Any], shares: tuple[int, ...]
) -> None:
    """Outputs, input gradients, parameters' gradients (summed over workers) and buffers, over several steps and in
    evaluation, equal those of torch's layer on the concatenated batch; in float64, to 1e-10."""
    make, shape = kind
    reference = plain_layer(make, **options)
    batches = [data(shape, seed) for seed in range(3)]
    weights = data(shape, 9)
    wanted = [run(reference, x, weights) for x in batches]
    reference.eval()
    wanted_eval = reference(batches[0]).detach() if options.get("track_running_stats", True) else None

    def body(comm: Backend) -> tuple[list[tuple[Tensor, Tensor]], Tensor, list[Tensor], dict[str, Tensor]]:
        layer = norm.convert(plain_layer(make, **options), comm=comm)
        mine = [t.split(list(shares))[comm.rank] for t in (*batches, weights)]
        steps = [run(layer, x, mine[-1]) for x in mine[:-1]]
        layer.eval()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        evaluated = mine[0] if wanted_eval is None else layer(mine[0]).detach()
        return steps, evaluated, gradients, dict(layer.named_buffers())

    workers = on_threads(body)
    for number, (y, dx) in enumerate(wanted):
        close(torch.cat([w[0][number][0] for w in workers]), y)
        close(torch.cat([w[0][number][1] for w in workers]), dx)
    if wanted_eval is not None:
        close(torch.cat([w[1] for w in workers]), wanted_eval)
    for index, parameter in enumerate(reference.parameters()):
        assert parameter.grad is not None
        close(sum(w[2][index] for w in workers), parameter.grad)  # type: ignore[arg-type]
    for name, buffer in reference.named_buffers():
        for worker in workers:
            close(worker[3][name], buffer)
            assert torch.equal(worker[3][name], workers[0][3][name])


def test_small_spread_far_from_zero() -> None:
    """Float32 at mean 1000 and deviation 0.1: as good as the inputs allow, where E[x²] - E[x]² has no digit left."""
    x = (data((60, 4, 5)) - 3) / 2 * 0.1 + 1000
    single = x.float()
    wanted = plain_layer(nn.BatchNorm1d)(single.double()).detach()

    def body(comm: Backend) -> tuple[Tensor, Tensor]:
        layer = norm.convert(plain_layer(nn.BatchNorm1d, torch.float32, momentum=1.0), comm=comm)
        y = layer(single.split([10, 49, 1])[comm.rank])
        return y.detach(), layer.running_var.clone()  # type: ignore[union-attr, operator]

    workers = on_threads(body)
    close(torch.cat([w[0] for w in workers]).double(), wanted, atol=2e-3)
    close(workers[0][1].double(), single.double().transpose(0, 1).flatten(1).var(1), atol=1e-6)


@pytest.mark.parametrize("own_type", [True, False], ids=["half layer", "float32 layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype: torch.dtype, own_type: bool) -> None:
    """Output and input gradient have the input's type, the statistics are better than that; as torch does it."""
    x = data((12, 4, 5)).to(dtype)
    weights = data((12, 4, 5), 9).to(dtype)
    kind = dtype if own_type else torch.float32
    y, dx = run(plain_layer(nn.BatchNorm1d).double(), x.double(), weights.double())

    def body(comm: Backend) -> tuple[Tensor, Tensor]:
        layer = norm.convert(plain_layer(nn.BatchNorm1d, kind), comm=comm)
        rows = slice(4 * comm.rank, 4 * comm.rank + 4)
        got = run(layer, x[rows], weights[rows])
        assert all(p.grad is not None and p.grad.dtype is kind for p in layer.parameters())
        return got

    workers = on_threads(body)
    for index, reference in enumerate((y, dx)):
        got = torch.cat([w[index] for w in workers])
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), reference, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_evaluation_sends_nothing(options: dict[str, Any]) -> None:
    """In evaluation a worker may be alone: one may evaluate while the others do not."""
    layer = norm.convert(plain_layer(nn.BatchNorm2d, **options), comm=Silent()).eval()
    plain = plain_layer(nn.BatchNorm2d, **options).eval()
    x = data((5, 4, 3, 2))
    close(layer(x), plain(x))
    run(layer, x, x)
    with pytest.raises(AssertionError, match="norm/"):
        layer.train()(x)


# --- convert and revert


class Net(nn.Module):
    """One layer in two places, one inside another module, and one of no interest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.LayerNorm(4)).double()
        self.shared = plain_layer(nn.BatchNorm1d)
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(self.shared(x)))  # type: ignore[no-any-return]


def identities(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: id(t) for name, t in tensors}


def test_convert_and_revert_change_no_tensor() -> None:
    """State-dict keys, parameters and buffers are the same objects, converted once, twice, and back."""
    model = Net()
    keys, tensors = list(model.state_dict()), identities(model)
    types = [type(m) for m in model.modules()]
    model.shared.eval()
    calls: list[int] = []
    model.shared.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert norm.convert(model, comm=Solo()) is model
        assert list(model.state_dict()) == keys
        assert identities(model) == tensors
        assert isinstance(model.shared, SyncBatchNorm)
        assert model.shared is model.again
        assert not model.shared.training
        assert isinstance(model.inner[1], SyncBatchNorm)
        assert len({m.key for m in model.modules() if isinstance(m, SyncBatchNorm)}) == 2
    model(data((5, 4)))
    assert calls == [1, 1]
    assert norm.revert(model) is model
    assert norm.revert(model) is model
    assert [type(m) for m in model.modules()] == types
    assert model.shared is model.again
    assert list(model.state_dict()) == keys
    assert identities(model) == tensors
    norm.convert(model, norm_batch="global", comm=Solo())
    norm.convert(model, norm_batch="worker", comm=Solo())
    assert [type(m) for m in model.modules()] == types


def test_state_dicts_fit_both_ways() -> None:
    """What a converted model saves, a plain one loads, and the reverse."""
    plain, converted = Net(), norm.convert(Net(), comm=Solo())
    converted(data((5, 4)))
    plain.load_state_dict(converted.state_dict())
    x = data((6, 4))
    assert torch.equal(plain.eval()(x), converted.eval()(x))
    converted.load_state_dict(Net().state_dict())


def test_a_model_that_is_a_batch_norm_layer() -> None:
    """The root itself is replaced: use what is returned."""
    layer = plain_layer(nn.BatchNorm2d)
    converted = norm.convert(layer, comm=Solo())
    assert isinstance(converted, SyncBatchNorm)
    assert identities(converted) == identities(layer)
    assert type(norm.revert(converted)) is nn.BatchNorm2d


def test_what_is_not_converted() -> None:
    """Unknown words, lazy and foreign layers are refused, and by name; nothing is half converted."""
    with pytest.raises(UsageError, match="norm_batch is 'all'"):
        norm.convert(Net(), norm_batch="all", comm=Solo())
    for foreign in (nn.LazyBatchNorm1d(), nn.SyncBatchNorm(4)):
        model = nn.Sequential(nn.BatchNorm1d(4), foreign)
        with pytest.raises(UsageError, match=rf"1 is a {type(foreign).__name__}"):
            norm.convert(model, comm=Solo())
        assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("count", [1, 0])
def test_too_few_values(count: int) -> None:
    """A variance needs two values over all workers: with fewer, every worker raises, as torch does on the whole."""

    def body(comm: Backend) -> None:
        layer = norm.convert(plain_layer(nn.BatchNorm1d), comm=comm)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(torch.ones(count if comm.rank == 1 else 0, 4, dtype=torch.float64))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))

    on_threads(body)


def test_inputs_without_channels() -> None:
    """One dimension is too few: ValueError, before anything is sent."""
    with pytest.raises(ValueError, match="takes"):
        norm.convert(nn.BatchNorm1d(4), comm=Silent())(torch.zeros(4))


# --- inside a model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare_with_whole(
    make: Callable[[], nn.Module],
    forward: Callable[[nn.Module, Tensor], Tensor],
    alone: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> None:
    """Gradients and buffers of workers' shares against those of the whole batch; the loss is the sum of squares."""
    whole, x = make(), data((9, 4))
    (alone or forward)(whole, x).square().sum().backward()

    def body(comm: Backend) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = norm.convert(make(), comm=comm)
        forward(model, x.split([2, 0, 7])[comm.rank]).square().sum().backward()
        return gradients(model), dict(model.named_buffers())

    workers = on_threads(body)
    for index, gradient in enumerate(gradients(whole)):
        close(sum(w[0][index] for w in workers), gradient)  # type: ignore[arg-type]
    for name, buffer in whole.named_buffers():
        assert all(torch.allclose(w[1][name], buffer, rtol=0, atol=1e-10) for w in workers)


def test_a_layer_used_twice_in_a_forward() -> None:
    """Each use has a message of its own, forward and backward."""
    compare_with_whole(Net, lambda model, x: model(x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    """Statistics computed again in backward are those of forward; running ones are updated once, other than torch's."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model.inner, x.requires_grad_(), use_reentrant=reentrant)
        return model.shared(y)  # type: ignore[no-any-return, operator]

    compare_with_whole(Net, forward, lambda model, x: model.shared(model.inner(x)))  # type: ignore[operator]


@pytest.mark.parametrize("shares", SHARES.values(), ids=list(SHARES))
def test_weight_without_bias(shares: tuple[int, ...]) -> None:
    x, weights = data((11, 4)), data((11, 4), 9)
    reference = plain_layer(nn.BatchNorm1d, bias=False)
    y, dx = run(reference, x, weights)
    found = on_threads(
        lambda comm: run(
            norm.convert(plain_layer(nn.BatchNorm1d, bias=False), comm=comm),
            *(t.split(list(shares))[comm.rank] for t in (x, weights)),
        )
    )
    close(torch.cat([f[0] for f in found]), y)
    close(torch.cat([f[1] for f in found]), dx)


@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
def test_compiled() -> None:
    """torch.compile leaves the transfers alone."""
    torch._dynamo.reset()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if not any(isinstance(m, SyncBatchNorm) for m in model.modules()):
            return model(x)  # type: ignore[no-any-return]
        return torch.compile(model, backend="aot_eager")(x)  # type: ignore[no-any-return]

    compare_with_whole(Net, forward)


def test_frozen_weights_and_first_layer() -> None:
    """Without a gradient for the input nothing is sent backward; frozen weight and bias get none."""

    def body(comm: Backend) -> None:
        layer = norm.convert(plain_layer(nn.BatchNorm1d), comm=comm)
        layer(data((3, 4))).sum().backward()
        sent = dict(comm.traffic.sent)
        layer(data((3, 4))).sum().backward()
        assert comm.traffic.sent["norm"] == 2 * sent["norm"]
        layer.requires_grad_(False)
        layer.zero_grad()
        x = data((3, 4)).requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is None

    on_threads(body)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_torch_on_cuda() -> None:
    """On a GPU too: the layer of torch on the whole batch, in float32 and float64, channels last included."""
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        x = data((12, 4, 5, 3)).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
        weights = data((12, 4, 5, 3), 9).to("cuda", dtype)
        reference = plain_layer(nn.BatchNorm2d, dtype).cuda()
        y, dx = run(reference, x, weights)

        def body(comm: Backend, dtype: torch.dtype = dtype, x: Tensor = x, weights: Tensor = weights) -> Any:
            layer = norm.convert(plain_layer(nn.BatchNorm2d, dtype), comm=comm).cuda()
            rows = slice(4 * comm.rank, 4 * comm.rank + 4)
            return *run(layer, x[rows], weights[rows]), layer.running_var

        workers = on_threads(body)
        close(torch.cat([w[0] for w in workers]), y, atol)
        close(torch.cat([w[1] for w in workers]), dx, atol)
        close(workers[0][2], reference.running_var, atol)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_torch_sync_batch_norm_alone() -> None:
    """One worker on a GPU: torch's own SyncBatchNorm, without a process group, computes the same."""
    x, weights = data((6, 4, 5, 3)).cuda(), data((6, 4, 5, 3), 9).cuda()
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(plain_layer(nn.BatchNorm2d)).cuda()
    ours = norm.convert(plain_layer(nn.BatchNorm2d), comm=Solo()).cuda()
    for a, b in zip(run(theirs, x, weights), run(ours, x, weights), strict=True):
        close(a, b)


# --- running statistics of plain layers


def test_merged_statistics() -> None:
    """Within, running statistics are those of all workers' samples together; after, each has its own again, even where
    the body raised. Synchronised layers, and those that keep none, are left alone."""
    parts = [data((20, 4), seed) * (seed + 1) + seed for seed in range(WORKERS)]
    whole = torch.cat(parts)

    def body(comm: Backend) -> None:
        model = nn.Sequential(
            nn.BatchNorm1d(4, momentum=1.0), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)
        ).double()
        model[2] = norm.convert(model[2], comm=comm)
        with torch.no_grad():
            model[0](parts[comm.rank])
        model[0].running_var.copy_(parts[comm.rank].var(0, correction=0))
        own = copy.deepcopy(model.state_dict())
        buffers = identities(model)

        def evaluate() -> None:
            with norm.merged_statistics(model, comm):
                close(model[0].running_mean, whole.mean(0))
                close(model[0].running_var, whole.var(0, correction=0))
                assert identities(model) == buffers
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            evaluate()
        assert all(torch.equal(a, b) for a, b in zip(own.values(), model.state_dict().values(), strict=True))
        assert sorted(merge_statistics(model, comm)) == ["0.running_mean", "0.running_var"]
        assert merge_statistics(nn.Linear(2, 2), Silent()) == {}

    on_threads(body)


# --- moments


numbers = st.floats(-1, 1, width=32)


@given(
    parts=st.lists(st.lists(st.lists(numbers, min_size=3, max_size=3), max_size=8), min_size=1, max_size=5),
    mean=st.floats(1e3, 1e6),
    scale=st.floats(1e-2, 10),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_moments_and_merge(parts: list[list[list[float]]], mean: float, scale: float, dtype: torch.dtype) -> None:
    """Mean and M2 of parts, merged, are those of the whole computed directly in float64; empty parts do not count."""
    tensors = [(torch.tensor(p, dtype=torch.float64).view(-1, 3) * scale + mean).to(dtype) for p in parts]
    rows = [moments(t) for t in tensors]
    assert [n for _, _, n in rows] == [len(p) for p in parts]
    counts = torch.tensor([float(n) for _, _, n in rows], dtype=torch.float64)
    got_mean, got_m2, total = merge(torch.stack([m for m, _, _ in rows]), torch.stack([q for _, q, _ in rows]), counts)
    whole = torch.cat(tensors).double()
    assert total == len(whole)
    if not len(whole):
        assert not got_mean.any()
        assert not got_m2.any()
        return
    wanted_m2 = (whole - whole.mean(0)).square().sum(0)
    ulp = torch.finfo(dtype).eps * mean  # the mean of a part is rounded to the type of its values
    torch.testing.assert_close(got_mean, whole.mean(0), rtol=0, atol=2 * ulp + 1e-9)
    torch.testing.assert_close(got_m2, wanted_m2, rtol=1e-5, atol=len(whole) * ((2 * ulp) ** 2 + 4 * ulp * scale))
    assert (got_m2 >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_halves(dtype: torch.dtype) -> None:
    """Half precision is summed in float32: many values do not saturate."""
    x = (data((5000, 2, 4)) + 100).to(dtype)
    mean, m2, count = moments(x)
    wide = x.double().transpose(0, 1).flatten(1)
    assert count == 20_000
    close(mean, wide.mean(1), atol=1e-3)
    torch.testing.assert_close(m2 / count, wide.var(1, correction=0), rtol=1e-3, atol=0)


def different_layers(comm: Backend) -> str:
    layers = [convert(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), comm=comm)[i] for i in range(2)]
    with pytest.raises((LayoutError, CommError)) as caught:
        layers[min(comm.rank, 1)](torch.randn(4, 2))
    return str(caught.value)


def test_workers_in_different_layers() -> None:
    """Over all-reduce, where messages meet by their order, no layer takes another one's statistics for its own."""
    for text in everywhere(different_layers, backend="allreduce", workers=2, timeout_s=5.0):
        assert "another layer" in text


def test_a_copy_is_a_plain_layer() -> None:
    """A copy of a converted model (an average of weights, say) is not connected, and can be converted again."""

    def body(comm: Backend) -> None:
        model = convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), comm=comm)
        copied = copy.deepcopy(model)
        copied(torch.randn(4, 2))  # no message: nobody else comes
        assert copied[1].comm is None
        assert convert(copied, comm=comm)[1].comm is comm

    everywhere(body, backend="threads", workers=2, timeout_s=5.0)
