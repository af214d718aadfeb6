"""Memory of a training step: what is predicted from two small micro-batches against what the process takes.

    python benchmarks/memory.py                 all recipes, two batches each, some minutes
    python benchmarks/memory.py --quick --json F

Each case trains three steps alone in a process of its own. Its figure is the growth of that process's largest physical
memory, over what it has with Python, torch, the data and the model, warmed up. The prediction is that of
`dtrain.measure.footprint` for the same, from 4 samples: the largest moment of a step, without the model. Beside it how
far off the parts are that can be counted byte by byte, which should be 0.

Each is done twice: with malloc as it is, which keeps what was freed in case it is wanted again, and with one that hands
larger pieces back at once (glibc's MALLOC_MMAP_THRESHOLD_), which shows what the step itself takes.

Processor only; one thread. On CUDA `dtrain.measure.memory.measured` reads torch's own statistics, untried here.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import Any

import common
import torch

import dtrain
from dtrain import recipes
from dtrain.comm.solo import Solo
from dtrain.data import to_device
from dtrain.measure import memory
from dtrain.measure.footprint import footprint
from dtrain.tables import table

CPU = torch.device("cpu")

HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc's malloc: pieces from 64 KiB on go back to the system when they are freed."""

CASES: list[tuple[str, dict[str, str], list[int]]] = [
    ("digits", {}, [128, 1024]),
    ("fashion", {}, [64, 256]),
    ("text", {}, [32, 128]),
    ("text", {"model": "transformer"}, [32, 128]),
    ("synthetic", {}, [64, 1024]),
    ("synthetic", {"model": "resnet"}, [16, 64]),
    ("synthetic", {"model": "lstm"}, [16, 64]),
    ("synthetic", {"model": "transformer"}, [8, 32]),
]


def batch_of(recipe: recipes.Recipe, samples: int) -> Any:
    chosen = [recipe.train[i % len(recipe.train)] for i in range(samples)]  # type: ignore[arg-type]
    return to_device(torch.utils.data.default_collate(chosen), CPU)


def predict(name: str, options: dict[str, str], sizes: list[int]) -> list[dict[str, int]]:
    """The parts and the peak, by batch."""
    recipe = recipes.build(name, **options)
    found = footprint(recipe.model, recipe.loss, batch_of(recipe, 4), recipe.optimizer)
    return [vars(found.at(size)) for size in sizes]


def train(recipe: recipes.Recipe, model: torch.nn.Module, samples: int, steps: int) -> dict[str, int]:
    """Some steps, as the trainer makes them; what there is at the end."""
    batch = batch_of(recipe, samples)
    replica = dtrain.replicate(model, Solo())
    optimizer = recipe.optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        replica.backward(recipe.loss(model, batch))
        optimizer.step()
    found = memory.measured(model, optimizer, replica)
    replica.close()
    return found


def measure(name: str, options: dict[str, str], samples: int) -> dict[str, int]:
    """One case, in this process: counted bytes, and `growth_bytes`."""
    recipe = recipes.build(name, **options)
    train(recipe, copy.deepcopy(recipe.model), 2, 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory.forget_peak(CPU)
    before_bytes = memory.peak_bytes(CPU)
    found = train(recipe, recipe.model, samples, 3)
    return {**found, "growth_bytes": found["peak_bytes"] - before_bytes}


def in_process(kind: str, *arguments: object, **environment: str) -> Any:
    """A process of its own for a prediction or a measurement."""
    command = [sys.executable, __file__, "--child", kind, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{kind} {arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def row_of(
    case: str, samples: int, predicted: dict[str, int], kept: dict[str, int], back: dict[str, int]
) -> common.Row:
    """
    Args:
        kept: measured with malloc as it is.
        back: with one that hands back.
    """
    growth = predicted["peak_bytes"] - predicted["parameters_bytes"] - predicted["buffers_bytes"]
    counted = ("parameters_bytes", "buffers_bytes", "gradients_bytes", "optimizer_bytes", "buckets_bytes")
    return {
        "case": case,
        "samples": samples,
        "predicted_bytes": growth,
        "growth_bytes": kept["growth_bytes"],
        "growth_handed_back_bytes": back["growth_bytes"],
        "ratio": kept["growth_bytes"] / growth,
        "ratio_handed_back": back["growth_bytes"] / growth,
        "counted_off_bytes": max(abs(predicted[part] - found[part]) for part in counted for found in (kept, back)),
        "parts": predicted,
    }


def show(rows: list[common.Row]) -> str:
    head = ["case", "samples", "predicted", "grown by", "ratio", "malloc that hands back", "ratio", "counted off"]
    body = [
        [
            *(row["case"], str(row["samples"]), memory.show(row["predicted_bytes"])),
            *(memory.show(row["growth_bytes"]), f"{row['ratio']:.2f}"),
            *(memory.show(row["growth_handed_back_bytes"]), f"{row['ratio_handed_back']:.2f}"),
            str(row["counted_off_bytes"]),
        ]
        for row in rows
    ]
    return table(head, body)


def main() -> None:
    flags = common.parser(__doc__ or "")
    flags.add_argument("--child", nargs=2, help="for this script's own processes")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        kind, given = arguments.child
        print(json.dumps({"predict": predict, "measure": measure}[kind](*json.loads(given))))
        return
    if not memory.forget_peak(CPU):
        raise SystemExit("this system does not let a process forget its largest memory (/proc/self/clear_refs)")
    rows = []
    for name, options, sizes in [(*case[:2], case[2][:1]) for case in CASES[:4]] if arguments.quick else CASES:
        case = " ".join([name, *options.values()])
        for samples, predicted in zip(sizes, in_process("predict", name, options, sizes), strict=True):
            kept, back = (in_process("measure", name, options, samples, **env) for env in ({}, HANDS_BACK))
            rows.append(row_of(case, samples, predicted, kept, back))
            print(f"{case}, {samples}: {rows[-1]['ratio']:.3f}, {rows[-1]['ratio_handed_back']:.3f}", flush=True)
    print(show(rows))
    if arguments.json:
        common.write(arguments.json, rows, quick=arguments.quick)


if __name__ == "__main__":
    main()
