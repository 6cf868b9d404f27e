"""Fields that all configs of the large architecture have.

Source: the public class xLSTMLarge of the package `xlstm`, 2.0.
"""

import math

from xlstm_jax.convert.fields import Fields, check_dtype
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import LargeConfig, large_width

NO_CAP = 1e10
"""A soft cap for configs that require one: in float32 it has no effect."""


def lm_config(fields: Fields, *, dim: int, num_blocks: int, factor: float, dtype: str) -> LMConfig:
    """The `LMConfig` equivalent to a config of the large architecture.

    Args:
        fields: of the config.
        dim, num_blocks: passed separately, as their names differ between configs.
        factor: default of `ffn_proj_factor`.
        dtype: of activations.

    Raises:
        ConfigError: a field is invalid or has no equivalent.
    """
    check_dtype(dtype)
    # These select kernels and their precision; here gates, state and accumulators are always
    # float32 or wider.
    fields.ignore("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode")
    fields.ignore("return_last_states", "norm_reduction_force_float32")
    fields.ignore("autocast_kernel_dtype", "inference_state_dtype")
    multiple = fields.count("ffn_round_up_to_multiple_of", 64)
    norm_eps = float(fields.number("norm_eps", 1e-6, minimum=0))
    use_bias = fields.flag("use_bias", default=False)
    has_norm = fields.flag("add_out_norm", default=True)
    fields.require_size("the width", dim)
    return LMConfig(
        vocab_size=fields.size("vocab_size"),
        dim=dim,
        pattern="M" * num_blocks,
        large=LargeConfig(
            num_heads=fields.size("num_heads"),
            qk_dim=_width(fields, "qk_dim_factor", dim, 0.5),
            v_dim=_width(fields, "v_dim_factor", dim, 1.0),
            ffn_dim=_width(fields, "ffn_proj_factor", dim, factor, multiple),
            use_bias=use_bias,
            gate_soft_cap=_cap(fields, "gate_soft_cap", 15.0),
            norm_eps=norm_eps,
            eps=float(fields.number("eps", 1e-6, minimum=0)),
            chunk_size=fields.count("chunk_size", 64),
        ),
        final_norm="rms" if has_norm else "none",
        final_norm_eps=norm_eps,
        final_norm_bias=use_bias and has_norm,
        logit_soft_cap=_cap(fields, "output_logit_soft_cap", 30.0),
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )


def _width(fields: Fields, name: str, dim: int, default: float, multiple: int = 1) -> int:
    factor = fields.positive(name, default)
    fields.require_size(f"{name} times the width", int(dim * factor))
    width = large_width(dim, factor, multiple)  # truncated, as in the original, for multiple=1
    fields.require_size(f"the width by {name}", width)
    return width


def _cap(fields: Fields, name: str, default: float) -> float | None:
    cap = None if fields.get(name, default) is None else fields.positive(name, default)
    # The inverse of what `hf.config_of` writes for a model without a cap.
    return None if cap == NO_CAP else cap


def factor_of(width: int, dim: int) -> float:
    """A factor for which int(factor * dim) == width."""
    factor = width / dim  # rounding may leave the product just below the width
    while int(dim * factor) < width:
        factor = math.nextafter(factor, math.inf)
    return factor
