"""The steps of an optimizer on ranges of a model's parameters.

A server steps an optimizer on its pieces of tensors. Where every element is updated by itself, that gives the same bits
however the tensors are cut, as long as cuts are at multiples of the layout's grain from a tensor's start and torch uses
one thread for an operation, which the server sees to. An optimizer that needs norms of whole tensors makes its step in
two halves, and is told what follows from all pieces' norms in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.comm.ordered import HALVES
from dtrain.errors import ProtocolError, UsageError
from dtrain.optim import Layerwise, in_memory, squares
from dtrain.ps.optimizers import CLASSES, LOOP, Hyper, OptimizerSpec
from dtrain.ps.pieces import Piece
from dtrain.ps.states import KEPT, SCALARS, State, conditional, is_elements, restored, shaped


class ShardOptimizer:
    """An optimizer of some pieces, which lie side by side in one flat tensor."""

    def __init__(self, spec: OptimizerSpec, pieces: Sequence[Piece], values: Tensor, *, whole: bool = False) -> None:
        """
        Args:
            values: the parameters, flat and on the CPU; updated in place.
            whole: the pieces are whole tensors, with shapes; optimizers that look at whole ones need that.

        Raises:
            UsageError: pieces that do not fit the tensor or the optimizer.
        """
        if values.dim() != 1 or values.numel() != sum(p.numel for p in pieces) or not pieces:
            raise UsageError(
                f"values have shape {tuple(values.shape)}: give a flat tensor as long as all pieces, not 0"
            )
        self._whole = whole or spec.whole
        if any(not 0 <= p.group < len(spec.groups) or (self._whole and p.shape is None) for p in pieces):
            need = "; it needs whole tensors, with shapes" if self._whole else ""
            raise UsageError(f"a piece does not fit {spec.name} with {len(spec.groups)} groups{need}")
        self.spec = spec
        self.pieces = tuple(pieces)
        self._sizes = [p.numel for p in pieces]
        self._values = values
        self._params = self._views(values)
        self._present = sorted({p.group for p in pieces})
        groups: list[dict[str, Any]] = [
            {**spec.groups[g], "params": [t for t, p in zip(self._params, pieces, strict=True) if p.group == g]}
            for g in self._present
        ]
        cls, flags = CLASSES[spec.name]
        if spec.name == "SGD" and values.dtype in HALVES:
            flags = LOOP  # torch 2.13: the fused kernel leaves most elements of halves as they are
        defaults: dict[str, Any] = {**spec.groups[0], **flags}
        self._optimizer = cls(groups, **defaults)
        self._group_of = [self._optimizer.param_groups[self._present.index(p.group)] for p in pieces]
        self._hyper = spec.groups

    def settle(self, values: Tensor) -> None:
        """From now on step these parameters, which have the values of the ones before."""
        self._values = values
        for parameter, view in zip(self._params, self._views(values), strict=True):
            parameter.data = view

    @torch.no_grad()
    def step(self, gradient: Tensor, used: Sequence[bool], hyper: Hyper | None = None) -> None:
        """One step. Pieces that are not used stay as they are, with their state, as with torch where `.grad` is None.

        Args:
            gradient: flat, as long as the values and of their type; not kept.
            used: of each piece.
            hyper: from `decode_hyper`; None: as before.
        """
        self._set(hyper)
        pairs = zip(self._params, self._views(gradient), strict=True)
        turn = [pair for pair, u in zip(pairs, used, strict=True) if u]
        if self.spec.name == "SGD" and len(turn) > 1:  # the fused kernel takes momentum of all tensors, or of none
            kept = self._optimizer.state
            known = [pair for pair in turn if kept.get(pair[0])]
            if 0 < len(known) < len(turn):
                self._turn([pair for pair in turn if not kept.get(pair[0])])
                turn = known
        self._turn(turn)

    @torch.no_grad()
    def direct(self, gradient: Tensor, used: Sequence[bool], hyper: Hyper | None = None) -> Tensor:
        """The first half of a step with trust ratios.

        Args:
            gradient: flat, as long as the values and of their type; it becomes what `move` wants.
            used: of each piece.
            hyper: from `decode_hyper`; None: as before.

        Returns:
            The sums of squares of the values, and of what the gradient has become, of each piece in order by block: a
            float64 tensor of shape (2, blocks). Those of pieces that are not used mean nothing.
        """
        self._set(hyper)
        optimizer = self._layerwise
        for p, g, group, u in zip(self._params, self._views(gradient), self._group_of, used, strict=True):
            if u:
                optimizer.direct(p, g, group, out=g)
        return torch.stack([squares(flat, self._sizes) for flat in (self._values, gradient)])

    @torch.no_grad()
    def move(self, update: Tensor, used: Sequence[bool], ratios: Sequence[float]) -> None:
        """The second half.

        Args:
            update: what `direct` has made.
            used: of each piece, as `direct` was told.
            ratios: of the parameter of each piece.
        """
        optimizer = self._layerwise
        turn = zip(self._params, self._views(update), self._group_of, used, ratios, strict=True)
        for parameter, part, group, u, ratio in turn:
            if u:
                optimizer.move(parameter, part, group, ratio)

    @property
    def _layerwise(self) -> Layerwise:
        assert isinstance(self._optimizer, Layerwise)  # noqa: S101
        return self._optimizer

    def _set(self, hyper: Hyper | None) -> None:
        if hyper is not None and hyper is not self._hyper:
            if hyper != self._hyper:
                for group, g in zip(self._optimizer.param_groups, self._present, strict=True):
                    group.update(hyper[g])
            self._hyper = hyper

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps beside the parameters; those of most optimizers begin with the first step."""
        return sum(t.nbytes for state in self._optimizer.state.values() for t in state.values())

    def state(self) -> list[State]:
        """What the optimizer keeps of each piece; nothing before its first step. The next step changes it in place."""
        return [
            {k: in_memory(t, p) if is_elements(k, t, p) else t for k, t in self._optimizer.state.get(p, {}).items()}
            for p in self._params
        ]

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what `state` has given, or `split_state`; it is copied.

        Raises:
            ProtocolError: not what this optimizer keeps of these pieces.
        """
        if len(states) != len(self.pieces):
            raise ProtocolError(f"optimizer states of {len(states)} pieces, where there are {len(self.pieces)}")
        for piece, parameter, state in zip(self.pieces, self._params, states, strict=True):
            self._check_state(piece, parameter, state)
        for parameter, state in zip(self._params, states, strict=True):
            self._optimizer.state.pop(parameter, None)
            if state:
                self._optimizer.state[parameter] = {k: restored(k, t, parameter) for k, t in state.items()}

    def _turn(self, turn: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not turn:
            return
        for parameter, gradient in turn:
            parameter.grad = gradient
        self._optimizer.step()
        for parameter, _ in turn:
            parameter.grad = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes) if len(self._sizes) > 1 else (flat.view(-1),)
        if not self._whole:
            return list(parts)
        return [shaped(part, piece.shape or (), piece.strides) for part, piece in zip(parts, self.pieces, strict=True)]

    def _check_state(self, piece: Piece, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        where = f"state of parameter {piece.parameter}"
        always, optional = (names.split() for names in KEPT[self.spec.name])
        needed = [*always, *conditional(self.spec.name, self._hyper[piece.group], parameter.dim())]
        allowed = {*needed, *(() if self.spec.whole else optional)}
        if state and not set(needed) <= state.keys() <= allowed:
            raise ProtocolError(
                f"{where} is {', '.join(state)}; {self.spec.name} keeps {', '.join(needed or optional)}"
            )
        for key, t in state.items():
            shape: tuple[int, ...] = (piece.numel,)
            if key in SCALARS:
                shape = ()
            elif key in ("row_var", "col_var"):
                *outer, rows, columns = parameter.shape
                reduced = (*outer, rows, 1) if key == "row_var" else (*outer, 1, columns)
                shape = shape if reduced == parameter.shape else reduced
            dtypes = (torch.float32, torch.float64, parameter.dtype) if key in SCALARS else (parameter.dtype,)
            if tuple(t.shape) != shape or t.dtype not in dtypes:
                raise ProtocolError(f"{where}: {key} is {tuple(t.shape)} {t.dtype}, not {shape} {dtypes[-1]}")
