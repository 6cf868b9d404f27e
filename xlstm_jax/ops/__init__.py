"""Sequence ops: one function per op, which selects an implementation."""

from xlstm_jax.ops.attention.api import attention
from xlstm_jax.ops.conv import causal_conv, shift
from xlstm_jax.ops.cross_entropy import CrossEntropy, cross_entropy
from xlstm_jax.ops.dense import dense, grouped_dense
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.ops.embed import embed
from xlstm_jax.ops.gated_delta import gated_delta_rule
from xlstm_jax.ops.lstm import lstm
from xlstm_jax.ops.mlstm.api import mlstm
from xlstm_jax.ops.norm import layer_norm, multi_head_norm, rms_norm, soft_cap, unit_norm
from xlstm_jax.ops.registry import implementations
from xlstm_jax.ops.selective_scan import selective_scan
from xlstm_jax.ops.slstm.api import slstm
from xlstm_jax.ops.ssd import ssd
from xlstm_jax.ops.wkv import wkv

__all__ = [
    "CrossEntropy",
    "attention",
    "causal_conv",
    "cross_entropy",
    "dense",
    "document_starts",
    "embed",
    "gated_delta_rule",
    "grouped_dense",
    "implementations",
    "layer_norm",
    "lstm",
    "mlstm",
    "multi_head_norm",
    "rms_norm",
    "selective_scan",
    "shift",
    "slstm",
    "soft_cap",
    "ssd",
    "unit_norm",
    "wkv",
]
