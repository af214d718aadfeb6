"""How a worker's memory grows with its micro-batch, found from two small ones.

Forward and backward are run on two small micro-batches; each tensor that they make is taken down when it comes and when
it goes, and a line is drawn through the two for each moment of the step. The model is left as it was.

Exact for tensors, as long as the same operations run at every batch; to a percent or so where a library rounds what it
keeps up to whole pages, as oneDNN's LSTM does. It is done with real tensors: fake ones lack what libraries keep from
forward to backward, which for an LSTM on the processor is four fifths of all that is saved. Not seen: what kernels take
and give back within one operation, the allocator's rounding, and the process itself.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.buckets import Named, Plan, plan
from dtrain.data import map_tensors
from dtrain.errors import UsageError
from dtrain.measure.memory import Footprint, Line, tensors

MESSAGES = {"bucket_bytes": 8 * 2**20, "first_bytes": 2**20, "direct_bytes": 4 * 2**20}
"""Sizes of messages as `dtrain.replicate` has them by default."""

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""

MakeOptimizer = Callable[[list[Parameter]], Optimizer]


def footprint(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    optimizer: MakeOptimizer,
    *,
    update: Literal["worker", "server", "sharded"] = "worker",
    shards: int = 1,
    packs: bool = False,
    send_as: torch.dtype | None = None,
    messages: Mapping[str, int] = MESSAGES,
) -> Footprint:
    """Run two small micro-batches, and one step of the optimizer on zeros, and see what they leave in memory.

    Args:
        model: as it is before `dtrain.replicate`, on the device that it is to train on. Layers that talk to other
            workers would do so here.
        loss: as the trainer has it.
        batch: an example of 2 samples or more, on that device; half of it, and all of it, are run.
        optimizer: makes one from a list of parameters, as `Recipe.optimizer` does; it gets others of the same shapes.
        update: `server`: the servers keep the optimizer's state, and gradients leave by buckets. `sharded`: so they do,
            and a worker keeps one of `shards` parts of the state.
        packs: whether the backend takes all gradients in buckets, as `ps` does.
        send_as: type that gradients travel as, if not their own: then they stay, and are rounded into buckets.
        messages: keyword arguments of `buckets.plan` that are other than `MESSAGES`.

    Raises:
        UsageError: a batch of fewer samples; an optimizer that needs a closure.
    """
    samples = min((len(tensor) for tensor in tensors(batch) if tensor.ndim), default=0)
    if samples < 2:
        raise UsageError(f"the example batch has {samples} samples: give 2 or more")
    named = list(model.named_parameters())
    sizes = {**MESSAGES, **messages, **({"direct_bytes": 0} if packs or update != "worker" else {})}
    plans = [one for one in plan(named, dtype=send_as, **sizes) if one.members or update == "worker"]
    direct = {named[index][0] for one in plans if one.direct or send_as is not None for index in one.members}
    small, large = (_look(model, loss, batch, count, direct) for count in (samples // 2, samples))
    state_bytes, temporary_bytes = _optimizer_bytes([p for _, p in named if p.requires_grad], optimizer)
    direct_bytes = sum(small.gradients[name] for name in direct & small.gradients.keys())
    gradients_bytes = sum(small.gradients.values())
    elsewhere = update != "worker"
    kept_bytes = {"worker": state_bytes, "server": 0, "sharded": math.ceil(state_bytes / shards)}[update]
    flags = 0 if elsewhere else 1 + sum(p.requires_grad for _, p in named)
    return Footprint(
        parameters_bytes=sum(p.nbytes for _, p in named),
        buffers_bytes=sum(b.nbytes for b in model.buffers()),
        gradients_bytes=0 if elsewhere else gradients_bytes,
        direct_bytes=direct_bytes,
        optimizer_bytes=kept_bytes,
        buckets_bytes=_buckets_bytes(named, plans, flags) - (0 if elsewhere else gradients_bytes - direct_bytes),
        batch=_line(small, large, lambda look: look.batch_bytes),
        activations=_line(small, large, lambda look: look.saved_bytes),
        workspace=(*_lines(small, large, lambda look: look.beside), Line(0 if elsewhere else temporary_bytes, 0.0)),
        live=(*_live(small, large), (Line(0 if elsewhere else temporary_bytes, 0.0), direct_bytes)),
    )


@dataclass(frozen=True)
class _Look:
    """What one micro-batch left."""

    samples: int
    batch_bytes: int
    saved_bytes: int
    """Of all that forward saved."""
    gradients: dict[str, int]
    """Bytes by parameter."""
    live: list[int]
    """At the end of each operation: what there is, but the gradients outside of buckets."""
    finished: list[int]
    """The same moments: the gradients outside of buckets."""
    beside: list[int]
    """At the start of each operation: what there is and nobody has saved."""


def _look(model: nn.Module, loss: Loss, batch: Any, samples: int, direct: Collection[str]) -> _Look:
    batch = map_tensors(lambda tensor: tensor[:samples].clone() if tensor.ndim else tensor, batch)
    leaves = {name: Parameter(p.detach(), requires_grad=p.requires_grad) for name, p in model.named_parameters()}
    state = {**leaves, **{name: buffer.clone() for name, buffer in model.named_buffers()}}
    ledger, gradients = _Ledger(), dict[str, int]()

    def arrived(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None  # noqa: S101  (it has just come)
        gradients[name] = leaf.grad.nbytes
        if name in direct:
            ledger.mark(leaf.grad, "gradient")
        else:
            leaf.grad = None  # it has been copied to its bucket

    for name, leaf in leaves.items():
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: arrived(name, leaf))

    def pack(tensor: Tensor) -> Tensor:
        ledger.mark(tensor, "saved")
        return tensor

    whole = _Whole(model, loss)
    with _as_in_training(model), torch.enable_grad(), ledger:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            value = functional_call(whole, {f"model.{name}": tensor for name, tensor in state.items()}, (batch,))
        saved_bytes = ledger.bytes["saved"]
        value.backward()
        ledger.look()
    return _Look(
        samples=samples,
        batch_bytes=sum(tensor.nbytes for tensor in tensors(batch)),
        saved_bytes=saved_bytes,
        gradients=gradients,
        live=ledger.live,
        finished=ledger.finished,
        beside=ledger.beside,
    )


class _Whole(nn.Module):
    """Model and loss as one, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


class _Ledger(TorchDispatchMode):
    """The memory of all tensors that operations make while it is on, by moment. What was there before is not in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = {"saved": 0, "gradient": 0, "beside": 0}
        self.live: list[int] = []
        self.finished: list[int] = []
        self.beside: list[int] = []
        self._kinds: dict[int, tuple[str, int]] = {}  # by storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.look()
        given = {tensor.untyped_storage()._cdata for tensor in tensors([args, kwargs or {}])}
        made = func(*args, **(kwargs or {}))
        for tensor in tensors(made):
            self._note(tensor, given)
        self.live.append(self.bytes["saved"] + self.bytes["beside"])
        self.finished.append(self.bytes["gradient"])
        return made

    def look(self) -> None:
        """Between two operations: what was saved of the last one is marked."""
        self.beside.append(self.bytes["beside"])

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is, if it was made here."""
        key = tensor.untyped_storage()._cdata
        if key in self._kinds:
            was, nbytes = self._kinds[key]
            self._kinds[key] = (kind, nbytes)
            self.bytes[was] -= nbytes
            self.bytes[kind] += nbytes

    def _note(self, tensor: Tensor, given: Collection[int]) -> None:
        """Take a tensor down, unless its memory is that of an operand."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kinds and storage._cdata not in given:
            self._kinds[storage._cdata] = ("beside", storage.nbytes())
            self.bytes["beside"] += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        kind, nbytes = self._kinds.pop(key)
        self.bytes[kind] -= nbytes


@contextlib.contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """All layers as in training, and torch's random numbers; as before afterwards."""
    were = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            for module, training in were:
                module.training = training


def _optimizer_bytes(parameters: Sequence[Parameter], make: MakeOptimizer) -> tuple[int, int]:
    """Bytes of the optimizer's state for all parameters, and the most that a step has beside it for one of them.

    Found by a step on zeros, of one parameter of each shape.
    """
    shapes = Counter((p.shape, p.dtype, p.device) for p in parameters)
    ones = [Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype, device in shapes]
    if not ones:
        return 0, 0
    for one in ones:
        one.grad = torch.zeros_like(one)
    optimizer, ledger = make(ones), _Ledger()
    try:
        with ledger:
            optimizer.step()
    except TypeError as error:
        raise UsageError(f"{type(optimizer).__name__} cannot be stepped without a closure: {error}") from error
    state = [sum(tensor.nbytes for tensor in tensors(optimizer.state.get(one, {}))) for one in ones]
    temporary = max(ledger.live, default=0) - sum(state)
    return sum(nbytes * count for nbytes, count in zip(state, shapes.values(), strict=True)), max(0, temporary)


def _buckets_bytes(named: Named, plans: Sequence[Plan], flags: int) -> int:
    """Bytes of all buckets, the last one with so many flags behind its gradients."""
    members = [named[i][1].numel() * one.dtype.itemsize for one in plans if not one.direct for i in one.members]
    return sum(members) + (plans[-1].dtype.itemsize * flags if plans else 0)


def _line(small: _Look, large: _Look, of: Callable[[_Look], int]) -> Line:
    return Line.through((small.samples, of(small)), (large.samples, of(large)))


def _lines(small: _Look, large: _Look, of: Callable[[_Look], list[int]]) -> list[Line]:
    """A line for each moment. Where the two had different operations: one through the largest of each."""
    if len(of(small)) != len(of(large)):
        return [_line(small, large, lambda look: max(of(look)))]
    pairs = zip(of(small), of(large), strict=True)
    return [Line.through((small.samples, a), (large.samples, b)) for a, b in pairs]


def _live(small: _Look, large: _Look) -> list[tuple[Line, int]]:
    """What lives, by moment, and the gradients outside of buckets."""
    lines = _lines(small, large, lambda look: look.live)
    if len(lines) == len(large.finished):
        return list(zip(lines, large.finished, strict=True))
    saved = _line(small, large, lambda look: look.saved_bytes)
    beside = _lines(small, large, lambda look: look.beside)[0]
    return [(Line(saved.fixed + beside.fixed, saved.each + beside.each), large.finished[-1])]
