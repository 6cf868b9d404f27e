"""Batches of raw text and synthetic tasks, in NumPy only; example i is a pure function of i."""

from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.data.config import SPLITS, DataConfig
from xlstm_jax.data.loader import DATASETS, batch_at, batches, dataset, eval_batches, load, load_all
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
    "dataset",
    "eval_batches",
    "load",
    "load_all",
]
