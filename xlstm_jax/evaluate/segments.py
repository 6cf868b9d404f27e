"""Windows of any length in segments, with the state carried from one to the next.

Device memory does not grow with the window, and the losses are those of one pass over it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.data.batch import Batch
from xlstm_jax.modules.lm import LM, head_kernel
from xlstm_jax.ops.cross_entropy import CrossEntropy, TokenLosses, token_losses
from xlstm_jax.sharding import constrain
from xlstm_jax.train.losses import token_sums

SEGMENT = 1024
"""Positions of a segment where the caller does not choose."""

T = TypeVar("T")


class HostLosses(NamedTuple):
    """`TokenLosses` of full sequences, on the host."""

    nats: np.ndarray  # B T, float32 or wider
    correct: np.ndarray  # B T, bool


def sums_of_segments(
    model: LM, params: Any, batch: Batch, segment_len: int, *, document_resets: bool
) -> Iterator[CrossEntropy]:
    """The loss sums of every segment of a batch, in order."""
    evaluate = functools.partial(_sums, model, params, document_resets=document_resets)
    return _over_segments(model, params, batch, segment_len, evaluate)


def losses_of_positions(
    model: LM, params: Any, batch: Batch, segment_len: int, *, document_resets: bool
) -> HostLosses:
    """The loss of every position of a batch."""
    evaluate = functools.partial(_losses, model, params, document_resets=document_resets)
    # On the host segment by segment, so that only one segment is on the device.
    parts = [
        jax.device_get(losses)
        for losses in _over_segments(model, params, batch, segment_len, evaluate)
    ]
    return HostLosses(*(np.concatenate(leaves, axis=1) for leaves in zip(*parts, strict=True)))


def _over_segments(
    model: LM,
    params: Any,
    batch: Batch,
    segment_len: int,
    evaluate: Callable[[Batch, np.ndarray, Any], tuple[T, Any]],
) -> Iterator[T]:
    """Results of `evaluate(segment, segment id before it, state) -> (result, state)`."""
    batch_size, seq_len = batch.inputs.shape
    state = None
    # A single segment needs no state, without which attention has no empty cache to look at.
    if seq_len > segment_len:
        is_wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
        state = model.init_state(batch_size, jnp.float64 if is_wide else None)
    for start in range(0, seq_len, segment_len):
        part = np.s_[:, start : start + segment_len]
        segment = Batch(*(leaf[part] for leaf in batch[:-1]), index=batch.index)
        # The first segment is compared with itself.
        before = batch.segment_ids[:, max(start - 1, 0)]
        result, state = evaluate(segment, before, state)
        yield result


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _sums(
    model: LM, params: Any, batch: Batch, before: jax.Array, state: Any, *, document_resets: bool
) -> tuple[CrossEntropy, Any]:
    if document_resets and state is not None:
        state = _reset(state, batch, before)
    return token_sums(model, params, batch, document_resets=document_resets, state=state)


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _losses(
    model: LM, params: Any, batch: Batch, before: jax.Array, state: Any, *, document_resets: bool
) -> tuple[TokenLosses, Any]:
    if document_resets and state is not None:
        state = _reset(state, batch, before)
    # Padding becomes a document of its own with weight 0, so it needs no mask.
    documents = jnp.where(batch.segment_ids == 0, -1, batch.segment_ids)
    hidden, state = model.apply(
        {"params": params},
        batch.inputs,
        state=state,
        segment_ids=documents if document_resets else None,
        has_padding=False,
        head=False,
    )
    kernel = head_kernel(model.cfg, params)
    losses = token_losses(hidden, kernel, batch.targets, soft_cap=model.cfg.logit_soft_cap)
    # Replicated, so that every process can read all of it.
    return TokenLosses(*(constrain(leaf, None, None) for leaf in losses)), state


def _reset(state: Any, batch: Batch, before: jax.Array) -> Any:
    """The initial state where a document begins with the segment.

    The model does not reset a given state at the first position. `before` is the segment id of the
    preceding position.
    """
    same = batch.segment_ids[:, 0] == before
    return jax.tree.map(  # leaves have the axes layers, B, ...
        lambda leaf: jnp.where(same.reshape((1, -1) + (1,) * (leaf.ndim - 2)), leaf, 0), state
    )
