"""Checkpoint folders of `transformers`: xLSTMForCausalLM in safetensors files.

Source of the layout: the public model class and config of the package `transformers`, 5.23.
"""

import dataclasses
import json
import logging
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import ConfigError, read_json
from xlstm_jax.convert import large, mapping, names, tensors
from xlstm_jax.convert.fields import Fields, check_size
from xlstm_jax.convert.prefixes import unwrap
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import large_width
from xlstm_jax.typing import PyTree

CONFIG = "config.json"
FFN_FACTOR = 2.667  # default of its config; the package xlstm has another
HEAD = "lm_head.weight"
OUT_NORM = "backbone.out_norm.weight"

# Published configs name kernels that only run on a GPU; these PyTorch kernels are equivalent.
KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}
SPECIAL_TOKENS: Mapping[str, int] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TOKEN_NAMES = (*SPECIAL_TOKENS, *(f"{token}_token_id" for token in ("unk", "sep", "cls", "mask")))


def load_hf(folder: str | Path, *, dtype: str | None = None) -> tuple[LMConfig, PyTree]:
    """Loads a checkpoint folder written by `save_pretrained` of `transformers`, sharded or not.

    Parameters are float32. They are read leaf by leaf, so that peak host memory is little more than
    the parameters, and sharded over the active mesh (`jax.set_mesh`) if there is one. As in
    `transformers`, a head in the files is used whatever `tie_word_embeddings` says. Tensor names
    may have the prefixes of a compiled or wrapped model, or lack `backbone.`. Warns if a value is
    NaN or infinite.

    Args:
        folder: has `config.json`, and `model.safetensors` or shards with their index.
        dtype: of activations, "float32" or "bfloat16"; None: that of the config.

    Raises:
        ConfigError: a field of the config is invalid or not supported.
        WeightsError: a file is corrupt, or tensors do not match the config.
    """
    cfg, read = open_folder(folder, dtype=dtype)
    return cfg, read()


def open_folder(
    folder: str | Path, *, dtype: str | None = None
) -> tuple[LMConfig, Callable[[], PyTree]]:
    """The config of a checkpoint folder, and a function that reads its parameters; as `load_hf`."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{quote_path(folder)} must be a folder with a {CONFIG}, but has none; pass a folder "
            "written by save_pretrained."
        )
    source = unwrap(tensors.from_folder(folder), names.HF, names.BACKBONE)
    path = quote_path(folder / CONFIG)
    fields = Fields(read_config(folder), path, source.longest_axis)
    fields.require_equal("model_type", "xlstm", "only xLSTMForCausalLM can be loaded from a folder")
    way_out = "transformers only loads separate weights; convert fused ones first"
    fields.require_equal("weight_mode", "single", way_out)
    has_norm = fields.flag("add_out_norm", default=True)
    # transformers applies the norm whatever the field says.
    way_out = "transformers applies that norm anyway: set it to true, or remove the tensor"
    fits = has_norm or OUT_NORM not in source.shapes
    what = f"true if the weights have {OUT_NORM!r}"
    fields.require("add_out_norm", has_norm, what, way_out, fits=fits)
    stored = fields.get("dtype", None) or fields.get("torch_dtype", None) or "float32"
    fields.require("dtype", stored, "the name of a dtype", fits=isinstance(stored, str))
    num_blocks = _either(fields, "num_hidden_layers", "num_blocks", path)
    large.check_num_blocks(fields, num_blocks, source)
    cfg = large.lm_config(
        fields,
        dim=_either(fields, "hidden_size", "embedding_dim", path),
        num_blocks=num_blocks,
        factor=FFN_FACTOR,
        dtype=dtype or stored.removeprefix("torch."),
    )
    wants_tie = fields.flag("tie_word_embeddings", default=False)
    tied = wants_tie and HEAD not in source.shapes
    if wants_tie and not tied:
        logging.getLogger(__name__).warning(
            "tie_word_embeddings of %s is ignored, as the weights have an embedding and a head",
            path,
        )
    # Written by transformers into every folder, or about execution; they do not affect results.
    fields.ignore("architectures", "transformers_version", "use_cache", "max_inference_chunksize")
    fields.ignore(*TOKEN_NAMES)
    fields.warn_unknown()
    # The final norm of transformers has no bias, whatever use_bias says.
    cfg = dataclasses.replace(cfg, tie_embeddings=tied, final_norm_bias=False)
    return cfg, lambda: mapping.load(cfg, names.HF, source)


def _either(fields: Fields, name: str, other: str, path: str) -> int:
    """A size that has two names in the config, of which either suffices."""
    if name in fields and other in fields and fields.count(name) != fields.count(other):
        raise ConfigError(
            f"{name} and {other} of {path} must be equal, got {fields.count(name)} and "
            f"{fields.count(other)}; remove the wrong one."
        )
    fields.ignore(name, other)
    return fields.count(other if name not in fields and other in fields else name)


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

    A tied head is written as a separate tensor, as `transformers` does not tie this model.

    Args:
        folder: a new folder, or one without weights.
        cfg: config of a model of large blocks.
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
    folder = Path(folder)
    config = config_of(cfg, dtype)
    if special_tokens is not SPECIAL_TOKENS:  # a small vocabulary may lack the default ones
        config |= check_special_tokens(special_tokens, cfg.vocab_size, "special_tokens")
    mapping.check_params(cfg, params)
    arrays = mapping.export(cfg, names.HF, params)
    if cfg.tie_embeddings:
        head = np.asarray(params["token_embedding"]["embedding"])
        arrays = [*arrays, (HEAD, head)]
    tensors.write(
        folder,
        arrays,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        files={CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"},
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads the config.json of a folder; raises ConfigError if it is not a JSON object."""
    path = Path(folder) / CONFIG
    check_size(path)
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quote_path(path)} must be a JSON object, got {quote(values)}; download it again."
        )
    return values


def special_tokens_of(folder: str | Path, vocab_size: int) -> dict[str, int]:
    """The special token ids in the config of a folder."""
    values = read_config(folder)
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
    """Why `save_hf` rejects models with this config, for an error message; None if it does not.

    `transformers` normalizes the output of the last block as the blocks do: by RMS, without a bias
    and with the same epsilon.
    """
    options, norm = cfg.large, cfg.final_norm
    is_supported = {
        f"pattern={quote(cfg.pattern)} with letters other than M": set(cfg.pattern) == {"M"},
        f"large.input_gate={options.input_gate!r} instead of 'exp'": options.input_gate == "exp",
        f"large.forget_gate={options.forget_gate!r} instead of 'sigmoid'": (
            options.forget_gate == "sigmoid"
        ),
        f"final_norm={norm!r} instead of 'rms'": norm == "rms",
        "final_norm_bias=True": not cfg.final_norm_bias,
        f"final_norm_eps={cfg.final_norm_eps} different from large.norm_eps={options.norm_eps}": (
            cfg.final_norm_eps == options.norm_eps
        ),
    }
    return ", ".join(reason for reason, fits in is_supported.items() if not fits) or None


def config_of(cfg: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model; raises ConfigError, with all reasons, if it is unsupported."""
    reasons = why_not_exportable(cfg)
    if reasons is not None:
        raise ConfigError(
            f"the model must be one that transformers supports, got {reasons}; change these "
            "options and train it again, or use it as a run."
        )
    options, dim = cfg.large, cfg.dim
    qk_dim, v_dim, ffn_dim = options.widths(dim)
    # A published factor if it gives this width; otherwise an exact one, without rounding up.
    published = (factor for factor in (2.667, 2.6667) if large_width(dim, factor) == ffn_dim)
    factor, multiple = next(published, None), 64
    if factor is None:
        factor, multiple = large.factor_of(ffn_dim, dim), 1
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": dim,
        "embedding_dim": dim,
        "num_hidden_layers": cfg.num_blocks,
        "num_blocks": cfg.num_blocks,
        "num_heads": options.num_heads,
        "use_bias": options.use_bias,
        "norm_reduction_force_float32": True,
        "tie_word_embeddings": False,
        "add_out_norm": True,
        "norm_eps": float(options.norm_eps),
        "qk_dim_factor": large.factor_of(qk_dim, dim),
        "v_dim_factor": large.factor_of(v_dim, dim),
        **KERNELS,
        "mode": "inference",
        # 64 is the default of the config; the chunk size does not affect results.
        "chunk_size": options.chunk_size or 64,
        "return_last_states": True,
        "autocast_kernel_dtype": "bfloat16",
        "eps": float(options.eps),
        "inference_state_dtype": "float32",
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": float(options.gate_soft_cap or large.NO_CAP),
        "output_logit_soft_cap": float(cfg.logit_soft_cap or large.NO_CAP),
        "weight_mode": "single",
        # Its cache rounds the widths up to a multiple of 64, and fails for others.
        "use_cache": qk_dim % 64 == v_dim % 64 == 0,
        "max_inference_chunksize": 16384,
        **{n: token for n, token in SPECIAL_TOKENS.items() if _is_token(token, cfg.vocab_size)},
    }
