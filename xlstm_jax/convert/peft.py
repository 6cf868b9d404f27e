"""Folders of the package `peft`: low-rank adapters of a model of large blocks.

adapter_config.json         rank, alpha and the names of the modules
adapter_model.safetensors   per module A, `rank in`, and B, `out rank`

Source of the layout: the public config and state dict of LoRA in the package `peft`, 0.21.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import ConfigError, parse_json
from xlstm_jax.convert import names
from xlstm_jax.convert.fields import check_size, first_of
from xlstm_jax.convert.tensors import WeightsError, check_writable, from_file, import_safetensors
from xlstm_jax.errors import quote, quote_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our name of a factor -> that of the tensor, which is transposed.
FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}

# Fields that select another computation -> the only value that is supported.
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}

Pairs = dict[str, dict[str, Any]]
"""Path of a kernel -> its factors by name, as in the tree of `train.lora`."""


def _modules() -> dict[str, str]:
    """Path of each kernel that is a linear map -> the module of `transformers`, with `{}`."""
    return {
        rule.path: rule.torch_name.removesuffix(".weight")
        for rule in names.HF
        if rule.layout == "transposed"
    }


def save(folder: str | Path, pairs: Pairs, *, rank: int, alpha: float) -> None:
    """Writes adapters; the folder must be new or have none."""
    folder, modules = Path(folder), _modules()
    check_writable(folder, (CONFIG,))
    unknown = [path for path in pairs if path not in modules]
    if unknown:
        raise ConfigError(
            "adapters must be those of linear maps of a model of large blocks, which peft can "
            f"represent, got {first_of(unknown, 3)}; merge them and export the model instead."
        )
    arrays = {}
    for path, pair in pairs.items():
        for ours, name in FACTORS.items():
            stacked = np.asarray(pair[ours], np.float32)
            layers = stacked if path.startswith("stack/") else stacked[None]
            for index, array in enumerate(layers):
                module = modules[path].format(index)
                arrays[f"{PREFIX}{module}.{name}.weight"] = np.ascontiguousarray(array.T)
    # A suffix of the names of modules, as peft matches them.
    targets = [modules[path].removeprefix(names.LARGE_BLOCK) for path in pairs]
    config = {**_PLAIN, "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha}
    config |= {"target_modules": sorted(targets), "lora_dropout": 0.0, "inference_mode": True}
    config |= {"base_model_name_or_path": None}
    safetensors = import_safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{WEIGHTS}.tmp"
    safetensors.numpy.save_file(arrays, draft, metadata={"format": "pt"})
    os.replace(draft, folder / WEIGHTS)
    # The config comes last: a folder without it is not read as complete adapters.
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: str | Path) -> tuple[int, float, Pairs]:
    """The rank, alpha and adapters of a folder; layers are stacked."""
    folder = Path(folder)
    config = _read_config(folder)
    source = from_file(folder / WEIGHTS)
    rules, pairs = _rules(), Pairs()
    adapters: dict[tuple[str, str], dict[int, str]] = {}
    for name in source.shapes:
        if ".base_layer." in name:  # peft adds a copy of a head that has an adapter
            continue
        path, factor, index = _parse(name, rules)
        adapters.setdefault((path, factor), {})[index] = name
    for (path, factor), layers in sorted(adapters.items()):
        if sorted(layers) != list(range(len(layers))):
            raise WeightsError(
                f"{quote_path(folder / WEIGHTS)} must have {FACTORS[factor]} of {path} for all "
                f"blocks, got {first_of([str(n) for n in sorted(layers)], 5)}; adapters of some "
                "blocks only are not supported."
            )
        arrays = [np.asarray(source.read(layers[n]), np.float32).T for n in range(len(layers))]
        stacked = np.stack(arrays) if path.startswith("stack/") else arrays[0]
        pairs.setdefault(path, {})[factor] = stacked
    for path, pair in pairs.items():
        ranks = {
            pair[name].shape[axis]
            for name, axis in (("lora_a", -1), ("lora_b", -2))
            if name in pair
        }
        if pair.keys() != FACTORS.keys() or ranks != {config["r"]}:
            raise WeightsError(
                f"{quote_path(folder / WEIGHTS)} must have lora_A and lora_B of rank "
                f"{config['r']} for {path}, got the ranks {sorted(ranks)}; save the adapters again."
            )
    return config["r"], float(config["lora_alpha"]), pairs


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{quote_path(folder)} must be a folder with {CONFIG}, but has none; pass a folder "
            "written by lora.save or by save_pretrained of peft."
        )
    check_size(path)
    values = parse_json(path.read_bytes(), path)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quote_path(path)} must be a JSON object, got {quote(values)}; save it again."
        )
    for name, plain in _PLAIN.items():
        value = values.get(name, plain)
        if value != plain and (value or plain):
            raise ConfigError(
                f"{name} of {quote_path(path)} must be {plain!r}, got {quote(value)}; merge these "
                "adapters with peft and load the model."
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    is_valid = type(rank) is int and isinstance(alpha, int | float) and rank > 0 and alpha > 0
    if not is_valid:
        raise ConfigError(
            f"r and lora_alpha of {quote_path(path)} must be numbers above 0, got {quote(rank)} "
            f"and {quote(alpha)}; save the adapters again."
        )
    return values


def _rules() -> list[tuple[re.Pattern[str], str]]:
    """Pattern of the names of modules, with the index of the block as a group, and our path."""
    return [
        (re.compile(re.escape(module).replace(r"\{\}", "([0-9]+)")), path)
        for path, module in _modules().items()
    ]


def _parse(name: str, rules: list[tuple[re.Pattern[str], str]]) -> tuple[str, str, int]:
    """The path, the factor and the block of a tensor."""
    for (factor, suffix), (pattern, path) in itertools.product(FACTORS.items(), rules):
        module = name.removeprefix(PREFIX).removesuffix(f".{suffix}.weight")
        if module != name.removeprefix(PREFIX) and (match := pattern.fullmatch(module)):
            return path, factor, int(match[1]) if match.groups() else 0
    raise WeightsError(
        f"tensor {quote(name)} must be lora_A or lora_B of a linear map of a model of large "
        "blocks; merge these adapters with peft and load the model."
    )
