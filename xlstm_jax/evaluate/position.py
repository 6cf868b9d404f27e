"""Loss by position in the window: the value of a longer context.

Source: as in Beck et al. 2024, arXiv:2405.04517, figure 7 (length extrapolation).
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.evaluate.perplexity import batches
from xlstm_jax.modules.lm import LM
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train.losses import token_sums

CHUNK = 1024  # positions in one forward pass; bounds memory for windows of any length


class Bucket(NamedTuple):
    """Targets at positions [start, stop) of their windows."""

    start: int
    stop: int
    nats_per_token: float  # NaN if num_tokens is 0
    num_tokens: int


def by_position(
    model: LM,
    variables: Any,
    windows: Examples,
    *,
    batch_size: int = 16,
    max_batches: int | None = None,
    document_resets: bool = True,
) -> list[Bucket]:
    """Loss in buckets of positions [0, 1), [1, 2), [2, 4), [4, 8), ...; windows have any length.

    A bucket is evaluated in chunks, and the state is carried from chunk to chunk: memory does not
    grow with the window, and the loss equals that of one pass over the window.

    Args and errors are those of `perplexity`.
    """
    evaluate = functools.partial(
        _chunk_sums, model, variables["params"], document_resets=document_resets
    )
    totals: dict[tuple[int, int], np.ndarray] = {}
    for batch in batches(model, windows, batch_size, max_batches):
        state = model.init_state(len(batch.inputs))
        for bucket, start, stop in _chunks(batch.inputs.shape[1]):
            chunk = Batch(*(leaf[:, start:stop] for leaf in batch[:-1]), index=batch.index)
            # Segment of the preceding position; the first chunk compares with itself.
            before = batch.segment_ids[:, max(start - 1, 0)]
            sums, state = evaluate(chunk, before, state)
            # In float64: a float32 total loses digits over millions of tokens.
            nats_and_count = np.array([sums.ce_sum, sums.weight_sum], np.float64)
            totals[bucket] = totals.get(bucket, np.zeros(2)) + nats_and_count
    return [
        Bucket(start, stop, float(nats / count) if count else float("nan"), int(count))
        for (start, stop), (nats, count) in totals.items()
    ]


def _chunks(seq_len: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Bucket, start and stop of every forward pass over a window."""
    edges = [0, *(2**n for n in range(seq_len.bit_length()) if 2**n < seq_len), seq_len]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, CHUNK):
            yield (first, last), start, min(start + CHUNK, last)


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _chunk_sums(
    model: LM, params: Any, batch: Batch, before: jax.Array, state: Any, *, document_resets: bool
) -> tuple[CrossEntropy, Any]:
    """Loss sums of a chunk, and the state; `before` is the segment id of the preceding position."""
    if document_resets:
        # The model does not reset a given state at the first position, so a document that starts
        # with the chunk needs a reset here.
        same = batch.segment_ids[:, 0] == before
        state = jax.tree.map(  # leaves have the axes layers, B, ...
            lambda leaf: jnp.where(same.reshape((1, -1) + (1,) * (leaf.ndim - 2)), leaf, 0), state
        )
    return token_sums(model, params, batch, document_resets=document_resets, state=state)
