"""The two models whose train step is compared with the official package, and our step of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.data import Batch
from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, at
from xlstm_jax.train import TrainConfig, TrainState, init_state, make_optimizer, make_train_step

VOCAB_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the shape of its batches."""

    model: LMConfig
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.seq_len


# float32 and nothing recomputed, on both sides: at these sizes memory is no concern.
LARGE = LMConfig(
    vocab_size=VOCAB_SIZE,
    dim=256,
    pattern="MMMM",
    large=LargeConfig(num_heads=4, ffn_dim=704),
    final_norm="rms",
    final_norm_eps=1e-6,
    logit_soft_cap=30.0,
    remat="none",
)
V1 = LMConfig(
    vocab_size=VOCAB_SIZE,
    dim=128,
    pattern=at(6, slstm=[1]),
    mlstm=MLSTMConfig(num_heads=4),
    slstm=SLSTMConfig(num_heads=4),
    remat="none",
)
CASES = {
    "large": Case(model=LARGE, batch_size=4, seq_len=512),
    "v1": Case(model=V1, batch_size=8, seq_len=256),
}
"""Name -> case; `peer_torch.py` builds the same models under the same names."""

# Rows are one document each, and the peer knows no documents: neither side looks for their borders.
TRAIN = TrainConfig(steps=1000, grad_clip=1.0, document_resets=False)


def train_step(model: LMConfig) -> tuple[jax.stages.Wrapped, Callable[[], TrainState]]:
    """The library's train step of a model, jitted with the state donated, and its first state."""
    lm, tx = LM(model), make_optimizer(TRAIN)
    tokens = jnp.zeros((1, 1), jnp.int32)
    step = jax.jit(make_train_step(lm, tx, TRAIN), donate_argnums=0)
    return step, lambda: init_state(lm, tx, jax.random.key(0), tokens)


def random_batch(case: Case) -> Batch:
    """One document a row, of uniformly random tokens."""
    shape = (case.batch_size, case.seq_len)
    tokens = jax.random.randint(
        jax.random.key(1), (shape[0], shape[1] + 1), 0, case.model.vocab_size, jnp.int32
    )
    ones = jnp.ones(shape, jnp.int32)
    index = jnp.arange(case.batch_size)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(jnp.float32), index)


def compiled_step(case: Case) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A call that trains one step more, and its compiled program."""
    step, first_state = train_step(case.model)
    state, batch = first_state(), random_batch(case)
    program = step.lower(state, batch).compile()

    def advance():
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return advance, program
