"""What a run leaves: what was asked for (`config.json`), and its figures at the end (`summary.json`)."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dtrain.comm import collectives
from dtrain.hooks import finite
from dtrain.measure import summarise
from dtrain.measure.memory import peak_bytes, tensors
from dtrain.recipes import Recipe
from dtrain.spec import RunSpec, first_rate
from dtrain.steering import AdaptBatch, NoiseScale
from dtrain.trainer import Trainer


def asked_for(spec: RunSpec, trainer: Trainer, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What was asked for, with what the recipe filled in; names of buffers, which are no weights."""
    comm = trainer.comm
    return {
        **dataclasses.asdict(spec),
        **{k: v for k, v in dataclasses.asdict(trainer.config).items() if k != "rewind_to"},
        "global_batch": trainer.data.first_batch,
        "lr": first_rate(spec, recipe),
        "buffers": [name for name, _ in trainer.model.named_buffers()],
        "backend": comm.name,
        "workers": comm.world_size,
        "servers": len(getattr(trainer.comm.inner, "addresses", ())),
        "device": str(device),
        "versions": {
            "dtrain": version("dtrain"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyzmq": version("pyzmq"),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def summarise_run(trainer: Trainer, recipe: Recipe, spec: RunSpec, seconds: float, samples: int) -> dict[str, Any]:
    """The figures of a run: worker 0's typical step, everyone's beside it, and what the model has learnt."""
    state, comm = trainer.state, trainer.comm
    mine = json.dumps(summarise(trainer.records)).encode()
    told = collectives.gather_bytes(comm, mine, "metric/summary")
    workers = [json.loads(data) for data in told if data]
    epochs = state.epoch if trainer.config.steps is None else round(state.samples / len(recipe.train), 3)  # type: ignore[arg-type]
    return {
        "recipe": spec.recipe,
        "backend": comm.name,
        "workers": comm.world_size,
        "written_by": next(rank for rank, data in enumerate(told) if data),  # 0, unless the job goes on without it
        "dtype": spec.dtype,
        "epochs": epochs,
        "steps": state.step,
        "samples_per_s": samples / trainer.step_s if trainer.step_s else 0.0,  # where it came for the end only
        "seconds": seconds,
        **workers[0],
        "train_loss": state.loss,
        **({"loss": state.loss} | state.metrics),
        **recipe.notes,
        **_first_device(trainer, workers),
        **_servers(trainer),
        **_noise(trainer),
        "memory": {**trainer.memory, "peak_bytes": peak_bytes(trainer.device)},
        "late": [dataclasses.asdict(late) for late in state.late] if trainer.config.joint else [],
        "per_worker": workers,
    }


def _noise(trainer: Trainer) -> dict[str, Any]:
    """The gradient noise scale at the end, where it was measured, and what was decided by it."""
    found: dict[str, Any] = {}
    for hook in trainer.hooks:
        if isinstance(hook, NoiseScale) and hook.found is not None:
            found["noise_scale"] = dataclasses.asdict(hook.found.whole)
        if isinstance(hook, AdaptBatch):
            found["decisions"] = hook.decisions
    return found


def _servers(trainer: Trainer) -> dict[str, Any]:
    """With the update on the servers: memory of the optimizer, and what became of each worker's gradients."""
    pushes, comm = trainer.replica.pushes, trainer.comm
    found: dict[str, Any] = {"rewinds": trainer.state.rewinds} if trainer.config.rewind_to else {}
    if pushes is None:
        return found
    mine = json.dumps({"staleness": pushes.staleness, "dropped": pushes.dropped}).encode()
    rows = [json.loads(data) for data in collectives.gather_bytes(comm, mine, "metric/staleness") if data]
    nbytes = pushes.state_bytes()
    collectives.barrier(comm)
    return found | {
        "placement": pushes.table(),
        "optimizer_bytes": nbytes,
        "optimizer_bytes_saved": nbytes * (comm.world_size - 1),  # against a copy on each worker
        "staleness": [row["staleness"] for row in rows],
        "dropped_gradients": [row["dropped"] for row in rows],
    }


def _first_device(trainer: Trainer, workers: list[dict[str, float]]) -> dict[str, Any]:
    """With the update on worker 0: what its device carries more than each other one."""
    if getattr(trainer.comm.inner, "device", None) is None:
        return {}
    state_bytes = sum(t.nbytes for t in tensors(list(trainer.optimizer.state.values())))
    rows = collectives.gather_numbers(trainer.comm, [state_bytes], "metric/devices")
    sent, received = ([w[f"bytes_{way}_per_step"] for w in workers] for way in ("sent", "received"))
    return {
        "device0_extra_memory_bytes": _extra([row[0] for row in rows]),
        "device0_extra_bytes_sent_per_step": _extra(sent),
        "device0_extra_bytes_received_per_step": _extra(received),
    }


def _extra(values: Sequence[float]) -> float:
    """What the first has more than any other."""
    return values[0] - max(values[1:], default=0)


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
