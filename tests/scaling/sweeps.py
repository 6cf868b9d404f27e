"""A small sweep, in a module of its own so that PLAN.py files of tests can import it."""

from typing import Any

from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig, MLSTMConfig
from xlstm_jax.modules.baselines import options
from xlstm_jax.scaling import Shape, Sweep
from xlstm_jax.train import TrainConfig


def xlstm(shape: Shape) -> LMConfig:
    """First-generation mLSTM blocks."""
    mlstm = MLSTMConfig(num_heads=shape.num_heads)
    return LMConfig(vocab_size=257, dim=shape.dim, pattern="m" * shape.num_blocks, mlstm=mlstm)


def llama(shape: Shape) -> LMConfig:
    """Transformer blocks."""
    attention = options.AttentionConfig(num_heads=shape.num_heads)
    pattern = "a" * shape.num_blocks
    return LMConfig(vocab_size=257, dim=shape.dim, pattern=pattern, attention=attention)


def sweep(**changes: Any) -> Sweep:
    """Two families, two shapes and two budgets, unless `changes` says otherwise."""
    train = TrainConfig(
        eval_every=1_000_000, eval_batches=2, log_every=10, checkpoint_every=0, watch="none"
    )
    fields: dict[str, Any] = dict(
        families={"xlstm": xlstm, "llama": llama},
        shapes=[Shape(16, 1, 2), Shape(24, 1, 2)],
        budgets=[1e9, 3e9],
        seq_len=32,
        batch_rule=lambda point: 4,
        lr_rule=lambda point: 3e-3 if point.shape.dim < 20 else 2e-3,
        data=DataConfig(source="grammar"),
        train=train,
    )
    return Sweep(**fields | changes)
