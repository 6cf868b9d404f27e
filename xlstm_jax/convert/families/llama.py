"""LlamaForCausalLM: blocks of rotary attention and a gated feed-forward layer.

Source of the layout: the public model class and config of the package `transformers`, 5.24.
"""

from typing import Any

from xlstm_jax.convert.families.record import (
    PLAIN,
    Family,
    instead_of,
    num_layers,
    require_silu,
    same_eps,
    sizes,
    warn_of_training,
)
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.names import module_rules
from xlstm_jax.convert.tensors import Source
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.modules.config import LMConfig

NORM_EPS = 1e-6
BLOCK = "model.layers.{}."
MLP = (
    ("mlp.gate_proj", "ffn/proj_up_gate", "dense"),
    ("mlp.up_proj", "ffn/proj_up", "dense"),
    ("mlp.down_proj", "ffn/proj_down", "dense"),
)


def top_rules(norm: str):
    """Rules for the parameters outside of the blocks; `norm` is the kind of the final one."""
    return module_rules(
        ("", ""),
        ("model.embed_tokens", "token_embedding", "embedding"),
        ("model.norm", "out_norm", norm),
        ("lm_head", "lm_head", "dense"),
    )


def rotary_fields(fields: Fields, fraction: float) -> tuple[float, float]:
    """Base and fraction of the rotary positions, `fraction` by default.

    Older configs have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
    """
    name = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    fields.ignore("rope_scaling", "rope_parameters")
    rope = fields.nested(name) or Fields({}, f"{name} of the config")
    for key in ("rope_type", "type"):
        rope.require_equal(key, "default", "rotary positions are not scaled here")
    base = rope.positive("rope_theta", fields.value("rope_theta", 10_000.0))
    key = "partial_rotary_factor"
    share = rope.number(key, fields.value(key, fraction), minimum=0)
    rope.require(key, share, "at most 1", fits=share <= 1)
    rope.warn_unknown()
    return base, float(share)


def attention(
    fields: Fields, *, heads: int, head_dim: int, kv_heads: int, **options: Any
) -> AttentionConfig:
    """The options of attention blocks, with defaults of head_dim and num_key_value_heads."""
    head_dim = fields.size_or("head_dim", head_dim)
    kv_heads = fields.size_or("num_key_value_heads", kv_heads)
    what = f"a divisor of num_attention_heads={heads}"
    fields.require("num_key_value_heads", kv_heads, what, fits=heads % kv_heads == 0)
    warn_of_training(fields, "attention_dropout")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        use_bias=fields.flag("attention_bias", default=False),
        **options,
    )


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    model, num_blocks = sizes(fields, dtype), num_layers(fields, source)
    heads = fields.size("num_attention_heads")
    require_silu(fields)
    fields.require_equal("mlp_bias", False, "our feed-forward layer has no biases")
    base, share = rotary_fields(fields, 1.0)
    # transformers ignores a fraction here.
    fields.require("partial_rotary_factor", share, "1", fits=share == 1)
    eps = fields.positive("rms_norm_eps", NORM_EPS)
    fields.ignore("initializer_range", "pretraining_tp")
    # transformers requires it even if head_dim is given.
    what, fits = f"a divisor of hidden_size={model['dim']}", model["dim"] % heads == 0
    fields.require("num_attention_heads", heads, what, fits=fits)
    options = attention(
        fields,
        heads=heads,
        head_dim=model["dim"] // heads,
        kv_heads=heads,
        ffn_dim=fields.size("intermediate_size", 11008),
        cache_size=fields.count("max_position_embeddings", 2048),
        rotary_base=base,
        norm_eps=eps,
    )
    return LMConfig(
        **model,
        pattern="a" * num_blocks,
        attention=options,
        final_norm="rms",
        final_norm_eps=eps,
    )


def attention_fields(cfg: LMConfig) -> dict[str, Any]:
    """The fields that both families of attention have."""
    options = cfg.attention
    return {
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_width(cfg.dim),
        "attention_bias": options.use_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": options.cache_size,
        "rms_norm_eps": float(cfg.final_norm_eps),
    }


def _write(cfg: LMConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": float(cfg.attention.rotary_base)}
    ffn_dim = cfg.attention.ffn_width(cfg.dim)
    own = {"rope_parameters": rope, "intermediate_size": ffn_dim, "mlp_bias": False}
    return attention_fields(cfg) | own


def attention_demands(cfg: LMConfig, **expected: Any) -> dict[str, bool]:
    """Demands on attention blocks: no window, and the `expected` options."""
    sees_all = {"window": None, "num_sinks": 0}
    return instead_of(sees_all | expected, cfg.attention, "attention.")


def _demands(cfg: LMConfig) -> dict[str, bool]:
    own = {"rotary_fraction": 1.0, "qk_norm": False, "output_gate": False, "norm_offset": False}
    divides = cfg.dim % cfg.attention.num_heads == 0
    return {
        **attention_demands(cfg, **own),
        f"attention.num_heads={cfg.attention.num_heads} that does not divide dim": divides,
        **instead_of({"final_norm": "rms"} | PLAIN, cfg),
        **same_eps(cfg, "attention"),
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    letters="a",
    base="model.",
    rules=(
        *top_rules("scale"),
        *module_rules(
            (BLOCK, "stack/a/"),
            ("input_layernorm", "norm_attention", "scale"),
            ("self_attn.q_proj", "attention/q", "dense"),
            ("self_attn.k_proj", "attention/k", "dense"),
            ("self_attn.v_proj", "attention/v", "dense"),
            ("self_attn.o_proj", "attention/out_proj", "dense"),
            ("post_attention_layernorm", "norm_ffn", "scale"),
            *MLP,
        ),
    ),
    read=_read,
    write=_write,
    demands=_demands,
)
