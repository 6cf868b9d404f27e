"""Sequence ops: one function per op, which selects an implementation."""

from xlstm_jax.ops.conv import causal_conv
from xlstm_jax.ops.cross_entropy import CrossEntropy, cross_entropy
from xlstm_jax.ops.dense import dense, grouped_dense
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.ops.embed import embed
from xlstm_jax.ops.lstm import lstm
from xlstm_jax.ops.mlstm.api import mlstm
from xlstm_jax.ops.norm import layer_norm, multi_head_norm, rms_norm, soft_cap
from xlstm_jax.ops.registry import implementations
from xlstm_jax.ops.slstm.api import slstm

__all__ = [
    "CrossEntropy",
    "causal_conv",
    "cross_entropy",
    "dense",
    "document_starts",
    "embed",
    "grouped_dense",
    "implementations",
    "layer_norm",
    "lstm",
    "mlstm",
    "multi_head_norm",
    "rms_norm",
    "slstm",
    "soft_cap",
]
