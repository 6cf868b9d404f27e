"""Log-probabilities of spans of tokens after their context, in batches of few shapes.

A span is the end of a sequence. Sequences are sorted by length and padded on the right, which
changes no earlier output; those longer than a segment are evaluated in segments, with the state
carried over.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from xlstm_jax.config import check_range
from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.evaluate.lengths import check_length
from xlstm_jax.evaluate.segments import SEGMENT, losses_of_positions
from xlstm_jax.modules.lm import LM

MIN_WIDTH = 32
"""Positions of the narrowest batch; others are powers of two up to a segment, or whole segments."""


class Span(NamedTuple):
    """A sequence of which the last tokens are scored."""

    tokens: Integer[np.ndarray, "tokens"]
    num_scored: int  # less than the number of tokens: the first one has no context


class SpanScore(NamedTuple):
    """The score of a span."""

    logprob: float  # nats, summed over the scored tokens
    is_greedy: bool  # every scored token has the largest logit


def windows_of_document(
    tokens: Integer[np.ndarray, "T"], prefix: int, window: int | None
) -> Iterator[Span]:
    """A document as windows in which every token is scored once.

    Windows predict `window` tokens each, the first one after the token `prefix`. The last is filled
    up with preceding tokens, which are context and not scored again, so that all but the windows of
    short documents have full length. Source: Magnusson et al. 2023, arXiv:2312.10523 (PALOMA).

    Args:
        window: None: the document is one window.
    """
    ids = np.append(np.array([prefix], np.int64), tokens)
    window = len(tokens) if window is None else window
    for start in range(0, len(tokens), window or 1):
        stop = min(start + window, len(tokens))
        yield Span(ids[max(stop - window, 0) : stop + 1], stop - start)


def score_spans(
    model: LM, variables: Any, spans: Sequence[Span], *, batch_size: int = 16
) -> list[SpanScore]:
    """The score of every span, in the order given.

    Args:
        spans: sequences of any lengths; each starts from the initial state.
        batch_size: sequences per forward pass; affects only speed and memory.

    Raises:
        ArgumentError: `batch_size` is below 1, a span is longer than the attention cache of the
            model, a token id is not below its `vocab_size`, or a span scores its first token.
    """
    check_range("batch_size", batch_size, "at least 1")
    for span in spans:
        _check(model, span)
    # A few spans do not need a whole batch; powers of two bound the number of compiled programs.
    batch_size = min(batch_size, 1 << max(len(spans) - 1, 0).bit_length())
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].tokens))
    scores: dict[int, SpanScore] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = _batch([spans[i] for i in indices], batch_size)
        losses = losses_of_positions(
            model, variables["params"], batch, SEGMENT, document_resets=False
        )
        for row, i in enumerate(indices):
            scored = batch.weights[row] > 0
            nats = losses.nats[row, scored].sum(dtype=np.float64)
            scores[i] = SpanScore(-float(nats), bool(losses.correct[row, scored].all()))
    return [scores[i] for i in range(len(spans))]


def _batch(spans: Sequence[Span], batch_size: int) -> Batch:
    """Spans as sequences of inputs and targets, of which weights are 1 where they are scored."""
    shape = batch_size, _width(max(len(span.tokens) for span in spans) - 1)
    inputs, targets = np.zeros((2, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (tokens, num_scored) in enumerate(spans):
        stop = len(tokens) - 1
        inputs[row, :stop], targets[row, :stop] = tokens[:-1], tokens[1:]
        weights[row, stop - num_scored : stop] = 1
    segment_ids = np.ones(shape, np.int32)
    return Batch(inputs, targets, segment_ids, weights, np.arange(batch_size, dtype=np.int64))


def _width(length: int) -> int:
    """The padded length of a batch."""
    if length > SEGMENT:
        return -(-length // SEGMENT) * SEGMENT
    return max(MIN_WIDTH, 1 << max(length - 1, 0).bit_length())


def _check(model: LM, span: Span) -> None:
    vocab_size = model.cfg.vocab_size
    if not 0 <= span.num_scored < len(span.tokens):
        raise ArgumentError(
            "a span must have at least one token of context, got "
            f"{len(span.tokens)} tokens of which {span.num_scored} are scored; add a context."
        )
    check_length(model.cfg, "the number of tokens", len(span.tokens) - 1)
    if span.tokens.min() < 0 or span.tokens.max() >= vocab_size:
        raise ArgumentError(
            f"token ids must be from 0 to {vocab_size - 1}, the vocabulary of the model, got "
            f"{span.tokens.min()} to {span.tokens.max()}; use the tokenizer of the model."
        )
