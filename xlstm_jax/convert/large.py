"""The large architecture: folders with a config.yaml.

Source of the layout: the public class xLSTMLarge of the package `xlstm`, 2.0.
"""

from pathlib import Path

from xlstm_jax.convert import mapping, names, yaml_file
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.joined import Joined, separate, stored_tensors
from xlstm_jax.convert.large_fields import lm_config
from xlstm_jax.convert.prefixes import unwrap
from xlstm_jax.convert.tensors import Source, check_num_blocks, from_folder
from xlstm_jax.errors import ConfigError, quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.typing import PyTree

CONFIG = "config.yaml"
FFN_FACTOR = 2.6667  # default of its config; `transformers` has another


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


def unfused(source: Source, cfg: LMConfig) -> Source:
    """Presents fused weights under the names of the separate ones, as slices of their first axis.

    A fused tensor is left as it is if its leading dimension is wrong or separate tensors exist too;
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
