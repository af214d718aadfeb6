"""Batch normalisation: every kind, over any backend, with one knob for how many samples share statistics.

convert, revert         statistics of `norm_batch` samples: ghost groups, plain, or synchronised over workers
precise, adapt          running statistics computed again: with the weights as they are, or for other data
freeze, renorm, virtual, per_domain, replace_with_group_norm
                        other kinds in the place of a model's layers
no_update, domain       context managers for single forwards
diagnose, drift, merged_statistics
                        what running statistics are worth, how far workers are apart, and all workers' together
fold                    batch norm as part of the layer before it, for inference
momentum, keras_batch_norm
                        Keras's and TensorFlow's conventions
"""

from dtrain.norm.convert import WORDS, Sharing, convert, sharing
from dtrain.norm.diagnose import Diagnosis, diagnose
from dtrain.norm.domains import DomainBatchNorm, domain, per_domain
from dtrain.norm.fold import Folded, fold
from dtrain.norm.frozen import FrozenBatchNorm, freeze
from dtrain.norm.ghost import GhostBatchNorm
from dtrain.norm.group import replace_with_group_norm
from dtrain.norm.keras import keras_batch_norm, momentum
from dtrain.norm.layer import revert
from dtrain.norm.merge import Drift, drift, merged_statistics
from dtrain.norm.modes import no_update
from dtrain.norm.precise import Changes, adapt, precise
from dtrain.norm.renorm import BatchRenorm, renorm
from dtrain.norm.sync import SyncBatchNorm
from dtrain.norm.virtual import VirtualBatchNorm, virtual

__all__ = [
    "WORDS",
    "BatchRenorm",
    "Changes",
    "Diagnosis",
    "DomainBatchNorm",
    "Drift",
    "Folded",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "Sharing",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "adapt",
    "convert",
    "diagnose",
    "domain",
    "drift",
    "fold",
    "freeze",
    "keras_batch_norm",
    "merged_statistics",
    "momentum",
    "no_update",
    "per_domain",
    "precise",
    "renorm",
    "replace_with_group_norm",
    "revert",
    "sharing",
    "virtual",
]
