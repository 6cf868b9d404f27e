"""The selective state space of Mamba over a sequence.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3: the state is recomputed in the backward pass
from its values at chunk boundaries, and never stored for all positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mamba import MambaState, mamba_init, mamba_scan
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops import chunks, dispatch, over_time
from xlstm_jax.ops.checks import check_chunk_size
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.selective_steps import Steps, scan_steps
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.typing import Array, Flag, Float

CHUNK_SIZE = 16
"""Positions per chunk by default."""


class Inputs(NamedTuple):
    """Arguments of the op besides state and flags."""

    x: Float[Array, "B T F"]
    dt: Float[Array, "B T F"]
    A: Float[Array, "F K"]
    B: Float[Array, "B T K"]
    C: Float[Array, "B T K"]
    D: Float[Array, "F"] | None


SIGNATURE = over_time.Signature(
    "selective_scan",
    Inputs._make(("B T F", "B T F", "F K", "B T K", "B T K", "F")),
    MambaState._make(("B F K",)),
    "B T F",
)


def _recurrent(inputs: Inputs, state: MambaState, flags: Flags, chunk_size: int | None):
    del chunk_size
    return mamba_scan(*inputs, state, **flags._asdict())


def _sequential(inputs: Inputs, state: MambaState, flags: Flags, chunk_size: int | None):
    """A scan over time in chunks, of which the backward pass saves the first states only."""
    x, dt, A, B, C, D = inputs
    wide, T = state.h.dtype, x.shape[1]
    arrays = Steps(*(flags.zero_masked(a).astype(wide) for a in (x, dt, B, C)))
    reset = flags.valid_reset
    is_reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
    L = min(chunk_size or CHUNK_SIZE, T)

    def by_step(a):  # B T ... to N L B ...; padding is zeros, and a step of size 0 changes nothing
        return jnp.moveaxis(chunks.split(a, L), 2, 1)

    h = vary_like(jnp.swapaxes(state.h, 1, 2), (inputs, flags))
    steps = jax.tree.map(by_step, arrays)
    A, has_reset = A.astype(wide).T, reset is not None
    y, h = scan_steps(A, h, steps, by_step(is_reset), has_reset=has_reset)
    y = chunks.join(jnp.moveaxis(y, 1, 2), T)
    if D is not None:
        y = y + D.astype(wide)[None, None] * arrays.x
    return flags.zero_masked(y).astype(x.dtype), MambaState(jnp.swapaxes(h, 1, 2))


def _chunkwise(inputs: Inputs, state: MambaState, flags: Flags, chunk_size: int | None):
    """Positions of a chunk by an associative scan: its depth is the logarithm of the chunk size."""
    x, dt, A, B, C, D = inputs
    wide = state.h.dtype
    A = A.astype(wide)
    arrays = tuple(flags.zero_masked(a).astype(wide) for a in (x, dt, B, C))
    L = min(chunk_size or CHUNK_SIZE, x.shape[1])

    def step(h, chunk):
        (x, dt, B, C), reset = chunk
        decay = jnp.exp(dt[..., None] * A[None, None])
        if reset is not None:
            decay = jnp.where(reset[..., None, None], 0, decay)
        new = (dt * x)[..., None] * B[:, :, None]
        decay, new = jax.lax.associative_scan(_compose, (decay, new), axis=1)
        h = decay * h[:, None] + new
        return h[:, -1], exact_einsum("BLFK,BLK->BLF", h, C)

    by_chunk = jax.tree.map(lambda a: chunks.split(a, L), (arrays, flags.valid_reset))
    h, y = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state.h, by_chunk)
    y = chunks.join(y, x.shape[1])
    if D is not None:
        y = y + D.astype(wide)[None, None] * arrays[0]
    return flags.zero_masked(y).astype(x.dtype), MambaState(h)


def _compose(first, second):
    """The affine map h -> decay h + new of two successive steps."""
    (decay_1, new_1), (decay_2, new_2) = first, second
    return decay_1 * decay_2, decay_2 * new_1 + new_2


def _not_on_cpu(call: dispatch.Call) -> str | None:
    if call.platform == "cpu" and not call.named:
        return "a CPU is faster at the scan over time"
    return dispatch.symbolic_refusal(call, "T")


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "chunkwise": Implementation(_chunkwise, _not_on_cpu),
    "sequential": Implementation(_sequential, lambda call: dispatch.symbolic_refusal(call, "T")),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh((SIGNATURE.y, SIGNATURE.state))
def selective_scan(
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
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T F"], MambaState]:
    """Selective state space with a diagonal transition per channel (arXiv:2312.00752).

    h_t = exp(dt A) h_{t-1} + dt x B,  y_t = C h_t + D x.

    Args:
        x: input of every channel.
        dt: step size, above 0.
        A: continuous transition, below 0.
        B, C: input and output vectors of the state, shared by all channels.
        D: weight of the skip connection; None: no skip connection.
        state: before the first step; None is the initial state, zeros.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, y is 0 and resets are ignored.
        chunk_size: positions between states that are saved for the backward pass; speed only.
        implementation: a name of `ops.implementations("selective_scan")`, or "auto".

    Returns y in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, or an unknown implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    check_chunk_size("selective_scan", chunk_size)
    if implementation == "auto" and x.ndim > 1 and x.shape[1] == 1:
        implementation = "recurrent"
    return over_time.run(
        SIGNATURE,
        IMPLEMENTATIONS,
        implementation,
        Inputs(x, dt, A, B, C, D),
        state,
        Flags.of(reset, mask),
        init=_init,
        chunk_size=chunk_size,
    )


def _init(inputs: Inputs, dtype: jnp.dtype) -> MambaState:
    F, K = inputs.A.shape
    return mamba_init(inputs.x.shape[0], F, K, dtype)
