"""Logits of the reference implementation, where it is installed, beside ours."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xlstm_jax.convert import hf
from xlstm_jax.modules.lm import LM

TOKENS = 64
TOLERANCE = 1e-3  # rounding gives about 1e-5, a wrong weight far more


class Comparison(NamedTuple):
    """How far apart two implementations of a model are."""

    error: float  # largest difference of logits, as a share of the largest logit
    agrees: bool
    versions: str


class TransformersError(Exception):
    """`transformers` or `torch` is not installed, or cannot read or run a folder."""


def with_transformers(folder: str | Path) -> Comparison:
    """Compares what we make of a folder with what `transformers` does, on random tokens.

    Both compute in float32.

    Raises:
        TransformersError: the reference fails; an error of ours is raised as it is.
    """
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise TransformersError("transformers or torch is not installed") from error
    cfg, params = hf.load_hf(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, TOKENS))
    ours, _ = LM(cfg).apply({"params": params}, jnp.asarray(tokens))
    try:
        theirs = _their_logits(torch, transformers, folder, tokens)
    except Exception as error:  # whatever they raise, it is not a fault of ours
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TransformersError(f"transformers cannot read or run the folder ({reason})") from error
    largest = np.abs(theirs).max()
    error = float(np.abs(np.asarray(ours) / largest - theirs / largest).max())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(error, error <= TOLERANCE, versions)


def _their_logits(torch: Any, transformers: Any, folder: str | Path, tokens: np.ndarray) -> Any:
    config = transformers.xLSTMConfig(**hf.read_config(folder) | hf.KERNELS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    # Its cache has the widths of the keys rounded up, and does not take those of every model.
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
