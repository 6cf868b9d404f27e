"""Log-probabilities of the last tokens of sequences, in batches of few shapes.

Sequences are sorted by length and padded on the right, which
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
"""Positions of the narrowest batch; others are powers of two up to a segment or multiples of it."""


class TokenSequence(NamedTuple):
    """A sequence of which the last tokens are scored."""

    tokens: Integer[np.ndarray, "tokens"]
    num_scored: int  # less than the number of tokens: the first one has no context


class SequenceScore(NamedTuple):
    """The score of a `TokenSequence`."""

    logprob: float  # nats, summed over the scored tokens
    is_greedy: bool  # every scored token has the largest logit


def windows_of_document(
    tokens: Integer[np.ndarray, "T"], prefix: int, window: int | None
) -> Iterator[TokenSequence]:
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
        yield TokenSequence(ids[max(stop - window, 0) : stop + 1], stop - start)


def score_sequences(
    model: LM, variables: Any, sequences: Sequence[TokenSequence], *, batch_size: int = 16
) -> list[SequenceScore]:
    """The score of every sequence, in the order given.

    Args:
        sequences: of any lengths; each starts from the initial state.
        batch_size: sequences per forward pass; affects only speed and memory.

    Raises:
        ArgumentError: `batch_size` is below 1, a sequence is longer than the attention cache of the
            model or scores its first token, or a token id is not below the `vocab_size`.
    """
    check_range("batch_size", batch_size, "at least 1")
    for sequence in sequences:
        _check(model, sequence)
    # A few sequences do not need a full batch; powers of two bound the number of compiled programs.
    batch_size = min(batch_size, 1 << max(len(sequences) - 1, 0).bit_length())
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens))
    scores: dict[int, SequenceScore] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = _batch([sequences[i] for i in indices], batch_size)
        losses = losses_of_positions(
            model, variables["params"], batch, SEGMENT, document_resets=False
        )
        for b, i in enumerate(indices):
            scored = batch.weights[b] > 0
            nats = losses.nats[b, scored].sum(dtype=np.float64)
            scores[i] = SequenceScore(-float(nats), bool(losses.correct[b, scored].all()))
    return [scores[i] for i in range(len(sequences))]


def _batch(sequences: Sequence[TokenSequence], batch_size: int) -> Batch:
    """Inputs and targets of sequences; the weights of scored targets are 1."""
    shape = batch_size, _width(max(len(sequence.tokens) for sequence in sequences) - 1)
    inputs, targets = np.zeros((2, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    for b, (tokens, num_scored) in enumerate(sequences):
        stop = len(tokens) - 1
        inputs[b, :stop], targets[b, :stop] = tokens[:-1], tokens[1:]
        weights[b, stop - num_scored : stop] = 1
    segment_ids = np.ones(shape, np.int32)
    return Batch(inputs, targets, segment_ids, weights, np.arange(batch_size, dtype=np.int64))


def _width(length: int) -> int:
    """The padded length of a batch."""
    if length > SEGMENT:
        return -(-length // SEGMENT) * SEGMENT
    return max(MIN_WIDTH, 1 << max(length - 1, 0).bit_length())


def _check(model: LM, sequence: TokenSequence) -> None:
    vocab_size = model.cfg.vocab_size
    if not 0 <= sequence.num_scored < len(sequence.tokens):
        raise ArgumentError(
            "a sequence must have at least one token of context, got "
            f"{len(sequence.tokens)} tokens, of which {sequence.num_scored} are scored; add a "
            "context."
        )
    check_length(model.cfg, "the number of tokens", len(sequence.tokens) - 1)
    if sequence.tokens.min() < 0 or sequence.tokens.max() >= vocab_size:
        raise ArgumentError(
            f"token ids must be from 0 to {vocab_size - 1}, the vocabulary of the model, got "
            f"{sequence.tokens.min()} to {sequence.tokens.max()}; use the tokenizer of the model."
        )
