"""Data-parallel training on PyTorch: one trainer over a parameter server, ring all-reduce, or threads."""

from dtrain import norm
from dtrain.comm.base import Backend
from dtrain.comm.hosts import ServerUpdate
from dtrain.config import TrainConfig
from dtrain.connect import connect
from dtrain.data import Loader
from dtrain.errors import CommError, DtrainError
from dtrain.evaluate import evaluate
from dtrain.hooks import Hook, State
from dtrain.jobs import run
from dtrain.replica import Replica, replicate
from dtrain.sharded import ShardedUpdate
from dtrain.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "CommError",
    "DtrainError",
    "Hook",
    "Loader",
    "Replica",
    "ServerUpdate",
    "ShardedUpdate",
    "State",
    "TrainConfig",
    "Trainer",
    "connect",
    "evaluate",
    "norm",
    "replicate",
    "run",
]
