"""Batch norm with statistics of its own for each domain (Chang et al. 2019, domain-specific batch normalisation).

A batch of one domain is normalised by that domain's statistics, in training and in evaluation; all other layers are
shared. Which domain it is, is said around the forward:

    model = per_domain(model, ["photos", "sketches"])
    with domain("sketches"):
        loss = criterion(model(x), y)
"""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtrain.errors import UsageError
from dtrain.norm.layer import NormLayer, swap

AFFINE = ("shared", "separate")

_current: ContextVar[str | None] = ContextVar("dtrain.norm.domain", default=None)


@contextlib.contextmanager
def domain(name: str) -> Iterator[None]:
    """Within, layers of `per_domain` are in that domain. The innermost counts; each thread has its own.

    A forward that gradient checkpointing repeats in backward needs it again: put it inside the checkpointed function.
    """
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


class Domain(nn.Module):
    """What a layer keeps for one domain: running statistics, and weight and bias where they are separate."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: _BatchNorm, *, separate: bool) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(layer, name)
            self.register_buffer(name, None if buffer is None else buffer.clone())
        for name in ("weight", "bias"):
            own = getattr(layer, name) if separate else None
            new = None if own is None else nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
            self.register_parameter(name, new)


class DomainBatchNorm(NormLayer):
    """Batch norm by the statistics of the domain that `domain` names.

    Each domain starts from the layer's own statistics, which then stay as they are: they are what `revert` gives back.
    In a state dict, the domains' come after them, as `domains.<name>.running_mean` and so on.
    """

    holds_more = True
    domains: nn.ModuleDict
    """A `Domain` for each, by name."""

    def to_plain(self) -> _BatchNorm:
        """With the statistics, weight and bias that the layer had before; what the domains have learnt is not in it."""
        plain = super().to_plain()
        plain._modules = {name: child for name, child in plain._modules.items() if name != "domains"}
        return plain

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        kept = self.current()
        weight, bias = (self.weight, self.bias) if kept.weight is None else (kept.weight, kept.bias)
        tracked, factor = kept.num_batches_tracked, self.momentum
        mean, var = kept.running_mean, kept.running_var
        if self.training and not self.track_running_stats:
            mean = var = None
        elif self.training and tracked is not None:
            tracked.add_(1)
            factor = 1.0 / float(tracked) if factor is None else factor
        return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, factor or 0.0, self.eps)

    def current(self) -> Domain:
        """What is kept of the domain that is set.

        Raises:
            UsageError: none is, or it is unknown.
        """
        name = _current.get()
        if name is None or name not in self.domains:
            said = "no domain is set" if name is None else f"there is no domain {name!r}"
            raise UsageError(
                f"{said}: around the forward, say `with domain(name)`, with one of {', '.join(self.domains)}"
            )
        return cast(Domain, self.domains[name])


def per_domain(model: nn.Module, domains: Sequence[str], *, affine: str = "shared") -> nn.Module:
    """Let every batch-norm layer keep statistics for each domain; in place.

    Load what was learnt before on several domains at once first: each domain starts from a copy of it. The layers' own
    parameters and buffers stay the same objects under the same names, and are what `revert` gives back.

    With separate affine, the domains' weights and biases are new parameters, copies of the layer's: make the optimizer
    after this, or add them to it. The layer's own then get no gradient, and neither do those of domains that a step
    does not see.

    Args:
        model: any module; one that is itself a batch-norm layer is replaced, so use what is returned.
        domains: their names, identifiers, as they become part of state-dict keys.
        affine: "shared", one weight and bias for all domains, or "separate", as in the paper.

    Returns:
        The model.

    Raises:
        UsageError: names that cannot be keys or come twice, another `affine`, or a lazy or foreign class.
    """
    if affine not in AFFINE:
        raise UsageError(f"affine is {affine!r}: one of {', '.join(AFFINE)}")
    if isinstance(domains, str) or not domains or len(set(domains)) < len(domains):
        raise UsageError(f"domains are {domains!r}: give a list of different names, at least one")
    for name in domains:
        if not name.isidentifier() or keyword.iskeyword(name) or hasattr(nn.ModuleDict(), name):
            raise UsageError(
                f"{name!r} cannot name a domain: names become state-dict keys, so it is an identifier, and one that "
                "torch's modules do not have already, as they have 'train' and 'type'"
            )

    def make(layer: _BatchNorm, path: str) -> DomainBatchNorm:
        new = DomainBatchNorm.from_plain(layer, path)
        plain = new.to_plain()
        kept = nn.ModuleDict({name: Domain(plain, separate=affine == "separate") for name in domains})
        # A dict of its own: the layer that it was made from shares the one that it has.
        new._modules = {**new._modules, "domains": kept}
        new.train(new.training)
        return new

    return swap(model, make)


__all__ = ["DomainBatchNorm", "domain", "per_domain"]
