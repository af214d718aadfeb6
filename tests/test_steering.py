"""A run whose learning rate and batch change by the samples seen: on every backend, interrupted anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.hooks import Hook, State
from dtrain.largebatch import Rule, Setting, constant, cosine, steady, steps
from dtrain.steering import AdaptBatch, NoiseScale, Steer
from tests.conftest import BACKENDS, everywhere
from tests.small import Job, differences, distance, fit, mean_square, result_of, trainer_of

GROWING = Job("dropout", count=216, global_batch=16, micro_batch=8, grow=56, optimizer="adam").with_config(steps=20)
"""Batches of 16, 32 and 56 samples, in mid-epoch, each epoch's last one ragged; dropout and batch norm."""

PLAIN = GROWING.but(kind="norm", optimizer="sgd", micro_batch=None).with_config(norm_batch="global")


def kept(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("parameters", "buffers", "optimizer", "lr", "random", "position", "global_batch")
    return [{name: result[name] for name in names} for result in results]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_growing_run_is_resumed_to_the_same_bits(backend: str, tmp_path: Path) -> None:
    """On 4 workers, from a checkpoint in the middle, by new objects in new processes."""
    whole = everywhere(fit, GROWING, backend=backend, workers=4)
    job = GROWING.but(root=str(tmp_path))
    first = everywhere(fit, job.with_config(steps=7), backend=backend, workers=4)
    resumed = everywhere(fit, job.but(resume=True), backend=backend, workers=4)
    assert not differences(kept(resumed), kept(whole))
    assert (first[0]["global_batch"], whole[0]["global_batch"]) == (32, 56)


@pytest.mark.parametrize("step", range(1, 20))
def test_at_any_step(step: int, tmp_path: Path) -> None:
    """Also just before and after the batch grows."""
    run = {"workers": 2, "backend": "threads"}
    whole = dtrain.run(fit, GROWING, **run)
    dtrain.run(fit, GROWING.but(root=str(tmp_path)).with_config(steps=step), **run)
    resumed = dtrain.run(fit, GROWING.but(root=str(tmp_path), resume=True), **run)
    assert not differences(kept(resumed), kept(whole))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_n_workers_are_one(backend: str) -> None:
    """In float64, with batch norm over the global batch, however large that has become."""
    (alone,) = everywhere(fit, PLAIN, backend="solo")
    workers = everywhere(fit, PLAIN, backend=backend, workers=4)
    for worker in workers:
        assert distance(worker["parameters"], alone["parameters"]) < 1e-12
        assert (worker["lr"], worker["position"]) == (alone["lr"], alone["position"])


def test_servers_that_step_see_the_same() -> None:
    """The rate that the hook sets goes to them with each step."""
    job = GROWING.but(kind="plain", optimizer="sgd")
    there = everywhere(fit, job.but(update="server"), backend="ps", workers=2)
    here = everywhere(fit, job, backend="threads", workers=2)
    assert not differences(there[0]["parameters"], here[0]["parameters"])
    assert there[0]["global_batch"] == 56


ADAPTING = GROWING.but(kind="plain", optimizer="sgd", grow=None, adapt=90).with_config(steps=20)
"""The batch follows what the gradients of 4 workers say."""


def adapting(comm: Backend, job: Job) -> dict[str, Any]:
    """As `fit`, with what was decided and measured."""
    trainer = trainer_of(comm, job)
    if job.resume:
        trainer.resume(Path(str(job.root)), job.resume_step)
    result = result_of(trainer, trainer.fit())
    (hook,) = (hook for hook in trainer.hooks if isinstance(hook, AdaptBatch))
    return {**result, "decisions": hook.decisions, "scale": hook.found and hook.found.whole.scale}


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_batch_follows_the_noise(backend: str, tmp_path: Path) -> None:
    """The same decisions on all workers and backends, and after a resume in the middle of a measurement."""
    (first, *others) = everywhere(adapting, ADAPTING, backend=backend, workers=4)
    here = dtrain.run(adapting, ADAPTING, workers=4, backend="threads")
    assert [d["batch"] for d in first["decisions"]] == [d["batch"] for d in here[0]["decisions"]]
    assert first["global_batch"] > 16
    assert first["scale"] == pytest.approx(here[0]["scale"], rel=1e-9)
    assert all(w["decisions"] == first["decisions"] and w["global_batch"] == first["global_batch"] for w in others)
    assert distance(first["parameters"], here[0]["parameters"]) < 1e-10
    job = ADAPTING.but(root=str(tmp_path))
    everywhere(adapting, job.with_config(steps=10), backend=backend, workers=4)
    (resumed, *_) = everywhere(adapting, job.but(resume=True), backend=backend, workers=4)
    names = ("parameters", "optimizer", "lr", "position", "decisions", "scale")
    assert not differences({n: resumed[n] for n in names}, {n: first[n] for n in names})


def test_each_decision_has_a_reason_and_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    """The rate rises by AdaScale's gain, which is more than 1 and less than the batch's growth."""
    found = dtrain.run(adapting, ADAPTING, workers=4, backend="threads")[0]
    (decision, *_) = found["decisions"]
    assert "noise scale" in decision["reason"]
    assert decision["reason"] in caplog.text
    assert decision["step"] % 4 == 0
    plain = cosine(3)(found["position"][2] / 216) * 0.05
    assert plain < found["lr"] < plain * found["global_batch"] / 16


def test_one_sample_of_the_gradient_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One worker with one micro-batch: the batch stays, and it is said why."""
    job = ADAPTING.but(micro_batch=None)
    (found,) = dtrain.run(adapting, job, workers=1, backend="threads")
    assert found["decisions"] == []
    assert found["global_batch"] == 16
    assert "not identifiable" in caplog.text


def goes_back(comm: Backend) -> list[Any]:
    """A hook that has measured, and goes back to a commit that knows nothing of it, beside a new one."""
    found = []
    for measured in (True, False):
        trainer = trainer_of(comm, ADAPTING)
        (hook,) = (hook for hook in trainer.hooks if isinstance(hook, AdaptBatch))
        if measured:
            trainer.fit()
            assert hook.decisions
        hook.restore(None)
        trainer.state.step = trainer.state.samples = 0
        hook.on_start(trainer.state)
        assert hook._noise is not None
        found.append((hook.saved(), trainer.optimizer.param_groups[0]["lr"]))
    return found


def test_going_back_to_before_the_first_measurement() -> None:
    """Survivors of a loss are then as replacements are: the same rate, and nothing measured or decided."""
    for survivor, replacement in dtrain.run(goes_back, workers=2, backend="threads"):
        assert survivor == replacement
        assert survivor[0]["decisions"] == []
        assert survivor[0]["noise"]["rows"] == []


def test_what_is_restored_but_not_begun_is_saved_again() -> None:
    hook = NoiseScale()
    hook.restore({"noise": {"count": 7}})
    assert hook.saved() == {"noise": {"count": 7}}


def two_that_steer(comm: Backend, kind: str) -> None:
    job = PLAIN.but(halve_every=2) if kind == "scheduler" else PLAIN
    trainer = trainer_of(comm, job)
    course = steady(constant(), 16)
    hooks = [*trainer.hooks, Steer(trainer.optimizer, course, samples=8)] if kind == "two" else trainer.hooks
    dtrain.Trainer(
        *(trainer.model, mean_square, trainer.optimizer, trainer.data),
        comm=comm,
        config=trainer.config,
        hooks=[NoiseScale(), NoiseScale()] if kind == "saved" else hooks,
    )


@pytest.mark.parametrize(
    ("kind", "said"), [("scheduler", "so does the scheduler"), ("two", "so does Steer"), ("saved", "two hooks")]
)
def test_two_that_set_the_rate(kind: str, said: str) -> None:
    """Or two hooks of which a checkpoint would keep one's state."""
    with pytest.raises(UsageError, match=said):
        dtrain.run(two_that_steer, kind, workers=1, backend="threads")


class Seen(Hook):
    """What each step had."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.samples = [0]
        self.rates: list[float] = []
        self.totals: list[int | None] = []

    def on_step(self, state: State) -> None:
        self.samples.append(state.samples)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.totals.append(state.steps)


def watched(comm: Backend) -> Any:
    trainer = trainer_of(comm, PLAIN.with_config(steps=None, epochs=3))
    seen = Seen(trainer.optimizer)
    trainer.hooks.insert(0, seen)
    return seen, result_of(trainer, trainer.fit())


def test_the_batch_and_rate_of_each_step() -> None:
    """Every sample once an epoch; the rate only falls where the batch has reached its cap; steps are told ahead."""
    ((seen, result),) = dtrain.run(watched, workers=1, backend="threads")
    sizes = [b - a for a, b in zip(seen.samples, seen.samples[1:], strict=False)]
    assert sizes[:6] == [16] * 6  # to 0.4 epochs: 86.4 samples
    assert sizes[6:10] == [32, 32, 32, 216 - 192]
    assert sizes[10:12] == [32, 56]  # 1.1 epochs is 237.6 samples
    assert sizes[-4:] == [56, 56, 56, 48]
    assert sum(sizes) == 3 * 216 == result["position"][2]
    assert seen.rates[0] == 0.05
    assert result["lr"] == pytest.approx(0.05 * 0.125 * 56 / 16)
    assert result["position"][0] == seen.totals[-1] == len(sizes)


def forecast(comm: Backend) -> tuple[int, int]:
    trainer = trainer_of(comm, PLAIN.with_config(steps=None, epochs=3))
    course = trainer.hooks[0]._course
    return steps(course, samples=216, epochs=3), trainer.fit().step


def test_steps_are_known_before() -> None:
    assert len({count for pair in dtrain.run(forecast, workers=2, backend="threads") for count in pair}) == 1


def refused(comm: Backend, config: dict[str, Any], batch: int) -> None:
    trainer = trainer_of(comm, Job("norm", optimizer="sgd").with_config(**config))
    course = lambda epochs: Setting(1.0, 8 if epochs < 0.5 else batch)  # noqa: E731
    trainer.hooks.append(Steer(trainer.optimizer, course, samples=23))
    trainer.fit()


def test_a_batch_that_batch_norm_cannot_follow() -> None:
    """Groups of 2 workers with 4 samples each cannot become groups of 8 samples of 2 workers with 16."""
    with pytest.raises(UsageError, match=r"norm_batch is 8.*global batch of 32 instead of 8"):
        dtrain.run(refused, {"norm_batch": 8}, 32, workers=2, backend="threads")
    dtrain.run(refused, {"norm_batch": 2}, 32, workers=2, backend="threads")


def test_what_cannot_be_meant() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(UsageError, match="samples is 0"):
        Steer(optimizer, steady(constant(), 8), samples=0)
    with pytest.raises(UsageError, match="lr_scaling is 'cubic'"):
        AdaptBatch(optimizer, Rule(), samples=8, lr_scaling="cubic")
    with pytest.raises(UsageError, match="ask_every is 0"):
        AdaptBatch(optimizer, Rule(), samples=8, ask_every=0)
    with pytest.raises(UsageError, match=r"rule is 512: give a largebatch\.Rule"):
        AdaptBatch(optimizer, 512, samples=8)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"the course gave 1\.0 for the beginning"):
        Steer(optimizer, constant(), samples=8)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="every is 0"):
        NoiseScale(every=0)
