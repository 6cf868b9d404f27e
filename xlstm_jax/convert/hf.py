"""Checkpoint folders of `transformers`: xLSTMForCausalLM, in safetensors files.

Source of the layout: the public model class and config of the package `transformers`, 5.23.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import ConfigError, read_json
from xlstm_jax.convert import large, mapping, names, tensors
from xlstm_jax.convert.fields import Fields
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.options import large_width
from xlstm_jax.typing import PyTree

CONFIG = "config.json"
FFN_FACTOR = 2.667
HEAD = "lm_head.weight"
OUT_NORM = "backbone.out_norm.weight"

# Published configs name kernels that only run on a GPU; these compute the same.
KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}
SPECIAL_TOKENS: Mapping[str, int] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def load_hf(folder: str | Path, *, dtype: str | None = None) -> tuple[LMConfig, PyTree]:
    """The model of a folder that `save_pretrained` of `transformers` wrote, in one file or several.

    Parameters are float32. They are read leaf by leaf, so that the host holds little more than the
    result, and go onto the active mesh (`jax.set_mesh`) where there is one. As in `transformers`,
    two tables are used where the files have them, whatever `tie_word_embeddings` says.

    Args:
        folder: with `config.json` and `model.safetensors`, or shards and their index.
        dtype: of activations, "float32" or "bfloat16"; None: as the config says.

    Raises:
        ConfigError: a field of the config cannot be honored.
        WeightsError: a file is damaged, or tensors do not fit the config.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{folder} must be a folder with a {CONFIG}, but has none; name a folder that "
            "save_pretrained wrote."
        )
    source, path = tensors.from_folder(folder), folder / CONFIG
    fields = Fields(read_config(folder), str(path))
    fields.refuse_unless("model_type", "xlstm", "only xLSTMForCausalLM can be read from a folder")
    only = "transformers reads no other; write separate weights"
    fields.refuse_unless("weight_mode", "single", only)
    has_norm = fields.flag("add_out_norm", default=True)
    way_out = "transformers applies that norm all the same: set it to true, or remove the tensor"
    fits = has_norm or OUT_NORM not in source.shapes
    what = f"true where the weights have {OUT_NORM!r}"
    fields.demand("add_out_norm", has_norm, what, way_out, fits=fits)
    stored = fields.get("dtype", None) or fields.get("torch_dtype", None) or "float32"
    cfg = large.to_ours(
        fields,
        dim=_either(fields, "hidden_size", "embedding_dim", path),
        num_blocks=_either(fields, "num_hidden_layers", "num_blocks", path),
        factor=FFN_FACTOR,
        dtype=dtype or stored,
    )
    wants_tie = fields.flag("tie_word_embeddings", default=False)
    tied = wants_tie and HEAD not in source.shapes
    if wants_tie and not tied:
        logging.getLogger(__name__).warning(
            "tie_word_embeddings of %s is ignored, as the weights have two tables", path
        )
    # Of every folder that transformers writes, or how it runs; they change no number.
    fields.ignore("architectures", "transformers_version", "use_cache", "max_inference_chunksize")
    fields.ignore(*SPECIAL_TOKENS)
    fields.done()
    # Its final norm has no bias, whatever use_bias says.
    cfg = dataclasses.replace(cfg, tie_embeddings=tied, final_norm_bias=False)
    return cfg, mapping.load(cfg, names.HF, source)


def _either(fields: Fields, name: str, other: str, path: Path) -> int:
    """A size that has two names; the second alone counts as well."""
    if name in fields and other in fields and fields.count(name) != fields.count(other):
        raise ConfigError(
            f"{name} and {other} of {path} must be equal, got {fields.count(name)} and "
            f"{fields.count(other)}; remove the one that is wrong."
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
    """Writes a model so that `transformers` loads it: config.json and safetensors files.

    A tied head is written out as a table of its own, as `transformers` does not tie this model.

    Args:
        folder: a new one, or one without weights in it.
        cfg: a model of large blocks.
        params: as `LM(cfg).init` makes them, under "params".
        dtype: of the stored tensors, "float32" or "bfloat16".
        max_shard_bytes: tensors go into as many files as it takes; a larger tensor has its own.
        special_tokens: ids that the config names; generation stops at `eos_token_id`.

    Raises:
        ConfigError: the model has something that `transformers` does not, or the folder is taken.
        WeightsError: the parameters are not those of the model; all that differs is listed.
    """
    folder = Path(folder)
    config = config_of(cfg, dtype) | dict(special_tokens)
    mapping.check_params(cfg, params)
    arrays = mapping.store(cfg, names.HF, params)
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
    """The config.json of a folder; raises ConfigError if it is no JSON object."""
    path = Path(folder) / CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a table of fields, got {values!r}; fetch it again.")
    return values


def special_tokens_of(folder: str | Path) -> dict[str, int]:
    """The ids that the config of a folder names."""
    values = read_config(folder)
    return {n: values[n] for n in SPECIAL_TOKENS if type(values.get(n)) is int}


def config_of(cfg: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        ConfigError: it has something that `transformers` does not; names all of it.
    """
    own, dim, norm = cfg.large, cfg.dim, cfg.final_norm
    demands = {
        f"pattern={cfg.pattern!r} with other letters than M": set(cfg.pattern) == {"M"},
        f"large.input_gate={own.input_gate!r} instead of 'exp'": own.input_gate == "exp",
        f"final_norm={norm!r} instead of 'rms'": norm == "rms",
        "final_norm_bias=True": not cfg.final_norm_bias,
        f"final_norm_eps={cfg.final_norm_eps} that is not large.norm_eps={own.norm_eps}": (
            cfg.final_norm_eps == own.norm_eps
        ),
    }
    faults = [fault for fault, fits in demands.items() if not fits]
    if faults:
        raise ConfigError(
            "the model must be one that transformers has, but it has "
            + ", ".join(faults)
            + "; change these options and train it again, or keep it as a run."
        )
    qk_dim, v_dim, ffn_dim = own.widths(dim)
    # One of the published factors where it gives this width.
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
        "num_heads": own.num_heads,
        "use_bias": own.use_bias,
        "norm_reduction_force_float32": True,
        "tie_word_embeddings": False,
        "add_out_norm": True,
        "norm_eps": float(own.norm_eps),
        "qk_dim_factor": large.factor_of(qk_dim, dim),
        "v_dim_factor": large.factor_of(v_dim, dim),
        **KERNELS,
        "mode": "inference",
        "chunk_size": own.chunk_size or 64,
        "return_last_states": True,
        "autocast_kernel_dtype": "bfloat16",
        "eps": float(own.eps),
        "inference_state_dtype": "float32",
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": float(own.gate_soft_cap or large.NO_CAP),
        "output_logit_soft_cap": float(cfg.logit_soft_cap or large.NO_CAP),
        "weight_mode": "single",
        # Its cache has the widths rounded up to 64, and takes no others.
        "use_cache": qk_dim % 64 == v_dim % 64 == 0,
        "max_inference_chunksize": 16384,
        **SPECIAL_TOKENS,
    }
