"""TiRex-2: folders with config.json and model.safetensors.

Source of the layout: the package `tirex-2`, 0.4.0, Apache-2.0.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlstm_jax.convert import mapping, remote, tensors
from xlstm_jax.convert.fields import CONFIG, Fields, read_config
from xlstm_jax.convert.layouts import LAYOUTS
from xlstm_jax.convert.names import Rule, module_rules
from xlstm_jax.convert.tensors import MAX_UNKNOWN_BLOCKS, Source, WeightsError
from xlstm_jax.convert.tirex_fields import tirex_config
from xlstm_jax.errors import ConfigError, quote_path
from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.modules.tirex.network import param_shapes
from xlstm_jax.typing import PyTree

LEGACY = ("model-config.yaml", "model.ckpt")

_MLP = ("hidden", "output", "residual")
_MIXER = (
    ("time_mixer.norm_lstm", "time/norm", "scale"),
    ("time_mixer.combination", "time/merge", "dense"),
    ("time_mixer.norm_ffn", "time/ffn_norm", "scale"),
    *((f"time_mixer.ffn.{n}", f"time/ffn/{n}", "dense") for n in ("proj_up_gate", "proj_up")),
    ("time_mixer.ffn.proj_down", "time/ffn/proj_down", "dense"),
    ("variate_mixer.norm_attn", "variate/norm", "scale"),
    *((f"variate_mixer.attn.W{n.upper()}", f"variate/{n}", "dense") for n in "qkv"),
    ("variate_mixer.attn.WO", "variate/out_proj", "dense"),
    ("variate_mixer.norm_ffn", "variate/ffn_norm", "scale"),
    ("variate_mixer.ffn.wi", "variate/ffn/proj_up", "dense"),
    ("variate_mixer.ffn.wo", "variate/ffn/proj_down", "dense"),
)
_MLSTM = (
    *((name, name, "dense") for name in ("q", "k", "v", "out_proj")),
    ("ogate_preact", "output_gate", "dense"),
    ("igate_preact", "input_gate", "dense"),
    ("fgate_preact", "forget_gate", "dense"),
    ("multihead_norm", "multihead_norm", "scale"),
)
# The gates of its cell are in the order i, f, z, o, but `fgate` is its first projection.
_SLSTM = (
    ("fgate", "input_gate", "headwise"),
    ("igate", "forget_gate", "headwise"),
    ("zgate", "cell_input", "headwise"),
    ("ogate", "output_gate", "headwise"),
    ("group_norm", "group_norm", "scale"),
)
CELL = "time_mixer.fwd_cell."
_BLOCK = re.compile(r"stack\.([0-9]+)\.")

# Ending of another name of a tensor -> that of its name here.
_ALIASES = (
    (re.compile(r"\.rev_cell\."), ".fwd_cell."),
    (re.compile(r"\.fwd_cell\.recurrent_kernel$"), ".fwd_cell._recurrent_kernel_"),
    (re.compile(r"\.fwd_cell\.bias$"), ".fwd_cell._bias_"),
)


def load_tirex(source: str | Path) -> tuple[TiRexConfig, PyTree]:
    """Loads TiRex-2, with float32 parameters, for the functions of `modules.tirex`.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or hf://ORG/NAME[@REVISION].

    Raises:
        ConfigError: a field of the config is invalid or not supported, or the source is no model.
        WeightsError: a file is corrupt, or tensors do not match the config.
        NetworkError: the hub cannot be reached.
    """
    folder = remote.find(source)
    _check_format(folder)
    stored = _canonical(tensors.from_folder(folder))
    fields = Fields(read_config(folder), quote_path(folder / CONFIG), stored.longest_axis)
    blocks = {match[1] for name in stored.shapes if (match := _BLOCK.match(name))}
    # Without a single block the weights have other names, which the error about these shows.
    cfg = tirex_config(fields, len(blocks) or MAX_UNKNOWN_BLOCKS)
    return cfg, _load(cfg, stored)


def _check_format(folder: Path) -> None:
    """Raises ConfigError for a folder without a config, such as one in the older format."""
    if not (folder / CONFIG).is_file():
        older = [name for name in LEGACY if (folder / name).is_file()]
        has = (
            f"only {older[0]}, of an older format that may run code when read" if older else "none"
        )
        raise ConfigError(
            f"{quote_path(folder)} must be a folder with {CONFIG} and {tensors.SINGLE}, but has "
            f"{has}; download the current files of the model."
        )


def rules(cfg: TiRexConfig) -> Iterator[Rule]:
    """Name, path and layout of every parameter."""
    for module, path in (("input_patch_embedding", "embed"), ("output_patch_embedding", "output")):
        yield from module_rules(
            (f"{module}.", f"{path}/"), *((f"{name}_layer", name, "dense") for name in _MLP)
        )
    yield Rule("stack_out_norm.weight", "norm/scale", "same")
    for index, block in enumerate(cfg.blocks):
        prefixes = {"time/": f"time_{index}/", "variate/": f"variate_{index}/"}
        cell = _MLSTM if block.cell == "mlstm" else _SLSTM
        modules = (*_MIXER, *((CELL + name, f"time/cell/{path}", k) for name, path, k in cell))
        for name, path, kind in modules:
            kind_of_mixer = path[: path.index("/") + 1]
            path = prefixes[kind_of_mixer] + path.removeprefix(kind_of_mixer)
            yield from module_rules((f"stack.{index}.", ""), (name, path, kind))
        cell_path = f"time_{index}/cell/"
        yield Rule(
            f"stack.{index}.{CELL}_recurrent_kernel_", cell_path + "recurrent_kernel", "same"
        )
        yield Rule(f"stack.{index}.{CELL}_bias_", cell_path + "bias", "same")


def _load(cfg: TiRexConfig, source: Source) -> PyTree:
    """The parameters; raises WeightsError if tensors do not match the config."""
    leaves, of_path = mapping.by_path(param_shapes(cfg)), {rule.path: rule for rule in rules(cfg)}
    shapes = {
        of_path[path].torch_name: LAYOUTS[of_path[path].layout].torch_shape(leaf.shape)
        for path, leaf in leaves.items()
    }
    remedy = "check that the config belongs to the weights"
    notes = {of_path[path].torch_name: f" (our {path})" for path in leaves}
    mapping.check_shapes("tensors", shapes, source.shapes, remedy, notes)
    tree: dict[str, Any] = {}
    not_finite = []
    for path, leaf in leaves.items():
        rule = of_path[path]
        array = LAYOUTS[rule.layout].from_torch(source.read(rule.torch_name), leaf.shape)
        if not tensors.is_finite(array):
            not_finite.append(rule.torch_name)
        node = tree
        *folders, last = path.split("/")
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(np.asarray(array, np.float32))
    tensors.warn_not_finite(not_finite)
    return tree


def _canonical(source: Source) -> Source:
    """One name per tensor: both directions share a cell, whose parameters have two names each.

    Raises:
        WeightsError: tensors that must be the same one differ.
    """
    names: dict[str, str] = {}
    for name in source.shapes:
        canonical = name
        for pattern, replacement in _ALIASES:
            canonical = pattern.sub(replacement, canonical)
        other = names.setdefault(canonical, name)
        if other != name and not np.array_equal(source.read(other), source.read(name)):
            raise WeightsError(
                f"tensors {other} and {name} must be equal, as both directions share a cell, but "
                "differ; download the weights again."
            )
    shapes = {canonical: source.shapes[name] for canonical, name in names.items()}
    return Source(shapes, lambda canonical: source.read(names[canonical]))
