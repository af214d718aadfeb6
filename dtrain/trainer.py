"""The loop: step, epoch, fit. One trainer for every backend."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtrain import checkpoint, generators, norm
from dtrain.comm import collectives
from dtrain.comm.base import Backend, Rejoins, TellsSpans
from dtrain.comm.hosts import ServerUpdate
from dtrain.comm.solo import Solo
from dtrain.config import HALVES, TrainConfig
from dtrain.data import Loader, Micro, Step, to_device
from dtrain.errors import DataError, Preempted, Rewound, UsageError
from dtrain.hooks import Hook, State
from dtrain.measure import Chosen, Ledger, Offset, StepTimes, Stopwatch, mean, metered, offset_to_first
from dtrain.measure.memory import measured
from dtrain.norm.merge import merge_statistics
from dtrain.pushes import HostedUpdate
from dtrain.replica import replicate
from dtrain.sharded import ShardedUpdate
from dtrain.snapshot import gather_own, restore_own

log = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> mean loss over the samples of the batch."""

_MOST_RECORDS = 10_000
_HEAR_WITHIN_S = 5.0  # of steps: how soon all hear that one of them was asked to stop


class Trainer:
    """Trains a model over the workers of a backend, as one worker would on the global batch.

    comm = dtrain.connect()
    trainer = dtrain.Trainer(model, loss, optimizer, data, comm=comm, config=TrainConfig(epochs=3))
    trainer.fit()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        data: Loader,
        *,
        comm: Backend | None = None,
        config: TrainConfig,
        scheduler: LRScheduler | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        """
        Args:
            model: on its device already, and the same on every worker; is not wrapped.
            loss: mean over the samples of a batch. `functools.partial` or a lambda over model and batch.
            optimizer: over the model's parameters.
            data: this worker's `dtrain.Loader`.
            comm: from `dtrain.connect()`; None: alone.
            scheduler: stepped once after each optimizer step.
            hooks: see `dtrain.hooks`.

        Raises:
            UsageError: `data` is the share of another worker, or of another number of them; a scheduler and a hook that
                both set the learning rate; two hooks of a class of which one is saved.
        """
        self.config = config
        self.comm = metered(comm or Solo())
        if (data.rank, data.world_size) != (self.comm.rank, self.comm.world_size):
            raise UsageError(
                f"the Loader is that of worker {data.rank} of {data.world_size}, and this is worker {self.comm.rank} "
                f"of {self.comm.world_size}: give it rank=comm.rank and world_size=comm.world_size"
            )
        self.model = model
        if config.norm_batch is not None:
            norm_sharing(config, data)
            micro_batch = data.micro_batch
            self.model = norm.convert(model, norm_batch=config.norm_batch, comm=self.comm, micro_batch=micro_batch)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._first_settings = copy.deepcopy(_settings(optimizer))
        update = self._hosted_update() or config.update
        send_as = HALVES.get(config.send_as)
        self.replica = replicate(self.model, self.comm, bucket_mb=config.bucket_mb, send_as=send_as, update=update)
        if config.nonfinite != "allow":
            self.replica.look_for_nonfinite()
        self.records: list[dict[str, float]] = []
        """Times and bytes of this worker's latest steps, see `dtrain.measure.StepTimes.record`."""
        self.step_s = 0.0
        """Seconds that all steps took here."""
        self.memory: dict[str, int] = {}
        """Bytes by what they are for, when the second step had its gradients, see `dtrain.measure.memory.measured`."""
        self._loss = loss
        self.data = data
        _check_hooks(hooks, scheduler)
        self.hooks = list(hooks)
        """What hangs on the loop, in this order."""
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        """Where the model is."""
        rounds = config.send_as == "fp16" and any(p.dtype != torch.float16 for p in model.parameters())
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16" or rounds)
        self._watch = Stopwatch(self.comm, self.device)
        self._ledger = Ledger(self.comm.rank, self.comm.world_size)
        self._chosen = Chosen()
        self._started_s = time.perf_counter()
        self._at_sample = 0  # of the epoch
        self._asked_to_stop = self._stopping = False
        self._tell_every = sys.maxsize  # steps, at most, from one time that workers tell each other to the next
        self._begun = False  # whether this process has made a step
        self._ahead = 0  # steps made before this worker's count of the servers' begins
        self._lost = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss times samples, samples
        self.state = State(
            look=self._look,
            comm=self.comm,
            steps=config.steps,
            snapshot=self._snapshot,
            observe=self.replica.observe,
            resize=self._resize,
            loss_scale=self._scaler.get_scale,
        )
        self._count_steps()
        generators.seed_all(config.seed * 1_000_003 + self.comm.rank)

    def fit(self) -> State:
        """Train to the end of `config.epochs` or `config.steps`; the final state."""
        self.model.train()
        self._started_s = time.perf_counter()
        self._ahead = self.state.step - (self.replica.pushes.steps if self.replica.pushes else 0)
        come_back = started = False
        while True:
            try:
                gone_back = (come_back or self._begin_or_come_back()) and self._rewind()
                self._begin_times()
                if not started:  # a replacement's hooks start where the run stands
                    started = True
                    self._call("on_start")
                elif gone_back:
                    self._call("on_rewind")
                if gone_back:
                    collectives.barrier(self.comm)
                while not self.over:
                    self._run_epoch()
                self._settle()
                self.state.record, self.state.fresh = None, []
                self._tell_times(with_loss=True)
                self._call("on_end")
                return self.state
            except Rewound as rewound:
                if self.config.rewind_to is None or not rewound.epoch or not isinstance(self.comm.inner, Rejoins):
                    raise
                log.warning("%s", rewound)
                come_back = True
                self._rejoin(rewound.epoch)

    def _run_epoch(self) -> None:
        """Train from where the run stands to the end of the epoch, or of the run."""
        for step in self._timed(self.data.epoch(self.state.epoch, self._at_sample)):
            skipped = self._train(step)
            if self._at_sample == self.data.num_samples:
                break
            if self.over or skipped:
                return
        self._end_epoch()

    def stop(self) -> None:
        """Ask for an end: soon, after the same step on all workers, they save their state and raise `Preempted`.

        That is at the next record, or the end of the epoch; and after 5 s of steps, where a record has told how long
        they take. May be called from a signal's handler, on any worker.
        """
        self._asked_to_stop = True

    def _stop_if_asked(self) -> None:
        if not self._stopping:
            return
        self.replica.settle()
        self._call("on_stop")
        collectives.barrier(self.comm)
        raise Preempted(f"asked to stop: the run is saved at step {self.state.step}; resume it to go on")

    # -- when a process of the job was lost ---------------------------------------------------------------------------

    def _begin_or_come_back(self) -> bool:
        """Commit the start of a run that is to survive a loss; or whether this process comes to one that has begun."""
        root, comm = self.config.rewind_to, self.comm.inner
        if root is None or not isinstance(comm, Rejoins):
            return False
        if comm.epoch > 0:
            return True
        again = any(row[0] for row in collectives.gather_numbers(comm, [comm.incarnation], "metric/incarnation"))
        if again or not checkpoint.steps(root):
            return self._commit_start(again)
        return False

    def _commit_start(self, again: bool) -> bool:
        """Whether there is a commit to go back to; else the present state becomes one. All workers call it."""
        root = self.config.rewind_to
        assert root is not None  # noqa: S101
        if again and self._newest_commit() >= 0:
            return True
        groups = self._snapshot()
        if groups is not None:
            checkpoint.save(root, self.state.step, groups)
        return False

    def _newest_commit(self) -> int:
        """The step that worker 0 finds, on all workers; -1 for none."""
        root = self.config.rewind_to
        newest = (checkpoint.steps(root) or [-1])[-1] if self.comm.rank == 0 and root is not None else 0
        return collectives.gather_numbers(self.comm, [newest], "metric/commit")[0][0]

    def _rejoin(self, epoch: int) -> None:
        """Come to the new epoch; another loss meanwhile makes it a later one."""
        assert isinstance(self.comm.inner, Rejoins)  # noqa: S101
        for group, settings in zip(self.optimizer.param_groups, self._first_settings, strict=True):
            group.update(copy.deepcopy(settings))  # which a replacement has, until both load the same commit
        while True:
            try:
                self.comm.inner.rejoin(epoch)
                self.replica.rejoin()
                return
            except Rewound as again:
                epoch = again.epoch

    def _rewind(self) -> bool:
        """Go back to the newest commit, the same on all workers; where there is none, the present state becomes one.

        Returns whether there was one.
        """
        root = self.config.rewind_to
        assert root is not None  # noqa: S101
        step = self._newest_commit()
        if step < 0:
            begun = [row[0] for row in collectives.gather_numbers(self.comm, [self._begun], "metric/begun")]
            if any(begun):  # those that have are started again
                raise Rewound(f"a process was lost, and there is no commit in {root} yet: start again", 0)
            self._commit_start(False)
            return False
        self._lost.zero_()
        self.optimizer.zero_grad()
        self.resume(root, step)
        self.state.rewinds += 1
        self.records = [record for record in self.records if record["step"] <= self.state.step]
        log.warning("went back to step %d", self.state.step)
        return True

    def resume(self, root: Path, step: int | None = None) -> int:
        """Go on from the newest checkpoint under `root`, or from that of `step`; the step that was reached.

        With as many workers as saved it, the run goes on to the bit. With another number, parameters, optimizer and
        position are the same, batch-norm averages are those of all workers together, and random numbers are new.

        Raises:
            DataError: no checkpoint, a damaged one, or one of another model, optimizer or order of the samples.
        """
        saved = checkpoint.load(root, step)
        groups = saved.groups
        position = groups["position"]
        self._check_order(position["order"], saved.path)
        self._load_model(groups["model"], saved.path)
        try:
            self.optimizer.load_state_dict(groups["optimizer"])
        except ValueError as error:
            raise DataError(f"{saved.path} is of another optimizer: {error}") from error
        if self.replica.pushes is not None:
            self.replica.pushes.restore(self.optimizer.state_dict()["state"])
            self.optimizer.state.clear()
        if self.scheduler is not None and groups["scheduler"] is not None:
            self.scheduler.load_state_dict(groups["scheduler"])
        if groups["scaler"]:
            self._scaler.load_state_dict(groups["scaler"])
        self.state.step, self.state.epoch, self.state.samples = (position[k] for k in ("step", "epoch", "samples"))
        self._at_sample = position["at_sample"]
        self.data.resize(position["global_batch"])
        self._count_steps()
        for hook in self.hooks:
            hook.restore(groups["hooks"].get(type(hook).__name__))
        self._ahead = self.state.step - (self.replica.pushes.steps if self.replica.pushes else 0)
        if position["world_size"] == self.comm.world_size:
            restore_own(groups[f"worker-{self.comm.rank}"], self.model)
        else:
            generators.seed_all((self.config.seed * 1_000_003 + self.state.step) * 1009 + self.comm.rank)
        return saved.step

    # -- a step -------------------------------------------------------------------------------------------------------

    def _train(self, step: Step) -> bool:
        """One step; whether later ones are to be left out, which others made while this worker was at it."""
        micro_batches = list(step.micro_batches)
        for position, micro in enumerate(micro_batches):
            last = position == len(micro_batches) - 1
            loss = self._forward(micro)
            with self._watch.phase("backward"):
                scaled = self._scaler.scale(loss)
                self.replica.backward(scaled, samples=micro.samples, total=step.total, sync=last)
            if micro.samples:
                self._lost[0] += loss.detach().double() * micro.samples
                self._lost[1] += micro.samples
        with self._watch.phase("optimizer"):
            self._update()
        self._begun = True
        made = self._made()
        samples = step.total if made == 1 else self._samples_of(step, made)
        self._at_sample = step.first + samples
        self.state.step += made
        self.state.samples += samples
        self._record()
        self._call("on_step")
        self._stop_if_asked()
        return made > 1

    def _made(self) -> int:
        """Steps that the job has made meanwhile: 1, or more where it does not wait for this worker."""
        pushes = self.replica.pushes
        if pushes is None or self.config.joint or not self.config.backup_workers:
            return 1
        made = pushes.steps + self._ahead - self.state.step
        left = self.data.steps_from(self._at_sample)
        return max(1, made if left is None else min(made, left))

    def _samples_of(self, step: Step, made: int) -> int:
        """Samples of a step and those after it, whose last may be short; of a stream, as if it were not."""
        samples = made * self.data.global_batch
        return samples if self.data.num_samples is None else min(samples, self.data.num_samples - step.first)

    def _forward(self, micro: Micro) -> Tensor:
        with self._watch.phase("forward"):
            batch = to_device(micro.batch, self.device)
            with autocast(self.config.amp, self.device):
                return self._loss(self.model, batch)

    def _update(self) -> None:
        """Clip the global gradient and step; every worker has the same one, so every worker does the same."""
        if self.state.step > 0 and not self.memory:  # the optimizer has made its state by now
            self.memory = measured(self.model, self.optimizer, self.replica)
        if self.replica.pushes is not None:
            self.replica.publish()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad()
            return
        if self._gradient_is_bad():
            self.optimizer.zero_grad()
            return
        if self.replica.updates:
            if self.config.clip_grad_norm is not None:
                self._scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
            scale = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            # A smaller scale says that the gradient overflowed, and the optimizer was not stepped.
            if self.scheduler is not None and self._scaler.get_scale() >= scale:
                self.scheduler.step()
        self.replica.publish()
        if self.config.update == "first" and self._scaler.is_enabled():
            self._share_scale()
        self.optimizer.zero_grad()

    def _gradient_is_bad(self) -> bool:
        """Whether this step is to be left out, because a worker's gradient is not finite."""
        if self.config.nonfinite == "allow":
            return False
        found = self.replica.nonfinite()
        if not found:
            return False
        text = f"step {self.state.step + 1}: the gradient is not finite: " + "; ".join(found)
        if self.config.nonfinite == "abort":
            raise DataError(text)
        if self.comm.rank == 0:
            log.warning("%s; the step is left out", text)
        self.replica.publish()
        return True

    def _hosted_update(self) -> HostedUpdate | None:
        config = self.config
        if config.update == "sharded":
            return ShardedUpdate(
                optimizer=self.optimizer,
                clip_grad_norm=config.clip_grad_norm,
                early_forward=config.early_forward,
            )
        if config.update != "server":
            return None
        return ServerUpdate(
            optimizer=self.optimizer,
            clip_grad_norm=config.clip_grad_norm,
            staleness=config.staleness,
            backup_workers=config.backup_workers,
            damping=config.damping,
            delay_compensation=config.delay_compensation,
            early_forward=config.early_forward,
        )

    def _settle(self) -> None:
        """Let all have the same parameters, before anybody looks: where workers do not wait for each other, and where
        some are on their way."""
        if self.replica.pushes is not None and not self.config.joint:
            self.replica.pushes.refresh()
        else:
            self.replica.settle()

    def _look(self) -> nn.Module:
        """The model for a hook, which may read its parameters."""
        self.replica.settle()
        return self.model

    def _share_scale(self) -> None:
        """Where worker 0 updates for all, it alone knows the scale of the next loss."""
        scale = self._scaler.get_scale() if self.comm.rank == 0 else 0.0
        self._scaler.update(collectives.sum_numbers(self.comm, [scale], "metric/scale")[0])

    def _timed(self, steps: Iterable[Step]) -> Iterable[Step]:
        """The steps of an epoch, with the stopwatch started before each is fetched."""
        iterator = iter(steps)
        while True:
            self._watch.begin()
            with self._watch.phase("data"):
                step = next(iterator, None)
                if step is None:
                    return
                step = Step(step.first, step.total, list(step.micro_batches))
            yield step

    def _record(self) -> None:
        self._watch.end(self.state.step)
        self.state.record, self.state.fresh = None, []
        due = self._is_recorded(self.state.step)
        if due or len(self._watch) >= min(self._ledger.most_steps, self._tell_every):
            mine = self._tell_times(with_loss=due)
            if due:
                rate = self.optimizer.param_groups[0]["lr"]
                now = {"time_s": time.perf_counter() - self._started_s, "loss": self.state.loss, "lr": float(rate)}
                self.state.record = {**now, **mean(mine)}

    def _is_recorded(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.state.steps

    def _tell_times(self, *, with_loss: bool) -> list[dict[str, float]]:
        """Tell the others of the steps since the last time, and hear of theirs; this worker's records of them.

        With the loss over all workers' samples since the last time, which is left as it was where there are none. Where
        workers do not wait for each other, each keeps what is its own.
        """
        steps = self._watch.take()
        numbers = torch.tensor([0.0, 0.0, float(self._asked_to_stop)], dtype=torch.float64)
        if with_loss:
            numbers[:2] = self._lost
            self._lost.zero_()
        flat = torch.cat([numbers, self._ledger.pack(steps, [step.record() for step in steps])])
        if self.config.joint:
            self.comm.all_reduce(flat, "metric/record").wait()
            self._stopping = self._stopping or float(flat[2]) > 0
        if flat[1] > 0:
            self.state.loss = float(flat[0] / flat[1])
        self.state.fresh = self._ledger.unpack(flat[3:])
        slowest_ms = max((record["step_ms"] for everyone in self.state.fresh for record in everyone), default=0.0)
        if self.config.joint and slowest_ms:
            self._tell_every = max(1, int(1e3 * _HEAR_WITHIN_S / slowest_ms))
        return self._keep(steps, self.state.fresh)

    def _keep(self, steps: list[StepTimes], fresh: list[list[dict[str, float]]]) -> list[dict[str, float]]:
        """This worker's own records of steps that all have told of."""
        mine, chosen = [], False
        for times, everyone in zip(steps, fresh, strict=True):
            for record in everyone:
                record["step"] = times.number
                if not self.config.joint:
                    record["worker"] = self.comm.rank
                    record.pop("wait_ms", None)  # of which it knows nothing
                    record.pop("transfer_ms", None)
            mine += [record for record in everyone if record["worker"] == self.comm.rank]
            chosen |= self._chosen.see(times, max(record["step_ms"] for record in everyone))
        if chosen and self.comm.rank == 0 and isinstance(self.comm.inner, TellsSpans):
            self._chosen.see_servers(self.comm.inner.server_spans())
        self.step_s += sum(record["step_ms"] for record in mine) / 1e3
        self.records += mine
        if len(self.records) > 2 * _MOST_RECORDS:
            del self.records[:-_MOST_RECORDS]
        return [{k: v for k, v in record.items() if k not in ("worker", "step", "start_s")} for record in mine]

    def _begin_times(self) -> None:
        """Before the first step, and when the run has gone back to an earlier one."""
        self._watch.take()
        self._tell_every = sys.maxsize
        offset = offset_to_first(self.comm) if self.config.joint else Offset()
        rank, world_size = (self.comm.rank, self.comm.world_size) if self.config.joint else (0, 1)
        self._ledger = Ledger(rank, world_size, offset, before=self._ledger)
        self._chosen = Chosen()
        self.state.late = self._ledger.late if self.config.joint else []
        self.state.events = lambda: (self._chosen.events(self.comm.rank, offset.seconds), self._chosen.notable)

    # -- the course of a run ------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the run has made all of its steps."""
        if self.config.steps is not None:
            return self.state.step >= self.config.steps
        return self.state.epoch >= (self.config.epochs or 0)

    def _resize(self, global_batch: int) -> None:
        """See `State.resize`."""
        if global_batch == self.data.global_batch:
            return
        if not self.config.joint:
            raise UsageError(
                "the global batch cannot change where workers do not wait for each other: give staleness=0 and no "
                "backup workers"
            )
        before, sharing = self.data.global_batch, norm_sharing(self.config, self.data)
        self.data.resize(global_batch)
        try:
            changed = norm_sharing(self.config, self.data) != sharing
        except UsageError:
            changed = True
        if changed:
            self.data.resize(before)
            raise UsageError(
                f"norm_batch is {self.config.norm_batch}, and with a global batch of {global_batch} instead of "
                f"{before} other samples would share statistics: give a micro_batch, and batches that are multiples of "
                "workers times that, or norm_batch='worker' or 'global'"
            )
        self._count_steps()

    def _count_steps(self) -> None:
        """What follows from the present global batch."""
        self.state.global_batch, self.state.share = self.data.global_batch, self.data.share
        rest, whole = self.data.steps_from(self._at_sample), self.data.steps_per_epoch
        if self.config.epochs is not None and rest is not None and whole is not None:
            later = max(0, self.config.epochs - self.state.epoch - 1)
            self.state.steps = self.state.step + (rest + later * whole if self.state.epoch < self.config.epochs else 0)

    def _end_epoch(self) -> None:
        if self._at_sample == 0:
            raise DataError("an epoch without a sample: the data set yields nothing")
        self.state.epoch += 1
        self._at_sample = 0
        self._settle()
        self._call("on_epoch")
        if not self.config.joint:
            self._stopping = collectives.any_says(self.comm, self._asked_to_stop, "metric/stop")
            self._stop_if_asked()

    def _call(self, name: str) -> None:
        for hook in self.hooks:
            getattr(hook, name)(self.state)

    # -- what is saved ------------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, object] | None:
        self._settle()
        optimizer = self.optimizer.state_dict()
        if self.replica.pushes is not None:
            optimizer["state"] = self.replica.pushes.optimizer_state()
        hooks = {type(hook).__name__: kept for hook in self.hooks if (kept := hook.saved()) is not None}
        own = gather_own(self.model, self.comm)
        merged = merge_statistics(self.model, self.comm, samples=self.data.share)
        if not own:
            return None
        groups: dict[str, object] = {
            "model": {**self.model.state_dict(), **merged},
            "optimizer": optimizer,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "hooks": hooks,
            "position": {
                "step": self.state.step,
                "epoch": self.state.epoch,
                "samples": self.state.samples,
                "at_sample": self._at_sample,
                "global_batch": self.data.global_batch,
                "world_size": len(own),  # less, where the job goes on without some: such a run is resumed by fewer
                "order": self._order(),
            },
        }
        return groups | {f"worker-{rank}": part for rank, part in enumerate(own)}

    def _order(self) -> dict[str, int | None]:
        """What decides which samples a step has."""
        data = self.data
        return {"global_batch": data.first_batch, "seed": data.seed, "num_samples": data.num_samples}

    def _check_order(self, saved: dict[str, int | None], path: Path) -> None:
        for name, here in self._order().items():
            if saved[name] != here:
                raise DataError(
                    f"{path} was saved with {name} {saved[name]}, and here it is {here}: resume with the same, or the "
                    "order of the samples changes"
                )

    def _load_model(self, tensors: dict[str, Tensor], path: Path) -> None:
        own = self.model.state_dict()
        for name in [*own, *tensors]:
            here, there = own.get(name), tensors.get(name)
            if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
                raise DataError(f"{path} is of another model: {name} is {_kind(there)} there, {_kind(here)} here")
        self.model.load_state_dict(tensors)


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What a forward runs in, by `TrainConfig.amp`."""
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device.type, dtype=HALVES[amp])


def norm_sharing(config: TrainConfig, data: Loader) -> norm.Sharing | None:
    """How the samples of `config.norm_batch` share batch-norm statistics; None: as the model has it.

    Raises:
        UsageError: that cannot be had with these batches and workers.
    """
    if config.norm_batch is None:
        return None
    shared = norm.sharing(config.norm_batch, world_size=data.world_size, micro_batch=data.micro_batch)
    if config.norm_batch != "global" and shared.workers > 1 and not data.even:
        raise UsageError(
            f"norm_batch is {config.norm_batch}, and workers' micro-batches are not all of one size: make the global "
            "batch a multiple of workers and micro-batches, or use 'global'"
        )
    if shared.workers > 1 and not config.joint:
        raise UsageError(
            f"norm_batch is {config.norm_batch}, which {shared.workers} workers share, and they do not wait for each "
            "other: give norm_batch=worker or less, or staleness=0 and no backup workers"
        )
    return shared


def _check_hooks(hooks: Sequence[Hook], scheduler: LRScheduler | None) -> None:
    steering = [type(hook).__name__ for hook in hooks if hook.steers]
    if len(steering) > 1 or (steering and scheduler is not None):
        also = "the scheduler" if scheduler is not None else steering[1]
        raise UsageError(f"{steering[0]} sets the learning rate, and so does {also}: give one of them")
    saved = [type(hook).__name__ for hook in hooks if type(hook).saved is not Hook.saved]
    if twice := sorted({name for name in saved if saved.count(name) > 1}):
        raise UsageError(f"two hooks of class {twice[0]}: a checkpoint keeps the state of one; subclass it")


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group, all but its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
