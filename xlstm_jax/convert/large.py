"""The large architecture: fields common to its configs, and folders with a config.yaml.

Source of the layout: the public class xLSTMLarge of the package `xlstm`, 2.0.
"""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.convert import mapping, names
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.tensors import Source, from_folder
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import LargeConfig, large_width
from xlstm_jax.typing import PyTree

CONFIG = "config.yaml"
FFN_FACTOR = 2.6667  # default of its config; `transformers` has another

NO_CAP = 1e10
"""A soft cap for configs that require one: in float32 it has no effect."""

DTYPES = ("float32", "bfloat16")


def load_large(folder: str | Path, *, dtype: str = "float32") -> tuple[LMConfig, PyTree]:
    """Loads a folder with `config.yaml` and `model.safetensors`, or `model_0`, `model_1`, ...

    Weights may be separate or fused. Parameters, `dtype` and errors are those of `load_hf`.
    """
    folder = Path(folder)
    fields = Fields(_read_yaml(folder / CONFIG), str(folder / CONFIG))
    cfg = lm_config(
        fields,
        dim=fields.count("embedding_dim"),
        num_blocks=fields.count("num_blocks"),
        factor=FFN_FACTOR,
        dtype=dtype,
    )
    mode = fields.get("weight_mode", "single")
    fields.require("weight_mode", mode, "'single' or 'fused'", fits=mode in ("single", "fused"))
    fields.warn_unknown()
    source = from_folder(folder)
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
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype={dtype!r} must be one of {', '.join(DTYPES)}, as float16 overflows in "
            "exponential gates; load it with dtype='bfloat16' or dtype='float32'."
        )
    # These select kernels and their precision; here gates, state and accumulators are always
    # float32 or wider.
    fields.ignore("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode")
    fields.ignore("return_last_states", "norm_reduction_force_float32")
    fields.ignore("autocast_kernel_dtype", "inference_state_dtype")
    multiple = fields.count("ffn_round_up_to_multiple_of", 64)
    norm_eps = float(fields.number("norm_eps", 1e-6, minimum=0))
    use_bias = fields.flag("use_bias", default=False)
    has_norm = fields.flag("add_out_norm", default=True)
    return LMConfig(
        vocab_size=fields.count("vocab_size"),
        dim=dim,
        pattern="M" * num_blocks,
        large=LargeConfig(
            num_heads=fields.count("num_heads"),
            # Truncated, as in the original.
            qk_dim=int(dim * fields.positive("qk_dim_factor", 0.5)),
            v_dim=int(dim * fields.positive("v_dim_factor", 1.0)),
            ffn_dim=large_width(dim, fields.positive("ffn_proj_factor", factor), multiple),
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


def _read_yaml(path: Path) -> Mapping:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reading {path} needs the package PyYAML; install it with `pip install "
            "'xlstm-jax[hf]'`."
        ) from error
    # YAML 1.1 parses 1e-6 as a string, as it has no decimal point.
    is_number = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+").fullmatch
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path.parent} must have a readable {CONFIG}; pass a folder written by the "
            "package xlstm."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML ({reason}); download it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of fields, got {values!r}; download it again.")
    return {
        name: float(value) if isinstance(value, str) and is_number(value) else value
        for name, value in values.items()
    }


def unfused(source: Source, cfg: LMConfig) -> Source:
    """Presents fused weights under the names of the separate ones, as slices of their rows.

    A fused tensor is left as it is if its number of rows is wrong or separate tensors exist too;
    `mapping.load` then lists it as unexpected.
    """
    shapes, slices = dict(source.shapes), {}
    targets = mapping.targets(cfg, names.LARGE, mapping.parameters(cfg))
    fused = itertools.product(range(cfg.num_blocks), names.FUSED.items(), (".weight", ".bias"))
    for index, (fused_name, members), kind in fused:
        block = names.LARGE_BLOCK.format(index)
        name = block + fused_name + kind
        # Without biases in the model, only the gates have one: parts that do not exist are skipped.
        parts = [part for member in members if (part := block + member + kind) in targets]
        sizes = [targets[part].torch_shape[0] for part in parts]
        shape = shapes.get(name, ())
        if not parts or shape[:1] != (sum(sizes),) or not shapes.keys().isdisjoint(parts):
            continue
        del shapes[name]
        for part, size, stop in zip(parts, sizes, itertools.accumulate(sizes), strict=True):
            slices[part] = name, slice(stop - size, stop)
            shapes[part] = (size, *shape[1:])

    def read(name: str) -> np.ndarray:
        if name not in slices:
            return source.read(name)
        fused_name, part = slices[name]
        return source.read(fused_name)[part]

    return Source(shapes, read)
