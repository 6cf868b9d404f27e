"""xLSTMForCausalLM: large blocks, with separate weights.

Source of the layout: the public model class and config of the package `transformers`, 5.23.
"""

import dataclasses
from typing import Any

from xlstm_jax.convert import large_fields, names
from xlstm_jax.convert.families.record import Family, instead_of, same_eps
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.tensors import Source, check_num_blocks
from xlstm_jax.errors import ConfigError
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import large_width

FFN_FACTOR = 2.667  # default of its config; the package xlstm has another
OUT_NORM = "backbone.out_norm.weight"

# Published configs name kernels that only run on a GPU; these PyTorch kernels are equivalent.
KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}


def _read(fields: Fields, source: Source, dtype: str) -> LMConfig:
    way_out = "transformers only loads separate weights; convert fused ones first"
    fields.require_equal("weight_mode", "single", way_out)
    has_norm = fields.flag("add_out_norm", default=True)
    # transformers applies the norm whatever the field says.
    way_out = "transformers applies that norm anyway: set it to true, or remove the tensor"
    fits = has_norm or OUT_NORM not in source.shapes
    what = f"true if the weights have {OUT_NORM!r}"
    fields.require("add_out_norm", has_norm, what, way_out, fits=fits)
    num_blocks = _either(fields, "num_hidden_layers", "num_blocks")
    check_num_blocks(fields, num_blocks, source)
    cfg = large_fields.lm_config(
        fields,
        dim=_either(fields, "hidden_size", "embedding_dim"),
        num_blocks=num_blocks,
        factor=FFN_FACTOR,
        dtype=dtype,
    )
    fields.ignore("max_inference_chunksize")  # about execution
    # The final norm of transformers has no bias, whatever use_bias says.
    return dataclasses.replace(cfg, final_norm_bias=False)


def _either(fields: Fields, name: str, other: str) -> int:
    """A size that has two names in the config, of which either suffices."""
    if name in fields and other in fields and fields.count(name) != fields.count(other):
        raise ConfigError(
            f"{name} and {other} of {fields.where} must be equal, got {fields.count(name)} and "
            f"{fields.count(other)}; remove the wrong one."
        )
    fields.ignore(name, other)
    return fields.count(other if name not in fields and other in fields else name)


def _write(cfg: LMConfig) -> dict[str, Any]:
    options, dim = cfg.large, cfg.dim
    qk_dim, v_dim, ffn_dim = options.widths(dim)
    # A published factor if it gives this width; otherwise an exact one, without rounding up.
    published = (factor for factor in (2.667, 2.6667) if large_width(dim, factor) == ffn_dim)
    factor, multiple = next(published, None), 64
    if factor is None:
        factor, multiple = large_fields.factor_of(ffn_dim, dim), 1
    return {
        "embedding_dim": dim,
        "num_blocks": cfg.num_blocks,
        "num_heads": options.num_heads,
        "use_bias": options.use_bias,
        "norm_reduction_force_float32": True,
        "add_out_norm": True,
        "norm_eps": float(options.norm_eps),
        "qk_dim_factor": large_fields.factor_of(qk_dim, dim),
        "v_dim_factor": large_fields.factor_of(v_dim, dim),
        **KERNELS,
        "mode": "inference",
        # 64 is the default of the config; the chunk size does not affect results.
        "chunk_size": options.chunk_size or 64,
        "return_last_states": True,
        "autocast_kernel_dtype": "bfloat16",
        "eps": float(options.eps),
        "inference_state_dtype": "float32",
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": float(options.gate_soft_cap or large_fields.NO_CAP),
        "output_logit_soft_cap": float(cfg.logit_soft_cap or large_fields.NO_CAP),
        "weight_mode": "single",
        # Its cache rounds the widths up to a multiple of 64, and fails for others.
        "use_cache": qk_dim % 64 == v_dim % 64 == 0,
        "max_inference_chunksize": 16384,
    }


def _demands(cfg: LMConfig) -> dict[str, bool]:
    """`transformers` normalizes the output of the last block as the blocks do.

    By RMS, without a bias and with the same epsilon.
    """
    cell = {"input_gate": "exp", "forget_gate": "sigmoid", "stabilize": True}
    return {
        **instead_of(cell | {"ffn_activation": None}, cfg.large, "large."),
        **instead_of({"embedding_norm": "none", "final_norm": "rms"}, cfg),
        "final_norm_bias=True": not cfg.final_norm_bias,
        **same_eps(cfg, "large"),
    }


FAMILY = Family(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    letters="M",
    base=names.BACKBONE,
    rules=names.HF,
    read=_read,
    write=_write,
    demands=_demands,
    ties=False,
    overrides=KERNELS,
)
