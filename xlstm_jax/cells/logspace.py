"""Arithmetic with logarithms of gates, and the precision of sums and products.

Exponential gates overflow in float32 at a pre-activation of 89, so every cell keeps the logarithm
of a scale (`m`) and works with exponents that are never positive (arXiv:2405.04517, section 2.2).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Float

NEG = -1e30
"""The log of nothing; finite, so that NEG - NEG is 0 and not NaN."""


def log_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 / (1 + exp(-x))) for any x: -softplus(-x), which neither overflows nor reaches -inf."""
    return -jax.nn.softplus(-x)


def state_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of gates, sums and state: float32, or wider where an input is."""
    return jnp.result_type(jnp.float32, *(a.dtype for a in arrays))


def exact_einsum(spec: str, *operands: Array, dtype: jnp.dtype | None = None) -> Array:
    """An einsum accumulated in `dtype`; float32 operands are never rounded to fewer digits."""
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=dtype)
