"""The messages of one backward where servers make the steps: gradients go out while it runs, parameters come back."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from dtrain.buckets import Bucket, Named, Plan, plan
from dtrain.comm import collectives
from dtrain.comm.base import Backend, Traffic
from dtrain.comm.hosts import Hosted, HostedBucket, ParameterHost, ServerUpdate, StepReport
from dtrain.errors import UsageError
from dtrain.sharded import Sharded, ShardedUpdate

_owners: weakref.WeakKeyDictionary[Traffic, weakref.ref[Pushes]] = weakref.WeakKeyDictionary()
"""Whose parameters the servers of a backend keep, by its traffic, which a meter around it shares."""

HostedUpdate = ServerUpdate | ShardedUpdate
"""Updates that are not this worker's own: gradients go out, parameters come back."""


class Pushes:
    """Pushes the gradients of a model's trainable parameters and pulls the parameters: an `Exchange` of another kind.

    The parameters lie where servers on this host write them. They may be written while backward still runs, once all
    workers have pushed the bucket: by then nothing of this step needs them, as long as the model uses no weight
    detached. Autograd is told, so that such a model raises instead of being wrong.

    A gradient that was pushed is no longer in `.grad`: it is only this worker's, and must not change under way.
    """

    def __init__(self, comm: Backend, named: Named, *, sizes: Mapping[str, int], update: HostedUpdate) -> None:
        """
        Raises:
            UsageError: the backend has no servers that keep parameters, or the optimizer cannot be theirs.
        """
        self._comm = comm
        if isinstance(update, ServerUpdate):
            self._host_on(comm)
        self._named = named
        self._update = update
        self._sizes = {**sizes, "direct_bytes": 0}
        self._buckets: list[Bucket] = []
        self._where: dict[int, tuple[Bucket, int]] = {}
        self._hosted: Hosted | None = None
        self._kept: dict[int, dict[str, Any]] = {}  # on worker 0: optimizer state, of frozen parameters too
        self._steps_before = 0  # of earlier layouts
        self._versions: dict[int, int] = {}  # of each parameter, by its id, when it was last the servers'
        self._late: dict[int, int] = {}  # by id: the bucket of each parameter that is on its way
        self._settled = True  # whether the last step is over here
        self._sent = 0
        self._share = 1.0 / comm.world_size
        self._stepping = False  # between begin and publish
        self.running = False
        self.staleness: Counter[int] = Counter()
        """How often this worker's gradient had which staleness."""
        self.dropped = 0
        """How often it came too late, and was dropped."""

    # -- as an Exchange has it ----------------------------------------------------------------------------------------

    def lay_out(self) -> list[int]:
        """Plan the buckets anew, and hand the parameters over; positions of those that take part."""
        owner = self._owner
        if owner is not None and owner is not self:
            owner.settle()  # what is on its way would not come any more
        state = self._take_back()
        plans = [p for p in plan(self._named, dtype=None, **self._sizes) if p.members]
        self._buckets, self._where = [], {}
        hosted = []
        for number, one in enumerate(plans):

            def empty(
                numel: int, dtype: torch.dtype, device: torch.device, key: str = f"gradient/{number}"
            ) -> torch.Tensor:
                return self._comm.empty(numel, dtype, key, device)

            bucket = Bucket(one, self._named, empty, flags=self._padding(one))
            bucket.flags.zero_()
            self._buckets.append(bucket)
            self._where.update({index: (bucket, slot) for slot, index in enumerate(one.members)})
            hosted.append(HostedBucket(bucket.flat, bucket.named))
        if isinstance(self._update, ShardedUpdate):
            self._hosted = Sharded(self._comm, hosted, self._named, self._update)
        else:
            self._hosted = self._host_on(self._comm).host(hosted, self._named, self._update)
        _owners[self._comm.traffic] = weakref.ref(self)
        if state is not None:
            self._hosted.restore(state)
        self._mark(self._parameters)
        return list(self._where)

    def check(self) -> None:
        """Refuse to begin.

        Raises:
            UsageError: the step before is not over, or the servers keep other values than there are here.
        """
        self.refuse_pending()
        self.settle()
        self._refuse_written(self._parameters)

    def _refuse_written(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            if parameter._version != self._versions[id(parameter)]:
                name = next(n for n, p in self._named if p is parameter)
                raise UsageError(
                    f"{name} was changed here, where servers keep it, and would be lost: change it before replicate(), "
                    "or hand worker 0's over with replica.pushes.restore(...)"
                )

    def refuse_pending(self) -> None:
        """Raise if the step before is not over."""
        if self._stepping:
            raise UsageError(
                "a backward before publish(): with a ServerUpdate or ShardedUpdate call it after each step's backward"
            )

    def begin(self, share: float | None) -> None:
        """A backward begins.

        Args:
            share: this worker's part of the step's samples; None: all workers weigh the same.
        """
        self.check()
        self._share = 1.0 / self._comm.world_size if share is None else share
        self._host.begin(self._share)
        self.running = True
        self._sent = 0
        for bucket in self._buckets:
            bucket.reset()

    def put(self, index: int, scale: float) -> None:
        """A parameter has its gradient: it is taken in, times `scale`; full buckets leave in their order."""
        if index not in self._where:
            raise UsageError(f"{self._named[index][0]} was unfrozen after the forward: unfreeze before it")
        bucket, slot = self._where[index]
        bucket.put(slot, scale)
        while not self._clips_alone and self._sent < len(self._buckets) and self._buckets[self._sent].full:
            self._push_next(scale)

    def finish(self, scale: float) -> None:
        """Backward has ended here: send what is left."""
        if self._clips_alone:
            self._clip(scale)
        while self._sent < len(self._buckets):
            self._push_next(scale)
        self._host.finish()
        self._clear()
        self.running, self._stepping = False, True

    def publish(self) -> StepReport | None:
        """Wait for the parameters after the step; what became of it. None where no backward was run.

        None with an early forward too: `settle` tells.
        """
        if not self._stepping:
            return None
        if self._update.early_forward:
            self._host.conclude()
            for number, bucket in enumerate(self._buckets):
                self._late |= {id(p): number for p in bucket.parameters}
                self._versions |= {id(p): p._version for p in bucket.parameters}
        self._stepping, self._settled = False, False
        self._clear()  # of a backward that was refused meanwhile
        return None if self._update.early_forward else self.settle()

    @property
    def late(self) -> bool:
        """Whether parameters are on their way that nobody has waited for."""
        return bool(self._late)

    def arrive(self, tensor: torch.Tensor) -> None:
        """Return when this one, if it is a parameter that is on its way, is there.

        Not for what lies in its memory: that is what a transfer writes, perhaps while a layer waits for another one.
        """
        number = self._late.get(id(tensor))
        if number is None:
            return
        self._host.arrive(number)
        self._refuse_written(self._buckets[number].parameters)
        self._late = {key: bucket for key, bucket in self._late.items() if bucket != number}
        self._mark(self._buckets[number].parameters)

    def settle(self) -> StepReport | None:
        """Return when all parameters are those after the last step; what became of it, to who asks first."""
        if self._settled:
            return None
        report = self._host.pull()
        came = self._parameters
        if self._update.early_forward:
            came = [p for number in set(self._late.values()) for p in self._buckets[number].parameters]
        late, self._late, self._settled = self._late, {}, True
        if late:
            self._refuse_written(came)
        self._mark(came)
        if report.counted:
            self.staleness[report.staleness] += 1
        else:
            self.dropped += 1
        return report

    def abandon(self) -> None:
        """A backward has failed; if it had begun, the servers wait for the rest of it, and the job cannot go on."""
        self.running = False

    def before_put(self, index: int) -> None:
        """Nothing is kept of an earlier step."""

    def total_share(self) -> float:
        """The shares of all workers together, of the last backward; 1 where each is a mean of its own."""
        if not self._is_joint:
            return 1.0
        return collectives.sum_numbers(self._comm, [self._share], "metric/share")[0]

    # -- what only servers have ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps that this worker has taken part in."""
        return self._steps_before + self._host.steps

    def refresh(self) -> None:
        """Get the newest parameters, the same on all workers, which all call it between steps."""
        self._refuse_amid_step("refresh()")
        self._host.refresh()
        self._mark(self._parameters)

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The `state` of the optimizer's state dict, on worker 0; all workers call it, between steps."""
        self._refuse_amid_step("optimizer_state()")
        return self._kept | self._host.optimizer_state()

    def restore(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Make worker 0's parameters everyone's, and this state the servers'; all workers call it."""
        self._refuse_amid_step("restore()")
        self._host.restore(state)
        self._host.refresh()
        self._kept = {number: dict(kept) for number, kept in state.items()}
        self._mark(self._parameters)

    def state_bytes(self) -> int:
        """Bytes that are kept for the optimizer, all together; all workers call it."""
        self._refuse_amid_step("state_bytes()")
        return self._host.state_bytes()

    def table(self) -> str:
        """What each server, or worker, keeps."""
        return self._host.table()

    def message_buffers(self) -> list[torch.Tensor]:
        """The flat tensors of all buckets."""
        return [bucket.flat for bucket in self._buckets]

    def forget(self) -> None:
        """The servers know nothing of these parameters any more: `lay_out` hands them over anew."""
        self._hosted = None
        self._kept, self._steps_before = {}, 0
        self.running = self._stepping = False
        self._late.clear()
        self._settled = True

    @property
    def _owner(self) -> Pushes | None:
        """Whose parameters the backend keeps."""
        weak = _owners.get(self._comm.traffic)
        return None if weak is None else weak()

    @property
    def _host(self) -> Hosted:
        if self._hosted is None or not self._buckets:
            raise UsageError("no parameter of the model requires a gradient: there is nothing to train")
        if self._owner is not self:
            raise UsageError(
                "another model is kept in this one's place since: a backend keeps one; tie both as one "
                "(nn.ModuleList), or this one again"
            )
        return self._hosted

    @staticmethod
    def _host_on(comm: Backend) -> ParameterHost:
        if not isinstance(comm, ParameterHost):
            raise UsageError(
                f"update=ServerUpdate(...) needs servers that keep parameters, as ps has; {comm.name} has none"
            )
        return comm

    @property
    def _parameters(self) -> list[Parameter]:
        return [parameter for bucket in self._buckets for parameter in bucket.parameters]

    def _take_back(self) -> dict[int, dict[str, Any]] | None:
        """Before another layout: newest parameters on all workers, the optimizer's state on worker 0. None at first."""
        if self._hosted is None or not self._buckets:
            return None if self._hosted is None else self._kept
        self._refuse_amid_step("a forward with other trainable parameters")
        self._steps_before = self.steps
        if not self._is_joint:
            self._host.refresh()
        self._kept = self._kept | self._host.optimizer_state()
        return self._kept

    def _refuse_amid_step(self, what: str) -> None:
        if self._stepping:
            raise UsageError(f"{what} between a backward and its publish(): call publish() first")
        self.settle()

    @property
    def _is_joint(self) -> bool:
        return self._update.synchronous and not self._update.backup_workers

    def _mark(self, parameters: list[Parameter]) -> None:
        """These have become the servers'. Autograd is told that they have changed."""
        torch.autograd.graph.increment_version(parameters)
        self._versions.update({id(parameter): parameter._version for parameter in parameters})

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def _clips_alone(self) -> bool:
        return not self._update.synchronous and self._update.clip_grad_norm is not None

    def _push_next(self, scale: float) -> None:
        bucket = self._buckets[self._sent]
        absent = set(bucket.seal(scale))
        torch.autograd.graph.increment_version(bucket.parameters)  # from now on servers may write them
        # What a loss over no samples yields is no gradient: nobody's momentum is to move by it.
        present = [self._share > 0 and slot not in absent for slot in range(len(bucket.parameters))]
        self._host.push(self._sent, present)
        self._sent += 1

    @torch.no_grad()
    def _clip(self, scale: float) -> None:
        """Bring the norm of this worker's own mean gradient under the limit."""
        for bucket in self._buckets:
            bucket.seal(scale)
        flats = [b.flat for b in self._buckets]
        # In float64, where that costs little, and for halves in float32, which hold their squares.
        norms = [
            torch.linalg.vector_norm(f if f.dtype == torch.float64 else f.float()).to(flats[0].device) for f in flats
        ]
        norm = torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))
        limit = self._update.clip_grad_norm or 0.0
        factor = torch.clamp(limit * self._share / (norm + 1e-6 * self._share), max=1.0)  # as torch has it, of the mean
        for flat in flats:
            flat.mul_(factor.to(flat.device))

    def _padding(self, one: Plan) -> int:
        """Elements behind a bucket's parameters, so that all workers have parts of one size."""
        numel = sum(self._named[index][1].numel() for index in one.members)
        return -numel % self._comm.world_size if isinstance(self._update, ShardedUpdate) else 0
