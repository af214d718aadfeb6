"""Kill processes of a job at random, again and again: python -m tests.faults.soak --kills 200 --seed 1

Each run trains a small model under the launcher's supervision, while workers and servers are killed at random moments;
its final weights must be those of the undisturbed run, to the bit. Ends with 1 if a run's are not.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from dtrain import checkpoint
from tests.faults.forked import Forked, forked

Weights = dict[str, torch.Tensor]


def arguments_of(options: argparse.Namespace, folder: Path, restarts: int) -> list[str]:
    return [
        *("train", "digits", "--option", "width=16", "--backend", "ps", "-n", str(options.workers)),
        *("--servers", str(options.servers), "--update", options.update, "--on-worker-loss", "wait"),
        *("--max-restarts", str(restarts), "--steps", str(options.steps), "--checkpoint-every", "10", "--quiet"),
        *("--lanes", options.lanes, "--run-dir", str(folder / "run")),
        *(["--early-forward"] if options.early_forward else []),
    ]


def run(
    options: argparse.Namespace, folder: Path, draw: random.Random, kills: int
) -> tuple[Weights | None, list[str], str]:
    """Train, with that many kills at most; the weights, who was killed, and what went wrong otherwise."""
    killed: list[str] = []
    limit_s = 60.0 + 15.0 * kills
    began = time.monotonic()
    with forked(folder, *arguments_of(options, folder, 3 * kills)) as job:
        next_s = began + draw.uniform(0.3, options.pause)
        while job.process.poll() is None:
            now = time.monotonic()
            if now - began > limit_s:
                return None, killed, f"not over after {limit_s:.0f} s\n{job.err}"
            if now >= next_s and len(killed) < kills and (victim := choose(job, draw)):
                killed.append(victim)
                next_s = now + draw.uniform(0.1, options.pause)
            time.sleep(0.005)
        if job.process.returncode != 0:
            return None, killed, f"ended with {job.process.returncode} after {', '.join(killed)}\n{job.err}"
    return checkpoint.load_tensors(folder / "run" / "model.safetensors"), killed, ""


def choose(job: Forked, draw: random.Random) -> str:
    """Kill one of the processes that are alive; its name."""
    alive = [(who, pids[-1]) for who, pids in sorted(job.pids().items()) if is_running(pids[-1])]
    if not alive:
        return ""
    who, pid = draw.choice(alive)
    try:
        psutil.Process(pid).kill()
    except psutil.Error:
        return ""
    return who


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=5, help="most kills in one run")
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--update", choices=("worker", "server"), default="worker")
    parser.add_argument("--early-forward", action="store_true", help="with --update server")
    parser.add_argument("--lanes", choices=("auto", "off"), default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pause", type=float, default=2.0, help="most seconds between two kills")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    draw = random.Random(seed)
    record: dict[str, Any] = {"seed": seed, "kills": 0, "runs": 0, "failed": [], "by": {}}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        expected, _, wrong = run(options, Path(name, "0"), draw, 0)
        if expected is None:
            print(f"the undisturbed run: {wrong}")
            return 1
        while record["kills"] < options.kills and time.monotonic() - began < options.limit_s:
            record["runs"] += 1
            most = min(options.per_run, options.kills - record["kills"])
            found, killed, wrong = run(options, Path(name, str(record["runs"])), draw, most)
            if found is not None:
                different = [n for n in expected if not torch.equal(expected[n], found[n])]
                wrong = f"other weights than without kills: {different} after {', '.join(killed)}" if different else ""
            record["kills"] += len(killed)
            for who in killed:
                record["by"][who] = record["by"].get(who, 0) + 1
            if wrong:
                record["failed"].append({"run": record["runs"], "killed": killed, "wrong": wrong})
                print(f"run {record['runs']}: {wrong}", flush=True)
            took = time.monotonic() - began
            bad = len(record["failed"])
            print(f"{record['kills']} kills, {record['runs']} runs, {bad} failed, {took:.0f} s", flush=True)
    record["seconds"] = round(time.monotonic() - began, 1)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"seed {seed}: {record['kills']} kills in {record['runs']} runs, {len(record['failed'])} of them failed")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
