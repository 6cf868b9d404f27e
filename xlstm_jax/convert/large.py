"""Plain folders of the large architecture: config.yaml and safetensors files.

Source of the layout: the public class xLSTMLarge of the package `xlstm`, 2.0.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.convert import large_config, mapping, names
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.tensors import Folder, Source
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.typing import PyTree

CONFIG = "config.yaml"
FFN_FACTOR = 2.6667


def load_large(folder: str | Path, *, dtype: str = "float32") -> tuple[LMConfig, PyTree]:
    """The model of a folder with `config.yaml` and `model.safetensors`, or `model_0`, `model_1` ...

    Separate and fused weights are read. Parameters are float32; they are read leaf by leaf and go
    onto the active mesh where there is one.

    Args:
        folder: where the files are.
        dtype: of activations, "float32" or "bfloat16".

    Raises:
        ConfigError: a field of the config cannot be honoured.
        WeightsError: a file is damaged, or tensors do not fit the config.
    """
    folder = Path(folder)
    fields = Fields(_read_yaml(folder / CONFIG), str(folder / CONFIG))
    cfg = large_config.to_ours(
        fields,
        dim=fields.count("embedding_dim"),
        num_blocks=fields.count("num_blocks"),
        factor=FFN_FACTOR,
        dtype=dtype,
    )
    mode = fields.get("weight_mode", "single")
    if mode not in ("single", "fused"):
        raise ConfigError(
            f"weight_mode of {folder / CONFIG} must be 'single' or 'fused', got {mode!r}; "
            "correct it."
        )
    fields.done()
    source = Folder(folder)
    return cfg, mapping.load(cfg, names.LARGE, Unfused(source, cfg) if mode == "fused" else source)


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


class Unfused:
    """Fused weights under the names of separate ones: rows of what is stored.

    What does not fit, in its rows or because the separate ones are there too, stays as it is, and
    is then listed with all that is wrong.
    """

    def __init__(self, source: Source, cfg: LMConfig):
        self._source, self._shapes = source, dict(source.shapes())
        self._rows: dict[str, tuple[str, int, int]] = {}
        targets = mapping.targets(cfg, names.LARGE, mapping.parameters(cfg))
        fused = itertools.product(range(cfg.num_blocks), names.FUSED.items(), (".weight", ".bias"))
        for number, (name, members), kind in fused:
            block = names.LARGE_BLOCK.format(number)
            parts = [part for m in members if (part := block + m + kind) in targets]
            sizes = [targets[part].their_shape[0] for part in parts]
            shape = self._shapes.get(block + name + kind, ())
            if not parts or shape[:1] != (sum(sizes),) or not self._shapes.keys().isdisjoint(parts):
                continue
            del self._shapes[block + name + kind]
            for part, size, stop in zip(parts, sizes, itertools.accumulate(sizes), strict=True):
                self._rows[part] = block + name + kind, stop - size, stop
                self._shapes[part] = (size, *shape[1:])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        if name not in self._rows:
            return self._source.read(name)
        whole, start, stop = self._rows[name]
        return self._source.read(whole)[start:stop]
