"""A model that compiles in seconds and whose logits differ clearly."""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig

VOCAB_SIZE = 11


@functools.cache
def model_and_variables(pattern="ms"):
    cfg = LMConfig(
        vocab_size=VOCAB_SIZE,
        dim=8,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=2, inner_dim=16),
        slstm=SLSTMConfig(num_heads=2, ffn_dim=16),
        # With the default initializers all logits are near 0, and rounding would decide the argmax.
        embedding_std=1.0,
        head_std=1.0,
    )
    model = LM(cfg)
    return model, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
