"""What is computed once keeps its value and its gradient, and is stored before it is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.ops import dispatch
from xlstm_jax.ops.cpu import materialize, materialize_cotangent


def _weights(gates, once):
    """All differences of gates that need some arithmetic first."""
    gates = once(2 * gates.T)
    return jnp.exp(gates[:, None, :] - gates[:, :, None])


@pytest.mark.parametrize("once", [materialize, materialize_cotangent])
def test_values_and_gradients_do_not_change(once, rng):
    gates = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    loss = lambda gates, once: jnp.sum(jnp.sin(_weights(gates, once)))  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for a, b in zip(run(gates, once), run(gates, lambda x: x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    many = jnp.stack([gates, -gates])
    mapped = jax.jit(jax.vmap(lambda gates: _weights(gates, once)))(many)
    np.testing.assert_allclose(mapped[1], _weights(-gates, lambda x: x), rtol=1e-6)


def test_a_number_that_is_not_finite_stays_where_it_is():
    x = jnp.asarray([1.0, jnp.nan, jnp.inf, -2.0])
    np.testing.assert_array_equal(jax.jit(materialize)(x), x)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers decide for themselves")
def test_the_compiled_program_stores_it():
    """Fails where a compiler has learnt to look through the branch: the op is then in vain."""
    gates = jnp.zeros((64, 8))
    program = jax.jit(_weights, static_argnums=1).lower(gates, materialize).compile().as_text()
    assert " conditional(" in program
    plain = jax.jit(_weights, static_argnums=1).lower(gates, lambda x: x).compile().as_text()
    assert " conditional(" not in plain


def test_a_default_device_decides_and_not_the_machine(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.platform() == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert dispatch.platform() == "cpu"
        assert "stablehlo.case" in jax.jit(materialize).lower(jnp.zeros(3)).as_text()
