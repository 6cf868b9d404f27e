"""Mamba-2: a state space with one decay per head, whose state is a matrix (SSD).

Source: Dao & Gu 2024, arXiv:2405.21060, sections 5 and 7; with its names dt, A, B, C, D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import exact_einsum, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class SSDState(NamedTuple):
    """Carry of one Mamba-2 layer; the initial state is zeros. Float32 or wider."""

    h: Float[Array, "B H K V"]  # matrix memory


export.register_namedtuple_serialization(SSDState, serialized_name="xlstm_jax.SSDState")


def ssd_init(
    batch_size: Size, num_heads: int, state_dim: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> SSDState:
    """The initial state: zeros."""
    return SSDState(jnp.zeros((batch_size, num_heads, state_dim, head_dim), dtype))


def ssd_step(
    state: SSDState,
    x: Float[Array, "B H V"],
    dt: Float[Array, "B H"],
    A: Float[Array, "H"],
    B: Float[Array, "B groups K"],
    C: Float[Array, "B groups K"],
    D: Float[Array, "H"] | None = None,
) -> tuple[SSDState, Float[Array, "B H V"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        x: input of every head, its value.
        dt: step size of every head, above 0.
        A: continuous transition of every head, below 0; the state decays by exp(dt A).
        B, C: key and query, each shared by the consecutive heads of a group.
        D: weight of the skip connection from x.

    Returns the state after step t, and y_t in the dtype of the state.
    """
    dtype = state.h.dtype
    x, dt, A, B, C = (a.astype(dtype) for a in (x, dt, A, B, C))
    H, groups = x.shape[1], B.shape[1]
    B, C = (jnp.repeat(a, H // groups, axis=1) for a in (B, C))
    decay = jnp.exp(dt * A[None])
    # dt and B are multiplied first: K numbers, not the K x V of their outer product with x.
    h = decay[..., None, None] * state.h + (dt[..., None] * B)[..., None] * x[..., None, :]
    y = exact_einsum("BHK,BHKV->BHV", C, h)
    return SSDState(h), y if D is None else y + D.astype(dtype)[None, :, None] * x


def ssd_scan(
    x: Float[Array, "B T H V"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T groups K"],
    C: Float[Array, "B T groups K"],
    D: Float[Array, "H"] | None = None,
    state: SSDState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T H V"], SSDState]:
    """The recurrence over a sequence; `reset` and `mask` as in `scan_time`.

    Returns y in the dtype of x, and the state after the last step.
    """
    dtype = state_dtype(x, dt, A)
    if state is None:
        state = ssd_init(x.shape[0], x.shape[2], B.shape[-1], x.shape[-1], dtype)
    arrays = (x, dt, A, B, C, D, reset, mask)
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), arrays)

    def step(state, inputs):
        x, dt, B, C = inputs
        return ssd_step(state, x, dt, A, B, C, D)

    y, state = scan_time(step, state, (x, dt, B, C), reset=reset, mask=mask)
    return y.astype(x.dtype), state
