"""RwkvForCausalLM: RWKV-4.

Source of the layout: the public model class and config of the package `transformers`, 5.24.
"""

from typing import Any

from xlstm_jax.convert.families.record import (
    Family,
    instead_of,
    num_layers,
    same_eps,
    sizes,
)
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.names import Rule, module_rules
from xlstm_jax.convert.tensors import Source
from xlstm_jax.modules.baselines.options import RWKV4Config
from xlstm_jax.modules.config import LMConfig

NORM_EPS = 1e-5
"""Epsilon of the final norm, whatever the config says."""

BLOCK = "rwkv.blocks.{}."
_SHARES = {
    "attention": ("time_mix", ("key", "value", "receptance")),
    "feed_forward": ("channel_mix", ("key", "receptance")),
}


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    model, num_blocks = sizes(fields, dtype), num_layers(fields, source)
    eps, way_out = fields.positive("layer_norm_epsilon", NORM_EPS), "transformers applies that one"
    what = f"{NORM_EPS}, that of the final norm"
    fields.require("layer_norm_epsilon", eps, what, way_out, fits=eps == NORM_EPS)
    # The first two bound a GPU kernel. The last one halves the residual stream at inference, to
    # keep float16 in range; norms undo it, except for their epsilon.
    fields.ignore("context_length", "max_position_embeddings", "rescale_every")
    inner = fields.size_or("attention_hidden_size", model["dim"])
    ffn = fields.size_or("intermediate_size", 4 * model["dim"])
    return LMConfig(
        **model,
        pattern="r" * num_blocks,
        rwkv4=RWKV4Config(inner_dim=inner, ffn_dim=ffn, norm_eps=eps),
        embedding_norm="layer_scale",
        final_norm="layer_scale",
        final_norm_eps=eps,
        final_norm_bias=True,
    )


def _write(cfg: LMConfig) -> dict[str, Any]:
    return {
        "attention_hidden_size": cfg.rwkv4.width(cfg.dim),
        "intermediate_size": cfg.rwkv4.ffn_width(cfg.dim),
        "layer_norm_epsilon": float(cfg.final_norm_eps),
        "rescale_every": 0,
    }


def _demands(cfg: LMConfig) -> dict[str, bool]:
    norms = {"embedding_norm": "layer_scale", "final_norm": "layer_scale", "final_norm_bias": True}
    others = {"final_norm_eps": NORM_EPS, "logit_soft_cap": None}
    return instead_of(norms | others, cfg) | same_eps(cfg, "rwkv4")


def _share_rules() -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{BLOCK}{module}.time_mix_{name}", f"stack/r/{ours}/mix_{name}/share", "row")
        for module, (ours, names) in _SHARES.items()
        for name in names
    )


FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    letters="r",
    base="rwkv.",
    rules=(
        *module_rules(
            ("", ""),
            ("rwkv.embeddings", "token_embedding", "embedding"),
            ("rwkv.blocks.0.pre_ln", "embedding_norm", "scale"),
            ("rwkv.ln_out", "out_norm", "scale"),
            ("head", "lm_head", "dense"),
        ),
        *module_rules(
            (BLOCK, "stack/r/"),
            ("ln1", "norm_time", "scale"),
            ("attention.key", "time_mix/key", "dense"),
            ("attention.value", "time_mix/value", "dense"),
            ("attention.receptance", "time_mix/receptance", "dense"),
            ("attention.output", "time_mix/out_proj", "dense"),
            ("ln2", "norm_channel", "scale"),
            ("feed_forward.key", "channel_mix/key", "dense"),
            ("feed_forward.receptance", "channel_mix/receptance", "dense"),
            ("feed_forward.value", "channel_mix/value", "dense"),
        ),
        *_share_rules(),
        Rule(f"{BLOCK}attention.time_decay", "stack/r/time_mix/decay", "same"),
        Rule(f"{BLOCK}attention.time_first", "stack/r/time_mix/bonus", "same"),
    ),
    read=_read,
    write=_write,
    demands=_demands,
)
