"""Small models whose parameters all affect the output, for the tests in this folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.baselines import options

LETTERS = ("m", "s", "M")
MIXED = "msM"
BASELINES = ("l", "L", "a", "w", "h", "b", "B", "d", "r")
MIXED_BASELINES = "awhbBdrL"

_BASELINES = dict(
    lstm=options.LSTMConfig(num_heads=2, ffn_dim=20),
    # Fewer heads of keys than of queries, half of the features rotated, a cache of 7 positions.
    attention=options.AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        cache_size=7,
        rotary_fraction=0.5,
        qk_norm=True,
        output_gate=True,
        ffn_dim=28,
    ),
    window=options.WindowConfig(num_heads=2, window=3, num_sinks=2, ffn_dim=28),
    hybrid=options.HybridConfig(num_heads=2, window=3, num_sinks=1, ffn_dim=28),
    mamba=options.MambaConfig(inner_dim=24, state_dim=5, dt_rank=3, chunk_size=3),
    mamba2=options.Mamba2Config(inner_dim=24, head_dim=6, state_dim=5, groups=2, chunk_size=3),
    gated_delta=options.GatedDeltaConfig(
        num_heads=4, num_qk_heads=2, qk_dim=5, v_dim=6, ffn_dim=28, chunk_size=3
    ),
    rwkv4=options.RWKV4Config(inner_dim=20, ffn_dim=28),
)


def config(pattern: str = MIXED, **changes) -> LMConfig:
    """A model of width 16 with two heads; all other sizes differ, to reveal mixed-up axes."""
    cfg = LMConfig(
        vocab_size=11,
        dim=16,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=2, inner_dim=24, qkv_block_size=3, conv_width=4),
        slstm=SLSTMConfig(num_heads=2, ffn_dim=20, conv_width=3),
        large=LargeConfig(num_heads=2, qk_dim=12, v_dim=20, ffn_dim=28),
        logit_soft_cap=30.0,
        **_BASELINES,
    )
    return dataclasses.replace(cfg, **changes)


def perturbed(tree, seed: int = 0, dtype=np.float32):
    """Adds noise to the leaves, so that no zero hides a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), dtype), tree
    )


def model_and_variables(cfg: LMConfig, seed: int = 0, dtype=np.float32):
    """A model and random parameters, none of which is zero."""
    model = LM(cfg)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    return model, perturbed(zeros, seed, dtype)


def apply(model: LM, variables, tokens, *arguments, **options):
    """Jitted `model.apply`, which is many times faster than op-by-op execution."""
    static = ("head", "deterministic")
    compiled = jax.jit(model.apply, static_argnames=static)
    return compiled(variables, tokens, *arguments, **options)


def tokens(seed: int, batch_size: int, length: int, vocab_size: int = 11) -> jax.Array:
    """Random token ids."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (batch_size, length))
    return jnp.asarray(ids, jnp.int32)
