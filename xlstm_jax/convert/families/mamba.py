"""MambaForCausalLM: blocks of a selective state space.

Source of the layout: the public model class and config of the package `transformers`, 5.24.
"""

import math
from typing import Any

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
from xlstm_jax.modules.baselines.options import MambaConfig
from xlstm_jax.modules.config import LMConfig

BLOCK = "backbone.layers.{}."
TOP = module_rules(
    ("", ""),
    ("backbone.embeddings", "token_embedding", "embedding"),
    ("backbone.norm_f", "out_norm", "scale"),
    ("lm_head", "lm_head", "dense"),
)


def common_options(fields: Fields) -> dict[str, Any]:
    """The options that Mamba and Mamba-2 share."""
    require_silu(fields)
    # They set initial values and the precision of the residual stream in bfloat16.
    fields.ignore("initializer_range", "rescale_prenorm_residual", "time_step_floor")
    fields.ignore("residual_in_fp32")
    return {
        "conv_width": fields.size("conv_kernel", 4),
        "conv_bias": fields.flag("use_conv_bias", default=True),
        "use_bias": fields.flag("use_bias", default=False),
        "dt_min": fields.positive("time_step_min", 1e-3),
        "dt_max": fields.positive("time_step_max", 0.1),
        "norm_eps": fields.positive("layer_norm_epsilon", 1e-5),
    }


def common_fields(cfg: LMConfig, options: Any) -> dict[str, Any]:
    """The inverse of `common_options`, with the state size and the expansion."""
    return {
        "state_size": options.state_dim,
        "expand": options.width(cfg.dim) // cfg.dim,
        "conv_kernel": options.conv_width,
        "use_conv_bias": options.conv_bias,
        "use_bias": options.use_bias,
        "time_step_min": float(options.dt_min),
        "time_step_max": float(options.dt_max),
        "layer_norm_epsilon": float(options.norm_eps),
        "hidden_act": "silu",
    }


def common_demands(cfg: LMConfig, kind: str) -> dict[str, bool]:
    """Demands of Mamba and Mamba-2; their config has the width as an integer multiple."""
    width = getattr(cfg, kind).width(cfg.dim)
    return {
        f"{kind}.inner_dim={width} that is not a multiple of dim={cfg.dim}": width % cfg.dim == 0,
        **instead_of({"final_norm": "rms"} | PLAIN, cfg),
        **same_eps(cfg, kind),
    }


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    model, num_blocks, options = (
        sizes(fields, dtype),
        num_layers(fields, source),
        common_options(fields),
    )
    expand, rank = fields.positive("expand", 2), fields.get("time_step_rank", "auto")
    # They set initial values, or choose one of several equal computations.
    fields.ignore("time_step_scale", "time_step_init_scheme", "use_mambapy")
    fields.ignore("use_associative_scan")
    rank = math.ceil(model["dim"] / 16) if rank == "auto" else fields.size("time_step_rank")
    return LMConfig(
        **model,
        pattern="b" * num_blocks,
        mamba=MambaConfig(
            inner_dim=fields.size("intermediate_size", int(expand * model["dim"])),
            state_dim=fields.size("state_size", 16),
            dt_rank=rank,
            **options,
        ),
        final_norm="rms",
        final_norm_eps=options["norm_eps"],
    )


def _write(cfg: LMConfig) -> dict[str, Any]:
    own = {
        "intermediate_size": cfg.mamba.width(cfg.dim),
        "time_step_rank": cfg.mamba.rank(cfg.dim),
    }
    return common_fields(cfg, cfg.mamba) | own


def _joined(cfg: LMConfig) -> tuple[Joined, ...]:
    del cfg
    return (
        joined(BLOCK + "mixer.in_proj", "x", "gate"),
        joined(BLOCK + "mixer.x_proj", "dt", "B", "C"),
    )


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    letters="b",
    base="backbone.",
    rules=(
        *TOP,
        *module_rules(
            (BLOCK, "stack/b/"),
            ("norm", "norm", "scale"),
            ("mixer.in_proj.x", "mamba/x", "dense"),
            ("mixer.in_proj.gate", "mamba/gate", "dense"),
            ("mixer.conv1d", "mamba/conv", "convolution"),
            ("mixer.x_proj.dt", "mamba/dt_down", "dense"),
            ("mixer.x_proj.B", "mamba/B", "dense"),
            ("mixer.x_proj.C", "mamba/C", "dense"),
            ("mixer.dt_proj", "mamba/dt_up", "dense"),
            ("mixer.out_proj", "mamba/out_proj", "dense"),
        ),
        *(Rule(f"{BLOCK}mixer.{n}", f"stack/b/mamba/{n}", "same") for n in ("A_log", "D")),
    ),
    read=_read,
    write=_write,
    demands=lambda cfg: common_demands(cfg, "mamba"),
    joined=_joined,
    tied_by_default=True,
)
