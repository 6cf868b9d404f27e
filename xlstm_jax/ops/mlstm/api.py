"""The mLSTM over a sequence: one signature, several implementations."""

import dataclasses

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import common_dtype, state_dtype
from xlstm_jax.cells.mlstm import MLSTMState, mlstm_init, mlstm_scan
from xlstm_jax.cells.time import vary_like
from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import (
    check_choice,
    check_chunk_size,
    check_length,
    check_shapes,
    fields_with_axes,
)
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import FLAG_AXES, Flags, flip_time
from xlstm_jax.ops.mlstm.arguments import INPUT_AXES, STATE_AXES, Inputs, Options
from xlstm_jax.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_jax.ops.mlstm.context_parallel import boundary_states
from xlstm_jax.ops.mlstm.parallel import mlstm_parallel
from xlstm_jax.ops.mlstm.segments import split_on_gpu
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.sharded.shard_map import is_checked, map_shards, sharding_axes
from xlstm_jax.typing import Array, Flag, Float

NO_STABILIZER, EXP_FORGET = "stabilize=False", "forget_gate='exp'"
"""Names in `dispatch.Call.uses`."""


def _kernels(backend: str) -> Implementation:
    """The kernels of a backend, a function of `pallas_kernels.mlstm.backends`."""

    def unsupported(call: dispatch.Call) -> str | None:
        reason = dispatch.kernel_refusal(backend, call)
        if reason is not None:
            return reason
        if NO_STABILIZER in call.uses:
            return f"it has no {NO_STABILIZER}"
        from pallas_kernels.mlstm import backends

        kernels = getattr(backends, backend)()
        return kernels.refusal(call.K, call.V, call.dtype, call.chunk_size)

    def compute(x: Inputs, state: MLSTMState | None, flags: Flags, options: Options):
        from pallas_kernels.mlstm import api, backends

        # Kernels load q, k and v in one dtype.
        dtype = common_dtype(x.q.dtype, x.k.dtype, x.v.dtype)
        q, k, v = (a.astype(dtype) for a in x[:3])
        kernels, kwargs = getattr(backends, backend)(), flags._asdict() | options._asdict()
        del kwargs["stabilize"]
        first = None if state is None else (state.C, state.n, state.m)
        h, last = api.mlstm(kernels, q, k, v, x.i, x.f, first, **kwargs)
        return h.astype(x.v.dtype), MLSTMState(*last)

    def programs_per_head(x: Inputs, options: Options) -> int:
        from pallas_kernels import common
        from pallas_kernels.mlstm import backends

        kernels, (K, V) = getattr(backends, backend)(), (x.k.shape[-1], x.v.shape[-1])
        dtype = common_dtype(x.q.dtype, x.k.dtype, x.v.dtype)
        tile = kernels.tile(K, V, dtype, x.q.shape[1], options.chunk_size)
        return tile.states.programs(*kernels.widths(x.k.shape[2], K, V, common.lanes()))

    # A TPU has one or two cores, which one sequence with two heads occupies.
    if backend != "tpu":
        compute = split_on_gpu(compute, programs_per_head)
    return Implementation(compute, unsupported, zeros_as_none=True)


def _in_chunks(call: dispatch.Call) -> str | None:
    """Only a known length can be divided into chunks, or into a matrix of pairs of positions."""
    if call.uses >= {NO_STABILIZER, EXP_FORGET}:
        return f"it has no {NO_STABILIZER} with {EXP_FORGET}"  # it sums log f <= 0
    return dispatch.symbolic_refusal(call, "T")


def _recurrent(x: Inputs, state: MLSTMState, flags: Flags, options: Options):
    """The reference, also used for decoding."""
    kwargs = options._asdict()
    del kwargs["chunk_size"]
    if x.q.shape[1] != 1 or flags.mask is None or not options.max_state:
        return mlstm_scan(*x, state, **flags._asdict(), **kwargs)
    # A scan with a mask selects between the full old and new state. With these gates, a masked step
    # multiplies the state by 1 and adds 0.
    q, k, v = map(flags.zero_masked, x[:3])
    is_masked = ~flags.mask[..., None]
    i = jnp.where(is_masked, -jnp.inf, x.i)
    f = jnp.where(is_masked, options.open_forget_gate, x.f)
    h, state = mlstm_scan(q, k, v, i, f, state, reset=flags.valid_reset, **kwargs)
    return flags.zero_masked(h), state


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "pallas_tpu": _kernels("tpu"),
    "mosaic_gpu": _kernels("mosaic_gpu"),
    "triton": _kernels("triton"),
    "chunkwise": Implementation(mlstm_chunkwise, _in_chunks),
    "parallel": Implementation(mlstm_parallel, _in_chunks),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh(("B T H V", STATE_AXES))
def mlstm(
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
    chunk_size: int | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """mLSTM: a matrix memory C of keys and values, read by queries (arXiv:2405.04517, section 2.3).

    Args:
        q, k, v: queries, keys, values; the op applies 1/sqrt(K) to q.
        i, f: gate pre-activations from -inf, a closed gate, to 1e30.
        state: before the first step; None is the initial state, zeros in every leaf.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, h is 0 and resets are ignored.
        input_gate: activation, "exp" or "sigmoid" (arXiv:2503.14376).
        forget_gate: activation, "sigmoid" or "exp". If both are "sigmoid", states have m = 0.
        normalize: divide h by max(|q n|, exp(-m)) + eps; False needs both to be "sigmoid".
        eps: added to the normalizer.
        stabilize: False, for ablations: m is 0, and the exponential of a gate above 88 is inf.
        chunk_size: positions per chunk of chunkwise implementations; changes speed only.
        reverse: run from the last position to the first.
        implementation: a name of `ops.implementations("mlstm")`, or "auto".

    Returns h in the dtype of v, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, an unknown gate or implementation, a chunk size below 1.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    x, flags = Inputs(q, k, v, i, f), Flags.of(reset, mask)
    options = Options(input_gate, forget_gate, normalize, eps, chunk_size, stabilize)
    call = _check(x, state, flags, options)
    selected = _choose(implementation, call)
    dtype = state_dtype(*x)
    time_axes = sharding_axes("T", call.T)
    if state is None and (time_axes or not selected.zeros_as_none):
        state = vary_like(mlstm_init(call.B, call.H, call.K, call.V, dtype), x)
    # A caller may pass a state in the dtype of the activations.
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    if reverse:
        x, flags = flip_time((x, flags))
    if time_axes and not stabilize:
        raise UnsupportedError(
            f"mlstm: {NO_STABILIZER} does not support a sequence sharded over {time_axes}; shard "
            "the batch instead."
        )

    def local(x, state, flags):
        if not time_axes:
            return selected.fn(x, state, flags, options)
        # `fn` returns the state after this shard; the op returns the state after the last one.
        initial, last = boundary_states(x, state, flags, options, time_axes)
        return selected.fn(x, initial, flags, options)[0], last

    axes = (INPUT_AXES, STATE_AXES, FLAG_AXES)
    sizes = {"B": call.B, "H": call.H} | ({"T": call.T} if time_axes else {})
    h, state = map_shards(local, (x, state, flags), axes, ("B T H V", STATE_AXES), sizes)
    return flip_time(h) if reverse else h, state


def _choose(implementation: str, call: dispatch.Call) -> Implementation:
    selected = dispatch.choose("mlstm", IMPLEMENTATIONS, implementation, call)
    if implementation == "auto" and call.T == 1 and selected is IMPLEMENTATIONS["chunkwise"]:
        return IMPLEMENTATIONS["recurrent"]  # a chunk of one step only adds work
    return selected


def _check(x: Inputs, state: MLSTMState | None, flags: Flags, options: Options) -> dispatch.Call:
    """Checks the arguments, and returns the static facts of the call."""
    arrays = fields_with_axes(x, INPUT_AXES) | fields_with_axes(flags, FLAG_AXES)
    if state is not None:
        arrays |= fields_with_axes(state, STATE_AXES, "state.")
    sizes = check_shapes("mlstm", arrays)
    check_length("mlstm", sizes)
    check_choice("mlstm", "input_gate", options.input_gate, ("exp", "sigmoid"))
    check_choice("mlstm", "forget_gate", options.forget_gate, ("sigmoid", "exp"))
    for name in ("input_gate", "forget_gate"):
        if not options.normalize and getattr(options, name) == "exp":
            raise ArgumentError(
                f"mlstm: normalize=False needs {name}='sigmoid', got {name}='exp'; exponential "
                "gates are unbounded, so h must be divided by the normalizer."
            )
    check_chunk_size("mlstm", options.chunk_size)
    B, T, H, K, V = (sizes[axis] for axis in "BTHKV")
    # A single float64 argument makes the computation float64, which kernels do not support.
    wide = state_dtype(*x)
    dtype = common_dtype(x.q.dtype, x.k.dtype, x.v.dtype) if wide == jnp.float32 else wide
    call = dispatch.Call(B, T, H, K, V, dtype, dispatch.platform(), options.chunk_size)
    uses = {NO_STABILIZER} if not options.stabilize else set()
    uses |= {EXP_FORGET} if options.forget_gate == "exp" else set()
    return dataclasses.replace(call, check_vma=is_checked(x), uses=frozenset(uses))
