"""Logits of the reference implementation, where it is installed, beside ours."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xlstm_jax.convert import hf
from xlstm_jax.modules import LM

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


def with_transformers(folder: str | Path) -> Comparison | None:
    """Compares what we make of a folder with what `transformers` does, on random tokens.

    Both compute in float32. Returns None where `transformers` or `torch` is not installed.
    """
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError:
        return None
    cfg, params = hf.load_hf(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, TOKENS))
    ours, _ = LM(cfg).apply({"params": params}, jnp.asarray(tokens))
    config = transformers.xLSTMConfig(**hf.read_config(folder) | _KERNELS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    # Its cache has the widths of the keys rounded up, and does not take those of every model.
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(float(error), versions)
