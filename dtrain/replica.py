"""One worker's copy of a model, tied to a backend: when `loss.backward()` returns, `.grad` holds the global gradient.

The model is not wrapped. Hooks on its parameters fill buckets while backward runs, full buckets travel meanwhile, and
the end of backward waits for the last one. Clipping, loss scaling and logging then work as on one worker.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.buckets import describe
from dtrain.comm import collectives
from dtrain.comm.base import Backend, PrimaryHost
from dtrain.comm.hosts import StepReport
from dtrain.comm.ordered import HALVES
from dtrain.early import EarlyForward, Hook
from dtrain.errors import DtrainError, LayoutError, UsageError
from dtrain.exchange import Exchange
from dtrain.pushes import HostedUpdate, Pushes
from dtrain.weights import StepWeights

_SHARE_TOLERANCE = 0.05  # the sum may be in half precision

_replicas: weakref.WeakSet[Replica] = weakref.WeakSet()


@runtime_checkable
class Observer(Protocol):
    """Looks at each worker's gradients before they are summed: see `Replica.observe`."""

    def begin(self, factor: float, samples: float | None) -> None:
        """A backward of this worker begins.

        Args:
            factor: what reaches a parameter is the gradient of the mean loss over `samples`, times this.
            samples: None: all workers weigh the same. 0: the loss means nothing.
        """

    def end(self) -> None:
        """The last backward of a step is over: `.grad` holds the mean gradient of the global batch."""


def replicate(
    model: nn.Module,
    comm: Backend,
    *,
    bucket_mb: float = 8.0,
    first_bucket_mb: float = 1.0,
    direct_mb: float = 4.0,
    send_as: torch.dtype | None = None,
    update: str | HostedUpdate = "worker",
) -> Replica:
    """Tie a model to a backend: parameters and buffers become worker 0's, gradients become global means.

    Args:
        model: the same on every worker: names, shapes and types are compared first.
        comm: from `dtrain.connect()`.
        bucket_mb: size at which a bucket travels, in MiB.
        first_bucket_mb: the same for the first one.
        direct_mb: a gradient of this size, in MiB, is sent from where autograd has put it, without a copy; 0: never.
        send_as: `torch.bfloat16` or `torch.float16`: gradients are rounded to it, added over workers in float32, and
            the sum is rounded once more: half the bytes, and no longer exact. float16 wants a scaled loss. None: their
            own type.
        update: who steps the optimizer. `worker`: every worker has the mean gradient and steps its own. `first`:
            gradients are gathered on worker 0, which alone steps; the others get its parameters (DataParallel's way).
            A `ServerUpdate`: the servers, which keep parameters and the optimizer's state. A `ShardedUpdate`: each
            worker a part of the parameters, the only one that it keeps the state of. With these two the parameters
            come back, and gradients do not: `.grad` is None after backward, and clipping is the update's.
            With all but `worker`, call `Replica.publish` after each step, and step only where `Replica.updates`.

    Returns:
        A handle with `backward`, `no_sync`, `check` and `close`.

    Raises:
        LayoutError: on every worker, if the models differ; names the first tensor that does.
        UsageError: complex parameters; a `send_as` that cannot be; `update="first"` on a backend without a primary, a
            `ServerUpdate` on one without servers, or with an optimizer that servers cannot step.
    """
    sizes_mb = (bucket_mb, first_bucket_mb, direct_mb)
    if bucket_mb <= 0 or first_bucket_mb <= 0 or direct_mb < 0:
        raise UsageError(f"bucket_mb, first_bucket_mb, direct_mb are {sizes_mb}: give MiB; 0 for direct_mb alone")
    if send_as not in (None, *HALVES):
        raise UsageError(f"send_as is {send_as}: torch.bfloat16, torch.float16, or None for gradients as they are")
    if send_as is not None and isinstance(update, HostedUpdate):
        raise UsageError(f"send_as is {send_as} with a {type(update).__name__}: it takes gradients as they are")
    return Replica(model, comm, sizes_bytes=tuple(int(mb * 2**20) for mb in sizes_mb), send_as=send_as, update=update)


class Replica:
    """See `replicate`."""

    def __init__(
        self,
        model: nn.Module,
        comm: Backend,
        *,
        sizes_bytes: tuple[int, ...],
        send_as: torch.dtype | None,
        update: str | HostedUpdate,
    ) -> None:
        if not isinstance(update, HostedUpdate) and update not in ("worker", "first"):
            raise UsageError(f"update is {update!r}: `worker`, `first`, a dtrain.ShardedUpdate or ServerUpdate")
        if update == "first" and not isinstance(comm, PrimaryHost):
            raise UsageError(f"update='first' needs a backend with a primary, such as threads; {comm.name} has none")
        _untie(model, comm)
        self.comm = comm
        self.updates = update == "worker" or (update == "first" and comm.rank == 0)
        """Whether the optimizer is to be stepped here."""
        self._model = model
        self._named = [(_plain(name), p) for name, p in model.named_parameters()]
        self._ids = {id(p) for _, p in self._named}
        self._update_is_joint = not isinstance(update, HostedUpdate) or (
            update.synchronous and not update.backup_workers
        )
        primary = comm if update == "first" and isinstance(comm, PrimaryHost) else None
        sizes = dict(zip(("bucket_bytes", "first_bytes", "direct_bytes"), sizes_bytes, strict=True))
        self.pushes: Pushes | None = None
        """With a `ServerUpdate` or `ShardedUpdate`: what is pushed and pulled, and the figures of it."""
        self._exchange: Exchange | Pushes
        if isinstance(update, HostedUpdate):
            self._exchange = self.pushes = Pushes(comm, self._named, sizes=sizes, update=update)
        else:
            self._exchange = Exchange(comm, self._named, sizes=sizes, send_as=send_as, primary=primary)
        self._primary = primary
        self._weights = StepWeights(comm, [p for _, p in self._named])
        self._hooks: list[Any] = [model.register_forward_pre_hook(Hook(self.before_forward))]
        self._early: EarlyForward | None = None
        self._hooked: set[int] = set()
        self._trainable: tuple[bool, ...] = ()
        self._sync = True
        self._forward_synced = True
        self._unreduced = False  # .grad holds what only this worker knows
        self._scale = 1.0 / comm.world_size
        self._explicit = False
        self._closed = False
        self._observers: list[Observer] = []
        self._shares_checked = False
        self._alive: weakref.ref[Any] | None = None  # dies with the backward that runs, however it ends
        _watch_optimizers()
        _replicas.add(self)
        try:
            self._agree_all()
            if self.pushes is not None and isinstance(update, HostedUpdate) and update.early_forward:
                self._early = EarlyForward(model, self.pushes)
            if self._named:
                self._refresh()
        except BaseException:
            self.close()
            raise

    # -- what users call ----------------------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor | None,
        *,
        samples: float | None = None,
        total: float | None = None,
        sync: bool = True,
    ) -> None:
        """`loss.backward()`, with this worker's loss weighted by its share of the samples of the step.

        `.grad` becomes the gradient of the mean loss over all samples of all workers, whatever the shares. The loss is
        scaled before backward, so that synchronised batch norm sees the weights too. A worker without samples passes
        `samples=0`, with a loss over an empty batch, or None where no layer communicates.

        Args:
            loss: mean over this worker's samples.
            samples: how many they are; tokens, for a mean over tokens. None: all workers weigh the same, as in DDP.
            total: the sum of `samples` over all workers and micro-batches of the step, if it is known: saves a message.
            sync: False for all but the last micro-batch of a step.

        Raises:
            UsageError: numbers that cannot be meant, or gradients of another kind left in `.grad`.
        """
        if self._closed:
            raise UsageError("this replica was closed, or its model was tied again: use what replicate() returned last")
        if samples is not None and total is None and not self._update_is_joint:
            raise UsageError(
                "backward(samples=) without total=: a step that is not made of all workers' gradients needs it"
            )
        sync = sync and self._sync
        self._drop_stale()
        if self.pushes is not None:
            self.pushes.check()
        factor, scale = self._weights.of(samples, total, sync=sync)
        was, self._sync = self._sync, sync
        self._explicit, self._scale, self._alive = True, scale, None
        for observer in self._observers:
            observer.begin(factor, samples)
        try:
            if loss is not None:
                # A mean over no samples is NaN, and its gradient must be nothing.
                weighted = torch.nan_to_num(loss) * 0.0 if samples == 0 else loss * factor
                weighted.backward()
            if sync:
                if not self._exchange.running:
                    self._begin()
                self._finish()
                for observer in self._observers:
                    observer.end()
            else:
                self._unreduced = True
        except BaseException:
            self._abandon()
            raise
        finally:
            self._explicit, self._sync, self._scale = False, was, 1.0 / self.comm.world_size

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on this worker alone, as in DDP; forward and backward both belong inside."""
        was, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = was

    def publish(self) -> StepReport | None:
        """With `update="first"`: everyone's parameters become worker 0's, after its step. With a `ServerUpdate` or a
        `ShardedUpdate`: they become those after the step; what became of this worker's is returned, or with
        `early_forward` by `settle`. Else nothing."""
        report = self._exchange.publish()
        if self._early is not None:
            self._early.reset()
            if self._early.compiled:
                return self.settle()
        return report

    def settle(self) -> StepReport | None:
        """With `early_forward`: return when all parameters are those after the last step, and what became of it, to
        who asks first. Else they are since `publish`, and this returns None."""
        return None if self.pushes is None else self.pushes.settle()

    def message_buffers(self) -> list[Tensor]:
        """The buckets in which gradients travel, as flat tensors: memory that stays from step to step."""
        return self._exchange.message_buffers()

    def observe(self, observer: Observer) -> None:
        """From now on let an observer see each `backward` of this replica begin, and each step's last one end.

        Raises:
            UsageError: with any update but `worker`: workers do not get the mean gradient; what does not observe, or
                does already.
        """
        if not isinstance(observer, Observer) or any(observer is other for other in self._observers):
            raise UsageError(f"{observer!r} cannot observe, or does already: give a GradientNoise, once")
        if isinstance(self._exchange, Pushes) or self._primary is not None:
            raise UsageError("observe() needs the mean gradient on every worker: give update='worker'")
        self._observers.append(observer)

    def nonfinite(self) -> list[str]:
        """Where gradients were NaN or infinite in the last backward, in words, by worker; the same on all workers.

        Needs `look_for_nonfinite`. All workers call it.
        """
        return [] if isinstance(self._exchange, Pushes) else self._exchange.nonfinite()

    def look_for_nonfinite(self) -> None:
        """From now on look at each worker's gradient before it is sent, to name the one where trouble began."""
        if isinstance(self._exchange, Pushes):
            raise UsageError("look_for_nonfinite() is for gradients that come back, not where parameters do")
        self._exchange.looks_for_nonfinite = True

    def check(self, *, buffers: bool = False) -> None:
        """Compare parameters over workers, by checksum.

        Raises:
            LayoutError: on every worker, naming the first tensor that differs and the workers that differ from 0.
            UsageError: the model has parameters that were not there when it was tied.
        """
        foreign = [_plain(n) for n, p in self._model.named_parameters() if id(p) not in self._ids]
        if foreign:
            raise UsageError(f"{foreign[0]} came into the model after replicate(): tie the model again")
        self.settle()
        named: list[tuple[str, Tensor]] = list(self._named)
        if buffers:
            named += [(_plain(name), b) for name, b in self._model.named_buffers()]
        found = collectives.first_difference(self.comm, named)
        if found:
            name, ranks = found
            raise LayoutError(f"{name} is not the same on all workers: {_listed(ranks)} from worker 0")

    def rejoin(self) -> None:
        """Tie the model again after the backend has come to a new epoch: what was under way is forgotten.

        All workers do what a new one does in `replicate`; parameters become worker 0's.
        """
        self._weights.reset()
        self._unreduced = self._shares_checked = False
        self._sync = True
        if self.pushes is not None:
            self.pushes.forget()
        else:
            self._exchange.abandon()
        for _, parameter in self._named:
            parameter.grad = None
        self._agree_all()
        if self._named:
            self._refresh()

    def close(self) -> None:
        """Take the hooks off the model, when parameters that are on their way are there, or cannot come any more."""
        if sys.exc_info()[0] is None:  # else nobody may come any more for whom to wait
            with contextlib.suppress(DtrainError):
                self.settle()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._hooked.clear()
        if self._early is not None:
            self._early.close()
        self._closed = True
        _replicas.discard(self)

    # -- the course of a backward -------------------------------------------------------------------------------------

    def before_forward(self, *_: object) -> None:
        """The model is about to be called."""
        if torch.is_grad_enabled():
            self._forward_synced = self._sync
            if self._trainable != tuple(p.requires_grad for _, p in self._named):
                self._refresh()

    def _ready(self, index: int, _: Tensor) -> None:
        """A parameter has its gradient."""
        if self.pushes is not None:
            self.pushes.refuse_pending()
        if not self._sync:
            if not self._explicit:
                self._weights.go_on((False, False), sync=False)
            self._unreduced = True
            return
        self._drop_stale()
        if not self._exchange.running:
            self._begin()
        self._exchange.put(index, self._scale)

    def _begin(self) -> None:
        if not self._forward_synced and not self._explicit:
            self._forward_synced = True
            raise UsageError("a forward ran under no_sync() and its backward outside: put both inside, or both outside")
        if not self._explicit:
            self._weights.refuse_mixture((False, False))
            # The engine forgets the callback when backward ends, even where an exception ends it and nothing is called.
            finish = functools.partial(self._finish)
            torch.autograd.Variable._execution_engine.queue_callback(finish)
            self._alive = weakref.ref(finish)
        self._unreduced = True
        self._exchange.begin(self._weights.share)

    def _finish(self) -> None:
        """Backward has ended here."""
        try:
            self._exchange.finish(self._scale)
            if self._weights.share is not None and not self._shares_checked:
                self._check_shares()
        except BaseException:
            self._abandon()
            raise
        self._weights.reset()
        self._unreduced = False

    def _check_shares(self) -> None:
        """Once: do the workers' samples add up to what they said the total was?"""
        self._shares_checked = True
        found = self._exchange.total_share() if self.updates or self.pushes is not None else 1.0
        if abs(found - 1.0) > _SHARE_TOLERANCE:
            raise UsageError(
                f"the samples of all workers add up to {found:.2f} times total: give each worker its own share, as a "
                "Loader with rank=comm.rank and world_size=comm.world_size does"
            )

    def _abandon(self) -> None:
        """A backward has failed."""
        if self._sync:
            self._weights.reset()
        self._exchange.abandon()

    def _drop_stale(self) -> None:
        if self._exchange.running and self._alive is not None and self._alive() is None:
            self._abandon()

    def _before_ready(self, index: int, _: Tensor) -> None:
        """A parameter is about to get another gradient."""
        self._exchange.before_put(index)

    # -- layout -------------------------------------------------------------------------------------------------------

    def _agree_all(self) -> None:
        named = [(_plain(n), t) for n, t in (*self._model.named_parameters(), *self._model.named_buffers())]
        sparse = [n for n, t in named if t.layout is not torch.strided]
        if sparse:
            raise UsageError(f"{sparse[0]} is sparse: tensors of a model must be dense")
        for name, parameter in self._named:
            if parameter.is_complex():
                raise UsageError(f"{name} is complex: complex parameters are not supported; use two real ones")
        collectives.agree(self.comm, describe(named), "models")
        collectives.broadcast(self.comm, [t for _, t in named])

    @_disable_dynamo  # torch.compile is not to look into the transfers
    def _refresh(self) -> None:
        """The set of parameters that require a gradient has changed: new messages, and hooks where there are none."""
        named = [np for np in self._named if np[1].requires_grad]
        collectives.agree(self.comm, describe(named), "trainable parameters")
        self._trainable = tuple(p.requires_grad for _, p in self._named)
        for index in set(self._exchange.lay_out()) - self._hooked:
            parameter: Parameter = self._named[index][1]
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_weakly(self._ready, index)))
            if self._primary is not None and self.comm.rank == 0:
                self._hooks.append(parameter.register_hook(_weakly(self._before_ready, index)))
            self._hooked.add(index)

    # -- misuse -------------------------------------------------------------------------------------------------------

    def refuse_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise if this optimizer is about to use gradients that are only this worker's."""
        mine = [p for g in optimizer.param_groups for p in g["params"] if id(p) in self._ids]
        if mine and self.pushes is not None:
            raise UsageError(
                "optimizer.step() where steps are made elsewhere: call publish(), and step only if replica.updates"
            )
        mine = [p for p in mine if p.grad is not None]
        if not mine:
            return
        if self._unreduced:
            raise UsageError(
                "optimizer.step() on gradients that were not summed over workers: the last backward of a step must run "
                "outside no_sync(), or with sync=True"
            )
        names = {id(p): name for name, p in self._named}
        hooked = {id(self._named[i][1]) for i in self._hooked}
        for parameter in mine:
            if id(parameter) not in hooked:
                raise UsageError(
                    f"optimizer.step() on {names[id(parameter)]}, which was unfrozen after the forward: its gradient "
                    "was not summed over workers; unfreeze before the forward"
                )


def _weakly(method: Callable[[int, Tensor], None], index: int) -> Callable[[Tensor], None]:
    """Hook on a parameter. Torch never frees what a parameter's hook refers to; the model holds the replica."""
    weak = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        bound = weak()
        if bound is None:
            raise UsageError("the model that was tied to the backend is gone: keep it, or what replicate() returned")
        bound(index, tensor)

    return hook


def _untie(model: nn.Module, comm: Backend) -> None:
    """A model that is tied again is tied anew; parts of it cannot be tied twice."""
    parameters = {id(p) for p in model.parameters()}
    for other in list(_replicas):
        if parameters.isdisjoint(other._ids):
            continue
        if other.comm.rank != comm.rank:
            raise UsageError(
                f"workers {other.comm.rank} and {comm.rank} share one model object: give each its own copy"
            )
        if other._model is not model:
            raise UsageError("parameters of this model are tied as part of another model: close() that replica first")
        other.close()


@functools.cache
def _watch_optimizers() -> None:
    """Look at every optimizer's step from now on; once in a process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for replica in list(_replicas):
        if (
            replica.pushes
            or replica._unreduced
            or replica._trainable != tuple(p.requires_grad for _, p in replica._named)
        ):
            replica.refuse_step(optimizer)


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _listed(ranks: list[int]) -> str:
    one = len(ranks) == 1
    return f"worker{'' if one else 's'} {', '.join(map(str, ranks))} differ{'s' if one else ''}"
