"""Forwards that leave the running statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from dtrain.errors import UsageError
from dtrain.norm.layer import layers

USES = ("batch", "running")


@contextlib.contextmanager
def no_update(model: nn.Module, *, use: str = "batch") -> Iterator[None]:
    """Within, no forward changes a running statistic or its count: for a GAN's fake batch, say.

    Batch-norm layers normalise as `use` says, whatever mode the model is in; other modules, dropout for one,
    keep their mode. Frozen and virtual layers normalise as they always do. Contexts nest, the inner one counts. A
    synchronised layer sends its statistics with "batch", as in training: all workers must come. Gradient checkpointing
    computes forwards again when this is long left: put it inside the checkpointed function.

    Args:
        use: "batch": normalise by the batch, as in training; "running": by the running statistics, as in evaluation.

    Raises:
        UsageError: another word; or "running" with a layer that has no running statistics.
    """
    if use not in USES:
        raise UsageError(f"use is {use!r}: one of {', '.join(USES)}")
    found = layers(model)
    without = [path for path, layer in found.items() if layer.running_mean is None]
    if use == "running" and without:
        raise UsageError(f"{', '.join(without)} keeps no running statistics (track_running_stats=False): use='batch'")
    before = [(layer, layer.training, layer.track_running_stats) for layer in found.values()]
    for layer, *_ in before:
        layer.training, layer.track_running_stats = use == "batch", False
    try:
        yield
    finally:
        for layer, training, track in before:
            layer.training, layer.track_running_stats = training, track
