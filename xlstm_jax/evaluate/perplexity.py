"""Perplexity on held-out data: nats per token and bits per byte."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from xlstm_jax.config import check_range
from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.loader import eval_batches
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.lm import LM
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train.losses import EvalSums, token_sums


class Perplexity(NamedTuple):
    """Means over all targets of nonzero weight; `exp(nats_per_token)` is the perplexity."""

    nats_per_token: float
    bits_per_byte: float | None  # None if the targets are not text
    num_tokens: int


def perplexity(
    model: LM,
    variables: Any,
    windows: Examples,
    *,
    batch_size: int = 16,
    max_batches: int | None = None,
    document_resets: bool = True,
) -> Perplexity:
    """Evaluates each window once, without dropout, like the held-out loss of training.

    Args:
        windows: held-out data, from `data.load(cfg, "valid")`.
        batch_size: windows per forward pass; affects only speed and memory.
        max_batches: limit on batches, which are spread evenly over the data; None: all.
        document_resets: whether each document starts from the initial state, as in training.

    Raises:
        ArgumentError: `batch_size` or `max_batches` is below 1, or a token id is not below the
            `vocab_size` of the model.
    """
    sums = functools.partial(_sums, model, variables["params"], document_resets=document_resets)
    # Summed on the host: a float32 total loses digits over millions of tokens.
    total = EvalSums()
    for batch in batches(model, windows, batch_size, max_batches):
        total = total.plus(sums(batch), batch, windows)
    return Perplexity(total.nats_per_token, total.bits_per_byte, total.num_tokens)


@functools.partial(jax.jit, static_argnames=("model", "document_resets"))
def _sums(model: LM, params: Any, batch: Batch, *, document_resets: bool) -> CrossEntropy:
    return token_sums(model, params, batch, document_resets=document_resets)[0]


def batches(
    model: LM, windows: Examples, batch_size: int, max_batches: int | None
) -> Iterator[Batch]:
    """Batches of all windows in order, or `max_batches` spread evenly; errors of `perplexity`."""
    check_range("max_batches", max_batches, "at least 1", "leave it out to use all data")
    vocab_size = model.cfg.vocab_size
    for batch in eval_batches(windows, DataConfig(batch_size=batch_size), max_batches):
        # The model itself would return NaN: under jit it cannot check ids.
        ids = np.append(batch.inputs, batch.targets[batch.weights != 0])
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ArgumentError(
                f"windows must have token ids from 0 to {vocab_size - 1}, the vocabulary of the "
                f"model, got {ids.min()} to {ids.max()}; use the tokenizer of the model."
            )
        yield batch
