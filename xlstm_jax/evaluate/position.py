"""Loss by position in the window: the value of a longer context.

Source: as in Beck et al. 2024, arXiv:2405.04517, figure 7 (length extrapolation).
"""

from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.data.batch import Examples
from xlstm_jax.evaluate.perplexity import batches, check_segment_len
from xlstm_jax.evaluate.segments import SEGMENT, losses_of_positions
from xlstm_jax.modules.lm import LM


class Bucket(NamedTuple):
    """Targets whose position in the window, or whose count, is in [start, stop)."""

    start: int
    stop: int | None  # None: no bound
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
    segment_len: int = SEGMENT,
) -> list[Bucket]:
    """Loss in buckets of positions [0, 1), [1, 2), [2, 4), [4, 8), ...; windows have any length.

    Windows are evaluated in segments, and the state is carried from one to the next: memory does
    not grow with the window, and the loss equals that of one pass over the window.

    Args and errors are those of `perplexity`.
    """
    check_segment_len(segment_len)
    totals, seq_len = np.zeros((1, 2)), 0  # nats and tokens of each bucket
    for batch in batches(model, windows, batch_size, max_batches):
        losses = losses_of_positions(
            model, variables["params"], batch, segment_len, document_resets=document_resets
        )
        seq_len = batch.inputs.shape[1]
        bucket = np.frexp(np.arange(seq_len))[1]  # of position 0: 0, 1: 1, 2 and 3: 2, ...
        sums = np.zeros((bucket[-1] + 1, 2))
        # In float64: a float32 total loses digits over millions of tokens.
        np.add.at(sums[:, 0], bucket, (batch.weights * losses.nats).sum(axis=0, dtype=np.float64))
        np.add.at(sums[:, 1], bucket, batch.weights.sum(axis=0, dtype=np.float64))
        totals = totals + sums  # windows have one length
    return [make_bucket(1 << n >> 1, min(1 << n, seq_len), *sums) for n, sums in enumerate(totals)]


def make_bucket(start: int, stop: int | None, nats: float, count: float) -> Bucket:
    """A bucket, from the sum of the losses of its tokens."""
    return Bucket(start, stop, float(nats / count) if count else float("nan"), int(count))
