"""The loss of all workers' samples as a function of the parameters: value, gradient, products with the Hessian.

Each worker goes through its own samples; what they find is summed, weighted by samples, so that n workers see the
surface that one worker sees with all the data.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from dtrain import generators, trees
from dtrain.buckets import describe
from dtrain.comm import collectives
from dtrain.comm.base import Backend, dtype_name
from dtrain.comm.solo import Solo
from dtrain.errors import LayoutError, UsageError
from dtrain.largebatch import derivatives
from dtrain.largebatch.part import count_samples

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> mean loss over the samples of the batch."""

_KEY = "metric/curvature"
_STOP, _GRADIENT, _PRODUCT = range(3)  # what worker 0 asks the others for


class LossSurface:
    """The mean loss over the samples of all workers, as a function of the model's parameters that require a gradient.

        surface = LossSurface(model, loss, Part(data, comm), comm=comm)
        surface.value()              # the mean loss
        surface.gradient()           # (P,)
        surface.hessian_vector(v)    # (P,), for v (P,)

    Vectors are flat, in the order of `model.named_parameters()`, of the parameters' type and on their device. The model
    may go on training: what is asked for is measured where it then stands. It is in evaluation mode meanwhile, so that
    batch norm normalises by its running statistics and dropout is off. Parameters, `.grad`, modes and random numbers
    are as before afterwards, also when something raises, and hooks on the parameters stay silent: a model tied by
    `dtrain.replicate` can be measured between its steps.

    All workers make the same calls. Results are the same bits on all of them; where a vector is given, worker 0's
    counts.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[Any],
        *,
        comm: Backend | None = None,
        samples: Callable[[Any], int] = count_samples,
    ) -> None:
        """
        Args:
            model: the same on every worker.
            loss: mean over the samples of a batch, as for a Trainer.
            batches: this worker's, on the model's device; gone through once for each value, gradient or product: a
                list, a `Part`, a loader, no iterator. Some workers may have none. They must not change: no random
                augmentation.
            comm: from `dtrain.connect()`; None: this worker alone.
            samples: how many samples a batch has.

        Raises:
            UsageError: an iterator; no samples; parameters of half precision or of several types; none that requires a
                gradient; batch norm without running statistics: its loss depends on how the data are cut.
            LayoutError: other models on other workers.
        """
        if isinstance(batches, Iterator):
            raise UsageError("batches is an iterator and can be read once only: give a list, a Part or a loader")
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise UsageError("no parameter of the model requires a gradient: nothing to measure along")
        kinds = {p.dtype for p in named.values()}
        if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
            names = ", ".join(sorted(dtype_name(k) for k in kinds))
            raise UsageError(f"parameters are {names}: curvature is measured in float32 or float64, say model.float()")
        for path, layer in model.named_modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is None:
                raise UsageError(f"{path} has no running statistics: the loss would depend on how the data are cut")
        self.model, self.comm = model, comm or Solo()
        self.dtype, self.device = kinds.pop(), next(iter(named.values())).device
        self.size = sum(p.numel() for p in named.values())
        """P, the number of parameters along which the loss is looked at."""
        self._names = tuple(named)
        self._loss, self._batches, self._count = loss, batches, samples
        collectives.agree(self.comm, describe(list(named.items())), "models that are measured")
        with _same_numbers():
            self._mine = sum(map(samples, batches))
        self.samples = int(collectives.sum_numbers(self.comm, [self._mine], _KEY)[0])
        """N, over all workers."""
        if not self.samples:
            raise UsageError("no worker has a sample to measure on")

    # -- what users call ----------------------------------------------------------------------------------------------

    def value(self, at: Tensor | None = None) -> float:
        """The mean loss, where the model stands or at the parameters `at` (P,).

        Raises:
            LayoutError: parameters or running statistics are not the same on all workers.
            UsageError: another number of samples than before, a loss that is no scalar.
        """
        self._check()
        return self._measure(self._given(at), None, 0)[0]

    def gradient(self, at: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss (P,). Raises as `value`."""
        self._check()
        return self._slope(self._given(at))[1]

    def hessian_vector(self, v: Tensor, at: Tensor | None = None) -> Tensor:
        """Product of the Hessian of the mean loss with v (P,): (P,). Exact, no finite difference. Raises as `value`."""
        self._check()
        return self._product(self._given(v), self._given(at))

    def hessian(self, *, at: Tensor | None = None, max_parameters: int = 4096, rows_at_once: int = 64) -> Tensor:
        """The Hessian of the mean loss (P, P), summed over workers in one message of P² numbers.

        Args:
            rows_at_once: so many rows share a backward (torch's vmap); 1: each has its own, for models with operations
                that cannot be batched.

        Raises:
            UsageError: more than `max_parameters`; else as `value`.
        """
        if self.size > max_parameters:
            raise UsageError(
                f"the full Hessian of {self.size} parameters has {self.size**2:.1e} numbers: ask top_eigenvalues, "
                f"trace or spectral_density, or raise max_parameters={max_parameters}"
            )
        self._check()
        term = functools.partial(derivatives.rows, at_once=rows_at_once)
        matrix = self._measure(self._given(at), term, self.size**2)[1].view(self.size, self.size)
        return (matrix + matrix.T) / 2  # rounding leaves it a little lopsided

    def point(self) -> Tensor:
        """The parameters as they are now (P,), a copy."""
        parameters = [p.detach() for p in self._parameters().values()]
        return derivatives.flat(parameters, parameters[0]).clone()

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (P,) as views of it in the shapes of the parameters: which layer an eigenvector lives in, say."""
        shapes = {n: p.shape for n, p in self._parameters().items()}
        parts = vector.split([shape.numel() for shape in shapes.values()])
        return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}

    def led(self, run: Callable[[Oracle], Any], *, progress: str = "") -> Any:
        """What `run(oracle)` returns, run on worker 0 alone, while the others answer what it asks the oracle.

        However an algorithm decides, whatever rounds differently on another host: all workers evaluate the same points,
        as often. The result is a tree as `dtrain.trees` keeps it; the same bits on all workers, tensors on the CPU.

        Args:
            progress: what to call the bar that counts passes over the data, on worker 0; empty: no bar.
        """
        self._check()
        data = b""
        if self.comm.rank == 0:
            with tqdm(desc=progress, unit="pass", disable=not progress) as bar:
                data = trees.dumps(run(Oracle(self, bar.update)))
            self._answer(_STOP)
        else:
            while self._answer(_STOP) is not None:
                pass
        return trees.loads(collectives.broadcast_bytes(self.comm, data, _KEY), "what worker 0 found")

    def _answer(self, kind: int, vector: Tensor | None = None) -> tuple[float, Tensor] | None:
        """What worker 0 asks for within `led`; the others' arguments do not count. None: it asks no more."""
        request = torch.zeros(1 + self.size, dtype=self.dtype, device=self.device)
        request[0] = kind
        if vector is not None:
            request[1:] = vector
        collectives.broadcast(self.comm, [request], _KEY)
        if request[0] == _PRODUCT:
            return 0.0, self._product(request[1:])
        return self._slope(request[1:]) if request[0] == _GRADIENT else None

    # -- the passes over the data -------------------------------------------------------------------------------------

    def _slope(self, at: Tensor | None) -> tuple[float, Tensor]:
        return self._measure(at, derivatives.gradient, self.size)

    def _product(self, v: Tensor | None, at: Tensor | None = None) -> Tensor:
        assert v is not None  # noqa: S101
        parts = list(self.by_name(v).values())
        product = self._measure(at, functools.partial(derivatives.product, parts=parts), self.size)[1]
        if not product.isfinite().all():
            raise UsageError("a product with the Hessian is not finite: neither is the loss near here, or its slope")
        return product

    def _measure(
        self, at: Tensor | None, term: Callable[[Tensor, list[Tensor]], Tensor] | None, numel: int
    ) -> tuple[float, Tensor]:
        """Means over all samples: the loss, and what `term` makes of a batch's loss and the parameters (numel,)."""
        leaves = self._leaves(at)
        total = torch.zeros(1 + numel, dtype=self.dtype, device=self.device)

        def go_through() -> None:
            seen = 0
            for batch in self._batches:
                count = self._count(batch)
                if not count:
                    continue
                seen += count
                mean = self._loss(self.model, batch)
                if mean.dim() or not mean.requires_grad:
                    what = f"of shape {tuple(mean.shape)}" if mean.dim() else "a number that does not"
                    raise UsageError(f"the loss must be a scalar that depends on the parameters; it is {what}")
                total[0] += mean.detach().to(total) * (count / self.samples)
                if term is not None:
                    total[1:].add_(term(mean, list(leaves.values())).to(total), alpha=count / self.samples)
            if seen != self._mine:
                raise UsageError(f"the batches had {self._mine} samples at first and {seen} now: give a list of them")

        with self._as_in_evaluation():
            functional_call(_Within(self.model), self._slots(leaves), (go_through,), tie_weights=False)
        self.comm.all_reduce(total, _KEY).wait()
        return total[0].item(), total[1:]

    def _leaves(self, at: Tensor | None) -> dict[str, Tensor]:
        """The parameters, as other tensors: what hangs on the model's own does not notice."""
        values = self._parameters() if at is None else self.by_name(at)
        devices = [p.device for p in self._parameters().values()]
        return {n: v.detach().to(d).requires_grad_() for (n, v), d in zip(values.items(), devices, strict=True)}

    def _slots(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leaves by each name that a parameter has, but once where modules are shared: torch.func (2.13) swaps what
        is named twice and swaps it back once, so that a model keeps the leaf."""
        of = {id(p): leaf for p, leaf in zip(self._parameters().values(), leaves.values(), strict=True)}
        return {
            ".".join(filter(None, ("model", path, name))): of[id(p)]
            for path, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in of
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if tuple(named) != self._names:
            odd = sorted(set(named) ^ set(self._names))
            raise UsageError(f"{odd[0]} was frozen, unfrozen or added since the surface was made: make a new one")
        return named

    def _given(self, vector: Tensor | None) -> Tensor | None:
        """A vector that a caller gave: worker 0's."""
        if vector is None:
            return None
        if vector.shape != (self.size,):
            raise UsageError(f"a vector of shape {tuple(vector.shape)} for {self.size} parameters: give ({self.size},)")
        own = vector.detach().to(self.device, self.dtype, copy=True)
        collectives.broadcast(self.comm, [own], _KEY)
        return own

    def _check(self) -> None:
        """What is measured must be one model."""
        floats = [(n, b) for n, b in self.model.named_buffers() if b.is_floating_point()]
        found = collectives.first_difference(self.comm, [*self.model.named_parameters(), *floats])
        if found:
            name, ranks = found
            raise LayoutError(
                f"{name} is not the same on all workers (not on {ranks}): a surface is that of one model. Running "
                "statistics of plain batch norm are each worker's own: measure within "
                "dtrain.norm.merged_statistics(model, comm)"
            )

    @contextlib.contextmanager
    def _as_in_evaluation(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
        with contextlib.ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # a compiled graph has no second derivative
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if recurrent and self.device.type == "cuda":  # nor has cuDNN's
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # nor have the other kernels of attention
            stack.enter_context(_same_numbers())
            stack.enter_context(torch.enable_grad())
            try:
                self.model.eval()
                yield
            finally:
                for module, training in modes:
                    module.training = training


@dataclass(frozen=True)
class Oracle:
    """What an algorithm on worker 0 may ask of all workers: see `LossSurface.led`."""

    surface: LossSurface
    count: Callable[[], object]
    """Called for each pass over the data."""

    def product(self, v: Tensor) -> Tensor:
        """The Hessian, where the model stands, times v (P,)."""
        return self._ask(_PRODUCT, v)[1]

    def slope(self, at: Tensor) -> tuple[float, Tensor]:
        """Mean loss and its gradient (P,) at the parameters `at` (P,)."""
        return self._ask(_GRADIENT, at)

    def _ask(self, kind: int, vector: Tensor) -> tuple[float, Tensor]:
        answer = self.surface._answer(kind, vector)
        assert answer is not None  # noqa: S101
        self.count()
        return answer


class _Within(nn.Module):
    """The model with other parameters while a function runs: backward too, where checkpointing calls layers again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], None]) -> None:
        run()


@contextlib.contextmanager
def _same_numbers() -> Iterator[None]:
    """Within, random numbers are drawn that are drawn again after: a shuffling loader's, say."""
    state = generators.state()
    try:
        yield
    finally:
        generators.set_state(state)
