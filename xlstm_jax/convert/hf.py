"""Checkpoint folders of `transformers` in safetensors files, of the families in `families`."""

import dataclasses
import functools
import itertools
import json
import logging
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import user_path
from xlstm_jax.convert import families, mapping, remote, tensors
from xlstm_jax.convert.fields import CONFIG, Fields, check_dtype, read_config
from xlstm_jax.convert.prefixes import unwrap
from xlstm_jax.errors import ConfigError, quote, quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.typing import PyTree

BUFFER = "rotary_emb.inv_freq"  # ending of tensors that follow from the config

SPECIAL_TOKENS: Mapping[str, int] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TOKEN_NAMES = (*SPECIAL_TOKENS, *(f"{token}_token_id" for token in ("unk", "sep", "cls", "mask")))


def load_hf(source: str | Path, *, dtype: str | None = None) -> tuple[LMConfig, PyTree]:
    """Loads a checkpoint written by `save_pretrained` of `transformers`, sharded or not.

    Parameters are float32. They are read leaf by leaf, so that peak host memory is little more than
    the parameters, and sharded over the active mesh (`jax.set_mesh`), if any. As in
    `transformers`, a head in the files is used whatever `tie_word_embeddings` says. Tensor names
    may have the prefixes of a compiled or wrapped model, or lack `backbone.` or its like. Warns if
    a value is NaN or infinite.

    Args:
        source: a folder with `config.json`, and `model.safetensors` or shards with their index; or
            hf://ORG/NAME[@REVISION], of which just these are downloaded, to the client's cache.
        dtype: of activations, "float32" or "bfloat16"; None: that of the config.

    Raises:
        ConfigError: a field of the config is invalid or not supported, or the model does not exist.
        WeightsError: a file is corrupt, or tensors do not match the config.
        NetworkError: the hub cannot be reached.
    """
    cfg, read = open_folder(source, dtype=dtype)
    return cfg, read()


def open_folder(
    source: str | Path, *, dtype: str | None = None
) -> tuple[LMConfig, Callable[..., PyTree]]:
    """The config of a checkpoint, and a function that reads its parameters; as `load_hf`.

    The function has the option `unstacked` of `mapping.load`.
    """
    folder = remote.find(source)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{quote_path(folder)} must be a folder with a {CONFIG}, but has none; pass a folder "
            "written by save_pretrained."
        )
    path = quote_path(folder / CONFIG)
    values = read_config(folder)
    family = families.of_type(values.get("model_type", "xlstm"), path)
    stored = unwrap(_without_buffers(tensors.from_folder(folder)), family.rules, family.base)
    fields = Fields(values, path, stored.longest_axis)
    named = fields.get("dtype", None) or fields.get("torch_dtype", None) or "float32"
    fields.require("dtype", named, "the name of a dtype", fits=isinstance(named, str))
    activations: str = dtype or named.removeprefix("torch.")
    check_dtype(activations)
    cfg = family.read(fields, stored, activations)
    wants_tie = fields.flag("tie_word_embeddings", default=family.tied_by_default)
    tied = wants_tie and family.head not in stored.shapes
    if wants_tie and not tied:
        logging.getLogger(__name__).warning(
            "tie_word_embeddings of %s is ignored, as the weights have an embedding and a head",
            path,
        )
    # Written by transformers into every folder, or about execution; they do not affect results.
    fields.ignore("model_type", "architectures", "transformers_version", "use_cache")
    fields.ignore("torch_dtype", *TOKEN_NAMES)
    fields.warn_unknown()
    cfg = dataclasses.replace(cfg, tie_embeddings=tied)
    joined = family.joined(cfg)
    return cfg, functools.partial(mapping.load, cfg, family.rules, stored, joined=joined)


def _without_buffers(source: tensors.Source) -> tensors.Source:
    """Drops the frequencies of rotary positions, which older versions saved."""
    shapes = {n: shape for n, shape in source.shapes.items() if not n.endswith(BUFFER)}
    return tensors.Source(shapes, source.read)


def save_hf(
    folder: str | Path,
    cfg: LMConfig,
    params: PyTree,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 10**9,
    special_tokens: Mapping[str, int] = SPECIAL_TOKENS,
) -> None:
    """Writes a model as a checkpoint folder that `transformers` loads.

    A tied head of a model of large blocks is written as a separate tensor, as `transformers` does
    not tie that one.

    Args:
        folder: a new folder, or one without weights.
        cfg: config of a model that one of the families can represent.
        params: `variables["params"]` of `LM(cfg)`.
        dtype: of the stored tensors, "float32" or "bfloat16".
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.
        special_tokens: names in `TOKEN_NAMES` -> ids in the vocabulary; generation stops at
            `eos_token_id`.

    Raises:
        ConfigError: `transformers` does not support the model, a special token is invalid, or the
            folder has weights.
        WeightsError: the parameters do not match the config; names the first differences.
    """
    folder = user_path(folder)
    config, family = config_of(cfg, dtype), _family_of(cfg)
    if special_tokens is not SPECIAL_TOKENS:  # a small vocabulary may lack the default ones
        config |= check_special_tokens(special_tokens, cfg.vocab_size, "special_tokens")
    mapping.check_params(cfg, params)
    arrays = mapping.export(cfg, family.rules, params, family.joined(cfg))
    if cfg.tie_embeddings and not family.ties:
        head = np.asarray(params["token_embedding"]["embedding"])
        arrays = itertools.chain(arrays, [(family.head, head)])
    tensors.write(
        folder,
        arrays,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        files={CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"},
    )


def special_tokens_of(folder: str | Path, vocab_size: int) -> dict[str, int]:
    """The special token ids in the config of a folder."""
    values = read_config(Path(folder))
    # A field may be null, a list of ids, or -1 for none, which are skipped.
    return {name: values[name] for name in TOKEN_NAMES if _is_token(values.get(name), vocab_size)}


def check_special_tokens(tokens: Any, vocab_size: int, where: str) -> dict[str, int]:
    """The ids by name; raises ConfigError, which calls them `where`, if a name or id is invalid."""
    if not isinstance(tokens, Mapping):
        raise ConfigError(f"{where} must map names to token ids, got {quote(tokens)}; pass a dict.")
    for name, token in tokens.items():
        if name not in TOKEN_NAMES:
            raise ConfigError(
                f"{where} must have names of {', '.join(TOKEN_NAMES)} only, got {quote(name)}; "
                "leave it out."
            )
        if not _is_token(token, vocab_size):
            raise ConfigError(
                f"{name} of {where} must be an integer from 0 to {vocab_size - 1}, a token of the "
                f"vocabulary, got {quote(token)}; correct it."
            )
    return {name: int(token) for name, token in tokens.items()}


def _is_token(value: Any, vocab_size: int) -> bool:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and 0 <= int(value) < vocab_size


def why_not_exportable(cfg: LMConfig) -> str | None:
    """Why `save_hf` rejects models with this config, for an error message; None if it does not."""
    return families.of_model(cfg)[1]


def _family_of(cfg: LMConfig) -> families.Family:
    family, reasons = families.of_model(cfg)
    if family is None or reasons is not None:
        raise ConfigError(
            f"the model must be one that transformers supports, got {reasons}; change these "
            "options and train it again, or use it as a run."
        )
    return family


def config_of(cfg: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model; raises ConfigError, with all reasons, if it is unsupported."""
    family = _family_of(cfg)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.num_blocks,
        "tie_word_embeddings": family.ties and cfg.tie_embeddings,
        **family.write(cfg),
        **{n: token for n, token in SPECIAL_TOKENS.items() if _is_token(token, cfg.vocab_size)},
    }
