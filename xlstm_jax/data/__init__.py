"""Raw text and seeded tasks to batches: NumPy only, no model, no accelerator.

A data set is rows by index: row i is a pure function of i, so the position of a run in its data
is one integer, shuffling is a permutation of indices, and any number of hosts can share the rows.
"""

from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.data.config import SPLITS, DataConfig
from xlstm_jax.data.loader import DATASETS, batch_at, batches, eval_batches, load
from xlstm_jax.data.windows import Windows

__all__ = [
    "DATASETS",
    "SPLITS",
    "Batch",
    "DataConfig",
    "Examples",
    "Windows",
    "batch_at",
    "batches",
    "eval_batches",
    "load",
]
