"""Batch normalisation over workers: `convert` a model, or merge the running statistics of plain layers."""

from dtrain.norm.convert import NORM_BATCHES, convert, revert
from dtrain.norm.merge import merged_statistics
from dtrain.norm.sync import SyncBatchNorm

__all__ = ["NORM_BATCHES", "SyncBatchNorm", "convert", "merged_statistics", "revert"]
