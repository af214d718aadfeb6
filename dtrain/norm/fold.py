"""Folding batch norm into the convolution or linear layer before it, over a whole model: for inference only.

In evaluation batch norm is a fixed scale and shift of each channel, which the layer before can do at no cost (Jacob et
al. 2018, section 3.2). The arithmetic is torch's (`torch.nn.utils.fusion`); what is here finds out from the traced
graph where it may be used, and measures what it changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves, tree_map_only

from dtrain.norm.domains import DomainBatchNorm
from dtrain.norm.layer import PLAIN, NormLayer, layers, swap
from dtrain.norm.virtual import VirtualBatchNorm

_KNOWN = (*PLAIN, nn.SyncBatchNorm)  # other classes may compute something else in evaluation


@dataclass(frozen=True)
class Folded:
    """What `fold` made."""

    model: nn.Module
    """A copy in evaluation mode; a batch norm that was folded is an `nn.Identity`."""
    max_difference: float
    """Largest absolute difference of the outputs on the example, between the model given and this one."""
    folded: list[str] = field(default_factory=list)
    """`convolution -> batch norm`, by path."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(path, why) of each batch norm that is still there."""

    def __str__(self) -> str:
        count = len(self.folded) + len(self.left)
        lines = [f"{len(self.folded)} of {count} batch-norm layers folded into the layer before."]
        lines.append(f"Largest difference of the outputs: {self.max_difference:.1e}.")
        lines += [f"  left: {path}: {why}" for path, why in self.left]
        return "\n".join(lines)


@torch.no_grad()
def fold(model: nn.Module, example: Any) -> Folded:
    """Fold every batch norm that can be into the convolution or linear layer right before it.

    Args:
        model: is not changed. Kinds of batch norm are made plain in the copy; layers of several domains take the
            statistics of the domain around the call (`with domain(name)`). A model with virtual batch norm is left.
        example: an input of the model, or a tuple of its inputs; the outputs on it are compared.

    Returns:
        A copy of the model in evaluation mode, which batch norms were folded and which not. Where torch.fx cannot trace
        the model, all of them are left.
    """
    original = copy.deepcopy(model).eval()
    wanted = _outputs(original, example)
    found = layers(original)
    if any(isinstance(layer, VirtualBatchNorm) for layer in found.values()):
        why = "virtual batch norm normalises by a reference batch, in evaluation too"
        return _compared(original, example, wanted, left=[(path, why) for path in found])
    new = swap(original, _plain).eval()
    if isinstance(new, _BatchNorm):
        return _compared(new, example, wanted, left=[("batch_norm", "it is the whole model")])
    found = layers(new)
    graph = _trace(new)
    if isinstance(graph, str):
        return _compared(new, example, wanted, left=[(path, graph) for path in found])
    dimensions = _dimensions(graph, example)
    paths = {id(module): path for path, module in new.named_modules()}
    folded, left = [], []
    for path, norm in found.items():
        before = _layer_before(graph, norm, dimensions)
        if isinstance(before, str):
            left.append((path, before))
        else:
            folded.append(f"{paths[id(before)]} -> {path}")
            _replace(new, before, _fused(before, norm))
            _replace(new, norm, nn.Identity().eval())
    return _compared(new, example, wanted, folded=folded, left=left)


def _plain(layer: _BatchNorm, _: str) -> _BatchNorm:
    """What a layer of any kind is in evaluation; of one for several domains, in the domain around the call."""
    if not isinstance(layer, NormLayer):
        return layer
    plain = layer.to_plain()
    if isinstance(layer, DomainBatchNorm):
        kept = layer.current()
        plain.running_mean, plain.running_var = kept.running_mean, kept.running_var
        for name, own in kept.named_parameters():
            setattr(plain, name, own)
    return plain


class _Tracer(fx.Tracer):
    """Torch's, which does not look into batch norm: not into foreign classes of it either."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.GraphModule | str:
    """The graph of the model, or why there is none."""
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # whatever the model's own code raises when it is given no tensors
        text = str(error).strip()
        return f"torch.fx cannot trace the model: {text.splitlines()[0] if text else type(error).__name__}"


class _Watch(fx.Interpreter):
    """Runs a graph and notes how many dimensions each output has."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.dimensions: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.dimensions[n.name] = out.dim()
        return out


def _dimensions(graph: fx.GraphModule, example: Any) -> dict[str, int]:
    watch = _Watch(graph)
    watch.run(*_arguments(example))
    return watch.dimensions


def _layer_before(graph: fx.GraphModule, norm: _BatchNorm, dimensions: dict[str, int]) -> _ConvNd | nn.Linear | str:
    """The layer that `norm` can be folded into, or why there is none."""
    if type(norm) not in _KNOWN:
        return f"what a {type(norm).__name__} computes is not known"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    calls = _calls(graph, norm)
    if len(calls) != 1 or _read_directly(graph, norm):
        return f"it is called {len(calls)} times in a forward, or its parameters are read apart from that"
    node = next((a for a in (*calls[0].args, *calls[0].kwargs.values()) if isinstance(a, fx.Node)), None)
    layer = graph.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None
    if node is None or not isinstance(layer, (_ConvNd, nn.Linear)):
        return "no convolution or linear layer right before it"
    if len(_calls(graph, layer)) != 1 or _read_directly(graph, layer):
        return f"{node.target}, the layer before, is used elsewhere too"
    if len(node.users) != 1:
        return f"the output of {node.target}, the layer before, is used elsewhere too"
    if isinstance(layer, _ConvTransposeNd) and layer.groups != 1:
        return f"torch does not fold into a transposed convolution in groups ({node.target})"
    if _changed_by_others(layer) or _changed_by_others(norm):
        return f"{node.target} or the batch norm itself has hooks or a parametrization"
    if dimensions[node.name] != layer.weight.dim():
        return f"{node.target} puts its channels in another dimension than batch norm takes them from"
    return layer


def _calls(graph: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_module" and graph.get_submodule(str(n.target)) is module]


def _read_directly(graph: fx.GraphModule, module: nn.Module) -> bool:
    """Whether the graph takes a parameter or buffer of a module without calling it."""
    owners = [str(n.target).rpartition(".")[0] for n in graph.graph.nodes if n.op == "get_attr"]
    return any(graph.get_submodule(owner) is module for owner in owners)


def _changed_by_others(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or parametrize.is_parametrized(module)


def _fused(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, _affine(norm))
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _ConvTransposeNd))


def _affine(norm: _BatchNorm) -> _BatchNorm:
    """A copy with weight and bias, which torch's utility for linear layers asks for."""
    new = copy.deepcopy(norm)
    for name, make in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        if getattr(new, name) is None:
            setattr(new, name, nn.Parameter(make(new.running_mean)))  # type: ignore[arg-type]
    return new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place where `old` stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _compared(model: nn.Module, example: Any, wanted: Sequence[Tensor], **found: Any) -> Folded:
    got = _outputs(model, example)
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(wanted, got, strict=True) if a.numel()]
    largest = torch.stack(differences).max().item() if differences else 0.0  # not a number, if one is not
    return Folded(model=model, max_difference=largest, **found)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*_arguments(example))) if isinstance(leaf, Tensor)]


def _arguments(example: Any) -> tuple[Any, ...]:
    """Copies: a model may write into what it is given."""
    inputs = example if isinstance(example, tuple) else (example,)
    return tuple(tree_map_only(Tensor, Tensor.clone, inputs))
