"""A worker that trains a small model for ever, or until the fault that it was told to have.

Whoever watches finds its pid and its step in the file `RANK` of a folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch
from torch import nn

import dtrain


class Boom(Exception):
    """What a worker that fails by itself raises."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--who", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10**9)
    arguments = parser.parse_args()

    comm = dtrain.connect()
    mine = comm.rank == arguments.who
    fault = arguments.fault if mine else "none"
    torch.manual_seed(comm.rank)
    model = nn.Linear(64, 9 if fault == "model" else 8)
    dtrain.replicate(model, comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in count():
        note(arguments.folder / str(comm.rank), step)
        if step == arguments.steps:
            break
        if step == 5:
            strike(fault)
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        time.sleep(0.01)
    comm.close()


def note(file: Path, step: int) -> None:
    text = f"{os.getpid()} {step}"
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(file)


def strike(fault: str) -> None:
    if fault == "raise":
        raise Boom("a bad batch")
    if fault == "exit":
        sys.exit(3)
    if fault == "leave":
        sys.exit(0)
    if fault == "stuck":
        time.sleep(1000)
    if fault == "die once" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
