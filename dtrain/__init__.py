"""Data-parallel training on PyTorch: one trainer over a parameter server, ring all-reduce, or threads."""

from dtrain.comm.base import Backend
from dtrain.connect import connect
from dtrain.jobs import run
from dtrain.replica import Replica, replicate

__version__ = "0.1.0"

__all__ = ["Backend", "Replica", "connect", "replicate", "run"]
