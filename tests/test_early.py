"""A forward that begins before all parameters are there: who waits for what, and nothing is computed of old ones."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain
from dtrain import ServerUpdate, ShardedUpdate
from dtrain.comm.base import Backend
from dtrain.comm.hosts import HostedBucket, StepReport
from dtrain.early import EarlyForward
from dtrain.errors import UsageError
from dtrain.hooks import Hook, State
from tests.conftest import BACKENDS, everywhere
from tests.ps.serving import Running, all_of, own_socket, workers_of
from tests.small import Job, differences, fit, trainer_of

OLD, NEW = 0.0, 1.0


class Slow:
    """Parameters that are `OLD` until somebody waits for them, who then has them set to `NEW`."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.left = {id(p): p for p in model.parameters()}
        self.order: list[str] = []
        for parameter in model.parameters():
            nn.init.constant_(parameter, OLD)

    @property
    def late(self) -> bool:
        return bool(self.left)

    def arrive(self, tensor: Tensor) -> None:
        parameter = self.left.pop(id(tensor), None)
        if parameter is not None:
            nn.init.constant_(parameter, NEW)
            self.order.append(self.names[id(tensor)])

    def settle(self) -> None:
        left, self.left = self.left, {}
        self.order += [f"{self.names[number]} at the end" for number in left]
        for parameter in left.values():
            nn.init.constant_(parameter, NEW)


def watched(model: nn.Module) -> Slow:
    """From now on the model waits for its parameters."""
    slow = Slow(model)
    EarlyForward(model, slow)
    return slow


def newest(model: nn.Module) -> nn.Module:
    """A plain copy with parameters that have come long ago."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        nn.init.constant_(parameter, NEW)
    return plain


class Foreign(nn.Module):
    """Uses parameters that are other modules', in all the ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(4))
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcdefg"})

    def forward(self, x: Tensor) -> Tensor:
        of = {name: module.weight for name, module in self.parts.items()}
        x = F.linear(x, of["a"])
        x = x @ of["b"].t()
        x = F.linear(input=x, weight=of["c"], bias=self.parts["c"].bias)
        x = torch.cat([x, of["d"]]) + 1
        x = torch.stack((x[:4], of["e"].detach())).sum(0)
        x = x + of["f"].data.sum() + float(self.parts["f"].bias.detach().sum())
        x = x + torch.tensor(of["g"].tolist()) + torch.from_numpy(self.parts["g"].bias.detach().numpy())
        return x * self.own


class Hidden(nn.Module):
    """Uses the weight of a layer that it does not call, in a function that it gives to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"b": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        def distance(a: Tensor, b: Tensor) -> Tensor:
            return ((a - b) @ self.parts["b"].weight).sum(1)

        loss = F.triplet_margin_with_distance_loss(x, x + 1, x - 2, distance_function=distance)
        return x + loss.detach()


class Tree(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return self.leaf(x) if depth == 0 else self.inner(self(x, depth - 1) + self(x + 1, depth - 1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), (3, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 2, 5, 5)),
    "lstm": (lambda: nn.LSTM(4, 4, num_layers=2), (5, 2, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), (0,)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (5, 2, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (3, 4)),
    "weight norm by a hook": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), (3, 4)),
    "foreign": (Foreign, (4, 4)),
    "hidden": (Hidden, (3, 4)),
    "tree": (Tree, (3, 4)),
}  # fmt: skip


def given(shape: tuple[int, ...]) -> Tensor:
    if shape == (0,):
        return torch.tensor([0, 2, 3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trains", [True, False])
def test_everything_is_computed_of_the_newest(name: str, trains: bool) -> None:
    make, shape = MODELS[name]
    model, plain, x = make(), make(), given(shape)
    for parameter in plain.parameters():
        nn.init.constant_(parameter, NEW)
    slow = watched(model.train(trains))
    plain.train(trains)
    with torch.set_grad_enabled(trains):
        found, expected = model(x), plain(x)
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        assert torch.equal(a, b)
    assert not slow.late
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for one in found:
            yield from _tensors(one)


def test_each_layer_waits_for_its_own() -> None:
    """The first has computed before the second's have come; what is not used comes when the model returns."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model.register_module("unused", nn.Linear(4, 4, bias=False))
    del model._modules["unused"]
    model.spare = nn.Linear(4, 4, bias=False)  # type: ignore[assignment]
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign,index]
    slow = watched(model)
    model[1].register_forward_hook(lambda *_: slow.order.append("computed"))
    model(torch.ones(3, 4))
    assert slow.order == ["0.weight", "computed", "2.weight", "spare.weight at the end"]


def test_a_part_that_is_called_by_itself() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    slow = watched(model)
    assert torch.equal(model["a"](torch.ones(1, 4)), torch.full((1, 4), 5.0))
    assert not slow.late


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3))
    slow = watched(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(1, 4))
        assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]
    assert slow.order[:2] == ["0.weight", "0.bias"]


def test_an_interrupted_forward_can_be_forgotten() -> None:
    """Torch tells no hook of an interrupt."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    slow = Slow(model)
    early = EarlyForward(model, slow)
    handle = model[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))
    handle.remove()
    early.reset()
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]
    slow.__init__(model)  # type: ignore[misc]
    model(torch.ones(1, 4))
    assert not slow.late


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_a_part_that_was_traced_has_everything_first() -> None:
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)))
    assert EarlyForward(model, Slow(model)).compiled


def test_reading_and_writing_the_state_wait() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    watched(model)
    assert all((t == NEW).all() for t in model.state_dict().values())
    slow = watched(other := nn.Sequential(nn.Linear(4, 4)))
    other.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    assert not slow.late
    assert all((p == NEW + 1).all() for p in other.parameters())


def test_a_copy_is_a_plain_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    slow = watched(model)
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 4))
    assert slow.late
    assert all((p == OLD).all() for p in twin.parameters())


def _whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="eager")
    return model


def _a_part(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.get_submodule("2").compile(backend="eager")
    return model


class Functional(nn.Module):
    """Has a compiled function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.compiled = torch.compile(lambda x: self.model(x), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile, of its own doing
@pytest.mark.parametrize("tie_first", [True, False])
@pytest.mark.parametrize("compile_", [_whole, _in_place, _a_part, Functional])
@pytest.mark.parametrize("late_at_first", [True, False])
def test_a_compiled_model_waits(compile_: Callable[[nn.Module], Any], tie_first: bool, late_at_first: bool) -> None:
    """For everything at once, where it must."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = given((3, 4))
    plain = newest(model)
    if tie_first:
        slow = Slow(model)
        early = EarlyForward(model, slow)
        used = compile_(model)
    else:
        used = compile_(model)
        slow = Slow(used)
        early = EarlyForward(used, slow)
    if not late_at_first:
        slow.settle()
    for _ in range(3):
        assert torch.equal(used(x), plain(x))
        assert not slow.late
        slow.__init__(model)  # type: ignore[misc]
        if early.compiled:
            slow.settle()  # as publish() does
    torch.compiler.reset()


# -- over backends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharded_update_has_the_same_bits(backend: str, optimizer: str, clip: float | None) -> None:
    job = Job("norm", optimizer=optimizer, update="sharded")
    job = job.with_config(norm_batch="global", bucket_mb=2e-4, clip_grad_norm=clip)
    plainly = everywhere(fit, job, backend=backend, workers=3)
    early = everywhere(fit, job.with_config(early_forward=True), backend=backend, workers=3)
    for a, b in zip(early, plainly, strict=True):
        assert not differences(a["parameters"], b["parameters"])
        assert not differences(a["buffers"], b["buffers"])


class Looks(Hook):
    """Reads parameters after some steps."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step(self, state: State) -> None:
        if state.step % 2:
            self.seen.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))


def looks(comm: Backend, job: Job) -> list[Tensor]:
    hook = Looks()
    trainer = trainer_of(comm, job, (hook,))
    trainer.fit()
    boxes = ("data_ms", "forward_ms", "backward_ms", "optimizer_ms", "rest_ms", "exposed_comm_ms")
    for record in trainer.records:
        assert sum(record[box] for box in boxes) == pytest.approx(record["step_ms"], rel=1e-6)
    return hook.seen


@pytest.mark.parametrize("update", ["server", "sharded"])
def test_hooks_see_the_newest(update: str) -> None:
    job = Job(count=64, update=update)
    plainly = dtrain.run(looks, job, workers=2, backend="ps")
    early = dtrain.run(looks, job.with_config(early_forward=True), workers=2, backend="ps")
    for a, b in zip(early, plainly, strict=True):
        assert len(a) == 3
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("update", ["server", "sharded"])
def test_a_resumed_run_has_the_same_bits(update: str, tmp_path: Path) -> None:
    """Checkpoints are of what the step made, and not of what was there when it began."""
    job = Job("dropout", count=40, update=update, optimizer="adam").with_config(early_forward=True)
    whole = dtrain.run(fit, job, workers=2, backend="ps")
    dtrain.run(fit, job.but(root=str(tmp_path), every_steps=2).with_config(steps=5), workers=2, backend="ps")
    resumed = dtrain.run(fit, job.but(root=str(tmp_path), resume=True, resume_step=4), workers=2, backend="ps")
    for a, b in zip(resumed, whole, strict=True):
        assert not differences(a["parameters"], b["parameters"])


# -- a worker and a server --------------------------------------------------------------------------------------------


_drawing = threading.Lock()


def mlp() -> nn.Sequential:
    """The same in all threads, which have one generator."""
    with _drawing:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def tie(comm: Backend, model: nn.Module, **rules: Any) -> dtrain.Replica:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dtrain.replicate(model, comm, update=ServerUpdate(optimizer=optimizer, early_forward=True, **rules))


def published(comm: Backend) -> tuple[nn.Sequential, dtrain.Replica]:
    """A model whose parameters are on their way."""
    model = mlp()
    replica = tie(comm, model)
    replica.backward(model(torch.ones(1, 6)).sum())
    replica.publish()
    return model, replica


def in_two(fn: Callable[[Any, threading.Event], Any], folder: Path) -> list[Any]:
    """With a server in a thread: what each of two workers returned."""
    running = Running(own_socket(folder), 2)
    event = threading.Event()

    def work(comm: Any) -> Any:
        try:
            return fn(comm, event)
        finally:
            comm.close()

    found = all_of(*(lambda w=w: work(w) for w in workers_of(running.address)))  # type: ignore[misc]
    assert running.ended() is None
    return found


def test_publish_does_not_wait_and_settle_tells(own_temporary_directory: Path) -> None:
    """Worker 1 sends its gradient only when worker 0 is past its publish."""

    def body(comm: Any, published: threading.Event) -> Any:
        model = mlp()
        replica = tie(comm, model)
        loss = model(torch.ones(1, 6)).sum()
        if comm.rank == 1:
            assert published.wait(20)
        replica.backward(loss)
        assert replica.publish() is None
        published.set()
        reports = [replica.settle(), replica.settle(), replica.publish()]
        replica.check()
        return reports, [p.detach().clone() for p in model.parameters()]

    for reports, parameters in in_two(body, own_temporary_directory):
        assert reports == [StepReport(1, 0, 2), None, None]
        begin = mlp()
        begin(torch.ones(1, 6)).sum().backward()
        for p, q in zip(parameters, begin.parameters(), strict=True):
            assert torch.allclose(p, q - 0.1 * q.grad)


def test_what_is_written_meanwhile_is_refused_and_not_lost(own_temporary_directory: Path) -> None:
    """A weight that is set by hand between two steps: as without an early forward, it is refused."""

    def body(comm: Any, _: threading.Event) -> str:
        model, replica = published(comm)
        with torch.no_grad():
            model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
        try:
            replica.backward(model(torch.ones(1, 6)).sum())
        except UsageError as error:
            return str(error)
        return ""

    assert all("was changed here, where servers keep it" in text for text in in_two(body, own_temporary_directory))


def test_a_weight_that_is_written_by_hand_is_refused(own_temporary_directory: Path) -> None:
    """It would be lost, or not, as it happens."""

    def body(comm: Any, _: threading.Event) -> str:
        model, _replica = published(comm)
        with torch.no_grad():
            model[0].weight.fill_(5.0)
        try:
            model(torch.ones(1, 6))
        except UsageError as error:
            return str(error)
        return ""

    assert all("0.weight was changed here" in text for text in in_two(body, own_temporary_directory))


def test_who_was_interrupted_waits_again(own_temporary_directory: Path) -> None:
    """In the midst of the last wait of a step."""

    def body(comm: Any, _: threading.Event) -> tuple[Any, int]:
        _model, replica = published(comm)
        hosted: Any = replica.pushes._hosted  # type: ignore[union-attr]
        wait = hosted._await

        def interrupted(what: str) -> None:
            hosted._await = wait
            raise KeyboardInterrupt

        hosted._await = interrupted
        with pytest.raises(KeyboardInterrupt):
            replica.settle()
        report = replica.settle()
        replica.check()
        return report, hosted.steps

    assert in_two(body, own_temporary_directory) == [(StepReport(1, 0, 2), 1)] * 2


def test_another_model_in_its_place_comes_after_what_was_on_its_way(own_temporary_directory: Path) -> None:
    def body(comm: Any, _: threading.Event) -> bool:
        (first, _replica), second = published(comm), mlp()
        tie(comm, second)
        with torch.no_grad():
            return torch.equal(first(torch.ones(1, 6)), second(torch.ones(1, 6)))

    assert in_two(body, own_temporary_directory) == [False, False]


def test_a_model_that_is_closed_waits_no_more(own_temporary_directory: Path) -> None:
    """And what was on its way is there."""

    def body(comm: Any, _: threading.Event) -> tuple[int, list[Tensor]]:
        model, replica = published(comm)
        replica.close()
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        return hooks, [p.detach().clone() for p in model.parameters()]

    for hooks, parameters in in_two(body, own_temporary_directory):
        assert hooks == 0
        assert not any(torch.equal(p, q) for p, q in zip(parameters, mlp().parameters(), strict=True))


def test_it_waits_in_inference_too(own_temporary_directory: Path) -> None:
    def body(comm: Any, _: threading.Event) -> bool:
        model, replica = published(comm)
        with torch.inference_mode():
            found = model(torch.ones(1, 6))
        replica.settle()
        return torch.equal(found, model(torch.ones(1, 6)))

    assert in_two(body, own_temporary_directory) == [True, True]


class Held:
    """A backend whose parameters come one by one, and in the order of the log."""

    def __init__(self, inner: Any, log: list[str]) -> None:
        self._inner, self._log = inner, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def host(self, buckets: list[HostedBucket], model: Any, update: Any) -> Any:
        hosted = self._inner.host(buckets, model, update)
        arrive = hosted.arrive
        hosted.arrive = lambda bucket: (arrive(bucket), self._log.append(buckets[bucket].named[-1][0]))
        return hosted


def test_layers_wait_for_their_buckets_in_the_order_of_forward(own_temporary_directory: Path) -> None:
    def body(comm: Any, _: threading.Event) -> list[str]:
        log: list[str] = []
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        update = ServerUpdate(optimizer=optimizer, early_forward=True)
        held: Any = Held(comm, log)
        replica = dtrain.replicate(model, held, update=update, bucket_mb=1e-5, first_bucket_mb=1e-5)
        model[1].register_forward_hook(lambda *_: log.append("the first layer has computed"))
        for _ in range(2):
            replica.backward(model(torch.ones(1, 6)).sum())
            replica.publish()
        replica.settle()
        return log[1:6]

    for log in in_two(body, own_temporary_directory):
        assert log == ["0.weight", "0.bias", "the first layer has computed", "2.weight", "2.bias"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{"staleness": 1}, {"staleness": None}, {"backup_workers": 1}])
def test_steps_of_some_workers_have_no_early_forward(rules: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="early_forward"):
        ServerUpdate(optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1), early_forward=True, **rules)
    with pytest.raises(UsageError, match="early_forward"):
        dtrain.TrainConfig(steps=1, update="server", early_forward=True, **rules)


@pytest.mark.parametrize("update", ["worker", "first"])
def test_where_every_worker_steps_there_is_none(update: str) -> None:
    with pytest.raises(UsageError, match="it needs update=server or sharded"):
        dtrain.TrainConfig(steps=1, update=update, early_forward=True)  # type: ignore[arg-type]


def test_it_is_for_sharded_updates_too() -> None:
    assert ShardedUpdate(optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1), early_forward=True).early_forward
