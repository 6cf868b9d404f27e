"""The large architecture: what its configs share, and plain folders with a config.yaml.

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
FFN_FACTOR = 2.6667

NO_CAP = 1e10
"""A soft cap for configs that must have one: in float32 it changes nothing."""

DTYPES = ("float32", "bfloat16")


def load_large(folder: str | Path, *, dtype: str = "float32") -> tuple[LMConfig, PyTree]:
    """The model of a folder with `config.yaml` and `model.safetensors`, or `model_0`, `model_1` ...

    Weights may be separate or fused. Parameters, `dtype` and errors are as in `load_hf`.
    """
    folder = Path(folder)
    fields = Fields(_read_yaml(folder / CONFIG), str(folder / CONFIG))
    cfg = to_ours(
        fields,
        dim=fields.count("embedding_dim"),
        num_blocks=fields.count("num_blocks"),
        factor=FFN_FACTOR,
        dtype=dtype,
    )
    mode = fields.get("weight_mode", "single")
    fields.demand("weight_mode", mode, "'single' or 'fused'", fits=mode in ("single", "fused"))
    fields.done()
    source = from_folder(folder)
    return cfg, mapping.load(cfg, names.LARGE, unfused(source, cfg) if mode == "fused" else source)


def to_ours(fields: Fields, *, dim: int, num_blocks: int, factor: float, dtype: str) -> LMConfig:
    """The model that a config of the large architecture describes.

    `dim` and `num_blocks` have several names in such configs; `factor` is the default of the
    feed-forward width's; `dtype` is that of activations.

    Raises:
        ConfigError: a field has no equivalent here.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype={dtype!r} must be one of {', '.join(DTYPES)}, as float16 overflows in "
            "exponential gates; load it with dtype='bfloat16' or dtype='float32'."
        )
    # These choose among kernels, and how far they round; here gates, state and sums are always
    # float32 or wider.
    fields.ignore("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode")
    fields.ignore("return_last_states", "norm_reduction_force_float32")
    fields.ignore("autocast_kernel_dtype", "inference_state_dtype")
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
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
    cap = None if fields.get(name, default) is None else fields.positive(name, default)
    return None if cap == NO_CAP else cap


def factor_of(width: int, dim: int) -> float:
    """A factor with int(factor * dim) == width."""
    factor = width / dim
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
    # YAML 1.1 takes 1e-6 for a word, as it has no point; those who write it mean the number.
    is_number = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+").fullmatch
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path.parent} must have a {CONFIG}, but it cannot be read; name a folder of the "
            "package xlstm."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML ({reason}); fetch it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a table of fields, got {values!r}; fetch it again.")
    return {
        name: float(value) if isinstance(value, str) and is_number(value) else value
        for name, value in values.items()
    }


def unfused(source: Source, cfg: LMConfig) -> Source:
    """Fused weights under the names of separate ones: rows of what is stored.

    What does not fit, in its rows or because the separate ones are there too, stays as it is, and
    is then listed with all that is wrong.
    """
    shapes, rows = dict(source.shapes), {}
    targets = mapping.targets(cfg, names.LARGE, mapping.parameters(cfg))
    fused = itertools.product(range(cfg.num_blocks), names.FUSED.items(), (".weight", ".bias"))
    for number, (fused_name, members), kind in fused:
        block = names.LARGE_BLOCK.format(number)
        name = block + fused_name + kind
        parts = [part for member in members if (part := block + member + kind) in targets]
        sizes = [targets[part].their_shape[0] for part in parts]
        shape = shapes.get(name, ())
        if not parts or shape[:1] != (sum(sizes),) or not shapes.keys().isdisjoint(parts):
            continue
        del shapes[name]
        for part, size, stop in zip(parts, sizes, itertools.accumulate(sizes), strict=True):
            rows[part] = name, slice(stop - size, stop)
            shapes[part] = (size, *shape[1:])

    def read(name: str) -> np.ndarray:
        if name not in rows:
            return source.read(name)
        fused_name, own_rows = rows[name]
        return source.read(fused_name)[own_rows]

    return Source(shapes, read)
