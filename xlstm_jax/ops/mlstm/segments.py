"""Sequence split: on a GPU, segments of a long sequence are computed in parallel, like sequences.

The kernel `states` runs serially along a sequence, with few programs per head. If batch and heads
are few, most of the chip is idle. Then the sequence is split into S segments, which are treated as
a batch. The state before each segment is exact: it is composed of the summaries of all earlier
ones (`summaries`), as for the shards of context parallelism. Gradients come from autodiff.

**Cost model.** With P programs of `states` for the full sequence, and M multiprocessors:

    unsplit   T / 64 iterations, one after the other, each about 0.8 microseconds
    split     T / (64 S) iterations as long as S P <= M; the summaries move about 6 (K + V) bytes
              per position and head, transposes included, and take some 20 small launches

Per program K + V is about 200 (one per head) to 100 (eight per head). At 4 TB/s the summaries cost
what the split saves where P is M / 3 to M / 2, and the launches cost 50 iterations. The backward
pass doubles both sides. So a split has at least 4 segments, of at least 2,048 positions.
`experiments/benchmarks/sequence_split.py` prints the modeled times. Not measured on hardware.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.mlstm import gates as pre
from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.mlstm import MLSTMState, mlstm_init
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.ops.mlstm.summaries import (
    Summary,
    absolute,
    boundary_stabilizers,
    relative,
    state_before,
    summarize,
    weights_at_end,
)
from xlstm_jax.typing import Array, Float

MIN_LENGTH, MIN_SEGMENTS = 2048, 4
"""A sequence is split only into at least this many segments of at least this many positions."""

MULTIPLE = 128
"""Segments are a multiple of this long, so that chunks divide them."""

Compute = Callable[..., tuple[Float[Array, "B T H V"], MLSTMState]]
"""(inputs, state or None for zeros, flags, options) -> h, state."""


def segment_length(T: int, programs: int, multiprocessors: int) -> int:
    """Positions per segment, T if the sequence is not split; see the cost model.

    Args:
        programs: of the kernel `states`, for the full sequence and all heads of the batch.
    """
    count = min(multiprocessors // programs, T // MIN_LENGTH)
    return T if count < MIN_SEGMENTS else common.round_up(-(-T // count), MULTIPLE)


def split_on_gpu(fn: Compute, programs_per_head: Callable[[Inputs, Options], int]) -> Compute:
    """`fn`, which launches kernels, in segments if the rule for the current GPU splits.

    The rule depends on local shapes only, without a batch that `vmap` adds.

    Args:
        programs_per_head: of the kernel `states`.
    """

    def compute(x: Inputs, state: MLSTMState | None, flags: Flags, options: Options):
        chip, (B, T, H, K) = gpu.current_chip(), x.q.shape
        if chip is None or common.interpreter() or T < MIN_SEGMENTS * MIN_LENGTH:
            return fn(x, state, flags, options)
        programs = B * H * programs_per_head(x, options)
        length = segment_length(T, programs, ARCHITECTURES[chip].multiprocessors)
        if length == T:
            return fn(x, state, flags, options)
        zeros = mlstm_init(B, H, K, x.v.shape[-1], state_dtype(*x))
        first = vary_like(zeros, x) if state is None else state
        return in_segments(fn, length, x, first, flags, options)

    return compute


def in_segments(
    fn: Compute, length: int, x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """`fn(x, state, flags, options)`, in segments of `length` positions as a batch."""
    B, T = x.q.shape[:2]
    count = -(-T // length)
    x, flags = _divide(x, flags, options, count * length, length)
    h, last = fn(x, _initial_states(x, state, flags, options, count), flags, options)
    h = h.reshape(B, count * length, *h.shape[2:])[:, :T]
    return h, jax.tree.map(lambda leaf: leaf.reshape(B, count, *leaf.shape[1:])[:, -1], last)


def _divide(x: Inputs, flags: Flags, options: Options, padded: int, length: int):
    """Inputs and flags `B T ...` as `BS length ...`, padded by steps that change no state."""

    def divide(a: Any, padding: float = 0) -> Any:
        if a is None:
            return None
        a = common.pad(a, 1, padded, padding)
        return a.reshape(-1, length, *a.shape[2:])

    i, f = divide(x.i, pre.NEG), divide(x.f, options.open_forget_gate)
    x = Inputs(divide(x.q), divide(x.k), divide(x.v), i, f)
    return x, Flags(divide(flags.reset), divide(flags.mask))


def _initial_states(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options, count: int
) -> MLSTMState:
    """The states before all segments, `BS H ...`; `state`, `B H ...`, is before the first."""
    gates = pre.log_gates(x.i, x.f, *flags, **options.gates, dtype=state.C.dtype)
    k, v = flags.zero_masked(x.k), flags.zero_masked(x.v)
    # The weights of all positions are rematerialized in the backward pass.
    summary_of = jax.checkpoint(summarize, prevent_cse=False, static_argnums=3)
    lead = functools.partial(_segments_first, count=count)
    if options.forget_gate == "sigmoid":
        parts = jax.tree.map(lead, summary_of(k, v, gates, options))
        starts = _states_before(parts, state)
    else:
        # As in `context_parallel`: sums far above 0 would round, so all are relative to m.
        _, g, m = weights_at_end(gates, options)
        m_first = boundary_stabilizers(lead(m), lead(g), state.m)[:-1]
        summary = summary_of(k, v, gates, options, _batch_first(m_first))
        parts = jax.tree.map(lead, summary._replace(m=jnp.zeros_like(m)))
        starts = absolute(_states_before(parts, relative(state)), m_first)
    return jax.tree.map(_batch_first, starts)


def _states_before(parts: Summary, state: MLSTMState) -> MLSTMState:
    """The states before all parts, `S B H ...`: all prefixes by one product with S x S weights."""
    ranks = jnp.arange(len(parts.g))
    return jax.vmap(state_before, in_axes=(0, None, None))(ranks, parts, state)


def _segments_first(a: Array, count: int) -> Array:
    """`BS ...` to `S B ...`."""
    return jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0)


def _batch_first(a: Array) -> Array:
    """`S B ...` to `BS ...`."""
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])
