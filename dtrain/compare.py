"""Do two backends train the same model? Runs of one recipe side by side: weights, speed, cost of communication."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain import checkpoint, env
from dtrain.connect import connect
from dtrain.errors import DataError, UsageError
from dtrain.jobs import run as run_job
from dtrain.launcher import Plan, launch
from dtrain.runs import train
from dtrain.spec import RunSpec

_KEPT = (
    *("step_ms", "compute_ms", "exposed_comm_ms", "ratio", "samples_per_s", "bytes_sent_per_step"),
    *("bytes_received_per_step", "loss", "accuracy", "perplexity", "train_loss", "steps"),
)


def compare(
    spec: RunSpec,
    backends: Sequence[str],
    workers: int,
    folder: Path,
    command: Callable[[str, RunSpec], list[str]],
    *,
    timeout_s: float = 60.0,
) -> dict[str, Any] | None:
    """Run a recipe over each backend, from one seed, and compare what came out.

    Inside a job (torchrun's, say) its processes are the workers of `ps` and `allreduce`, and process 0 runs `solo` and
    `threads` by itself; else the processes are started here.

    Args:
        spec: the run; its `run_dir` is set for each backend.
        backends: two or more names; `solo` gets micro-batches as large as those of all workers together.
        workers: of each backend but `solo`.
        folder: where the run directories go.
        command: command line of a run, for processes that are started here.
        timeout_s: longest wait of a worker for another.

    Returns:
        The comparison, see `dtrain compare --help`; None on workers of a job other than the first.

    Raises:
        UsageError: fewer than two backends, or one twice.
    """
    if len(set(backends)) != len(backends) or len(backends) < 2:
        raise UsageError(f"backends is {','.join(backends)}: give two or more, each once")
    # In a job, process 0 is late wherever it first runs something by itself: that comes last.
    for backend in sorted(backends, key=_is_alone) if env.in_job() else backends:
        one = _one(spec, backend, workers, folder / backend)
        if env.in_job():
            _in_job(one, backend, workers, timeout_s)
        else:
            _start(command(backend, one), backend, workers, timeout_s)
    if env.in_job() and env.resolve().rank > 0:
        return None
    return _compared(spec, backends, workers, folder)


def _one(spec: RunSpec, backend: str, workers: int, run_dir: Path) -> RunSpec:
    """The spec for one backend: one worker sees the micro-batches that the others share."""
    micro = spec.micro_batch
    if backend == "solo" and micro is not None:
        micro *= workers
    return dataclasses.replace(spec, micro_batch=micro, run_dir=str(run_dir), checkpoint_every="never")


def _start(command: Sequence[str], backend: str, workers: int, timeout_s: float) -> None:
    if _is_alone(backend):
        workers, backend = 1, "solo"
    code = launch(command, Plan(workers=workers, backend=backend, timeout_s=timeout_s))
    if code:
        raise SystemExit(code)


def _in_job(spec: RunSpec, backend: str, workers: int, timeout_s: float) -> None:
    place = env.resolve()
    if place.world_size != workers:
        raise UsageError(f"workers is {workers}, and this job has {place.world_size}: leave --workers out")
    if not _is_alone(backend):
        comm = connect(backend, timeout_s=timeout_s)
        try:
            train(comm, spec)
        finally:
            comm.close()
    elif place.rank == 0:
        run_job(train, spec, workers=1 if backend == "solo" else workers, backend=backend)


def _is_alone(backend: str) -> bool:
    """Whether one process runs all the workers."""
    return backend in ("solo", "threads")


def _compared(spec: RunSpec, backends: Sequence[str], workers: int, folder: Path) -> dict[str, Any]:
    summaries = {b: json.loads((folder / b / "summary.json").read_text(encoding="utf-8")) for b in backends}
    weights = {b: _weights(folder / b) for b in backends}
    pairs = {(a, b): max_difference(weights[a], weights[b]) for a, b in itertools.combinations(backends, 2)}
    return {
        "recipe": spec.recipe,
        "workers": workers,
        "dtype": spec.dtype,
        "steps": summaries[backends[0]]["steps"],
        "norm_batch": spec.norm_batch,
        "max_abs_weight_diff": max(pairs.values()),
        "pairs": {f"{a},{b}": difference for (a, b), difference in pairs.items()},
        "bitwise": [f"{a},{b}" for a, b in pairs if _same_bits(weights[a], weights[b])],
        "runs": {b: {k: summary[k] for k in _KEPT if k in summary} for b, summary in summaries.items()},
    }


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Final parameters of a run; running statistics are no weights."""
    buffers = set(json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["buffers"])
    tensors = checkpoint.load_tensors(run_dir / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name not in buffers}


def max_difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference of any weight; infinite where one is not a number.

    Raises:
        DataError: the tensors do not have the same names and shapes.
    """
    if a.keys() != b.keys():
        raise DataError(f"the runs have different weights: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise DataError(f"{name} is {tuple(a[name].shape)} in one run and {tuple(b[name].shape)} in the other")
    largest = max(((a[n].double() - b[n].double()).abs().max().item() for n in a if a[n].numel()), default=0.0)
    finite = all(torch.isfinite(t).all() for t in (*a.values(), *b.values()))
    return largest if finite else float("inf")


def _same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n].view(-1).view(torch.uint8), b[n].view(-1).view(torch.uint8)) for n in a)


def python_m_dtrain(*arguments: str) -> list[str]:
    """A command line that runs this installation of dtrain."""
    return [sys.executable, "-m", "dtrain", *arguments]
