"""sLSTM: scalar memories, exponential gates, recurrence within each head.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import NEG, log_sigmoid, state_dtype
from xlstm_jax.cells.lstm import recurrent_gates
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class SLSTMState(NamedTuple):
    """Carry of one sLSTM layer; the initial state is all zeros. Leaves are float32 or wider."""

    c: Float[Array, "B H K"]  # cell, times exp(-m)
    n: Float[Array, "B H K"]  # normalizer, times exp(-m); 0 until an input gate opens, then >= 1
    h: Float[Array, "B H K"]  # hidden state, fed back through `r`
    m: Float[Array, "B H K"]  # stabilizer: log of the factor divided out; meaningless where n is 0


export.register_namedtuple_serialization(SLSTMState, serialized_name="xlstm_jax.SLSTMState")


def slstm_init(
    batch_size: Size, num_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> SLSTMState:
    """The initial state: zeros in every leaf, each in its own buffer, so that it can be donated."""
    shape = batch_size, num_heads, head_dim
    return SLSTMState._make(jnp.zeros(shape, dtype) for _ in SLSTMState._fields)


def slstm_step(
    state: SLSTMState,
    x: Float[Array, "B 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    *,
    forget_gate: str = "sigmoid",
    stabilize: bool = True,
) -> tuple[SLSTMState, Float[Array, "B H K"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state, x, r, b: as in `lstm_step`.
        forget_gate: activation of the forget gate, `"sigmoid"` or `"exp"`.
        stabilize: False: m is 0, and exponentials of the gates may overflow.

    Returns the state after step t, and h_t in the dtype of the state.
    """
    i, f, z, o = recurrent_gates(state.h, x, r, b)
    log_f = f if forget_gate == "exp" else log_sigmoid(f)
    # In the initial state (n = 0) the old stabilizer must not count: values and gradients are
    # those of m = i. Per element, so that a reset of some sequences does not affect the others.
    log_carry = jnp.where(state.n == 0, -jnp.inf, log_f + state.m)
    m = jnp.maximum(jnp.maximum(log_carry, i), NEG)  # never -inf, as -inf - -inf is NaN
    m = m if stabilize else jnp.zeros_like(m)
    # With this m both exponents are <= 0: nothing overflows, and n is 0 or >= 1.
    f_scaled = jnp.exp(log_carry - m)
    i_scaled = jnp.exp(i - m)
    c = f_scaled * state.c + i_scaled * jnp.tanh(z)
    n = f_scaled * state.n + i_scaled
    h = jax.nn.sigmoid(o) * c / jnp.where(n == 0, 1, n)  # n = 0: all input gates were 0, and h is
    return SLSTMState(c, n, h, m), h


def slstm_scan(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: SLSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    forget_gate: str = "sigmoid",
    stabilize: bool = True,
    reverse: bool = False,
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The recurrence over a sequence; `reset`, `mask` and `reverse` as in `scan_time`.

    Returns h in the dtype of x, and the state after the last step.
    """
    B, _, _, H, K = x.shape
    dtype = state_dtype(x, r)
    state = slstm_init(B, H, K, dtype) if state is None else state
    # `scan` requires a carry of one dtype, also where the caller passes a narrower state.
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), (x, r, b, reset, mask))

    def step(state, x):
        return slstm_step(state, x, r, b, forget_gate=forget_gate, stabilize=stabilize)

    h, state = scan_time(step, state, x, reset=reset, mask=mask, reverse=reverse)
    return h.astype(x.dtype), state
