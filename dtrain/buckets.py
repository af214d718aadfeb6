"""Parameters <-> flat buffers, in the order in which backward yields their gradients.

Many small messages are slow, and one large one cannot start before backward ends. So gradients are laid side by side
in buckets of a few megabytes, the last layers' first, and a bucket travels as soon as it is full (Li et al. 2020,
"PyTorch Distributed", section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.errors import UsageError

Named = Sequence[tuple[str, Parameter]]


@dataclass(frozen=True)
class Plan:
    """Which parameters share a bucket: positions in the list of parameters, in the order of the buffer."""

    members: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def describe(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """One line a tensor, `name (shape) type`: what workers must agree on."""
    return [f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in named]


def plan(named: Named, *, bucket_bytes: int, first_bytes: int) -> list[Plan]:
    """Cut the trainable parameters, last to first, into buckets of one type and device.

    Args:
        bucket_bytes: a bucket is closed when it has reached this size; a larger tensor has one to itself.
        first_bytes: the same for the first bucket, which should leave early.

    Raises:
        UsageError: a parameter whose gradient cannot be summed (a complex one).
    """
    plans: list[Plan] = []
    open_: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for index in reversed(range(len(named))):
        name, parameter = named[index]
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise UsageError(f"{name} is complex: gradients of complex parameters are not supported; use two real ones")
        kind = (parameter.dtype, parameter.device)
        open_.setdefault(kind, []).append(index)
        sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        if sizes[kind] >= (bucket_bytes if plans else min(first_bytes, bucket_bytes)):
            plans.append(Plan(tuple(open_.pop(kind)), *kind))
            sizes[kind] = 0
    plans += [Plan(tuple(members), *kind) for kind, members in open_.items()]
    return plans


class Bucket:
    """A flat buffer of gradients, followed by one element a parameter that counts the workers which used it."""

    def __init__(self, plan: Plan, named: Named, empty: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        """
        Args:
            named: the list that the plan's positions refer to.
            empty: makes the buffer, from number of elements, type and device.
        """
        parameters = [named[i][1] for i in plan.members]
        sizes = [p.numel() for p in parameters]
        self.names = [named[i][0] for i in plan.members]
        self.parameters = parameters
        self.flat = empty(sum(sizes) + len(sizes), plan.dtype, plan.device)
        *parts, self._users = self.flat.split([*sizes, len(sizes)])
        self._views = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        self._missing = set(range(len(sizes)))

    @property
    def full(self) -> bool:
        return not self._missing

    @torch.no_grad()
    def put(self, slot: int, scale: float) -> None:
        """Take a parameter's gradient in, times `scale`; `.grad` becomes a view of the buffer.

        Raises:
            UsageError: a sparse gradient, or the second one in a backward.
        """
        parameter, view = self.parameters[slot], self._views[slot]
        gradient = parameter.grad
        if slot not in self._missing:
            raise UsageError(f"{self.names[slot]} received two gradients in one backward: call backward once for each")
        if gradient is None:
            view.zero_()
            return
        if gradient.layout is not torch.strided:
            raise UsageError(f"{self.names[slot]} has a sparse gradient: build the layer with sparse=False")
        self._missing.remove(slot)
        if gradient.data_ptr() == view.data_ptr() and gradient.shape == view.shape:
            view.mul_(scale)
        else:
            torch.mul(gradient, scale, out=view)
        parameter.grad = view

    @torch.no_grad()
    def seal(self, scale: float) -> list[int]:
        """Make the buffer ready to travel: what no gradient came for holds what `.grad` has, or zero.

        Returns:
            Slots that have no gradient on this worker.
        """
        for slot in sorted(self._missing):
            self.put(slot, scale)
        absent = sorted(self._missing)
        self._users.fill_(1)
        for slot in absent:
            self._users[slot] = 0
        return absent

    def settle(self, absent: Sequence[int]) -> None:
        """After the sum: parameters that only other workers used get their gradient; those nobody used have none."""
        used = self._users.tolist() if absent else []
        for slot in absent:
            if used[slot]:
                self.parameters[slot].grad = self._views[slot]
        self._missing = set(range(len(self.parameters)))

    def reset(self) -> None:
        """Forget a backward that did not end."""
        self._missing = set(range(len(self.parameters)))
