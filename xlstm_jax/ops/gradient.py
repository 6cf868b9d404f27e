"""Hand-written backward passes that also support forward-mode differentiation.

`jax.custom_vjp` does not, so it rules out forward-over-reverse Hessian-vector products. A backward
pass is linear in the cotangents, so its transpose is the forward-mode derivative. In reverse mode
JAX transposes that once more, which yields the given backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, PyTree

Forward = Callable[..., tuple[Any, Any]]
Backward = Callable[..., Any]


def with_backward(
    forward: Forward, backward: Backward, num_static: int = 0, *, rematerialize: bool = False
) -> Callable[..., Any]:
    """`forward(*args)[0]` with this backward pass, in every mode of differentiation.

    Args:
        forward: (*static, *args) -> (output, residuals).
        backward: (*static, residuals, cotangent of the output) -> tuple of the cotangents of args,
            with None for every integer or boolean array. It must be linear in the cotangent, and a
            differentiable function of the residuals, for second derivatives.
        num_static: number of leading arguments that are not arrays.
        rematerialize: reverse mode saves the residuals only, not values that `backward` computes
            from them.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=tuple(range(num_static)))
    def fn(*args):
        return forward(*args)[0]

    def jvp(*args):
        *static, primals, tangents = args
        output, residuals = forward(*static, *primals)
        # None for arguments that are not differentiated. Tangents of zeros would be operands of
        # products, where XLA's CPU backend reads past broadcast constants: see `cpu.materialize`.
        tangents = jax.tree.map(lambda t: None if _is_zero(t) else t, tangents)

        def pushforward(residuals: PyTree, tangents: PyTree) -> PyTree:
            def pullback(cotangent: PyTree) -> PyTree:
                cotangents = backward(*static, residuals, cotangent)
                select = lambda t, c: None if t is None else c  # noqa: E731
                return jax.tree.map(select, tangents, cotangents, is_leaf=lambda t: t is None)

            return jax.linear_transpose(pullback, output)(tangents)[0]

        wrap = (
            functools.partial(jax.checkpoint, prevent_cse=False) if rematerialize else lambda f: f
        )
        return output, wrap(pushforward)(residuals, tangents)

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn


def _is_zero(tangent: Any) -> bool:
    # Integers and booleans have tangents of the dtype float0.
    is_symbolic = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return is_symbolic or tangent.dtype == jax.dtypes.float0


def unit(x: Array) -> Array:
    """exp(x) divided by the constant exp(x): 1, with the gradient of a factor exp(x)."""
    return times_unit(jnp.ones_like(x), x)


@jax.custom_jvp
def times_unit(a: Array, x: Array) -> Array:
    """`a * unit(x)`, with x broadcast over trailing axes: a itself, which is not multiplied."""
    # Selects a twice, so that `vmap` over x alone maps the result too. It would not map a itself,
    # but its tangent, and then the derivative of `jax.checkpoint` raises (jax 0.10 to 0.12).
    is_any = jnp.isnan(x).reshape(x.shape + (1,) * (a.ndim - x.ndim))
    return jnp.where(is_any, a, a)


@times_unit.defjvp
def _times_unit_jvp(primals, tangents):
    (a, x), (da, dx) = primals, tangents
    product, one = times_unit(a, x), jnp.exp(x - jax.lax.stop_gradient(x))
    dx, one = (y.reshape(y.shape + (1,) * (a.ndim - x.ndim)) for y in (dx, one))
    return product, da * one + product * dx
