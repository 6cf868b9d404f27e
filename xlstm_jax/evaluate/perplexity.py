"""Perplexity on validation data: nats per token and bits per byte."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from xlstm_jax.config import check_range
from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.loader import eval_batches
from xlstm_jax.errors import ArgumentError
from xlstm_jax.evaluate.lengths import check_length
from xlstm_jax.evaluate.segments import sums_of_segments
from xlstm_jax.modules.lm import LM
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train.losses import EvalSums, token_sums


class Perplexity(NamedTuple):
    """Means over all targets of nonzero weight."""

    nats_per_token: float
    bits_per_byte: float | None  # None if the targets are not text
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """At most exp(700): beyond it, float64 overflows."""
        return math.exp(min(self.nats_per_token, 700.0))


def perplexity(
    model: LM,
    variables: Any,
    windows: Examples,
    *,
    batch_size: int = 16,
    max_batches: int | None = None,
    document_resets: bool = True,
    segment_len: int | None = None,
) -> Perplexity:
    """Evaluates each window once, without dropout, like the validation loss of training.

    Args:
        windows: validation data, from `data.load(cfg, "valid")`.
        batch_size: windows per forward pass; affects only speed and memory.
        max_batches: limit on batches, which are spread evenly over the data; None: all.
        document_resets: whether each document starts from the initial state, as in training.
        segment_len: positions per forward pass. The state is carried over, so that any value gives
            the same result up to rounding, and windows of any length fit in memory. None: those
            of a window.

    Raises:
        ArgumentError: `batch_size`, `max_batches` or `segment_len` is below 1, a window exceeds the
            attention cache of the model, or a token id is not below its `vocab_size`.
    """
    check_segment_len(segment_len)
    params = variables["params"]
    sums_of_windows = functools.partial(_sums, model, params, document_resets=document_resets)
    # Summed on the host: a float32 total loses digits over millions of tokens.
    total = EvalSums()
    for batch in batches(model, windows, batch_size, max_batches):
        if segment_len is None:
            total = total.plus(sums_of_windows(batch), batch, windows)
            continue
        parts = sums_of_segments(model, params, batch, segment_len, document_resets=document_resets)
        sums = [np.asarray(part, np.float64) for part in parts]
        total = total.plus(CrossEntropy(*np.sum(sums, axis=0)), batch, windows)
    return Perplexity(total.nats_per_token, total.bits_per_byte, total.num_tokens)


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _sums(model: LM, params: Any, batch: Batch, *, document_resets: bool) -> CrossEntropy:
    return token_sums(model, params, batch, document_resets=document_resets)[0]


def check_segment_len(segment_len: int | None) -> None:
    """Raises ConfigError if the length of segments is below 1."""
    check_range("segment_len", segment_len, "at least 1", "leave it out")


def batches(
    model: LM, windows: Examples, batch_size: int, max_batches: int | None
) -> Iterator[Batch]:
    """Batches of all windows in order, or `max_batches` spread evenly; errors of `perplexity`."""
    check_range("max_batches", max_batches, "at least 1", "leave it out to use all data")
    vocab_size = model.cfg.vocab_size
    for batch in eval_batches(windows, DataConfig(batch_size=batch_size), max_batches):
        check_length(model.cfg, "the length of windows", batch.inputs.shape[1])
        # The model itself would return NaN: under jit it cannot check ids.
        ids = np.append(batch.inputs, batch.targets[batch.weights != 0])
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ArgumentError(
                f"windows must have token ids from 0 to {vocab_size - 1}, the vocabulary of the "
                f"model, got {ids.min()} to {ids.max()}; use the tokenizer of the model."
            )
        yield batch
