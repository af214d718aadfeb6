"""A model's parameters in two groups, and servers that step an optimizer of them, without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.optim import BLOCK, Layerwise, total_norm
from dtrain.ps import optimizers
from dtrain.ps.optimizers import decode_hyper, decode_spec, encode_spec, hyper, spec_of
from dtrain.ps.pieces import Piece, chunks, cut
from dtrain.ps.placement import grain, place
from dtrain.ps.states import merge_states, split_state
from dtrain.ps.update import ShardOptimizer

SHAPES = [
    (150, 131),
    (131,),
    (1,),
    (),
    (0, 3),
    (77, 9),
    (128, 2),
    (20_011,),
]  # two buckets of more than 64 KiB, one less
BUCKETS = [[7, 6], [5, 4, 3, 2, 1], [0]]
MATRICES = [(150, 131), (131, 1), (1, 1), (64, 7), (77, 9), (128, 2), (40, 500)]
MATRIX_BUCKETS = [[6, 5], [4, 3, 2, 1], [0]]
STEPS = 4


CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95)}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {"lr": 0.01, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
    ("ASGD", {"lr": 0.01, "t0": 1.0, "weight_decay": 0.1}),
    ("Adafactor", {"lr": 0.01, "weight_decay": 0.1}),
    ("Muon", {"lr": 0.01}),
    ("LARS", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}),
    ("LARS", {"lr": 0.5, "nesterov": True, "weight_decay": 0.1, "trust_coefficient": 0.1, "lr_in_momentum": True}),
    ("LARS", {"lr": 0.01, "momentum": 0.0, "adapt": True}),
    ("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
    ("LAMB", {"lr": 0.01, "bias_correction": False, "max_weight_norm": 3.0, "adapt": True}),
    ("LAMB", {"lr": 0.01, "adapt": False}),
]
IDS = [f"{name}-{'-'.join(list(kw)[1:])}" for name, kw in CASES]


def class_of(name: str) -> Any:
    return optimizers.CLASSES[name][0]


class Model:
    """Parameters in two groups, an optimizer of them, and gradients that depend on the step only."""

    def __init__(self, name: str, kw: dict[str, Any], dtype: torch.dtype = torch.float64, **flags: Any) -> None:
        self.shapes, self.buckets = (MATRICES, MATRIX_BUCKETS) if name == "Muon" else (SHAPES, BUCKETS)
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes]
        if len(self.shapes) > 5:
            values[5] = values[5].t().contiguous().t()  # as channels_last: strides that are not those of its shape
        self.parameters = [Parameter(v) for v in values]
        self.dtype = dtype
        last = dict(kw, lr=kw["lr"] / 2, **({"betas": (0.7, 0.9)} if "betas" in kw else {}))
        groups = [{"params": self.parameters[:4]}, {"params": self.parameters[4:], **last}]
        groups[1].pop("initial_accumulator_value", None)
        self.optimizer: torch.optim.Optimizer = class_of(name)(groups, **kw, **flags)

    def gradients(self, step: int) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(100 + step)
        found = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(self.dtype) for p in self.parameters]
        unused = {0: {0, 2}, 1: {5}, 2: set(), 3: {0, 7}}[step]
        if type(self.optimizer).__name__ in ("SGD", "Adafactor"):  # torch's own fail where a tensor has no element
            unused |= {4}
        return [
            None if i in unused else torch.empty_like(p).copy_(g)
            for i, (p, g) in enumerate(zip(self.parameters, found, strict=True))
        ]

    def schedule(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5 if step == 2 else 1.0

    def run(self, steps: range) -> None:
        for step in steps:
            self.schedule(step)
            for p, g in zip(self.parameters, self.gradients(step), strict=True):
                p.grad = g
            self.optimizer.step()

    def like(self) -> dict[int, Tensor]:
        return {i: p.detach().to("meta") for i, p in enumerate(self.parameters)}


def flat(tensor: Tensor) -> Tensor:
    """Its elements in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Servers:
    """What `num_servers` servers do with a model's buckets; each in chunks."""

    def __init__(self, model: Model, num_servers: int, limit: int = 2048, *, whole: bool = False) -> None:
        self.model = model
        spec = decode_spec(json.loads(json.dumps(encode_spec(spec_of(model.optimizer)))))
        self.spec = spec
        numels = [[model.parameters[i].numel() for i in b] for b in model.buckets]
        size = model.parameters[0].element_size()
        self.grain = BLOCK if spec.layerwise else grain(sum(map(sum, numels)))
        self.halves = spec.layerwise and not whole  # whether a step has two
        whole = whole or spec.whole
        placement = place(numels, [size] * len(numels), num_servers, whole=whole, step=self.grain)
        self.shards: list[tuple[int, int, Tensor, ShardOptimizer]] = []
        for b, (members, ranges) in enumerate(zip(model.buckets, placement, strict=True)):
            buffer = torch.cat([flat(model.parameters[i]) for i in members])
            tensors = []
            for i in members:
                p = model.parameters[i]
                tensors.append(Piece(i, int(i >= 4), 0, p.numel(), tuple(p.shape), p.stride()))
            for r in ranges:
                held = buffer[r.start : r.stop].clone()
                for chunk in chunks(cut(tensors, r.start, r.stop), limit, self.grain, whole=whole):
                    shard = ShardOptimizer(spec, chunk.pieces, held[chunk.start : chunk.stop], whole=whole)
                    self.shards.append((b, r.start + chunk.start, held[chunk.start : chunk.stop], shard))

    def run(self, steps: range) -> None:
        for step in steps:
            self.model.schedule(step)
            now = decode_hyper(self.spec, json.loads(json.dumps(hyper(self.model.optimizer))))
            gradients = self.model.gradients(step)
            filled = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self.model.parameters, gradients, strict=True)
            ]
            buffers = [torch.cat([flat(filled[i]) for i in members]) for members in self.model.buckets]
            turns = [
                (
                    shard,
                    buffers[b][start : start + values.numel()],
                    [gradients[p.parameter] is not None for p in shard.pieces],
                )
                for b, start, values, shard in self.shards
            ]
            if not self.halves:
                for shard, gradient, used in turns:
                    shard.step(gradient, used, now)
                continue
            sums = [shard.direct(gradient, used, now) for shard, gradient, used in turns]
            ratios = self.ratios(sums, now)
            for shard, gradient, used in turns:
                shard.move(gradient, used, [ratios[p.parameter] for p in shard.pieces])

    def ratios(self, sums: Sequence[Tensor], now: Sequence[dict[str, Any]]) -> dict[int, float]:
        """What workers make of the sums of squares that the chunks have told."""
        optimizer: Any = self.model.optimizer
        assert isinstance(optimizer, Layerwise)
        told: dict[int, list[tuple[int, int, Tensor]]] = {}
        for (*_, shard), both in zip(self.shards, sums, strict=True):
            blocks = [-(-p.numel // self.grain) for p in shard.pieces]
            for p, part in zip(shard.pieces, both.split(blocks, dim=1), strict=True):
                told.setdefault(p.parameter, []).append((p.start, p.group, part))
        found = {}
        for number, parts in told.items():
            parts.sort(key=lambda part: part[0])
            group = now[parts[0][1]]
            norms = [total_norm([part[row] for _, _, part in parts]) for row in (0, 1)]
            adapted = optimizer.adapts(group, self.model.parameters[number].dim())
            found[number] = optimizer.ratio(group, *norms) if adapted else 1.0
        return found

    def parameters(self) -> list[Tensor]:
        buffers = [
            torch.empty(sum(self.model.parameters[i].numel() for i in m), dtype=self.model.dtype)
            for m in self.model.buckets
        ]
        for b, start, values, _ in self.shards:
            buffers[b][start : start + values.numel()] = values
        found = list(self.model.parameters)
        for buffer, members in zip(buffers, self.model.buckets, strict=True):
            for part, i in zip(buffer.split([found[j].numel() for j in members]), members, strict=True):
                found[i] = part.as_strided(found[i].shape, found[i].stride())
        return found

    def state(self) -> dict[int, dict[str, Any]]:
        parts = [
            (p, s) for *_, shard in reversed(self.shards) for p, s in zip(shard.pieces, shard.state(), strict=True)
        ]
        return merge_states(parts, self.model.like())

    def load(self, state: dict[int, dict[str, Any]]) -> None:
        for *_, shard in self.shards:
            shard.load(split_state(state, shard.pieces, self.model.like()))


def same_state(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]], **tolerance: float) -> None:
    def nonempty(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {i: {k: t.detach() for k, t in s.items()} for i, s in state.items() if s and i != 4}

    a, b = nonempty(a), nonempty(b)
    assert {i: s.keys() for i, s in a.items()} == {i: s.keys() for i, s in b.items()}
    for i in a:
        for k in a[i]:
            torch.testing.assert_close(
                a[i][k], b[i][k], **(tolerance or {"rtol": 0, "atol": 0}), check_dtype=not tolerance
            )
