"""LSTM with memory mixing within heads: the classic cell in the layout of the sLSTM.

Source: Hochreiter & Schmidhuber 1997; heads as in Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import exact_einsum, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class LSTMState(NamedTuple):
    """Carry of one LSTM layer; the initial state is all zeros. Leaves are float32 or wider."""

    c: Float[Array, "B H K"]  # cell
    h: Float[Array, "B H K"]  # hidden state, fed back through `r`


export.register_namedtuple_serialization(LSTMState, serialized_name="xlstm_jax.LSTMState")


def lstm_init(
    batch_size: Size, num_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> LSTMState:
    """The initial state: zeros in every leaf, each in its own buffer, so that it can be donated."""
    shape = batch_size, num_heads, head_dim
    return LSTMState._make(jnp.zeros(shape, dtype) for _ in LSTMState._fields)


def lstm_step(
    state: LSTMState,
    x: Float[Array, "B 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
) -> tuple[LSTMState, Float[Array, "B H K"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        x: input contributions to (i, f, z, o), before any nonlinearity.
        r: recurrent weights (input, gate, output) of the same four gates; heads do not mix.
        b: bias of the four gates.

    Returns the state after step t, and h_t in the dtype of the state.
    """
    i, f, z, o = recurrent_gates(state.h, x, r, b)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(z)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return LSTMState(c, h), h


def recurrent_gates(
    h: Float[Array, "B H K"],
    x: Float[Array, "B 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None,
) -> tuple[Float[Array, "B H K"], ...]:
    """Pre-activations of i, f, z, o: input, recurrent contribution of the same head, and bias."""
    # Cast to the dtype of the state: activations may be bfloat16, gates may not.
    gates = x.astype(h.dtype) + exact_einsum("BHK,HKGJ->BGHJ", h, r.astype(h.dtype))
    if b is not None:
        # `b` has the head axis first, like `r`; pre-activations have the gate axis first.
        gates = gates + jnp.swapaxes(b, 0, 1)[None].astype(h.dtype)
    return tuple(gates[:, g] for g in range(4))


def lstm_scan(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: LSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T H K"], LSTMState]:
    """The recurrence over a sequence; `reset`, `mask` and `reverse` as in `scan_time`.

    Returns h in the dtype of x, and the state after the last step.
    """
    B, _, _, H, K = x.shape
    dtype = state_dtype(x, r)
    state = lstm_init(B, H, K, dtype) if state is None else state
    # `scan` requires a carry of one dtype, also where the caller passes a narrower state.
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), (x, r, b, reset, mask))

    def step(state, x):
        return lstm_step(state, x, r, b)

    h, state = scan_time(step, state, x, reset=reset, mask=mask, reverse=reverse)
    return h.astype(x.dtype), state
