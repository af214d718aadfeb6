"""One knob: how many samples share batch-norm statistics."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.comm.base import Backend
from dtrain.errors import UsageError
from dtrain.norm.sync import SyncBatchNorm, from_plain, to_plain

NORM_BATCHES = ("worker", "global")
"""`worker`: each worker's micro-batch by itself, as in DDP. `global`: all workers' micro-batches of a forward."""


def convert(model: nn.Module, *, norm_batch: str = "global", comm: Backend) -> nn.Module:
    """Let the batch-norm layers of a model share statistics as `norm_batch` says; in place.

    Parameters and buffers stay the same objects under the same names: state dicts and optimizers do not notice.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        norm_batch: one of `NORM_BATCHES`.
        comm: the backend that carries the statistics.

    Returns:
        The model.

    Raises:
        UsageError: an unknown `norm_batch`, or a lazy or foreign batch-norm class.
    """
    if norm_batch not in NORM_BATCHES:
        raise UsageError(f"norm_batch is {norm_batch!r}; it is {' or '.join(NORM_BATCHES)}")
    model = revert(model)
    if norm_batch == "worker":
        return model
    made: dict[int, SyncBatchNorm] = {}  # a layer used in two places stays one layer
    places = _batch_norms(model)
    for _, _, layer, path in places:
        if id(layer) not in made:
            made[id(layer)] = from_plain(layer, comm, path or "batch_norm")
    for parent, name, layer, _ in places:
        if parent is None:
            return made[id(layer)]
        setattr(parent, name, made[id(layer)])
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: plain torch layers again, with what they have learnt. Returns the model."""
    if isinstance(model, SyncBatchNorm):
        return to_plain(model)
    plain: dict[int, _BatchNorm] = {}
    for parent, name, layer, _ in _batch_norms(model):
        if isinstance(layer, SyncBatchNorm) and parent is not None:
            setattr(parent, name, plain.setdefault(id(layer), to_plain(layer)))
    return model


def _batch_norms(model: nn.Module) -> list[tuple[nn.Module | None, str, _BatchNorm, str]]:
    """(parent, attribute, layer, path) of every place where a batch-norm layer stands."""
    if isinstance(model, _BatchNorm):
        return [(None, "", model, "")]
    return [
        (parent, name, child, f"{path}.{name}".lstrip("."))
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()  # named_children leaves out the second place of a shared layer
        if isinstance(child, _BatchNorm)
    ]
