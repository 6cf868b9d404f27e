"""Loss by the frequency of the target in the training data: how well rare tokens are predicted.

Source: as in Beck et al. 2024, arXiv:2405.04517, figure 2 (right).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from xlstm_jax.data.batch import Examples
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.loader import eval_batches
from xlstm_jax.data.mixture import Mixture
from xlstm_jax.data.windows import Windows
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.evaluate.perplexity import batches, check_segment_len
from xlstm_jax.evaluate.position import Bucket, make_bucket
from xlstm_jax.evaluate.segments import SEGMENT, losses_of_positions
from xlstm_jax.modules.lm import LM

EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)
"""First count of each bucket where the caller does not choose; tokens never seen are the first."""

_CHUNK = 1 << 22  # tokens that are counted at once


def count_tokens(examples: Examples, vocab_size: int | None = None) -> Int64[np.ndarray, "vocab"]:
    """The number of occurrences of every token id in a data set.

    Args:
        examples: the training data: all tokens of a text, of each text of a mixture, or the targets
            of at most 256,000 samples of a task, which has no end.
        vocab_size: length of the result; None: that of the data.

    Raises:
        ArgumentError: the data have more token ids than `vocab_size`.
    """
    vocab_size = examples.vocab_size if vocab_size is None else vocab_size
    if examples.vocab_size > vocab_size:
        raise ArgumentError(
            f"vocab_size must be at least {examples.vocab_size}, that of the data, got "
            f"{vocab_size}; use the tokenizer of the model."
        )
    if isinstance(examples, Mixture):
        parts = [count_tokens(source, vocab_size) for source in examples.sources.values()]
        return np.sum(parts, axis=0)
    counts = np.zeros(vocab_size, np.int64)
    if isinstance(examples, Windows):
        store = examples.store
        for start in range(0, store.num_tokens, _CHUNK):
            ids = store.read(start, min(start + _CHUNK, store.num_tokens))
            counts += np.bincount(ids, minlength=vocab_size)
        return counts
    for batch in eval_batches(examples, DataConfig(batch_size=256), max_batches=1000):
        counts += np.bincount(batch.targets[batch.weights > 0], minlength=vocab_size)
    return counts


def by_frequency(
    model: LM,
    variables: Any,
    windows: Examples,
    *,
    counts: Integer[np.ndarray, "vocab"] | Sequence[int],
    edges: Sequence[int] = EDGES,
    batch_size: int = 16,
    max_batches: int | None = None,
    document_resets: bool = True,
    segment_len: int = SEGMENT,
) -> list[Bucket]:
    """Loss of the targets whose count is in [edges[i], edges[i + 1]), and from the last edge on.

    Weighted by `num_tokens`, the buckets average to the loss of `perplexity`.

    Args:
        counts: by token id, of the training data; see `count_tokens`.
        edges: increasing counts from 0 on. Targets below the first edge form a bucket, too.

    The other args and errors are those of `perplexity`.

    Raises:
        ArgumentError: edges do not increase, or a token id has no count.
    """
    check_edges(edges)
    check_segment_len(segment_len)
    counts = np.asarray(counts)
    if counts.ndim != 1 or len(counts) < windows.vocab_size or counts.dtype.kind not in "iu":
        raise ArgumentError(
            f"counts must be integers for {windows.vocab_size} token ids, got {counts.dtype} "
            f"of shape {counts.shape}; use `count_tokens` of the training data."
        )
    starts = [*([0] if edges[0] else []), *(int(edge) for edge in edges)]
    bucket_of_id = np.searchsorted(starts, counts, side="right") - 1
    totals = np.zeros((len(starts), 2))  # nats and tokens of each bucket
    for batch in batches(model, windows, batch_size, max_batches):
        losses = losses_of_positions(
            model, variables["params"], batch, segment_len, document_resets=document_resets
        )
        is_target = batch.weights > 0
        weights = batch.weights[is_target]
        bucket = bucket_of_id[batch.targets[is_target]]
        # In float64: a float32 total loses digits over millions of tokens.
        np.add.at(totals[:, 0], bucket, (weights * losses.nats[is_target]).astype(np.float64))
        np.add.at(totals[:, 1], bucket, weights.astype(np.float64))
    stops = (*starts[1:], None)
    return [make_bucket(a, b, *sums) for a, b, sums in zip(starts, stops, totals, strict=True)]


def check_edges(edges: Sequence[int]) -> None:
    """Raises ArgumentError unless edges are increasing integers from 0 on."""
    is_increasing = all(a < b for a, b in itertools.pairwise(edges))
    if not (len(edges) and is_increasing and edges[0] >= 0):
        raise ArgumentError(
            f"edges must be increasing counts from 0 on, got {quote(list(edges))}; the default is "
            f"{list(EDGES)}."
        )
