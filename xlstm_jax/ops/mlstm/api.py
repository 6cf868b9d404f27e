"""The mLSTM over a sequence: one signature, several ways to compute it."""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.mlstm import MLSTMState, mlstm_init, mlstm_scan
from xlstm_jax.ops import dispatch, mlstm_kernel
from xlstm_jax.ops.checks import check_choice, check_length, check_shapes
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.mlstm_chunkwise import mlstm_chunkwise
from xlstm_jax.ops.mlstm_context import mlstm_context
from xlstm_jax.ops.mlstm_parallel import mlstm_parallel
from xlstm_jax.ops.sharded import cut_by, per_device
from xlstm_jax.typing import Array, Bool, Float


def _recurrent(q, k, v, i, f, state, *, chunk_size, **options):
    del chunk_size  # one step at a time
    return mlstm_scan(q, k, v, i, f, state, **options)


# Ordered: "auto" takes the first that can serve the call.
IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(mlstm_kernel.mlstm_tpu, mlstm_kernel.tpu_refusal),
    "triton": Implementation(mlstm_kernel.mlstm_triton, mlstm_kernel.triton_refusal),
    "chunkwise": Implementation(mlstm_chunkwise),
    "parallel": Implementation(mlstm_parallel),
    "recurrent": Implementation(_recurrent),
}


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    input_gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """mLSTM: a matrix memory written by v k' and read by q (arXiv:2405.04517, section 2.3).

    Args:
        q, k, v: queries, keys, values; 1/sqrt(K) is applied to q here.
        i, f: gate pre-activations; the forget gate is a sigmoid.
        state: memory before the first step; None is the empty one.
        reset: where True, everything before this position is forgotten.
        mask: where False, the state is left as it is, bit for bit, and h is 0.
        input_gate: "exp", or "sigmoid" (arXiv:2503.14376), whose states have m = 0.
        normalize: divide by max(|q n|, exp(-m)) + eps; False needs the sigmoid input gate.
        eps: added after that maximum.
        chunk_size: positions computed at once by the chunkwise forms; changes speed only.
        reverse: flips time in every argument and in h.
        implementation: a name of `ops.implementations("mlstm")`, or "auto".

    Returns h in the dtype of v, and the state after the last step, float32 or wider.

    Raises:
        ValueError: shapes that do not fit, an unknown gate or implementation, a chunk size below 1.
        NotImplementedError: the implementation cannot serve this call; says why.
    """
    call = _check(q, k, v, i, f, state, reset, mask, chunk_size)
    check_choice("mlstm", "input_gate", input_gate, ("exp", "sigmoid"))
    if not normalize and input_gate == "exp":
        raise ValueError(
            "mlstm: normalize=False needs input_gate='sigmoid', got input_gate='exp', "
            "whose memory grows without bound unless it is divided by its normaliser."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"mlstm: `chunk_size` must be at least 1, got {chunk_size}; "
            "leave it None to let the op choose."
        )
    chosen = dispatch.choose("mlstm", IMPLEMENTATIONS, implementation, call)
    if implementation == "auto" and call.T == 1 and chosen is IMPLEMENTATIONS["chunkwise"]:
        chosen = IMPLEMENTATIONS["recurrent"]  # decoding: a chunk of one step only adds work
    dtype = state_dtype(q, k, v, i, f)
    if state is None:
        state = mlstm_init(call.B, call.H, call.K, call.V, dtype)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    options = dict(input_gate=input_gate, normalize=normalize, eps=eps, chunk_size=chunk_size)
    arrays = (q, k, v, i, f, reset, mask)
    if reverse:
        arrays = jax.tree.map(_flip, arrays)
    h, state = _on_a_mesh(chosen, call, state, arrays, options)
    return _flip(h) if reverse else h, state


def _on_a_mesh(chosen: Implementation, call: dispatch.Call, state, arrays, options):
    """Each device its rows and its heads, and where the rules cut time its span of the sequence."""
    spans = cut_by("T", call.T)

    def compute(q, k, v, i, f, reset, mask, state):
        args = (q, k, v, i, f, MLSTMState(*state))
        if spans:
            h, state = mlstm_context(chosen.fn, spans, *args, reset, mask, **options)
        else:
            h, state = chosen.fn(*args, reset=reset, mask=mask, **options)
        return h, tuple(state)

    names = ("B T H K", "B T H K", "B T H V", "B T H", "B T H", "B T", "B T")
    axes = [None if x is None else name for x, name in zip(arrays, names, strict=True)]
    state_axes = ("B H K V", "B H K", "B H")
    sizes = {"B": call.B, "H": call.H} | ({"T": call.T} if spans else {})
    args, out_axes = (*arrays, tuple(state)), ("B T H V", state_axes)
    h, state = per_device(compute, args, (*axes, state_axes), out_axes, sizes)
    return h, MLSTMState(*state)


def _flip(x: jax.Array) -> jax.Array:
    return jnp.flip(x, axis=1)


def _check(q, k, v, i, f, state, reset, mask, chunk_size) -> dispatch.Call:
    arrays = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T H V"),
        "i": (i, "B T H"),
        "f": (f, "B T H"),
        "reset": (reset, "B T"),
        "mask": (mask, "B T"),
    }
    if state is not None:
        arrays["state.C"] = (state.C, "B H K V")
        arrays["state.n"] = (state.n, "B H K")
        arrays["state.m"] = (state.m, "B H")
    sizes = check_shapes("mlstm", arrays)
    check_length("mlstm", sizes)
    B, T, H, K, V = (sizes[axis] for axis in "BTHKV")
    # What is float64 anywhere is computed in float64.
    wide = state_dtype(q, k, v, i, f)
    dtype = jnp.result_type(q, k, v) if wide == jnp.float32 else wide
    return dispatch.Call(B, T, H, K, V, dtype, dispatch.platform(), chunk_size)
