"""Keeping XLA from computing the same thing again and again."""

import jax
import jax.numpy as jnp

from xlstm_jax.ops import dispatch
from xlstm_jax.typing import Array, PyTree


def computed_once(x: PyTree) -> PyTree:
    """x, but stored before anything reads it, on a CPU.

    XLA for CPUs merges elementwise work, transpositions and copies into every loop that reads their
    result, however often that loop reads each element: gates of L positions were added up and
    transposed anew for each of L x L weights, in a loop that no longer runs in vector registers
    (0.84 instead of 0.20 ms for 128 chunks of 64, AMD EPYC, 2026-11-23). A branch is what it does
    not look into, and a predicate behind a barrier what it does not know. The other branch is never
    taken. It costs one copy of x.
    """
    if dispatch.platform() != "cpu":
        return x
    yes = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.cond(yes, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), x)


def stored(x: PyTree) -> PyTree:
    """x, in memory, for products that are to read it; on a CPU.

    Where an operand of a product is one value repeated, such as the zeros of an empty memory, XLA's
    library for CPUs reads past that value: outputs of a sequence of one chunk were off by 1e8 times
    their size (jaxlib 0.10.2).
    """
    return computed_once(x)


@jax.custom_vjp
def gradient_computed_once(x: Array) -> Array:
    """x, whose cotangent is stored before anything reads it, on a CPU; see `computed_once`."""
    return x


gradient_computed_once.defvjp(lambda x: (x, None), lambda _, dx: (computed_once(dx),))
