"""Comparison of our logits with those of `transformers`, if it is installed."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xlstm_jax.convert import families, hf
from xlstm_jax.errors import printable
from xlstm_jax.modules.lm import LM

TOKENS = 64  # in the compared sequence
TOLERANCE = 1e-3  # relative; rounding gives about 1e-5, a wrong weight far more


class Comparison(NamedTuple):
    """Difference between the logits of two implementations of a model."""

    error: float  # largest difference of logits, relative to the largest logit
    agrees: bool  # error <= TOLERANCE
    versions: str  # of the reference packages


class TransformersError(Exception):
    """`transformers` or `torch` is not installed, or cannot load or run the model of a folder."""


def with_transformers(folder: str | Path) -> Comparison:
    """Compares our logits for a checkpoint folder with those of `transformers`, on random tokens.

    Both compute in float32.

    Raises:
        TransformersError: the reference is not installed or fails.
        ConfigError: we cannot load the folder; as in `hf.load_hf`.
    """
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise TransformersError("transformers or torch is not installed") from error
    cfg, params = hf.load_hf(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, TOKENS))
    logits, _ = LM(cfg).apply({"params": params}, jnp.asarray(tokens))
    try:
        reference = _reference_logits(torch, transformers, folder, tokens)
    except Exception as error:  # the package may raise anything; none of it is a bug of ours
        reason = printable(" ".join(str(error).split()))[:200] or type(error).__name__
        raise TransformersError(f"transformers cannot read or run the folder ({reason})") from error
    largest = np.abs(reference).max()
    error = float(np.abs(np.asarray(logits) / largest - reference / largest).max())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(error, error <= TOLERANCE, versions)


def _reference_logits(torch: Any, transformers: Any, folder: str | Path, tokens: np.ndarray) -> Any:
    values = hf.read_config(folder)
    family = families.of_type(values.get("model_type", "xlstm"), hf.CONFIG)
    config = transformers.AutoConfig.for_model(
        **{"model_type": family.model_type} | values | dict(family.overrides)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    # use_cache=False: its cache rounds the width of the keys up, and fails for other widths.
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
