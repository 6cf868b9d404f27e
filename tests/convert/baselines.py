"""Shared by tests of the baselines of `transformers`: folders, and models of other shapes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from xlstm_jax.modules import LMConfig
from xlstm_jax.modules.baselines.options import (
    AttentionConfig,
    GatedDeltaConfig,
    Mamba2Config,
    MambaConfig,
    RWKV4Config,
)
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.sharding import path_name

GOLDEN = {
    "llama": "llama_tiny",
    "mamba": "mamba_tiny",
    "rwkv": "rwkv4_tiny",
    "mamba2": "mamba2_tiny",
    "qwen3_next": "qwen3_next_tiny",
}
"""Family -> folder of the golden vectors."""

_QWEN = dict(norm_offset=True, ffn_dim=56)
_FIELDS: Mapping[str, dict[str, Any]] = {
    "llama": dict(
        pattern="aaa",
        tie_embeddings=True,
        final_norm="rms",
        final_norm_eps=1e-6,
        attention=AttentionConfig(
            num_kv_heads=1, head_dim=6, use_bias=True, rotary_base=5e5, cache_size=128, ffn_dim=56
        ),
    ),
    "mamba": dict(
        pattern="bbb",
        final_norm="rms",
        mamba=MambaConfig(
            inner_dim=108, state_dim=4, dt_rank=5, conv_width=3, conv_bias=False, use_bias=True
        ),
    ),
    "rwkv": dict(
        pattern="rrr",
        embedding_norm="layer_scale",
        final_norm="layer_scale",
        final_norm_bias=True,
        rwkv4=RWKV4Config(inner_dim=56, ffn_dim=72),
    ),
    "mamba2": dict(
        pattern="BBB",
        tie_embeddings=True,
        final_norm="rms",
        mamba2=Mamba2Config(
            inner_dim=72,
            head_dim=12,
            state_dim=10,
            groups=3,
            conv_width=3,
            conv_bias=False,
            chunk_size=16,
        ),
    ),
    "qwen3_next": dict(
        pattern="ddad",
        tie_embeddings=True,
        final_norm="rms_offset",
        final_norm_eps=1e-6,
        attention=AttentionConfig(
            num_heads=6,
            num_kv_heads=3,
            head_dim=16,
            use_bias=True,
            rotary_fraction=0.25,
            cache_size=128,
            qk_norm=True,
            output_gate=True,
            **_QWEN,
        ),
        gated_delta=GatedDeltaConfig(
            num_heads=6, num_qk_heads=3, qk_dim=10, v_dim=6, conv_width=3, **_QWEN
        ),
    ),
}

OTHERS = {name: LMConfig(vocab_size=83, dim=36, **fields) for name, fields in _FIELDS.items()}
"""Family -> a model with biases, groups and widths that its golden folder lacks."""


def changed(name: str, **fields: Any) -> LMConfig:
    """The other model of a family; a field of its blocks is written `attention__window`."""
    cfg = OTHERS[name]
    for field, value in fields.items():
        group, _, option = field.partition("__")
        if option:
            value = dataclasses.replace(getattr(cfg, group), **{option: value})
        cfg = dataclasses.replace(cfg, **{group: value})
    return cfg


def random_params(cfg: LMConfig) -> Any:
    """Random parameters that all affect the results, of a scale that keeps activations near 1."""
    rng = np.random.default_rng(3)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name, x = path_name(path), rng.standard_normal(shape.shape).astype(np.float32)
        if name.endswith("kernel"):
            return x / np.float32(math.sqrt(shape.shape[-2]))
        if name.endswith("embedding"):
            return x
        offset = {"scale": 1.0, "A_log": -1.5}.get(name.split("/")[-1], 0.0)
        return np.float32(0.3) * x + np.float32(offset)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(cfg))
