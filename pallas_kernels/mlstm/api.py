"""Differentiable mLSTM on top of the kernels of a backend.

The gradient is that of the recurrence except for one term: `eps` is scaled by e^m, so h depends on
m through it, and the gradient omits this dependence if the forget gate is a sigmoid. In float64 the
omission changes the gradients of i and f by at most 7e-6 of their largest element (eps = 1e-6,
gates of scale 1 to 10), and no other gradient. With an exponential forget gate exp(-m) may be below
eps, and the gradient is exact.

Source: arXiv:2405.04517, section 2.3; chunkwise form: arXiv:2503.14376, section 3.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from pallas_kernels import common
from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm import packing
from pallas_kernels.mlstm.options import Kernels, Options, State


def mlstm(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    f: jax.Array,
    state: State | None,
    *,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    input_gate: str = "exp",
    forget_gate: str = "sigmoid",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
) -> tuple[jax.Array, State]:
    """mLSTM over a sequence.

    Args:
        kernels: from `backends`.
        q, k, v: `B T H K`, `B T H K`, `B T H V`, all float32 or all bfloat16; 1/sqrt(K) is applied
            to q here.
        i, f: `B T H`, gate pre-activations.
        state: before the first step; None is the initial state, zeros.
        reset: `B T`; where True, the state is the initial one before this position is processed.
        mask: `B T`; where False, the state is unchanged and h is 0.
        input_gate, forget_gate: "exp" or "sigmoid"; if both are "sigmoid", the states have m = 0.
        normalize: divide by max(|q n|, exp(-m)) + eps; False requires both to be "sigmoid".
        eps: added after that maximum.
        chunk_size: positions in a chunk, a multiple of the tile (128 on a TPU, 64 on a GPU); None:
            chosen by `kernels.tile`.

    Any T, K and V are supported: they are padded to tiles, time by steps that leave the state
    unchanged and widths by zeros. State, normalizers and gates are float32. States at chunk
    boundaries, which are saved for the gradient and from which GPU kernels compute h, are in the
    dtype of q. Second derivatives are not supported; the XLA implementation "chunkwise" has them.

    Returns:
        h in the dtype of v, and the state after the last step.

    Raises:
        ValueError: an unknown gate, an unsupported dtype, a chunk size that is not a multiple of
            the tile, or heads too wide for the chip; the message names sizes that fit.
    """
    T, K, V = q.shape[1], q.shape[-1], v.shape[-1]
    activations = {"input_gate": input_gate, "forget_gate": forget_gate}
    _check(q, k, v, activations, normalize=normalize)
    tile = kernels.tile(K, V, v.dtype, T, chunk_size)
    if mask is not None:
        q, k, v = (jnp.where(mask[..., None, None], x, 0) for x in (q, k, v))
    gates = pre.log_gates(i, f, reset, mask, **activations)
    compute = _step if T == 1 and kernels.supports_step(K, V) else _padded
    zero_state = state is None and compute is _padded
    state = None if zero_state else _float32_state(state, v.shape, K)
    options = Options(
        kernels=kernels,
        tile=tile,
        forget_gate=forget_gate,
        max_state="exp" in activations.values(),
        normalize=normalize,
        eps=eps,
        resets=reset is not None,
        lanes=common.lanes(),
        interpret=common.interpreter(),
        target=common.target(),
        zero_state=zero_state,
    )
    h, state = compute(options, q, k, v, gates, state)  # pyright: ignore[reportGeneralTypeIssues]
    return (h if mask is None else jnp.where(mask[..., None, None], h, 0)), state


def _float32_state(state: State | None, shape: tuple[int, ...], K: int) -> State:
    """The state in float32, zeros if it is None; `shape` is `B T H V`."""
    if state is not None:
        C, n, m = (leaf.astype(jnp.float32) for leaf in state)
        return C, n, m
    B, _, H, V = shape
    C, n, m = (jnp.zeros(sizes, jnp.float32) for sizes in ((B, H, K, V), (B, H, K), (B, H)))
    return C, n, m


def _check(q, k, v, activations: dict[str, str], *, normalize: bool) -> None:
    """Checks the arguments of direct callers; the op `mlstm` has checked its own."""
    for name, gate in activations.items():
        if gate not in ("exp", "sigmoid"):
            raise ValueError(f"mlstm: `{name}` must be 'exp' or 'sigmoid', got {gate!r}.")
        if gate == "exp" and not normalize:
            raise ValueError(f"mlstm: normalize=False needs {name}='sigmoid', got 'exp'.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"mlstm: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; "
            "cast them to the widest."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(options: Options, q, k, v, gates: pre.LogGates, state: State) -> tuple[jax.Array, State]:
    """T = 1, by the step kernel; the gradient is that of a chunk with one position."""
    step = common.fold_vmap(functools.partial(options.kernels.step, options))
    return step(q, k, v, gates, state)


_step.defvjp(
    lambda options, *arrays: jax.vjp(functools.partial(_padded, options), *arrays),
    lambda options, pullback, cotangents: pullback(cotangents),
)


def _padded(options: Options, q, k, v, gates: pre.LogGates, state: State | None):
    """`_core` for any sizes, by padding to chunks and tiles."""
    if state is not None and not options.max_state:
        state = pre.fold_stabilizer(*state)
    B, T, H, K = q.shape
    V = v.shape[-1]
    padded = common.round_up(T, options.chunk)
    widths = options.kernels.widths(H, K, V, options.lanes)
    q, k, v = (
        common.pad(common.pad(x, 3, width), 1, padded).reshape(B, padded, H * width)
        for x, width in ((q, widths[0]), (k, widths[0]), (v, widths[1]))
    )
    gates = pre.LogGates(
        common.pad(gates.log_i, 1, padded, pre.NEG),
        common.pad(gates.log_f, 1, padded),
        None if gates.reset is None else common.pad(gates.reset, 1, padded),
    )
    C, n, m = None, None, jnp.zeros((B, H), jnp.float32)
    if state is not None:
        C, n, m = state
        C = common.pad(common.pad(C, 2, widths[0]), 3, widths[1])
        n = common.pad(n, 2, widths[0])[:, :, None]
    args = (q, k, v, gates, C, n, m)
    h, C, n, m = _core(options, K, *args)  # pyright: ignore[reportGeneralTypeIssues]
    h = h.reshape(B, padded, H, widths[1])[:, :T, :, :V]
    return h, (C[:, :, :K, :V], n[:, :, 0, :K], m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(options: Options, K: int, q, k, v, gates: pre.LogGates, C, n, m):
    """The chunkwise kernels for padded sizes, q `B T HK`; K is the width before padding.

    With `options.zero_state`, C and n are None.

    Returns h, C, n, m.
    """
    return _forward(options, K, q, k, v, gates, C, n, m, save=False)[0]


def _folded(kernel: Callable[..., Any], *static: Any, **options: Any) -> Callable[..., Any]:
    """A part of a derivative whose first arguments are static, with a `vmap` rule."""
    kernel = functools.partial(kernel, *static, **options)
    return common.first_order(common.fold_vmap(kernel))


def _forward(options: Options, K: int, q, k, v, gates: pre.LogGates, C, n, m, *, save=True):
    packed, m_starts, m_last = _folded(options.kernels.pack_forward, options, K)(gates, m)
    kernel = _folded(options.kernels.forward, options, save=save)
    h, C, n, *saved = kernel(packed, q, k, v, C, n)
    return (h, C, n, m_last), (q, k, v, gates, m_starts, h, C, n, *saved)


def _backward(options: Options, K: int, residuals, cotangents):
    """dC, dn and dm, of the state after the last step, are None if no loss depends on them."""
    q, k, v, gates, m_starts, h, C, n, d, C_starts, n_starts = residuals
    dh, dC, dn, dm = cotangents
    if not options.normalize:
        h = d = None
    kernels = options.kernels
    packed = _folded(kernels.pack_backward, options, K)(gates, m_starts, d, h, dh)
    backward = _folded(kernels.backward, options)
    grads = backward(packed, q, k, v, h, dh, C_starts, n_starts, dC, dn)
    scaling = jnp.zeros_like(m_starts[..., 0])
    if dC is not None:
        scaling = jnp.sum(dC * C, axis=(2, 3)) + jnp.sum(dn * n, axis=(2, 3))
    dlog_i, dlog_f = _folded(kernels.gate_grads, options)(gates, grads, scaling)
    dm_first = grads.scaling[:, :, 0].sum(-1)
    through_eps = options.normalize and options.forget_gate == "exp"
    if options.max_state and (dm is not None or through_eps):
        # Returned C and n are scaled by exp(-m), so for a fixed unscaled state dm gets -scaling.
        dm_last = -scaling if dm is None else dm - scaling
        through_m = packing.stabilizer_grads(options, gates, m_starts, d, h, dh, dm_last)
        dlog_i, dlog_f = dlog_i + through_m[0], dlog_f + through_m[1]
        dm_first = dm_first + through_m[2]
    dgates = pre.LogGates(dlog_i, dlog_f, None)
    dstate = (None, None) if options.zero_state else (grads.C, grads.n)
    return grads.q, grads.k, grads.v, dgates, *dstate, dm_first


def _forward_of_primals(options: Options, K: int, *args):
    """`_forward` for a `custom_vjp` with symbolic zeros."""
    return _forward(options, K, *custom_vjp_primal_tree_values(args))


def _backward_of_cotangents(options: Options, K: int, residuals, cotangents):
    """`_backward`, for cotangents that may be symbolic zeros."""
    dh, *state = cotangents
    dh = jnp.zeros(dh.shape, dh.dtype) if _is_zero(dh) else dh
    if all(map(_is_zero, state)):
        return _backward(options, K, residuals, (dh, None, None, None))
    state = (jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x for x in state)
    return _backward(options, K, residuals, (dh, *state))


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


# Symbolic, because the final state has no cotangent in training, and zeros `B H K V` cost traffic.
_core.defvjp(_forward_of_primals, _backward_of_cotangents, symbolic_zeros=True)
