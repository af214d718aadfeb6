"""One worker's copy of a model, tied to a backend: when `loss.backward()` returns, `.grad` holds the global gradient.

The model is not wrapped. Hooks on its parameters fill buckets while backward runs, full buckets travel meanwhile, and
the end of backward waits for the last one. Clipping, loss scaling and logging then work as on one worker.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtrain.buckets import Bucket, describe, plan
from dtrain.comm import collectives
from dtrain.comm.base import Backend, PrimaryHost, Work
from dtrain.errors import LayoutError, UsageError

_replicas: weakref.WeakSet[Replica] = weakref.WeakSet()


def replicate(
    model: nn.Module,
    comm: Backend,
    *,
    bucket_mb: float = 25.0,
    first_bucket_mb: float = 1.0,
    update: str = "all",
) -> Replica:
    """Tie a model to a backend: parameters and buffers become worker 0's, gradients become global means.

    Args:
        model: the same on every worker: names, shapes and types are compared first.
        comm: from `dtrain.connect()`.
        bucket_mb: size at which a bucket travels, in MiB.
        first_bucket_mb: the same for the first one.
        update: `all`: every worker has the mean gradient and steps its own optimizer. `first`: gradients are gathered
            on worker 0, which alone steps; the others get its parameters by `Replica.publish` (DataParallel's way).

    Returns:
        A handle with `backward`, `no_sync`, `check` and `close`.

    Raises:
        LayoutError: on every worker, if the models differ; names the first tensor that does.
        UsageError: complex parameters; `update="first"` on a backend without a primary.
    """
    return Replica(model, comm, bucket_mb=bucket_mb, first_bucket_mb=first_bucket_mb, update=update)


class Replica:
    """See `replicate`."""

    def __init__(
        self, model: nn.Module, comm: Backend, *, bucket_mb: float, first_bucket_mb: float, update: str
    ) -> None:
        if bucket_mb <= 0 or first_bucket_mb <= 0:
            raise UsageError(f"bucket_mb is {bucket_mb}, first_bucket_mb {first_bucket_mb}: give MiB, more than 0")
        if update not in ("all", "first"):
            raise UsageError(f"update is {update!r}: `all` or `first`")
        if update == "first" and not isinstance(comm, PrimaryHost):
            raise UsageError(f"update='first' needs a backend with a primary, such as threads; {comm.name} has none")
        self.comm = comm
        self.updates = update == "all" or comm.rank == 0
        self._model = model
        self._primary = comm if update == "first" and isinstance(comm, PrimaryHost) else None
        self._sizes = (int(bucket_mb * 2**20), int(first_bucket_mb * 2**20))
        self._named = [(_plain(name), p) for name, p in model.named_parameters()]
        self._ids = {id(p) for _, p in self._named}
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._before_forward)]
        self._hooked: set[int] = set()
        self._trainable: tuple[bool, ...] = ()
        self._sync = True
        self._forward_synced = True
        self._unreduced = False  # .grad holds what only this worker knows
        self._accumulating = False
        self._samples = 0.0
        self._scale = 1.0 / comm.world_size
        self._explicit = False
        self._running = False
        self._buckets: list[Bucket] = []
        self._works: list[tuple[Bucket, list[int], Work]] = []
        self._where: dict[int, tuple[Bucket, int]] = {}
        self._agree_all()
        self._refresh()
        _watch_optimizers()
        _replicas.add(self)

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
        sync = sync and self._sync
        factor, scale = self._weights(samples, total, sync)
        was, self._sync = self._sync, sync
        self._explicit, self._scale = True, scale
        try:
            if loss is not None:
                # A mean over no samples is NaN, and its gradient must be nothing.
                weighted = torch.nan_to_num(loss) * 0.0 if samples == 0 else loss * factor
                weighted.backward()
            if sync:
                if not self._running:
                    self._begin()
                self._finish()
            else:
                self._unreduced = True
        except BaseException:
            self._end()
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

    def publish(self) -> None:
        """With `update="first"`: everyone's parameters become worker 0's, after its step. Else nothing."""
        if self._primary is None:
            return
        works = []
        with torch.no_grad():
            for number, bucket in enumerate(self._buckets):
                flat = torch.cat([p.detach().reshape(-1) for p in bucket.parameters])
                works.append((bucket, flat, self._primary.send_first(flat, f"gradient/parameters{number}")))
            for bucket, flat, work in works:
                work.wait()
                parts = flat.split([p.numel() for p in bucket.parameters])
                for parameter, part in zip(bucket.parameters, parts, strict=True):
                    parameter.copy_(part.view(parameter.shape))

    def check(self, *, buffers: bool = False) -> None:
        """Compare parameters over workers, by checksum.

        Raises:
            LayoutError: on every worker, naming the first tensor that differs and the workers that differ from 0.
        """
        named: list[tuple[str, Tensor]] = list(self._named)
        if buffers:
            named += [(_plain(name), b) for name, b in self._model.named_buffers()]
        found = collectives.first_difference(self.comm, named)
        if found:
            name, ranks = found
            raise LayoutError(f"{name} is not the same on all workers: {_listed(ranks)} from worker 0")

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._hooked.clear()
        _replicas.discard(self)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _weights(self, samples: float | None, total: float | None, sync: bool) -> tuple[float, float]:
        """(factor on the loss, scale on the gradient as it is packed).

        The factor is the same multiple of `samples` on all workers, or batch-norm messages would not add up. A global
        gradient that `.grad` already holds survives a mean over workers, but no other scale.
        """
        world = self.comm.world_size
        if samples is None:
            if total is not None or self._accumulating:
                raise UsageError("give samples= with every backward of a step, or with none")
            return 1.0, 1.0 / world
        if samples < 0 or (total is not None and (total <= 0 or samples > total)):
            raise UsageError(f"samples is {samples}, total {total}: samples run from 0 to total, and total is above 0")
        if total is not None:
            if self._accumulating:
                raise UsageError("give total= with every backward of a step, or with none")
            return world * samples / total, 1.0 / world
        if not self._accumulating and (not sync):
            if any(p.grad is not None for _, p in self._named):
                raise UsageError(
                    "backward(samples=, sync=False) on top of earlier gradients: call zero_grad() first, or give total="
                )
            self._accumulating = True
        if not sync:
            self._samples += samples
            return float(samples), 1.0
        everyone = collectives.sum_numbers(self.comm, [self._samples + samples], "metric/samples")[0]
        if everyone <= 0:
            raise UsageError("samples is 0 on every worker: a step needs at least one sample")
        if self._accumulating:
            return float(samples), 1.0 / everyone
        return world * samples / everyone, 1.0 / world

    # -- the course of a backward -------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        if torch.is_grad_enabled():
            self._forward_synced = self._sync
            self._refresh()

    def _ready(self, index: int, _: Tensor) -> None:
        """A parameter has its gradient."""
        if not self._sync:
            self._unreduced = True
            return
        if not self._running:
            self._begin()
        bucket, slot = self._where[index]
        bucket.put(slot, self._scale)
        self._send_full()

    def _begin(self) -> None:
        if not self._forward_synced and not self._explicit:
            self._forward_synced = True
            raise UsageError("a forward ran under no_sync() and its backward outside: put both inside, or both outside")
        self._running = True
        self._works = []
        for bucket in self._buckets:
            bucket.reset()
        if not self._explicit:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _send_full(self) -> None:
        while len(self._works) < len(self._buckets) and self._buckets[len(self._works)].full:
            self._send_next()

    def _send_next(self) -> None:
        """Buckets leave in their order, on every worker the same."""
        number = len(self._works)
        bucket = self._buckets[number]
        absent = bucket.seal(self._scale)
        start = self._primary.gather_sum if self._primary else self.comm.all_reduce
        self._works.append((bucket, absent, start(bucket.flat, f"gradient/{number}")))

    def _finish(self) -> None:
        """Backward has ended here: send what is left, and wait for everything."""
        try:
            while len(self._works) < len(self._buckets):
                self._send_next()
            for bucket, absent, work in self._works:
                work.wait()
                bucket.settle(absent)
        finally:
            self._end()
        self._unreduced = False

    def _end(self) -> None:
        self._running = False
        self._works = []
        self._accumulating = False if self._sync else self._accumulating
        self._samples = 0.0 if self._sync else self._samples

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

    def _refresh(self) -> None:
        """Lay out the buckets, when the set of parameters that require a gradient has changed."""
        trainable = tuple(p.requires_grad for _, p in self._named)
        if trainable == self._trainable:
            return
        collectives.agree(
            self.comm, describe([np for np in self._named if np[1].requires_grad]), "trainable parameters"
        )
        self._trainable = trainable
        plans = plan(self._named, bucket_bytes=self._sizes[0], first_bytes=self._sizes[1])
        self._buckets, self._where = [], {}
        for number, bucket_plan in enumerate(plans):
            bucket = Bucket(bucket_plan, self._named, functools.partial(self._empty, f"gradient/{number}"))
            self._buckets.append(bucket)
            self._where.update({index: (bucket, slot) for slot, index in enumerate(bucket_plan.members)})
        for index in set(self._where) - self._hooked:
            parameter: Parameter = self._named[index][1]
            self._hooks.append(parameter.register_post_accumulate_grad_hook(functools.partial(self._ready, index)))
            self._hooked.add(index)

    def _empty(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.comm.empty(numel, dtype, key, device)

    # -- misuse -------------------------------------------------------------------------------------------------------

    def refuse_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise if this optimizer is about to use gradients that are only this worker's."""
        mine = [p for g in optimizer.param_groups for p in g["params"] if id(p) in self._ids and p.grad is not None]
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


@functools.cache
def _watch_optimizers() -> None:
    """Look at every optimizer's step from now on; once in a process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for replica in list(_replicas):
        if replica._unreduced or replica._trainable != tuple(p.requires_grad for _, p in replica._named):
            replica.refuse_step(optimizer)


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _listed(ranks: list[int]) -> str:
    one = len(ranks) == 1
    return f"worker{'' if one else 's'} {', '.join(map(str, ranks))} differ{'s' if one else ''}"
