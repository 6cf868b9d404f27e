"""How well a model predicts held-out text: nats per token and bits per byte."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from xlstm_jax import ops
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, DataConfig, Examples, Windows, eval_batches
from xlstm_jax.modules import LM, head_kernel


class Perplexity(NamedTuple):
    """Means over every target that counts; `exp(nats_per_token)` is the perplexity."""

    nats_per_token: float
    bits_per_byte: float | None  # None where the targets are not text
    num_tokens: int


def perplexity(
    model: LM,
    variables: Any,
    windows: Examples,
    *,
    batch_size: int = 16,
    max_batches: int | None = None,
) -> Perplexity:
    """Each row once, in order, without dropout; every target has the same weight wherever it lies.

    Args:
        windows: held-out rows, from `data.load(cfg, "valid")`.
        batch_size: rows of one pass; no more than speed and memory depend on it.
        max_batches: stop after so many, for a quick look.

    Raises:
        ConfigError: a count is below 1.
    """
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in rows(windows, batch_size, max_batches):
        sums = _sums(model, variables, batch)
        # Python floats: a float32 total would lose digits over millions of tokens.
        nats += float(sums.ce_sum)
        num_tokens += int(sums.weight_sum)
        if isinstance(windows, Windows):
            num_bytes += windows.tokenizer.num_bytes(batch.targets[batch.weights > 0])
    return Perplexity(
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        num_tokens=num_tokens,
    )


def rows(windows: Examples, batch_size: int, max_batches: int | None) -> Iterator[Batch]:
    """Batches of all rows in order, or the first `max_batches` of them; else a ConfigError."""
    if max_batches is not None and max_batches < 1:
        raise ConfigError(
            f"max_batches must be at least 1, got {max_batches}; leave it out to read everything."
        )
    return eval_batches(windows, DataConfig(batch_size=batch_size), max_batches)


@functools.partial(jax.jit, static_argnames="model")
def _sums(model: LM, variables: Any, batch: Batch) -> ops.CrossEntropy:
    hidden, _ = model.apply(variables, batch.inputs, segment_ids=batch.segment_ids, head=False)
    return sums_of(model, variables, hidden, batch.targets, batch.weights)


def sums_of(model: LM, variables: Any, hidden, targets, weights) -> ops.CrossEntropy:
    """Cross entropy of the model's head, from the hidden states after its final norm."""
    cfg = model.cfg
    kernel = head_kernel(cfg, variables["params"])
    return ops.cross_entropy(hidden, kernel, targets, weights, soft_cap=cfg.logit_soft_cap)
