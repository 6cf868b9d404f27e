"""`materialize` changes neither values nor gradients, and prevents fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.ops import dispatch
from xlstm_jax.ops.cpu import materialize, materialize_cotangent


def _weights(gates, identity):
    """Exponentials of all differences of gates, which are computed first."""
    gates = identity(2 * gates.T)
    return jnp.exp(gates[:, None, :] - gates[:, :, None])


@pytest.mark.parametrize("identity", [materialize, materialize_cotangent])
def test_values_and_gradients_do_not_change(identity, rng):
    gates = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    loss = lambda gates, identity: jnp.sum(jnp.sin(_weights(gates, identity)))  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for a, b in zip(run(gates, identity), run(gates, lambda x: x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    stacked = jnp.stack([gates, -gates])
    mapped = jax.jit(jax.vmap(lambda gates: _weights(gates, identity)))(stacked)
    np.testing.assert_allclose(mapped[1], _weights(-gates, lambda x: x), rtol=1e-6)


def test_materialize_preserves_non_finite_values():
    x = jnp.asarray([1.0, jnp.nan, jnp.inf, -2.0])
    np.testing.assert_array_equal(jax.jit(materialize)(x), x)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a workaround for the CPU backend")
def test_compiled_program_contains_the_conditional():
    """Fails if XLA simplifies the conditional: `materialize` then has no effect."""
    gates = jnp.zeros((64, 8))
    program = jax.jit(_weights, static_argnums=1).lower(gates, materialize).compile().as_text()
    assert " conditional(" in program
    plain = jax.jit(_weights, static_argnums=1).lower(gates, lambda x: x).compile().as_text()
    assert " conditional(" not in plain


def test_platform_follows_the_default_device(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.platform() == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert dispatch.platform() == "cpu"
        assert "stablehlo.case" in jax.jit(materialize).lower(jnp.zeros(3)).as_text()
