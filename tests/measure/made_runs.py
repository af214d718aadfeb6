"""Run directories made by hand, with every file that a run leaves."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

STEPS = 60
TYPICAL, SLOWEST = 8, 31


def make_run(folder: Path, *, seed: int = 0, workers: int = 2, scale: float = 1.0, **config: Any) -> Path:
    """A run whose worker 1 is late, and slowest in step 31, where it waits for data."""
    folder.mkdir(parents=True)
    noise = random.Random(seed)
    rows = [row for step in range(1, STEPS + 1) for row in _step(step, workers, noise, scale)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics(rows, noise)))
    asked = _config(workers, config)
    write(folder, "config.json", asked)
    write(folder, "summary.json", _summary(rows, workers) | {name: asked[name] for name in ("recipe", "backend")})
    write(folder, "trace.json", _trace(rows))
    return folder


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(folder: Path, name: str, **fields: Any) -> None:
    """Give a JSON file of a run other fields."""
    write(folder, name, {**json.loads((folder / name).read_text(encoding="utf-8")), **fields})


def _config(workers: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"recipe": "digits", "backend": "ps", "workers": workers, "global_batch": 64, "lr": 0.05, "seed": 0},
        **{"dtype": "float32", "norm_batch": "worker", "options": [], "run_dir": "runs/one", "bucket_mb": 8.0},
        "buffers": ["1.running_mean"],
        "versions": {"dtrain": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "pyzmq": "27.1.0"},
        **more,
    }


def _step(step: int, workers: int, noise: random.Random, scale: float) -> list[dict[str, Any]]:
    ready = []
    for worker in range(workers):
        jitter = noise.uniform(0.9, 1.2)
        data = 60.0 if (step, worker) == (SLOWEST, 1) else 0.4 * jitter
        backward = (9.0 if worker == 1 else 6.5) * jitter * scale
        ready.append({"data_ms": data, "forward_ms": 3.1 * jitter * scale, "backward_ms": backward})
    last = max(sum(boxes.values()) for boxes in ready)
    return [_row(step, worker, boxes, last - sum(boxes.values()), 0.09 * step) for worker, boxes in enumerate(ready)]


def _row(step: int, worker: int, boxes: dict[str, float], wait: float, start_s: float) -> dict[str, Any]:
    comm = {"wait_ms": wait, "transfer_ms": 2.2, "codec_ms": 0.6}
    rest = {"optimizer_ms": 0.8, "rest_ms": 0.3}
    exposed = sum(comm.values())
    return {
        **{"step": step, "worker": worker, "start_s": start_s, **boxes, **rest, **comm},
        **{"exposed_comm_ms": exposed, "hidden_comm_ms": 1.7},
        "step_ms": sum(boxes.values()) + sum(rest.values()) + exposed,
        **{"bytes_sent": 151_000, "bytes_received": 150_900, "sent_gradient": 150_000, "sent_norm": 600},
        **{"sent_metric": 400, "received_gradient": 150_000, "received_norm": 600, "received_metric": 300},
    }


def _metrics(rows: list[dict[str, Any]], noise: random.Random) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in (row for row in rows if row["worker"] == 0 and row["step"] % 2 == 0):
        place = {"step": row["step"], "epoch": row["step"] // 20, "samples": 64 * row["step"]}
        loss = 2.3 * math.exp(-row["step"] / 18) + noise.uniform(0.02, 0.1)
        boxes = {name: value for name, value in row.items() if name.endswith("_ms")}
        found.append({**place, "loss": loss, "lr": 0.05, **boxes})
        if row["step"] % 20 == 0:
            found.append({**place, "metrics": {"loss": loss + 0.05, "accuracy": 1 - loss / 3}})
    return found


def _summary(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    each = []
    for worker in range(workers):
        row = next(row for row in rows if (row["step"], row["worker"]) == (TYPICAL, worker))
        each.append({name: value for name, value in row.items() if name.endswith("_ms")})
        each[-1] |= {"bytes_sent_per_step": 151_000.0, "bytes_received_per_step": 150_900.0}
    compute = sum(each[0][f"{name}_ms"] for name in ("forward", "backward", "optimizer"))
    return {
        **{"recipe": "digits", "backend": "ps", "workers": workers, "dtype": "float32", "epochs": 3, "steps": STEPS},
        **{"samples_per_s": 64e3 / each[0]["step_ms"], "seconds": 5.4, **each[0], "compute_ms": compute},
        "ratio": compute / each[0]["exposed_comm_ms"],
        "efficiency": 1 - each[0]["exposed_comm_ms"] / each[0]["step_ms"],
        **{"train_loss": 0.11, "loss": 0.16, "accuracy": 0.9612, "per_worker": each},
        "late": [{"cost_s": 0.02 if w != 1 else 1.31, "steps": 3 if w != 1 else 57} for w in range(workers)],
    }


def _trace(rows: list[dict[str, Any]]) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    for row in (row for row in rows if row["step"] in (TYPICAL, SLOWEST)):
        at, args = row["start_s"] * 1e6, {"step": row["step"]}
        backward_at = 0.0
        for name in ("data", "forward", "backward", "optimizer"):
            took = row[f"{name}_ms"] * 1e3
            if name == "optimizer":
                blocked = row["exposed_comm_ms"] * 1e3
                events.append(_event(row["worker"], 0, "blocked", at, blocked, args))
                at += blocked
            backward_at = at if name == "backward" else backward_at
            events.append(_event(row["worker"], 0, name, at, took, args))
            at += took
        for bucket in range(3):
            start = backward_at + (bucket + 1) * row["backward_ms"] * 250
            args_of = {**args, "nbytes": 50_000}
            events.append(_event(row["worker"], 1 + 10 * (bucket % 2), f"gradient/{bucket}", start, 2400.0, args_of))
        events.append(_event(row["worker"], 2, "norm/0", backward_at - 900, 500.0, {**args, "nbytes": 600}))
    return {"traceEvents": events, "otherData": {"typical_step": TYPICAL, "slowest_step": SLOWEST}}


def _event(worker: int, row: int, name: str, ts: float, dur: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": worker, "tid": row, "name": name, "ts": ts, "dur": dur, "args": args}


DIAGNOSIS = {
    "batches": 20,
    "output_shift": 0.031,
    "layers": [
        {
            **{"path": f"features.{place}.norm", "kind": "BatchNorm2d", "samples": 32.0, "values": 2048.0},
            **{"mean_shift": shift, "variance_ratio": 1.1, "variance_factor": 1.12, "mean_noise": 0.11},
            **{"variance_noise": 0.2, "dead": [], "findings": {"stale": "its mean is off"} if shift > 0.25 else {}},
        }
        for place, shift in enumerate((0.05, 0.31, 0.12))
    ],
}
