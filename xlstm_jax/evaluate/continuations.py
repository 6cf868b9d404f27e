"""Log-probabilities of continuations of a text, as in multiple-choice tasks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.evaluate.scoring import TokenSequence, score_sequences
from xlstm_jax.modules.lm import LM


class Score(NamedTuple):
    """The score of a continuation. Choices of different lengths compare by logprob / num_bytes."""

    logprob: float  # nats, summed over its tokens
    num_tokens: int
    num_bytes: int  # of its text in UTF-8
    is_greedy: bool  # greedy decoding of the context yields it


def score_continuations(
    model: LM,
    variables: Any,
    tokenizer: Tokenizer,
    context: str,
    continuations: Sequence[str],
    *,
    batch_size: int = 16,
) -> list[Score]:
    """The log-probability of each continuation of a context.

    Context and continuation are tokenized together, so that the tokens are those of the text. A
    space at the end of the context belongs to the continuation, where tokenizers expect it. After
    an empty context the tokens follow that which ends documents.

    Args:
        batch_size: continuations per forward pass; affects only speed and memory.

    Raises:
        ArgumentError: a continuation is empty or has no tokens of its own, or the tokens exceed the
            vocabulary or the attention cache of the model.
    """
    if isinstance(continuations, str) or not all(continuations):
        raise ArgumentError(
            "continuations must be a list of texts that are not empty, got "
            f"{quote(continuations)}; drop empty ones, or write [text] for one."
        )
    sequences = [sequence_of(tokenizer, context, text) for text in continuations]
    scores = score_sequences(model, variables, sequences, batch_size=batch_size)
    return [
        Score(logprob, sequence.num_scored, len(text.encode("utf-8", "replace")), is_greedy)
        for text, sequence, (logprob, is_greedy) in zip(
            continuations, sequences, scores, strict=True
        )
    ]


def sequence_of(tokenizer: Tokenizer, context: str, continuation: str) -> TokenSequence:
    """The tokens of a context and its continuation, which is scored."""
    before, after = encode_pair(tokenizer, context, continuation)
    if not len(after):
        raise ArgumentError(
            f"continuation {quote(continuation)} must add a token to its context, got none; the "
            "tokenizer merges it with the end of the context: move the boundary."
        )
    return TokenSequence(np.concatenate([before, after]), len(after))


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a context, at least one, and of its continuation."""
    if not context:
        ids = tokenizer.encode(continuation).astype(np.int64)
        return np.array([tokenizer.eos_id], np.int64), ids
    stripped = context.rstrip()
    # The space stays in a context without other text, which must have a token.
    spaces = context[len(stripped) :] if stripped else ""
    context, continuation = context[: len(context) - len(spaces)], spaces + continuation
    before = tokenizer.encode(context)
    both = tokenizer.encode(context + continuation).astype(np.int64)
    return both[: len(before)], both[len(before) :]
