"""Qwen3NextForCausalLM with dense feed-forward layers: gated delta nets and gated attention.

Source of the layout: the public model class and config of the package `transformers`, 5.24.
"""

from collections.abc import Sequence
from typing import Any

from xlstm_jax.convert.families import llama
from xlstm_jax.convert.families.record import (
    PLAIN,
    Family,
    instead_of,
    num_layers,
    require_silu,
    same_eps,
    sizes,
)
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.joined import Joined, joined
from xlstm_jax.convert.names import Rule, module_rules
from xlstm_jax.convert.tensors import Source
from xlstm_jax.modules.baselines.options import GatedDeltaConfig
from xlstm_jax.modules.config import LMConfig

BLOCK = llama.BLOCK
LETTERS = {"linear_attention": "d", "full_attention": "a"}
_EXPERTS = "decoder_sparse_step moe_intermediate_size shared_expert_intermediate_size"
_EXPERTS += " num_experts_per_tok norm_topk_prob output_router_logits router_aux_loss_coef"


def _pattern(fields: Fields, num_blocks: int) -> str:
    types, every = fields.get("layer_types", None), fields.count("full_attention_interval", 4)
    if types is None:
        return "".join("d" if (n + 1) % every else "a" for n in range(num_blocks))
    is_list = isinstance(types, Sequence) and not isinstance(types, str)
    fits = is_list and len(types) == num_blocks and all(t in list(LETTERS) for t in types)
    what = f"a list of {num_blocks} of {', '.join(LETTERS)}"
    fields.require("layer_types", types, what, fits=fits)
    return "".join(LETTERS[kind] for kind in types)


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    model, num_blocks = sizes(fields, dtype), num_layers(fields, source)
    experts, way_out = fields.get("num_experts", 512), "only dense models are supported"
    fields.require("num_experts", experts, "0", way_out, fits=experts == 0)
    fields.ignore("initializer_range", "mlp_only_layers", *_EXPERTS.split())  # those of experts
    require_silu(fields)
    base, share = llama.rotary_fields(fields, 0.25)
    eps = fields.positive("rms_norm_eps", llama.NORM_EPS)
    ffn_dim = fields.size("intermediate_size", 5632)
    common: dict[str, Any] = dict(norm_eps=eps, norm_offset=True, ffn_dim=ffn_dim)
    heads = fields.size("linear_num_value_heads", 32)
    qk_heads = fields.size("linear_num_key_heads", 16)
    what = f"a divisor of linear_num_value_heads={heads}"
    fields.require("linear_num_key_heads", qk_heads, what, fits=heads % qk_heads == 0)
    return LMConfig(
        **model,
        pattern=_pattern(fields, num_blocks),
        gated_delta=GatedDeltaConfig(
            num_heads=heads,
            num_qk_heads=qk_heads,
            qk_dim=fields.size("linear_key_head_dim", 128),
            v_dim=fields.size("linear_value_head_dim", 128),
            conv_width=fields.size("linear_conv_kernel_dim", 4),
            **common,
        ),
        attention=llama.attention(
            fields,
            heads=fields.size("num_attention_heads", 16),
            head_dim=256,
            kv_heads=2,
            cache_size=fields.count("max_position_embeddings", 32768),
            rotary_base=base,
            rotary_fraction=share,
            qk_norm=True,
            output_gate=True,
            **common,
        ),
        final_norm="rms_offset",
        final_norm_eps=eps,
    )


def _write(cfg: LMConfig) -> dict[str, Any]:
    options, attention = cfg.gated_delta, cfg.attention
    K, V = options.widths(cfg.dim)
    types = {letter: kind for kind, letter in LETTERS.items()}
    return llama.attention_fields(cfg) | {
        "layer_types": [types[letter] for letter in cfg.pattern],
        "intermediate_size": cfg.options_of(cfg.pattern[0]).ffn_width(cfg.dim),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(attention.rotary_base),
            "partial_rotary_factor": float(attention.rotary_fraction),
        },
        "linear_num_value_heads": options.num_heads,
        "linear_num_key_heads": options.qk_heads,
        "linear_key_head_dim": K,
        "linear_value_head_dim": V,
        "linear_conv_kernel_dim": options.conv_width,
        "num_experts": 0,
    }


def _demands(cfg: LMConfig) -> dict[str, bool]:
    demands = instead_of({"final_norm": "rms_offset"} | PLAIN, cfg)
    if "a" in cfg.pattern:
        own = {"qk_norm": True, "output_gate": True, "norm_offset": True}
        demands |= llama.attention_demands(cfg, **own) | same_eps(cfg, "attention")
    if "d" in cfg.pattern:
        demands |= instead_of({"norm_offset": True}, cfg.gated_delta, "gated_delta.")
        demands |= same_eps(cfg, "gated_delta")
    widths = {letter: cfg.options_of(letter).ffn_width(cfg.dim) for letter in set(cfg.pattern)}
    demands[f"ffn_dim that differs between letters, {widths}"] = len(set(widths.values())) == 1
    return demands


def _joined(cfg: LMConfig) -> tuple[Joined, ...]:
    mixer, groups = BLOCK + "linear_attn.", cfg.gated_delta.qk_heads
    return (
        joined(mixer + "in_proj_qkvz", "q", "k", "v", "z", groups=groups),
        joined(mixer + "in_proj_ba", "b", "a", groups=groups),
        joined(mixer + "conv1d", "q", "k", "v"),
        joined(BLOCK + "self_attn.q_proj", "q", "gate", groups=cfg.attention.num_heads),
    )


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    letters="da",
    base="model.",
    rules=(
        *llama.top_rules("offset"),
        *module_rules(
            (BLOCK, "stack/a/"),
            ("input_layernorm", "norm_attention", "offset"),
            ("self_attn.q_proj.q", "attention/q", "dense"),
            ("self_attn.q_proj.gate", "attention/output_gate", "dense"),
            ("self_attn.k_proj", "attention/k", "dense"),
            ("self_attn.v_proj", "attention/v", "dense"),
            ("self_attn.q_norm", "attention/q_norm", "offset"),
            ("self_attn.k_norm", "attention/k_norm", "offset"),
            ("self_attn.o_proj", "attention/out_proj", "dense"),
            ("post_attention_layernorm", "norm_ffn", "offset"),
            *llama.MLP,
        ),
        *module_rules(
            (BLOCK, "stack/d/"),
            ("input_layernorm", "norm_mixer", "offset"),
            ("linear_attn.in_proj_qkvz.q", "gated_delta/q", "dense"),
            ("linear_attn.in_proj_qkvz.k", "gated_delta/k", "dense"),
            ("linear_attn.in_proj_qkvz.v", "gated_delta/v", "dense"),
            ("linear_attn.in_proj_qkvz.z", "gated_delta/gate", "dense"),
            ("linear_attn.in_proj_ba.b", "gated_delta/beta", "dense"),
            ("linear_attn.in_proj_ba.a", "gated_delta/decay", "dense"),
            *((f"linear_attn.conv1d.{p}", f"gated_delta/conv_{p}", "convolution") for p in "qkv"),
            ("linear_attn.norm", "gated_delta/norm", "scale"),
            ("linear_attn.out_proj", "gated_delta/out_proj", "dense"),
            ("post_attention_layernorm", "norm_ffn", "offset"),
            *llama.MLP,
        ),
        *(
            Rule(f"{BLOCK}linear_attn.{name}", f"stack/d/gated_delta/{name}", "same")
            for name in ("dt_bias", "A_log")
        ),
    ),
    read=_read,
    write=_write,
    demands=_demands,
    joined=_joined,
)
