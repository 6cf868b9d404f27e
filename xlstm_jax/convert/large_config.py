"""Configs of the large architecture: those of `xlstm` and of `transformers`, to ours and back."""

import math
from typing import Any

from xlstm_jax.config import ConfigError
from xlstm_jax.convert.fields import Fields
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import LargeConfig, large_width

NO_CAP = 1e10
"""A soft cap for configs that must have one: in float32 it changes nothing."""

DTYPES = ("float32", "bfloat16")

# They choose among kernels, and how far these round; here gates, memory and sums are always float32
# or wider.
_WITHOUT_EFFECT = (
    "chunkwise_kernel",
    "sequence_kernel",
    "step_kernel",
    "mode",
    "return_last_states",
    "autocast_kernel_dtype",
    "inference_state_dtype",
    "norm_reduction_force_float32",
)


def to_ours(fields: Fields, *, dim: int, num_blocks: int, factor: float, dtype: str) -> LMConfig:
    """The model that a config of the large architecture describes.

    `dim` and `num_blocks` have several names in such configs; `factor` is the default of the
    feed-forward width's; `dtype` is that of activations.

    Raises:
        ConfigError: a field has no equivalent here.
    """
    fields.ignore(*_WITHOUT_EFFECT)
    multiple = fields.count("ffn_round_up_to_multiple_of", 64)
    norm_eps = float(fields.number("norm_eps", 1e-6, least=0))
    use_bias = fields.flag("use_bias", default=False)
    has_norm = fields.flag("add_out_norm", default=True)
    return LMConfig(
        vocab_size=fields.count("vocab_size"),
        dim=dim,
        pattern="M" * num_blocks,
        large=LargeConfig(
            num_heads=fields.count("num_heads"),
            # Truncated, as the original does.
            qk_dim=int(dim * fields.positive("qk_dim_factor", 0.5)),
            v_dim=int(dim * fields.positive("v_dim_factor", 1.0)),
            ffn_dim=large_width(dim, fields.positive("ffn_proj_factor", factor), multiple),
            use_bias=use_bias,
            gate_soft_cap=_cap(fields, "gate_soft_cap", 15.0),
            norm_eps=norm_eps,
            eps=float(fields.number("eps", 1e-6, least=0)),
            chunk_size=fields.count("chunk_size", 64),
        ),
        final_norm="rms" if has_norm else "none",
        final_norm_eps=norm_eps,
        final_norm_bias=use_bias and has_norm,
        logit_soft_cap=_cap(fields, "output_logit_soft_cap", 30.0),
        dtype=_dtype(dtype),
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
    cap = None if fields.get(name, default) is None else fields.positive(name, default)
    return None if cap == NO_CAP else cap


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ConfigError(
            f"dtype={name!r} must be one of {', '.join(DTYPES)}, as float16 overflows in "
            "exponential gates; load it with dtype='bfloat16' or dtype='float32'."
        )
    return name


def to_theirs(cfg: LMConfig) -> dict[str, Any]:
    """The fields that both configs of the large architecture have.

    Raises:
        ConfigError: the model has something that they have no field for; names all of it.
    """
    faults = [fault for fits, fault in _demands(cfg) if not fits]
    if faults:
        raise ConfigError(
            "the model must be one that the large architecture describes, but it has "
            + ", ".join(faults)
            + "; change these options and train it again, or keep it as a run."
        )
    large, dim = cfg.large, cfg.dim
    qk_dim, v_dim, ffn_dim = large.widths(dim)
    factor, multiple = _ffn_factor(dim, ffn_dim)
    return {
        "vocab_size": cfg.vocab_size,
        "num_heads": large.num_heads,
        "use_bias": large.use_bias,
        "norm_reduction_force_float32": True,
        "add_out_norm": cfg.final_norm == "rms",
        "norm_eps": float(large.norm_eps),
        "qk_dim_factor": factor_of(qk_dim, dim),
        "v_dim_factor": factor_of(v_dim, dim),
        "mode": "inference",
        "chunk_size": large.chunk_size or 64,
        "return_last_states": True,
        "eps": float(large.eps),
        "inference_state_dtype": "float32",
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": float(large.gate_soft_cap or NO_CAP),
        "output_logit_soft_cap": float(cfg.logit_soft_cap or NO_CAP),
        "weight_mode": "single",
    }


def _demands(cfg: LMConfig) -> list[tuple[bool, str]]:
    """(whether it holds, what the model has where it does not)."""
    large = cfg.large
    return [
        (set(cfg.pattern) == {"M"}, f"pattern={cfg.pattern!r} with other letters than M"),
        (large.input_gate == "exp", f"large.input_gate={large.input_gate!r} instead of 'exp'"),
        (cfg.final_norm in ("rms", "none"), f"final_norm={cfg.final_norm!r} instead of 'rms'"),
        (
            cfg.final_norm == "none" or cfg.final_norm_eps == large.norm_eps,
            f"final_norm_eps={cfg.final_norm_eps} that is not large.norm_eps={large.norm_eps}",
        ),
    ]


def _ffn_factor(dim: int, ffn_dim: int) -> tuple[float, int]:
    """A factor and a multiple that give this width; those that were published where they do."""
    for factor in (2.667, 2.6667):
        if large_width(dim, factor) == ffn_dim:
            return factor, 64
    return factor_of(ffn_dim, dim), 1


def factor_of(width: int, dim: int) -> float:
    """A factor with int(factor * dim) == width."""
    factor = width / dim
    while int(dim * factor) < width:
        factor = math.nextafter(factor, math.inf)
    return factor
