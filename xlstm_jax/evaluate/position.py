"""Loss as a function of the position in the window: what a longer past is worth.

Source: the question of Beck et al. 2024, arXiv:2405.04517, figure 7 (length extrapolation).
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

PIECE = 1024  # positions in one pass: what bounds the memory, whatever the window


class Bucket(NamedTuple):
    """Targets at positions [start, stop) of their windows."""

    start: int
    stop: int
    nats_per_token: float  # NaN where no target counts
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
    """Loss in buckets [0, 1), [1, 2), [2, 4), [4, 8), ...; windows may be of any length.

    A bucket is read in one pass, or in pieces, and the state is carried to the next: memory does
    not grow with the window, and the loss is that of the window in one piece.

    Args and errors: those of `perplexity`.
    """
    read = functools.partial(_read, model, variables["params"], document_resets=document_resets)
    totals: dict[tuple[int, int], np.ndarray] = {}
    for batch in batches(windows, batch_size, max_batches):
        state = model.init_state(len(batch.inputs))
        for bucket, start, stop in _pieces(batch.inputs.shape[1]):
            piece = Batch(*(leaf[:, start:stop] for leaf in batch[:-1]), index=batch.index)
            before = batch.segment_ids[:, max(start - 1, 0)]
            sums, state = read(piece, before, state)
            both = np.array([sums.ce_sum, sums.weight_sum], np.float64)
            totals[bucket] = totals.get(bucket, np.zeros(2)) + both
    return [
        Bucket(start, stop, float(nats / count) if count else float("nan"), int(count))
        for (start, stop), (nats, count) in totals.items()
    ]


def _pieces(seq_len: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """The bucket, the start and the stop of every pass over a window."""
    edges = [0, *(2**n for n in range(seq_len.bit_length()) if 2**n < seq_len), seq_len]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, PIECE):
            yield (first, last), start, min(start + PIECE, last)


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _read(
    model: LM, params: Any, batch: Batch, before: jax.Array, state: Any, *, document_resets: bool
) -> tuple[CrossEntropy, Any]:
    """One pass; `before` is the document of the position before the first."""
    if document_resets:
        # The model sees documents change inside a piece; a change at its edge is seen here.
        same = batch.segment_ids[:, 0] == before
        state = jax.tree.map(  # leaves have the axes layers, B, ...
            lambda leaf: jnp.where(same.reshape((1, -1) + (1,) * (leaf.ndim - 2)), leaf, 0), state
        )
    return token_sums(model, params, batch, document_resets=document_resets, state=state)
