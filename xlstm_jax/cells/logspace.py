"""Log-space gate arithmetic, and the precision of sums and products.

Exponential gates overflow in float32 at a pre-activation of 89, so every cell stores the logarithm
of a scale (`m`), and its exponents are never positive (arXiv:2405.04517, section 2.2).
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.typing import Array, Float

NEG = -1e30
"""Stands for log(0); finite, so that NEG - NEG is 0 and not NaN."""


def log_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 / (1 + exp(-x))) for any x: -softplus(-x), which neither overflows nor reaches -inf."""
    return -jax.nn.softplus(-x)


def common_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype to which arrays of these dtypes are promoted."""
    # Promoted explicitly, so that it works where the user forbids implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def state_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of gates, sums and state: float32, or wider if an input is wider."""
    # bfloat16 has 8 significant bits: a state summed over many steps would lose small updates.
    return common_dtype(jnp.float32, *(a.dtype for a in arrays))


def exact_einsum(spec: str, *operands: Array, dtype: jnp.dtype | None = None) -> Array:
    """An einsum accumulated in `dtype`; float32 operands are not rounded to fewer bits."""
    # By default a TPU multiplies float32 in bfloat16 and a recent GPU may use TF32.
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=dtype)
