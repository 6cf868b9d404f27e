"""Log-space gate arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm import gates
from xlstm_jax.cells import logspace, mlstm


@pytest.mark.parametrize("x", [-1e4, -200.0, -104.0, -1.0, 0.0, 1.0, 200.0])
def test_log_sigmoid_and_its_gradient_are_exact_and_finite(x):
    value, slope = jax.value_and_grad(logspace.log_sigmoid)(jnp.float32(x))
    np.testing.assert_allclose(value, -np.logaddexp(0, -x), rtol=1e-6, atol=1e-38)
    np.testing.assert_allclose(slope, np.exp(-np.logaddexp(0, x)), rtol=1e-5, atol=1e-38)


def test_neg_is_finite_and_its_exponential_is_zero():
    neg = jnp.float32(logspace.NEG)
    assert neg - neg == 0
    assert jnp.exp(neg) == 0
    assert jnp.exp(neg + 200.0) == 0


@pytest.mark.parametrize(
    "inputs,expected",
    [
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["bfloat16", "float32"], "float32"),
        (["float32", "float64"], "float64"),
    ],
)
def test_state_dtype_is_float32_or_wider(inputs, expected, x64):
    assert logspace.state_dtype(*(jnp.zeros((), dtype) for dtype in inputs)) == expected


def test_constants_equal_those_of_the_kernels():
    """`cells` does not import the kernels, so both packages define the constants."""
    assert logspace.NEG == gates.NEG
    assert (mlstm.READ_FLOOR, mlstm.TINY) == (gates.READ_FLOOR, gates.TINY)
