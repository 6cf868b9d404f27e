"""Can a small xLSTM learn to write source code, byte by byte, in a few minutes on two CPU cores?

Expected: at most 3.0 bits per byte on validation text, decreasing at every evaluation. (A uniform
distribution has 8 bits per byte, byte frequencies alone about 4.8.)

    xlstm-jax train experiments/char_lm.py --size cpu

Data: the standard library of the running Python, split by file, so validation text comes from files
that are not trained on. Sizes: smoke (seconds, a functional test), cpu (the experiment), paper (a
larger model, for an accelerator).
"""

import dataclasses

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, tokenizers
from xlstm_jax.modules import LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

CPU = ExperimentConfig(
    name="char_lm",
    model=LMConfig(
        vocab_size=tokenizers.get("byte").vocab_size,
        dim=160,
        pattern="mmsmmm",
        mlstm=MLSTMConfig(num_heads=4),
        slstm=SLSTMConfig(num_heads=4),
    ),
    data=DataConfig(source="stdlib", seq_len=256, batch_size=8),
    train=TrainConfig(steps=500, lr=3e-3, eval_every=100, eval_batches=40, grad_clip=1.0),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=32, pattern="ms"),
    data=dataclasses.replace(CPU.data, source="grammar", seq_len=64, batch_size=4),
    train=dataclasses.replace(
        CPU.train, steps=20, eval_every=10, eval_batches=4, log_every=5, checkpoint_every=10
    ),
)
PAPER = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=512, pattern="mmmsmmmm" * 2, dtype="bfloat16"),
    data=dataclasses.replace(CPU.data, seq_len=1024, batch_size=32),
    train=dataclasses.replace(CPU.train, steps=10_000, lr=1e-3, eval_every=1000),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}


def config(size: str = "cpu") -> ExperimentConfig:
    """The config of one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is unknown; use one of: {', '.join(SIZES)}.")
    return SIZES[size]
