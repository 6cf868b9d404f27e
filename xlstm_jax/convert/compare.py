"""Logits of the reference implementation, where it is installed, beside ours."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.typing import PyTree

TOKENS = 64

# Published configs name kernels that only run on a GPU; these compute the same.
_KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}


class Comparison(NamedTuple):
    """How far apart two implementations of a model are."""

    error: float  # largest difference of logits, as a share of the largest logit
    versions: str


def with_transformers(folder: str | Path, cfg: LMConfig, params: PyTree) -> Comparison | None:
    """Compares a model with what `transformers` makes of a folder, on random tokens, in float32.

    Returns None where `transformers` or `torch` is not installed.
    """
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError:
        return None
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, TOKENS))
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, kernel in _KERNELS.items():
        setattr(config, name, kernel)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    # Its cache has the widths of the keys rounded up, and does not take those of every model.
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    ours, _ = LM(dataclasses.replace(cfg, dtype="float32")).apply(
        {"params": params}, jnp.asarray(tokens)
    )
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(float(error), versions)
