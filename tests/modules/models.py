"""Small models whose every parameter matters, for the tests beside this file."""

import dataclasses

import jax
import jax.numpy as jnp

from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig

LETTERS = ("m", "s", "M")
MIXED = "mmsM"


def config(pattern: str = MIXED, **changes) -> LMConfig:
    """A model of width 16 with two heads, everywhere with sizes that differ from each other."""
    cfg = LMConfig(
        vocab_size=11,
        dim=16,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=2, inner_dim=24, qkv_block_size=3, conv_width=4),
        slstm=SLSTMConfig(num_heads=2, ffn_dim=20, conv_width=3),
        large=LargeConfig(num_heads=2, qk_dim=12, v_dim=20, ffn_dim=28),
        logit_soft_cap=30.0,
    )
    return dataclasses.replace(cfg, **changes)


def shaken(tree, key: jax.Array, dtype=jnp.float32):
    """Parameters moved away from their initial values, where zeros would hide mistakes."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    moved = [
        (leaf + 0.3 * jax.random.normal(k, leaf.shape)).astype(dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def model_and_variables(cfg: LMConfig, key: jax.Array, dtype=jnp.float32):
    """A model and shaken parameters."""
    model = LM(cfg)
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 1), jnp.int32))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    return model, shaken(zeros, key, dtype)


def tokens(key: jax.Array, batch_size: int, length: int, vocab_size: int = 11) -> jax.Array:
    """Random token ids."""
    return jax.random.randint(key, (batch_size, length), 0, vocab_size)
