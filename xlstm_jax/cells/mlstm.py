"""mLSTM: a matrix memory per head, updated by outer products of keys and values.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.3; the sigmoid input gate: arXiv:2503.14376.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import NEG, exact_einsum, log_sigmoid, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Bool, Flag, Float, Size

READ_FLOOR = -20.0
"""Lowest log-scale for the read-out. Below -88, exp(-m) is inf in float32 and its gradient NaN;
the floor changes the read-out by less than eps * exp(-20) = 2e-15."""

TINY = 2.0**-120
"""Lower bound of the normalizer, for queries with q n = 0 where exp(-m) has underflowed."""


class MLSTMState(NamedTuple):
    """Carry of one mLSTM layer; the initial state is all zeros. Leaves are float32 or wider.

    Keys are stored unscaled: the factor 1/sqrt(K) is applied to the query.
    """

    C: Float[Array, "B H K V"]  # matrix memory, times exp(-m)
    n: Float[Array, "B H K"]  # normalizer, times exp(-m)
    m: Float[Array, "B H"]  # log of the scale divided out of C and n


export.register_namedtuple_serialization(MLSTMState, serialized_name="xlstm_jax.MLSTMState")


def mlstm_init(
    batch_size: Size, num_heads: int, qk_dim: int, v_dim: int, dtype: DTypeLike = jnp.float32
) -> MLSTMState:
    """The initial state: zeros in every leaf."""
    return MLSTMState(
        jnp.zeros((batch_size, num_heads, qk_dim, v_dim), dtype),
        jnp.zeros((batch_size, num_heads, qk_dim), dtype),
        jnp.zeros((batch_size, num_heads), dtype),
    )


def mlstm_step(
    state: MLSTMState,
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    i: Float[Array, "B H"],
    f: Float[Array, "B H"],
    *,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    normalize: bool = True,
    eps: float = 1e-6,
    stabilize: bool = True,
) -> tuple[MLSTMState, Float[Array, "B H V"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        q, k, v: query, key and value.
        i, f: gate pre-activations.
        input_gate, forget_gate: activations, `"exp"` or `"sigmoid"`. If both are a sigmoid, the
            state is bounded and m is 0 after every step.
        normalize: divide by max(|q n|, exp(-m)) + eps.
        eps: added after that maximum.
        stabilize: False: m is 0 with exponential gates too, whose exponentials may overflow.

    Returns the state after step t, and h_t in the dtype of the state.
    """
    q, k, v, i, f = (a.astype(state.C.dtype) for a in (q, k, v, i, f))
    log_carry = (f if forget_gate == "exp" else log_sigmoid(f)) + state.m
    log_i = i if input_gate == "exp" else log_sigmoid(i)
    # With m = 0 the first step multiplies the scale of a given state back into C and n. If both
    # gates are 0, m is NEG: it is never -inf, as -inf - -inf is NaN.
    max_gate = jnp.maximum(jnp.maximum(log_carry, log_i), NEG)
    has_max = stabilize and "exp" in (input_gate, forget_gate)
    m = max_gate if has_max else jnp.zeros_like(log_carry)
    # With an exponential gate and its m both exponents are <= 0: nothing overflows.
    f_scaled = jnp.exp(log_carry - m)
    i_scaled = jnp.exp(log_i - m)
    # Gate and key are multiplied first: K numbers, not the K x V of their outer product with v.
    C = f_scaled[..., None, None] * state.C + (i_scaled[..., None] * k)[..., None] * v[..., None, :]
    n = f_scaled[..., None] * state.n + i_scaled[..., None] * k
    state = MLSTMState(C, n, m)
    return state, mlstm_read(state, q, normalize=normalize, eps=eps)


def mlstm_read(
    state: MLSTMState, q: Float[Array, "B H K"], *, normalize: bool, eps: float
) -> Float[Array, "B H V"]:
    """The read-out: C q / (max(|q n|, exp(-m)) + eps)."""
    q, m = _scale_query(state, q)
    u = exact_einsum("BHK,BHKV->BHV", q, state.C)
    return u / _divisor(state.n, q, m, eps)[..., None] if normalize else u


def mlstm_normalizer(
    state: MLSTMState, q: Float[Array, "B H K"], *, eps: float
) -> Float[Array, "B H"]:
    """The divisor of the read-out, in units of exp(max(m, READ_FLOOR))."""
    return _divisor(state.n, *_scale_query(state, q), eps)


def _scale_query(state: MLSTMState, q: Float[Array, "B H K"]):
    """The query for the stored state, and m raised to the floor."""
    m = jnp.maximum(state.m, READ_FLOOR)
    # The difference to the floor and 1/sqrt(K) scale the query, which is smaller than the state.
    return q * (q.shape[-1] ** -0.5 * jnp.exp(state.m - m)[..., None]), m


def _divisor(n: Float[Array, "B H K"], q, m: Float[Array, "B H"], eps: float):
    d = jnp.sum(q * n, axis=-1)
    return jnp.maximum(jnp.abs(d), _floor(m)) + eps


def _floor(m: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    # exp(-m) is 1 in units of the unscaled state: small |q n| must not amplify the read-out.
    return jnp.maximum(jnp.exp(-m), TINY)


def floor_acts(
    normalizer: Float[Array, "*batch H"], m: Float[Array, "*batch H"], *, eps: float
) -> Bool[Array, "*batch H"]:
    """Whether a divisor of `mlstm_normalizer` is its lower bound, whatever the query is."""
    floor = _floor(jnp.maximum(m, READ_FLOOR)) + eps
    return normalizer <= floor * (1 + 1e-6)  # equal up to the rounding of another program


def mlstm_scan(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    normalize: bool = True,
    eps: float = 1e-6,
    stabilize: bool = True,
    reverse: bool = False,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The recurrence over a sequence; `reset`, `mask` and `reverse` as in `scan_time`.

    Returns h in the dtype of v, and the state after the last step.
    """
    B, _, H, K = q.shape
    dtype = state_dtype(q, k, v, i, f)
    state = mlstm_init(B, H, K, v.shape[-1], dtype) if state is None else state
    # `scan` requires a carry of one dtype, also where the caller passes a narrower state.
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), (q, k, v, i, f, reset, mask))

    gates = {"input_gate": input_gate, "forget_gate": forget_gate, "stabilize": stabilize}

    def step(state, x):
        return mlstm_step(state, *x, normalize=normalize, eps=eps, **gates)

    h, state = scan_time(step, state, (q, k, v, i, f), reset=reset, mask=mask, reverse=reverse)
    return h.astype(v.dtype), state
