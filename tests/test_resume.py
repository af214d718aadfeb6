"""Nothing lost: a run that is interrupted and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import dtrain
from dtrain import checkpoint, generators
from dtrain.comm import collectives
from dtrain.comm.solo import Solo
from dtrain.errors import DataError
from tests.conftest import everywhere
from tests.small import Job, Points, differences, distance, fit, make_model, trainer_of

ROUNDING = 1e-12

FULL = Job("dropout", count=105, global_batch=16, micro_batch=4, halve_every=4, optimizer="adam").with_config(steps=12)
"""Seven steps an epoch, the last one ragged; dropout, each worker's own batch-norm averages, and a schedule."""


def run_threads(job: Job, workers: int = 2) -> list[dict[str, Any]]:
    return dtrain.run(fit, job, workers=workers, backend="threads", timeout_s=30.0)


def kept(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be equal to the bit."""
    names = ("parameters", "buffers", "optimizer", "lr", "random", "position", "scale")
    return [{name: result[name] for name in names} for result in results]


@pytest.mark.parametrize("backend", ["solo", "threads", "ps", "allreduce"])
def test_a_resumed_run_has_the_same_bits(backend: str, tmp_path: Path) -> None:
    """12 steps, and 5 steps (amid an epoch) with 7 more by other objects in other processes.

    Parameters, moments of Adam, each worker's own batch-norm averages and random numbers, rate and position.
    """
    whole = everywhere(fit, FULL, backend=backend)
    job = FULL.but(root=str(tmp_path))
    first = everywhere(fit, job.with_config(steps=5), backend=backend)
    resumed = everywhere(fit, job.but(resume=True), backend=backend)
    assert not differences(kept(resumed), kept(whole))
    assert whole[0]["position"] == (12, 1, 105 + 5 * 16)
    assert differences(first[0]["parameters"], whole[0]["parameters"])
    assert all(torch.equal(w["random"], whole[0]["random"]) for w in whole) == (backend == "solo")
    if backend != "solo":  # else the law says nothing of buffers
        assert differences(whole[0]["buffers"], whole[1]["buffers"])


@pytest.mark.parametrize("step", range(1, 12))
def test_a_run_can_be_resumed_at_any_step(step: int, tmp_path: Path) -> None:
    """Also at the last step of an epoch, before its end was seen, and at the first."""
    whole = run_threads(FULL)
    run_threads(FULL.but(root=str(tmp_path)).with_config(steps=step))
    resumed = run_threads(FULL.but(root=str(tmp_path), resume=True))
    assert not differences(kept(resumed), kept(whole))


def test_a_run_resumed_again_and_again(tmp_path: Path) -> None:
    """From each checkpoint the next; and by its step from an older one."""
    whole = run_threads(FULL)
    job = FULL.but(root=str(tmp_path), every_steps=1)
    for steps in (3, 4, 9, 12):
        last = run_threads(job.but(resume=steps > 3).with_config(steps=steps))
    assert not differences(kept(last), kept(whole))
    older = run_threads(job.but(root=str(tmp_path), resume=True, resume_step=7))
    assert not differences(kept(older), kept(whole))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_is_resumed_to_the_bit(workers: int, tmp_path: Path) -> None:
    """What was read already is skipped, and reading it again draws no random number."""
    job = FULL.but(stream=True)
    whole = run_threads(job, workers)
    run_threads(job.but(root=str(tmp_path)).with_config(steps=5), workers)
    resumed = run_threads(job.but(root=str(tmp_path), resume=True), workers)
    assert not differences(kept(resumed), kept(whole))


def test_update_on_the_first_worker_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """Where one optimizer has all the state."""
    job = FULL.but(update="first")
    whole = run_threads(job)
    run_threads(job.but(root=str(tmp_path)).with_config(steps=5))
    resumed = run_threads(job.but(root=str(tmp_path), resume=True))
    for name in ("parameters", "buffers", "random", "position"):
        assert not differences([r[name] for r in resumed], [w[name] for w in whole])
    assert not differences(resumed[0]["optimizer"], whole[0]["optimizer"])


def test_the_scale_of_the_loss_is_resumed(tmp_path: Path) -> None:
    """It falls in the first steps of this run, and does not start again at the top."""
    job = FULL.but(dtype=torch.float32).with_config(amp="fp16")
    whole = run_threads(job)
    run_threads(job.but(root=str(tmp_path)).with_config(steps=5))
    resumed = run_threads(job.but(root=str(tmp_path), resume=True))
    assert not differences(kept(resumed), kept(whole))
    assert 0 < whole[0]["scale"]["scale"] < 2.0**16


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_another_number_of_workers_goes_on_to_rounding(workers: int, micro_batch: int | None, tmp_path: Path) -> None:
    """From 2 workers to 1 or 3: the same samples in the same order, so the same weights."""
    job = Job("norm", count=44, halve_every=4).with_config(steps=12, norm_batch="global")
    # Batch norm sees micro-batches: those of one worker hold what two workers' hold together.
    half = None if micro_batch is None else micro_batch * 2
    whole = fit(Solo(), job.but(micro_batch=None if half is None else half))
    run_threads(job.but(root=str(tmp_path), micro_batch=micro_batch).with_config(steps=5))
    later = None if half is None else -(-half // workers)
    for result in run_threads(job.but(root=str(tmp_path), resume=True, micro_batch=later), workers):
        assert distance(result["parameters"], whole["parameters"]) <= ROUNDING
        assert distance(result["buffers"], whole["buffers"]) <= ROUNDING
        assert result["position"] == whole["position"]
        assert result["lr"] == whole["lr"]


def test_another_number_of_workers_gets_everyones_averages(tmp_path: Path) -> None:
    """Batch-norm averages of all workers, merged; random numbers that differ between workers."""
    job = FULL.but(root=str(tmp_path)).with_config(steps=5)
    saved = run_threads(job)
    resumed = run_threads(job.but(resume=True), workers=3)
    means = torch.stack([s["buffers"]["1.running_mean"] for s in saved])
    for result in resumed:
        torch.testing.assert_close(result["buffers"]["1.running_mean"], means.mean(0), rtol=0, atol=1e-15)
    assert len({tuple(r["random"].tolist()) for r in resumed}) == 3


def test_resuming_a_run_that_is_complete_changes_nothing(tmp_path: Path) -> None:
    """No step is made."""
    job = FULL.but(root=str(tmp_path))
    whole = run_threads(job)
    again = run_threads(job.but(resume=True))
    assert not differences(kept(again), kept(whole))
    assert [r["records"] for r in again] == [[], []]
    assert checkpoint.steps(tmp_path) == [7, 12]


def test_more_steps_than_were_planned(tmp_path: Path) -> None:
    """A complete run goes on as if it had been longer from the start."""
    run_threads(FULL.but(root=str(tmp_path)))
    longer = run_threads(FULL.but(root=str(tmp_path), resume=True).with_config(steps=15))
    assert not differences(kept(longer), kept(run_threads(FULL.with_config(steps=15))))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    """An empty directory, and one that is not there, are named."""
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"{root}: no checkpoint here"):
            run_threads(FULL.but(root=str(root), resume=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "plain"}, r"of another model: 2\.weight is absent there, \(1, 8\) torch.float64 here"),
        ({"dtype": torch.float32}, r"0\.weight is \(8, 5\) torch.float64 there, \(8, 5\) torch.float32 here"),
        ({"global_batch": 6}, "was saved with global_batch 16, and here it is 6"),
        ({"seed": 1}, "was saved with seed 0, and here it is 1"),
        ({"count": 106}, "was saved with num_samples 105, and here it is 106"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """On every worker, by the name of what differs, and before anything of the model is touched."""
    run_threads(FULL.but(root=str(tmp_path)).with_config(steps=2))

    def resume(comm: Any) -> bool:
        trainer = trainer_of(comm, FULL.but(**change))
        before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
        with pytest.raises(DataError, match=said) as caught:
            trainer.resume(tmp_path)
        assert str(tmp_path) in str(caught.value)
        return not differences(dict(trainer.model.state_dict()), before)

    assert dtrain.run(resume, workers=2, backend="threads") == [True, True]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Other groups of parameters cannot be filled."""
    run_threads(FULL.but(root=str(tmp_path)).with_config(steps=2))
    trainer = trainer_of(Solo(), FULL)
    trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]})
    with pytest.raises(DataError, match="of another optimizer"):
        trainer.resume(tmp_path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """With a warning, for the one before; the run ends with the same bits."""
    whole = run_threads(FULL)
    job = FULL.but(root=str(tmp_path), every_steps=2)
    run_threads(job.with_config(steps=6))
    file = tmp_path / "step-6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.warns(RuntimeWarning, match="instead of a newer checkpoint"):
        resumed = run_threads(job.but(resume=True))
    assert not differences(kept(resumed), kept(whole))


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_random_state_comes_back_whole() -> None:
    """torch's, Python's and NumPy's, in the middle of a pair of normal numbers too."""
    import random

    import numpy as np

    def draw() -> list[float]:
        return [torch.rand(1).item(), random.gauss(0, 1), random.random(), float(np.random.randn()), np.random.rand()]

    before = generators.state()
    try:
        generators.seed_all(2**70)
        draw()
        state = generators.state()
        first = draw()
        generators.set_state(state)
        assert draw() == first
    finally:
        generators.set_state(before)


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    """safetensors and JSON, whatever the trainer saves."""
    run_threads(FULL.but(root=str(tmp_path)).with_config(steps=2, amp="fp16"))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_copied_checkpoint_is_as_good(tmp_path: Path) -> None:
    """It knows nothing of where it lay."""
    run_threads(FULL.but(root=str(tmp_path / "a")).with_config(steps=5))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    resumed = run_threads(FULL.but(root=str(tmp_path / "b"), resume=True))
    assert not differences(kept(resumed), kept(run_threads(FULL)))


def test_data_that_draw_random_numbers_are_resumed_to_the_bit(tmp_path: Path) -> None:
    """A map-style data set that adds noise as it is read, in the worker's own process."""

    class Noisy(Points):
        def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, y = super().batch(indices)
            return x + 0.01 * torch.randn_like(x), y

    def train(comm: Any, steps: int, resume: bool) -> Any:
        trainer = trainer_of(comm, FULL.but(root=str(tmp_path)).with_config(steps=steps), data=Noisy(105))
        if resume:
            trainer.resume(tmp_path)
        trainer.fit()
        return dict(trainer.model.state_dict()), torch.rand(3)

    def threads(steps: int, resume: bool) -> Any:
        return dtrain.run(train, steps, resume, workers=2, backend="threads")

    whole = threads(9, False)
    shutil.rmtree(tmp_path)
    threads(4, False)
    assert not differences(threads(9, True), whole)


def test_models_are_built_alike() -> None:
    """The tests above rest on it: each `make_model` gives the same weights."""
    a, b = (dict(make_model("dropout", torch.float64).state_dict()) for _ in range(2))
    assert not differences(a, b)
    assert not isinstance(Points(1), IterableDataset)


# -- steps that servers make ------------------------------------------------------------------------------------------

SERVED = FULL.but(update="server")
SHARED = Job("plain", count=44, micro_batch=3, halve_every=4, optimizer="adam").with_config(
    steps=12, clip_grad_norm=0.5
)
"""The same for any number of workers; without batch norm, before which biases have no gradient but rounding."""


def there_and_back(comm: Any, folder: Path) -> dict[str, Any]:
    """Whole runs; and runs that change in the middle who makes the steps."""
    torch.set_num_threads(1)
    found = {}

    def run(name: str, job: Job, root: str | None = None) -> None:
        more = {} if root is None else {"root": str(folder / root)}
        found[name] = fit(comm, job.but(**more))
        collectives.barrier(comm)  # worker 0 saves

    first = {"config": FULL.config | {"steps": 5}}
    run("whole", SERVED, "whole")
    run("whole, by workers", FULL, "whole, by workers")
    run("begun", SERVED.but(**first), "begun")
    run("begun by workers", FULL.but(**first), "begun by workers")
    run("resumed", SERVED.but(resume=True, resume_step=5), "begun")
    run("resumed again", SERVED.but(resume=True, resume_step=7), "begun")
    run("resumed by servers", SERVED.but(resume=True, resume_step=5), "begun by workers")
    if comm.rank == 0:
        shutil.copytree(folder / "begun", folder / "begun by servers")
    collectives.barrier(comm)
    run("resumed by workers", FULL.but(resume=True, resume_step=5), "begun by servers")
    for optimizer in ("adam", "adafactor"):
        job = SHARED.but(optimizer=optimizer, update="server").with_config(steps=5)
        run(f"begun, {optimizer}", job, f"begun, {optimizer}")
    return found


def go_on(comm: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    """In another job, what was begun there."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        job = SERVED if name == "begun" else SHARED.but(optimizer=name.split()[1], update="server")
        found[name] = fit(comm, job.but(root=str(folder / name), resume=True, resume_step=5))
        collectives.barrier(comm)
    return found


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("changed")
    return folder, dtrain.run(there_and_back, folder, workers=2, backend="ps", servers=2, timeout_s=30.0)


def saved_optimizer(root: Path, step: int = 12) -> dict[str, Any]:
    return checkpoint.load(root, step).groups["optimizer"]  # type: ignore[no-any-return]


def test_servers_go_on_with_the_same_bits(changed: tuple[Path, list[dict[str, Any]]]) -> None:
    """From their own checkpoint, in the middle of an epoch or after it; the optimizer's state is theirs again."""
    folder, found = changed
    for name in ("resumed", "resumed again"):
        assert not differences(kept([f[name] for f in found]), kept([f["whole"] for f in found]))
    assert not differences(saved_optimizer(folder / "begun", 7), saved_optimizer(folder / "whole", 7))


@pytest.mark.parametrize(
    ("name", "root"),
    [("resumed by servers", "begun by workers"), ("resumed by workers", "begun by servers"), ("whole", "whole")],
)
def test_who_makes_the_steps_may_change(name: str, root: str, changed: tuple[Path, list[dict[str, Any]]]) -> None:
    """Workers go on with what servers have begun, and servers with what workers have: to rounding."""
    folder, found = changed
    for worker in found:
        whole = worker["whole, by workers"]
        assert distance(worker[name]["parameters"], whole["parameters"]) <= DIVIDED
        assert distance(worker[name]["buffers"], whole["buffers"]) <= DIVIDED
        assert not differences({k: worker[name][k] for k in LEFT}, {k: whole[k] for k in LEFT})
    here, there = (saved_optimizer(folder / r)["state"] for r in (root, "whole, by workers"))
    for number, state in there.items():
        assert state.keys() == here[number].keys()
        for key, value in state.items():
            torch.testing.assert_close(here[number][key], value, rtol=DIVIDED, atol=1e-12)


DIVIDED = 1e-9
"""Adam divides the rounding of biases before batch norm, whose gradient is nothing else, by an eps of 1e-8."""
LEFT = ("lr", "random", "position")


@pytest.mark.parametrize("servers", [1, 3])
def test_another_number_of_servers_goes_on_with_the_same_bits(
    servers: int, changed: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The optimizer's state is merged in the file, and divided anew."""
    folder, found = changed
    shutil.copytree(folder / "begun", tmp_path / "begun")
    later = dtrain.run(go_on, tmp_path, ["begun"], workers=2, backend="ps", servers=servers, timeout_s=30.0)
    assert not differences(kept([f["begun"] for f in later]), kept([f["whole"] for f in found]))


def test_another_number_of_workers_goes_on_with_the_servers_state(
    changed: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """To rounding, with optimizers whose state has other shapes than the parameters too; alone as well."""
    folder, _ = changed
    names = ["begun, adam", "begun, adafactor"]
    for name in names:
        shutil.copytree(folder / name, tmp_path / name)
    later = dtrain.run(go_on, tmp_path, names, workers=3, backend="ps", servers=3, timeout_s=30.0)
    for name in names:
        job = SHARED.but(optimizer=name.split()[1])
        whole = fit(Solo(), job)
        alone = fit(Solo(), job.but(root=str(tmp_path / name), resume=True, resume_step=5))
        for result in [*(worker[name] for worker in later), alone]:
            assert distance(result["parameters"], whole["parameters"]) <= ROUNDING
            assert result["position"] == whole["position"]
