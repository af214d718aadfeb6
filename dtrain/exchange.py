"""The messages of one backward: they leave in their order while it runs, and are all there when it ends."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dtrain.buckets import Bucket, Direct, Message, Named, Packed, Plan, plan
from dtrain.comm import collectives
from dtrain.comm.base import Backend, PrimaryHost, Traffic, Work
from dtrain.errors import UsageError

_numbers: weakref.WeakKeyDictionary[Traffic, int] = weakref.WeakKeyDictionary()
"""How many exchanges a backend has had, by its traffic, which a meter around it shares: each has keys of its own, so
that two in one backward do not meet."""


class Exchange:
    """Sums the gradients of a model's trainable parameters over workers.

    The last message also carries a flag for each parameter, which counts the workers that have a gradient for it: one
    that nobody used keeps none, so that an optimizer leaves it alone, as on one worker. Behind the flags comes the
    worker's share of the samples.
    """

    def __init__(
        self,
        comm: Backend,
        named: Named,
        *,
        sizes: Mapping[str, int],
        send_as: torch.dtype | None = None,
        primary: PrimaryHost | None = None,
    ) -> None:
        """
        Args:
            sizes: keyword arguments of `buckets.plan`.
            send_as: type that gradients travel as; None: their own.
            primary: gather the sums on worker 0 alone; the others are left without gradients.
        """
        self._comm = comm
        self._named = named
        number = _numbers[comm.traffic] = _numbers.get(comm.traffic, -1) + 1
        self._key = f"gradient/{number}." if number else "gradient/"
        self._sizes = {**sizes, "direct_bytes": 0} if comm.packs else sizes
        self._send_as = send_as
        self._primary = primary
        self._messages: list[Message] = []
        self._where: dict[int, tuple[Message, int]] = {}
        self._flag_of: dict[int, int] = {}
        self._flags = torch.empty(0)
        self._share = 0.0
        self._works: list[tuple[Message, list[int], Work]] = []
        self._gathered: set[int] = set()  # on worker 0 of a primary: parameters whose .grad is the global one
        self.running = False
        self.looks_for_nonfinite = False
        """Whether to look, before they are sent, for gradients that are NaN or infinite."""
        self._nonfinite: list[str] = []

    def lay_out(self) -> list[int]:
        """Plan the messages anew; positions of the parameters that take part."""
        plans = plan(self._named, **self._sizes, dtype=self._send_as)
        self._messages, self._where = [], {}
        for number, one in enumerate(plans):
            message = self._message(one, number, flags=number == len(plans) - 1)
            self._messages.append(message)
            self._where.update({index: (message, slot) for slot, index in enumerate(one.members)})
        self._flag_of = {index: position for position, index in enumerate(self._where)}
        return list(self._where)

    def begin(self, share: float | None) -> None:
        """A backward begins.

        Args:
            share: this worker's part of the step's samples; travels with the flags, see `total_share`.
        """
        self._share = share or 0.0
        self.running = True
        self._works = []
        self._nonfinite = []
        for message in self._messages:
            message.reset()

    def put(self, index: int, scale: float) -> None:
        """A parameter has its gradient: send it, times `scale`, when its message is full and its turn has come."""
        if index not in self._where:
            raise UsageError(f"{self._named[index][0]} was unfrozen after the forward: unfreeze before it")
        message, slot = self._where[index]
        message.put(slot, scale)
        while len(self._works) < len(self._messages) and self._messages[len(self._works)].full:
            self._send_next(scale)

    def finish(self, scale: float) -> None:
        """Backward has ended here: send what is left, and wait for everything."""
        while len(self._works) < len(self._messages):
            self._send_next(scale)
        for _, _, work in self._works:
            work.wait()
        self._grant([index for _, absent, _ in self._works for index in absent])
        for message in self._messages:
            message.release()
        self.running, self._works = False, []
        if self._primary:
            self._keep_on_first()

    def message_buffers(self) -> list[Tensor]:
        """The flat tensors of all buckets."""
        return [message.flat for message in self._messages if isinstance(message, Bucket)]

    def total_share(self) -> float:
        """The shares of all workers together, of the last backward."""
        return float(self._flags[-1])

    def nonfinite(self) -> list[str]:
        """Of the last backward, by worker: `worker 2: layer.weight`, the first of each. All workers call it."""
        mine = self._nonfinite[0].encode() if self._nonfinite else b""
        found = collectives.gather_bytes(self._comm, mine, "metric/nonfinite")
        return [f"worker {rank}: {name.decode()}" for rank, name in enumerate(found) if name]

    def abandon(self) -> None:
        """A backward has failed. What it has sent is still under way: its memory is left to it."""
        in_flight = [message for message, _, _ in self._works]
        self.running, self._works = False, []
        for message in in_flight:
            message.abandon()
        if in_flight:
            self.lay_out()

    def publish(self) -> None:
        """With a primary: everyone's parameters become worker 0's. Else nothing."""
        if self._primary is None:
            return
        works = []
        with torch.no_grad():
            for number, parameters in enumerate(m.parameters for m in self._messages if m.parameters):
                flat = torch.cat([p.detach().reshape(-1) for p in parameters])
                works.append((parameters, flat, self._primary.send_first(flat, f"{self._key}parameters{number}")))
            for parameters, flat, work in works:
                work.wait()
                parts = flat.split([p.numel() for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part.view(parameter.shape))

    def before_put(self, index: int) -> None:
        """A parameter is about to get another gradient on top of what `.grad` has."""
        if index in self._gathered:
            self._spread([index])

    def _send_next(self, scale: float) -> None:
        """Messages leave in their order, on every worker the same; the last one has the flags."""
        number = len(self._works)
        message = self._messages[number]
        self._spread(self._gathered.intersection(message.missing_members))
        absent = [message.members[slot] for slot in message.seal(scale)]
        if self.looks_for_nonfinite and not math.isfinite(float(message.flat.detach().float().sum())):
            self._nonfinite += [name for name, p in message.named if p.grad is not None and not p.grad.isfinite().all()]
        if number == len(self._messages) - 1:
            self._raise_flags([*(i for _, missing, _ in self._works for i in missing), *absent])
        start = self._primary.gather_sum if self._primary else self._comm.all_reduce
        self._works.append((message, absent, start(message.flat, f"{self._key}{number}")))

    @torch.no_grad()
    def _raise_flags(self, absent: list[int]) -> None:
        self._flags.fill_(1)
        self._flags[-1] = self._share
        for index in absent:
            self._flags[self._flag_of[index]] = 0

    def _grant(self, absent: list[int]) -> None:
        """Parameters that only other workers used get their gradient; those that nobody used have none."""
        used = self._flags.tolist() if absent else []  # where all are used, a device need not be waited for
        for index in absent:
            if used[self._flag_of[index]]:
                message, slot = self._where[index]
                message.grant(slot)

    def _keep_on_first(self) -> None:
        """Worker 0 alone has the gradient; the others' is part of it by now."""
        if self._comm.rank == 0:
            self._gathered = {i for i, (_, p) in enumerate(self._named) if p.grad is not None}
            return
        for _, parameter in self._named:
            parameter.grad = None

    def _spread(self, indices: Iterable[int]) -> None:
        """On worker 0: let the global gradient survive the next mean, to which the others bring nothing."""
        for index in list(indices):
            gradient = self._named[index][1].grad
            self._gathered.discard(index)
            if gradient is not None:
                gradient.mul_(self._comm.world_size)

    def _message(self, one: Plan, number: int, *, flags: bool) -> Message:
        if one.direct:
            return Direct(one, self._named)
        trainable = sum(p.requires_grad for _, p in self._named)
        empty = functools.partial(self._empty, f"{self._key}{number}")
        kind = Packed if any(self._named[i][1].dtype != one.dtype for i in one.members) else Bucket
        bucket = kind(one, self._named, empty, flags=trainable + 1 if flags else 0)
        self._flags = bucket.flags
        return bucket

    def _empty(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._comm.empty(numel, dtype, key, device)
