"""Mamba: a selective state space per channel, with a diagonal transition.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3; with its names dt, A, B, C, D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import exact_einsum, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class MambaState(NamedTuple):
    """Carry of one Mamba layer; the initial state is zeros. Float32 or wider."""

    h: Float[Array, "B F K"]  # K numbers per channel


export.register_namedtuple_serialization(MambaState, serialized_name="xlstm_jax.MambaState")


def mamba_init(
    batch_size: Size, features: int, state_dim: int, dtype: DTypeLike = jnp.float32
) -> MambaState:
    """The initial state: zeros."""
    return MambaState(jnp.zeros((batch_size, features, state_dim), dtype))


def mamba_step(
    state: MambaState,
    x: Float[Array, "B F"],
    dt: Float[Array, "B F"],
    A: Float[Array, "F K"],
    B: Float[Array, "B K"],
    C: Float[Array, "B K"],
    D: Float[Array, "F"] | None = None,
) -> tuple[MambaState, Float[Array, "B F"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        x: input of every channel.
        dt: step size, above 0.
        A: continuous transition, below 0; the state decays by exp(dt A).
        B, C: how the input enters the state and how the state is read; shared by all channels.
        D: weight of the skip connection from x.

    Returns the state after step t, and y_t in the dtype of the state.
    """
    dtype = state.h.dtype
    x, dt, A, B, C = (a.astype(dtype) for a in (x, dt, A, B, C))
    decay = jnp.exp(dt[..., None] * A[None])
    h = decay * state.h + (dt * x)[..., None] * B[:, None]
    y = exact_einsum("BFK,BK->BF", h, C)
    return MambaState(h), y if D is None else y + D.astype(dtype)[None] * x


def mamba_scan(
    x: Float[Array, "B T F"],
    dt: Float[Array, "B T F"],
    A: Float[Array, "F K"],
    B: Float[Array, "B T K"],
    C: Float[Array, "B T K"],
    D: Float[Array, "F"] | None = None,
    state: MambaState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T F"], MambaState]:
    """The recurrence over a sequence; `reset` and `mask` as in `scan_time`.

    Returns y in the dtype of x, and the state after the last step.
    """
    dtype = state_dtype(x, dt, A)
    if state is None:
        state = mamba_init(x.shape[0], A.shape[0], A.shape[1], dtype)
    arrays = (x, dt, A, B, C, D, reset, mask)
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), arrays)

    def step(state, inputs):
        x, dt, B, C = inputs
        return mamba_step(state, x, dt, A, B, C, D)

    y, state = scan_time(step, state, (x, dt, B, C), reset=reset, mask=mask)
    return y.astype(x.dtype), state
