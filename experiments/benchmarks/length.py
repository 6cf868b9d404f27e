"""Time and memory per token of the chunkwise mLSTM, forward and backward, as rows grow longer."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from xlstm_jax import ops

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS, QK_DIM, V_DIM = 4, 32, 64  # of the large case


def run(repeats: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """One row per length; `max_over_min` is 1 where the cost per token does not change."""
    rows = {str(length): at_length(length, repeats) for length in lengths}
    ratios = {
        name: max(row[name] for row in rows.values()) / min(row[name] for row in rows.values())
        for name in ("nanoseconds_per_token", "bytes_per_token")
    }
    shape = f"1 row, {HEADS} heads, key width {QK_DIM}, value width {V_DIM}, float32"
    return {"shape": shape, "lengths": rows, "max_over_min": ratios}


def at_length(length: int, repeats: int) -> dict[str, Any]:
    """Cost of the gradient of all inputs for one row of that many tokens."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (1, length, HEADS)
    shapes = [(*shape, QK_DIM), (*shape, QK_DIM), (*shape, V_DIM), shape, shape, (*shape, V_DIM)]
    *inputs, weights = map(jax.random.normal, keys, shapes)

    def loss(*inputs):
        h, _ = ops.mlstm(*inputs, implementation="chunkwise")
        return jnp.sum(weights * h)

    program = jax.jit(jax.grad(loss, argnums=range(5))).lower(*inputs).compile()
    jax.block_until_ready(program(*inputs))
    times = measure.summary(measure.seconds(lambda: program(*inputs), repeats))
    return {
        "nanoseconds_per_token": 1e9 * times["median_seconds"] / length,
        "bytes_per_token": measure.temporary_bytes(program) / length,
        **times,
    }
