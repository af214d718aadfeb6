"""The next forward before all parameters are there: what uses one that is still on its way waits for it.

Parameters come back in the order in which forward needs them, and travel while the first layers already compute
(Jayarajan et al. 2019, "Priority-based Parameter Propagation"; Peng et al. 2019, "ByteScheduler").

Nothing is computed of old values: a layer waits for its own parameters, and so does each function of torch that is
given one inside the model, whoever's it is. When the model returns, all are there. What torch does not tell of is not
seen: functions that were scripted, extensions in C++ and threads that a forward starts, where they are given
parameters of a layer that was not called, and tensors kept from before that share a parameter's memory. Models that
are compiled, in whole or in part, have all parameters first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode, _get_current_function_mode


class Late(Protocol):
    """Parameters that are on their way."""

    @property
    def late(self) -> bool:
        """Whether any are."""

    def arrive(self, tensor: Tensor) -> None:
        """Return when this one, if it is a parameter that is on its way, is there."""

    def settle(self) -> object:
        """Return when all are there."""


class EarlyForward:
    """Hooks on a model and all its modules, by which it waits for each parameter when it is used."""

    def __init__(self, model: nn.Module, late: Late) -> None:
        self._late = late
        self._modules = list(model.modules())
        self._waits = _Waits(late)
        self._outermost: nn.Module | None = None  # of the modules that are being called, the first one
        self._depth = 0  # how often it is, which may call itself
        self.compiled = False
        """Whether code was compiled that does not wait: parameters must be there before it runs."""
        self._hooks: list[Any] = []
        for module in self._modules:
            if isinstance(module, torch.jit.ScriptModule):
                self.compiled = True
                continue
            self._hooks += [
                module.register_forward_pre_hook(Hook(self._before), prepend=True),
                module.register_forward_hook(Hook(self._after), always_call=True),
                module.register_state_dict_pre_hook(Hook(self._settle)),
                module.register_load_state_dict_pre_hook(Hook(self._settle)),
            ]

    def _before(self, module: nn.Module, *_: object) -> None:
        """A module is about to be called."""
        if torch.compiler.is_compiling() or (self._outermost is None and self._any_compiled()):
            self.compiled = True  # nothing asks from now on, whatever is late
            if self._late.late:
                self._settle()
            return
        if self._outermost is module:
            self._depth += 1
        if not self._late.late:
            return
        if self._outermost is None:
            self._outermost, self._depth = module, 1
            self._waits.__enter__()  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunction():  # what waits is not to wait for itself
            for parameter in module.parameters(recurse=False):
                self._late.arrive(parameter)

    def _after(self, module: nn.Module, _: object, result: object) -> None:
        """It has returned, or raised."""
        if self._outermost is not module:
            return
        self._depth -= 1
        if self._depth:
            return
        self._outermost = None
        self._waits.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if result is not None or sys.exc_info()[0] is None:
            self._settle()

    @_disable_dynamo  # torch.compile is not to look into the transfers
    def _settle(self, *_: object) -> None:
        with torch._C.DisableTorchFunction():
            self._late.settle()

    def reset(self) -> None:
        """Forget a forward that was interrupted, of which torch tells no hook."""
        if self._outermost is None:
            return
        self._outermost = None
        if _get_current_function_mode() is self._waits:
            self._waits.__exit__(None, None, None)

    def close(self) -> None:
        """Take the hooks off."""
        self.reset()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def _any_compiled(self) -> bool:
        return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self._modules)


_ABOUT = frozenset(
    getattr(Tensor, name).__get__
    for name in ("requires_grad", "shape", "ndim", "dtype", "device", "layout", "is_leaf", "is_cuda", "grad", "grad_fn")
)
"""What may be asked of a parameter whose numbers are on their way."""


class _Waits(TorchFunctionMode):
    """Inside, each function of torch waits for the parameters that it is given."""

    def __init__(self, late: Late) -> None:
        super().__init__()
        self._late = late

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._late.late and func not in _ABOUT:
            self._look(args)
            if kwargs:
                self._look(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _look(self, given: Iterable[Any]) -> None:
        for one in given:
            if isinstance(one, Tensor):
                self._late.arrive(one)
            elif isinstance(one, list | tuple):
                self._look(one)
            elif callable(one) and not isinstance(one, type):
                self._late.settle()  # inside it nothing waits


class Hook:
    """A hook of a model that a copy of it (averaged weights, say) does not have: that is a plain model."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = method

    def __call__(self, *given: object) -> None:
        if self._method is not None:
            self._method(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()
