"""Time and memory per token of the chunkwise mLSTM, forward and backward, over sequence length."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from xlstm_jax import ops

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS, QK_DIM, V_DIM = 4, 32, 64  # sizes of the large workload


def run(repeats: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """One record per length; `max_over_min` is 1 if the cost per token is constant."""
    costs = {str(length): at_length(length, repeats) for length in lengths}
    ratios = {
        name: max(cost[name] for cost in costs.values())
        / min(cost[name] for cost in costs.values())
        for name in ("nanoseconds_per_token", "bytes_per_token")
    }
    shape = f"batch 1, {HEADS} heads, key size {QK_DIM}, value size {V_DIM}, float32"
    return {"shape": shape, "lengths": costs, "max_over_min": ratios}


def at_length(length: int, repeats: int) -> dict[str, Any]:
    """Cost of the gradients of all inputs for one sequence of `length` tokens."""
    widths = ((QK_DIM,), (QK_DIM,), (V_DIM,), (), (), (V_DIM,))
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = [(1, length, HEADS, *width) for width in widths]
    *inputs, weights = map(jax.random.normal, keys, shapes)

    def loss(*inputs):
        return jnp.sum(weights * ops.mlstm(*inputs, implementation="chunkwise")[0])

    program = jax.jit(jax.grad(loss, argnums=range(5))).lower(*inputs).compile()
    jax.block_until_ready(program(*inputs))
    times = measure.summary(measure.seconds(lambda: program(*inputs), repeats))
    nanoseconds = 1e9 * times["median_seconds"] / length
    size = measure.temporary_bytes(program) / length
    print(f"length {length}: {nanoseconds:,.0f} ns and {size:,.0f} bytes per token")
    return {"nanoseconds_per_token": nanoseconds, "bytes_per_token": size, **times}
