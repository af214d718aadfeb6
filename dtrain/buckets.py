"""Parameters <-> messages, in the order in which backward yields their gradients.

Many small messages are slow, and one large one cannot start before backward ends. So small gradients are laid side by
side in buckets, the last layers' first, and a bucket travels as soon as it is full (Li et al. 2020, "PyTorch
Distributed", section 3.2.3). A large gradient travels by itself, from where autograd has put it: no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.errors import UsageError

Named = Sequence[tuple[str, Parameter]]

Empty = Callable[[int, torch.dtype, torch.device], Tensor]
"""Makes a flat buffer, from number of elements, type and device."""


@dataclass(frozen=True)
class Plan:
    """Which parameters travel in one message: positions in the list of parameters, in the order of the buffer."""

    members: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    direct: bool = False
    """One large gradient, sent from where it lies."""


def describe(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """One line a tensor, `name (shape) type`, and strides where they are unusual: what workers must agree on."""
    return [
        f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        + ("" if t.is_contiguous() else f" strides {t.stride()}")
        for name, t in named
    ]


def plan(
    named: Named, *, bucket_bytes: int, first_bytes: int, direct_bytes: int = 0, dtype: torch.dtype | None = None
) -> list[Plan]:
    """Cut the trainable parameters, last to first, into messages of one type and device; the last is a bucket.

    Args:
        bucket_bytes: a bucket is closed when it has reached this size; a tensor as large has one to itself.
        first_bytes: the same for the first bucket, which should leave early.
        direct_bytes: a gradient of this size or more travels by itself; 0: none does.
        dtype: send gradients as this, and none by itself; None: as they are.

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
        kind = (dtype or parameter.dtype, parameter.device)
        nbytes = parameter.numel() * kind[0].itemsize
        if dtype is None and nbytes >= direct_bytes > 0:
            plans.append(Plan((index,), *kind, direct=True))
            continue
        if nbytes >= bucket_bytes and kind in open_:
            plans.append(Plan(tuple(open_.pop(kind)), *kind))
            sizes[kind] = 0
        open_.setdefault(kind, []).append(index)
        sizes[kind] = sizes.get(kind, 0) + nbytes
        if sizes[kind] >= (bucket_bytes if plans else min(first_bytes, bucket_bytes)):
            plans.append(Plan(tuple(open_.pop(kind)), *kind))
            sizes[kind] = 0
    plans += [Plan(tuple(members), *kind) for kind, members in open_.items()]
    if plans and plans[-1].direct:
        plans.append(Plan((), plans[-1].dtype, plans[-1].device))
    return plans


class Message:
    """Gradients that travel together. See `Bucket` and `Direct`."""

    flat: Tensor
    """What travels; set when the message is sealed, at the latest."""

    def __init__(self, plan: Plan, named: Named) -> None:
        """
        Args:
            named: the list that the plan's positions refer to.
        """
        self.members = plan.members
        self.named = [named[i] for i in plan.members]
        self.names = [name for name, _ in self.named]
        self.parameters = [parameter for _, parameter in self.named]
        self._missing = set(range(len(plan.members)))

    @property
    def full(self) -> bool:
        return not self._missing

    @property
    def missing_members(self) -> list[int]:
        """Positions of the parameters that no gradient has come for."""
        return [self.members[slot] for slot in self._missing]

    @torch.no_grad()
    def put(self, slot: int, scale: float) -> None:
        """Take a parameter's gradient in, times `scale`.

        Raises:
            UsageError: a sparse gradient, or the second one in a backward.
        """
        gradient = self.parameters[slot].grad
        if slot not in self._missing:
            raise UsageError(f"{self.names[slot]} received two gradients in one backward: call backward once for each")
        if gradient is None:
            return
        if gradient.layout is not torch.strided:
            raise UsageError(f"{self.names[slot]} has a sparse gradient: build the layer with sparse=False")
        if gradient.requires_grad:
            raise UsageError(
                f"{self.names[slot]}: backward(create_graph=True) is not summed over workers; use torch.autograd.grad"
            )
        self._missing.remove(slot)
        self._take(slot, gradient, scale)

    @torch.no_grad()
    def seal(self, scale: float) -> list[int]:
        """Make the message ready to travel: what no gradient came for holds what `.grad` has, or zero.

        Returns:
            Slots that have no gradient on this worker.
        """
        for slot in sorted(self._missing):
            self.put(slot, scale)
        absent = sorted(self._missing)
        for slot in absent:
            self._blank(slot)
        return absent

    def reset(self) -> None:
        """Be ready for the next backward."""
        self._missing = set(range(len(self.parameters)))

    def grant(self, slot: int) -> None:
        """Give a parameter that only other workers used its gradient, after the sum."""
        raise NotImplementedError

    def release(self) -> None:
        """The sum is in place: keep no memory that the gradient's owner may want to free."""

    def abandon(self) -> None:
        """Leave the memory to a transfer that nobody waits for any more."""
        for parameter in self.parameters:
            inside = self.flat.data_ptr() <= _address(parameter.grad) < self.flat.data_ptr() + self.flat.nbytes
            if inside and parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _take(self, slot: int, gradient: Tensor, scale: float) -> None:
        raise NotImplementedError

    def _blank(self, slot: int) -> None:
        raise NotImplementedError


class Bucket(Message):
    """Small gradients side by side in a flat buffer; `.grad` becomes a view of it."""

    def __init__(self, plan: Plan, named: Named, empty: Empty, *, flags: int = 0) -> None:
        """
        Args:
            flags: number of elements to leave at the end of the buffer, for `flags`.
        """
        super().__init__(plan, named)
        sizes = [p.numel() for p in self.parameters]
        self.flat = empty(sum(sizes) + flags, plan.dtype, plan.device)
        *parts, self.flags = self.flat.split([*sizes, flags])
        self._views = [view_like(part, p) for part, p in zip(parts, self.parameters, strict=True)]

    def grant(self, slot: int) -> None:
        self.parameters[slot].grad = self._views[slot]

    def _take(self, slot: int, gradient: Tensor, scale: float) -> None:
        view = self._views[slot]
        if gradient.data_ptr() == view.data_ptr() and gradient.stride() == view.stride():
            view.mul_(scale)
        else:
            torch.mul(gradient, scale, out=view)
        self.parameters[slot].grad = view

    def _blank(self, slot: int) -> None:
        self._views[slot].zero_()


class Packed(Bucket):
    """A bucket of another type than its gradients: they are rounded as they come in, and the sum is copied back."""

    def grant(self, slot: int) -> None:
        parameter = self.parameters[slot]
        parameter.grad = torch.empty_like(self._views[slot], dtype=parameter.dtype).copy_(self._views[slot])

    @torch.no_grad()
    def release(self) -> None:
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(view)

    def abandon(self) -> None:
        """No gradient lies in the buffer."""

    def _take(self, slot: int, gradient: Tensor, scale: float) -> None:
        torch.mul(gradient, scale, out=self._views[slot])


class Direct(Message):
    """One large gradient, summed where autograd has put it, if nobody else reads that memory."""

    def grant(self, slot: int) -> None:
        self.parameters[slot].grad = view_like(self.flat, self.parameters[slot])

    def release(self) -> None:
        self.flat = self.flat.new_empty(0)

    def _take(self, slot: int, gradient: Tensor, scale: float) -> None:
        parameter = self.parameters[slot]
        if not _exclusive(gradient) or gradient.stride() != _strides(parameter):
            self.flat = gradient.new_empty(gradient.numel())
            own = view_like(self.flat, parameter)
            torch.mul(gradient, scale, out=own)
            parameter.grad = own
            return
        if scale != 1.0:
            gradient.mul_(scale)
        self.flat = gradient.as_strided((gradient.numel(),), (1,))

    def _blank(self, slot: int) -> None:
        parameter = self.parameters[slot]
        self.flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """Strides of its gradient: its own, where they leave no gaps; torch's fused optimizers count on equal ones."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(parameter.stride(), parameter.shape, strict=True) if si > 1):
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()


@torch.no_grad()
def lay(parameters: Sequence[Parameter], flat: Tensor) -> None:
    """Let parameters lie side by side in a flat tensor, which is as long as they are together, or longer."""
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, flat[: sum(sizes)].split(sizes), strict=True):
        view = view_like(part, parameter)
        view.copy_(parameter)
        parameter.data = view


def view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """A flat tensor seen in the shape and strides of a parameter."""
    return flat.as_strided(parameter.shape, _strides(parameter))


def _exclusive(tensor: Tensor) -> bool:
    """Whether no other tensor lies in the same memory.

    Autograd hands over gradients that are views: of a tensor that backward still reads, or that is another parameter's
    gradient too. There is no public way to see it; without the private one, memory counts as shared.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and bool(count(tensor.untyped_storage()._cdata) <= 2)  # this tensor, and the question


def _address(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.data_ptr()
