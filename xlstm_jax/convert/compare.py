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
        TransformersError: the reference is not installed, fails, or lacks the tied head.
        ConfigError: we cannot load the folder; as in `hf.load_hf`.
    """
    cfg, read = hf.open_folder(folder, dtype="float32")
    family, _ = families.of_model(cfg)
    assert family is not None  # as it was read
    if cfg.tie_embeddings and not family.ties:
        raise TransformersError("transformers gives tied models a random head")
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise TransformersError("transformers or torch is not installed") from error
    # A cache for fewer positions is a window, which the reference does not have.
    length = min(TOKENS, cfg.attention.cache_size if "a" in cfg.pattern else TOKENS)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length))
    logits, _ = LM(cfg).apply({"params": read()}, jnp.asarray(tokens))
    try:
        reference = _reference_logits(torch, transformers, folder, tokens, family.overrides)
    except Exception as error:  # the package may raise anything; none of it is a bug of ours
        reason = printable(" ".join(str(error).split()))[:200] or type(error).__name__
        raise TransformersError(f"transformers cannot read or run the folder ({reason})") from error
    largest = np.abs(reference).max()
    error = float(np.abs(np.asarray(logits) / largest - reference / largest).max())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(error, error <= TOLERANCE, versions)


def _reference_logits(
    torch: Any, transformers: Any, folder: str | Path, tokens: np.ndarray, overrides: Any
) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **overrides
    )
    # use_cache=False: its cache rounds the width of the keys up, and fails for other widths.
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
