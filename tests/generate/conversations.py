"""Models of bytes for sessions, and a sampler whose texts are letters.

By default the state is a cache with an integer, of a single block, which compiles fastest.
"""

import functools

import jax
import jax.numpy as jnp

from tests.modules.models import config
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import Sampler, prepare_params
from xlstm_jax.modules import LM

VOCAB_SIZE = 610  # more than the tokenizers have
BYTES = tokenizers.get("byte")

# Samples from few letters, which soon occur. All tests share it, as each sampler is a program.
LETTERS = Sampler(never=tuple(i for i in range(VOCAB_SIZE) if i not in [*b"abcd"]), temperature=3.0)


@functools.cache
def model_and_variables(pattern: str = "w", **changes):
    """A model and prepared parameters."""
    model, variables = initialized(pattern, **changes)
    return model, prepare_params(model, variables)


def initialized(pattern: str = "w", **changes):
    """A model and its initial parameters."""
    sizes = dict(vocab_size=VOCAB_SIZE, embedding_std=1.0, head_std=1.0) | changes
    cfg = config(pattern, **sizes)
    model = LM(cfg)
    return model, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
