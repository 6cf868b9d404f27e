"""The large architecture: fields common to its configs, and folders with a config.yaml.

Source of the layout: the public class xLSTMLarge of the package `xlstm`, 2.0.
"""

import math
from pathlib import Path

from xlstm_jax.config import ConfigError
from xlstm_jax.convert import mapping, names, yaml_file
from xlstm_jax.convert.fields import Fields, check_dtype
from xlstm_jax.convert.joined import Joined, separate, stored_tensors
from xlstm_jax.convert.prefixes import unwrap
from xlstm_jax.convert.tensors import Source, from_folder
from xlstm_jax.errors import quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import LargeConfig, large_width
from xlstm_jax.typing import PyTree

CONFIG = "config.yaml"
FFN_FACTOR = 2.6667  # default of its config; `transformers` has another

NO_CAP = 1e10
"""A soft cap for configs that require one: in float32 it has no effect."""

MAX_UNKNOWN_BLOCKS = 100
"""Blocks of a config whose weights have other names."""


def load_large(folder: str | Path, *, dtype: str = "float32") -> tuple[LMConfig, PyTree]:
    """Loads a folder with `config.yaml` and `model.safetensors`, or `model_0`, `model_1`, ...

    Weights may be separate or fused. Parameters, `dtype` and errors are those of `load_hf`.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{quote_path(folder)} must have a readable {CONFIG}; pass a folder written by the "
            "package xlstm."
        )
    values = yaml_file.read(path)
    source = unwrap(from_folder(folder), names.LARGE, names.BACKBONE)
    fields = Fields(values, quote_path(path), source.longest_axis)
    num_blocks = fields.count("num_blocks")
    check_num_blocks(fields, num_blocks, source)
    cfg = lm_config(
        fields,
        dim=fields.count("embedding_dim"),
        num_blocks=num_blocks,
        factor=FFN_FACTOR,
        dtype=dtype,
    )
    mode = fields.get("weight_mode", "single")
    fields.require("weight_mode", mode, "'single' or 'fused'", fits=mode in ("single", "fused"))
    fields.warn_unknown()
    return cfg, mapping.load(cfg, names.LARGE, unfused(source, cfg) if mode == "fused" else source)


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
    fields.require_size(f"{name} times the width", dim * factor)
    width = large_width(dim, factor, multiple)  # truncated, as in the original, for multiple=1
    fields.require_size(f"the width by {name}", width)
    return width


def check_num_blocks(
    fields: Fields, num_blocks: int, source: Source, name: str = "num_blocks"
) -> None:
    """Raises ConfigError if the config has more blocks than the weights, before building any.

    Weights without a single block have other names, which the error about these shows.
    """
    stored = source.num_blocks
    what = f"at most {stored}, the number of blocks in the weights"
    fields.require(name, num_blocks, what, fits=num_blocks <= (stored or MAX_UNKNOWN_BLOCKS))


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


def unfused(source: Source, cfg: LMConfig) -> Source:
    """Presents fused weights under the names of the separate ones, as slices of their rows.

    A fused tensor is left as it is if its number of rows is wrong or separate tensors exist too;
    `mapping.load` then lists it as unexpected.
    """
    block = names.LARGE_BLOCK
    modules = [
        Joined(block + name, tuple(block + part for part in parts))
        for name, parts in names.FUSED.items()
    ]
    targets = mapping.targets(cfg, names.LARGE, mapping.parameters(cfg))
    shapes = {name: target.torch_shape for name, target in targets.items()}
    return separate(source, stored_tensors(shapes, modules, cfg.num_blocks))
