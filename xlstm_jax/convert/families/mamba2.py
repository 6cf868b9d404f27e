"""Mamba2ForCausalLM: blocks of a state space with a decay per head.

Source of the layout: the public model class and config of the package `transformers`, 5.24.
"""

import math
from typing import Any

from xlstm_jax.convert.families.mamba import (
    BLOCK,
    TOP,
    common_demands,
    common_fields,
    common_options,
)
from xlstm_jax.convert.families.record import Family, num_layers, sizes
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.joined import Joined, joined
from xlstm_jax.convert.names import Rule, module_rules
from xlstm_jax.convert.tensors import Source
from xlstm_jax.modules.baselines.options import Mamba2Config
from xlstm_jax.modules.config import LMConfig

NO_LIMIT = ([0, math.inf], [0, {"__float__": "Infinity"}])  # as JSON, and as transformers writes it


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    model, num_blocks, options = (
        sizes(fields, dtype),
        num_layers(fields, source),
        common_options(fields),
    )
    expand = fields.positive("expand", 2)
    heads, head_dim = fields.size("num_heads", 128), fields.size("head_dim", 64)
    inner = int(expand * model["dim"])
    what = f"expand * hidden_size / head_dim = {inner / head_dim:g}"
    fields.require("num_heads", heads, what, fits=heads * head_dim == inner)
    groups = fields.size("n_groups", 8)
    what = f"a divisor of num_heads={heads}"
    fields.require("n_groups", groups, what, fits=heads % groups == 0)
    limit = fields.get("time_step_limit", NO_LIMIT[0])
    fields.require(
        "time_step_limit",
        limit,
        "[0, Infinity]",
        "steps have no limit here",
        fits=limit in NO_LIMIT,
    )
    fields.ignore("time_step_rank")  # not used by this family
    return LMConfig(
        **model,
        pattern="B" * num_blocks,
        mamba2=Mamba2Config(
            inner_dim=inner,
            head_dim=head_dim,
            state_dim=fields.size("state_size", 128),
            groups=groups,
            chunk_size=fields.count("chunk_size", 256),
            **options,
        ),
        final_norm="rms",
        final_norm_eps=options["norm_eps"],
    )


def _write(cfg: LMConfig) -> dict[str, Any]:
    options = cfg.mamba2
    return common_fields(cfg, options) | {
        "num_heads": options.heads(cfg.dim),
        "head_dim": options.head_dim,
        "n_groups": options.groups,
        "chunk_size": options.chunk_size or 256,  # the default; it does not affect results
    }


def _joined(cfg: LMConfig) -> tuple[Joined, ...]:
    del cfg
    return (
        joined(BLOCK + "mixer.in_proj", "gate", "x", "B", "C", "dt"),
        joined(BLOCK + "mixer.conv1d", "x", "B", "C"),
    )


_PARTS = ("gate", "x", "B", "C", "dt")

FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    letters="B",
    base="backbone.",
    rules=(
        *TOP,
        *module_rules(
            (BLOCK, "stack/B/"),
            ("norm", "norm", "scale"),
            *((f"mixer.in_proj.{part}", f"mamba2/{part}", "dense") for part in _PARTS),
            *((f"mixer.conv1d.{p}", f"mamba2/conv_{p}", "convolution") for p in ("x", "B", "C")),
            ("mixer.norm", "mamba2/norm", "scale"),
            ("mixer.out_proj", "mamba2/out_proj", "dense"),
        ),
        *(
            Rule(f"{BLOCK}mixer.{name}", f"stack/B/mamba2/{name}", "same")
            for name in ("dt_bias", "A_log", "D")
        ),
    ),
    read=_read,
    write=_write,
    demands=lambda cfg: common_demands(cfg, "mamba2"),
    joined=_joined,
)
