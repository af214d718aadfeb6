"""Parameter servers of other libraries, which `step.py` measures beside dtrain's.

torch RPC: the parameter server of torch's tutorial "Implementing Batch RPC Processing Using Asynchronous Executions".
A process of its own holds parameters and optimizer. A trainer computes its gradients, sends them in one call, and is
answered with the new parameters when those of all trainers have come: the last call adds, steps, and answers all.

Taken from the tutorial: `async_execution`, one future for all trainers, the lock, one call a step with a list of
gradients (one flat tensor was slower). Changed, to leave out what only costs time:

- the answer is a list of tensors, where the tutorial pickles the module;
- the first gradients to come are taken as they are, where it adds to zeroed ones;
- each trainer divides its loss by the number of trainers, where the server divides all gradients;
- the model's parameters take the memory that the answer came in.

Transport: TensorPipe's sockets on the loopback interface, and for tensors whatever it finds best, on one Linux host
`process_vm_readv`. Its shared-memory transport carries only small messages and asks for them in an endless loop, which
would take processor time from whoever else has the turn.

Ray: not measured. Its documented pattern has actors that Ray starts itself, and so could not take turns with others in
the processes of this comparison.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import torch
import torch.distributed.rpc as rpc  # noqa: TID251  (what is measured here, and no part of dtrain)
from torch import Tensor, nn
from torch.distributed.rpc.functions import async_execution  # noqa: TID251
from torch.futures import Future
from torch.optim import Optimizer

from dtrain import env
from dtrain.processes import cores, remove

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]

NAMES = {"rpc": "torch RPC", "ray": "Ray"}

SERVER = "server"
TIMEOUT_S = 60.0
"""Longest wait: for the others at the start, and for the answer to a call."""

_PRELOADED = ["torch", "torch._dynamo", "dtrain", "dtrain.jobs"]
"""As in `dtrain.run`: the first to start a process decides what later ones need not import."""


def absent(name: str) -> str | None:
    """Why this peer cannot be measured here; None if it can."""
    if name == "rpc":
        return None if rpc.is_available() else "this build of torch has no RPC"
    if importlib.util.find_spec("ray") is None:
        return "ray is not installed"
    return "ray is installed, but starts its workers itself: it cannot take turns with others in these processes"


# -- the server's process ---------------------------------------------------------------------------------------------


class _Batch:
    """Parameters and optimizer, and the gradients of a step as they come."""

    def __init__(self, workers: int, make_optimizer: MakeOptimizer) -> None:
        self._workers = workers
        self._make_optimizer = make_optimizer
        self._lock = threading.Lock()
        self._arrived = 0
        self._answer: Future[list[Tensor]] = Future()

    def begin(self, parameters: list[Tensor]) -> None:
        self._parameters = [nn.Parameter(parameter) for parameter in parameters]
        self._optimizer = self._make_optimizer(self._parameters)

    def add(self, gradients: list[Tensor]) -> Future[list[Tensor]]:
        """Add the gradients of one trainer. What is returned has a value when all have come."""
        with self._lock:
            answer = self._answer
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if self._arrived == 0 or parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)
            self._arrived += 1
            if self._arrived == self._workers:
                self._optimizer.step()
                self._arrived = 0
                self._answer = Future()
                answer.set_result([parameter.detach() for parameter in self._parameters])
        return answer


_batch: _Batch  # of this process, if it is a server


def _begin(parameters: list[Tensor]) -> None:
    """Called by one trainer, before any gradient comes."""
    _batch.begin(parameters)


@async_execution
def _update_and_fetch(gradients: list[Tensor]) -> Future[list[Tensor]]:
    """Called by all trainers, once a step."""
    return _batch.add(gradients)


def _serve(folder: str, workers: int, make_optimizer: MakeOptimizer, ready: Connection) -> None:
    """The server's process: it ends when all trainers have left, or when the process that started it is gone."""
    global _batch
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(cores())  # the workers wait meanwhile
    _batch = _Batch(workers, make_optimizer)
    ready.send("ready")
    _join(SERVER, folder, workers, workers)
    rpc.shutdown()  # waits for all trainers to call it


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        remove(folder)
        os._exit(1)


def _join(name: str, folder: str, rank: int, workers: int) -> None:
    """Meet the others in a file of the folder."""
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        env.set_default(variable, env.LOOPBACK)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{folder}/rpc", rpc_timeout=TIMEOUT_S, _transports=["uv"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)  # torch's own call
        rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


@contextlib.contextmanager
def rpc_server(folder: str, workers: int, make_optimizer: MakeOptimizer) -> Iterator[None]:
    """A server for that many trainers, which meet it in the folder. It is gone afterwards, whatever happened to them.

    The folder's name starts with `dtrain-`: if this process is killed, the server removes it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(folder, workers, make_optimizer, theirs), daemon=True)
    process.start()
    theirs.close()
    grace_s, started = 0.0, False
    try:
        with contextlib.suppress(EOFError):
            started = ours.poll(TIMEOUT_S) and ours.recv() == "ready"
        if not started:
            raise RuntimeError("the server of torch RPC did not start")
        yield
        grace_s = 10.0  # all trainers have left, and so will the server
    finally:
        process.join(grace_s)
        process.kill()
        process.join()
        process.close()
        ours.close()


# -- a trainer --------------------------------------------------------------------------------------------------------


class RpcTrainer:
    """A worker of torch's RPC parameter server. `with` leaves it."""

    def __init__(self, model: nn.Module, folder: str, rank: int, workers: int) -> None:
        """Meet the server. The first trainer gives it the parameters."""
        self._parameters = list(model.parameters())
        self._workers = workers
        _join(f"trainer{rank}", folder, rank, workers)
        if rank == 0:
            rpc.rpc_sync(SERVER, _begin, args=([p.detach().cpu() for p in self._parameters],))

    def step(self, loss: Tensor) -> None:
        """Backward; the gradients to the server; its new parameters into the model. First trainer 0 must be there.

        On CUDA gradients and parameters are copied by way of the processor, as in the tutorial.
        """
        (loss / self._workers).backward()
        gradients = [parameter.grad.cpu() for parameter in self._parameters if parameter.grad is not None]
        fresh = rpc.rpc_sync(SERVER, _update_and_fetch, args=(gradients,))
        for parameter, new in zip(self._parameters, fresh, strict=True):
            parameter.grad = None
            if parameter.is_cuda:
                parameter.data.copy_(new)
            else:
                parameter.data = new

    def close(self, *, failed: bool = False) -> None:
        """Leave: together with all others, or at once after a failure."""
        rpc.shutdown(graceful=not failed)

    def __enter__(self) -> RpcTrainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)
