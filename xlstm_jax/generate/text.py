"""Streaming of generated text: `decode.stream` with a tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.generate import decode
from xlstm_jax.modules.lm import LM

PIECE = 8  # tokens between two updates: few for low latency, many for throughput
CONTEXT = 32
"""Tokens before a continuation that are decoded with it: some tokenizers write a space depending on
the token before."""


def stream_text(
    model: LM,
    variables: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Yields the continuation of a prompt in parts, up to the end of the document.

    Args:
        stop: strings that end the text; they are not part of it.
        options: those of `decode.stream` except `stop`, `piece` and `with_state`.

    Raises:
        ArgumentError: a stop string is empty, or as `decode.stream`; before the first `next`.
    """
    check_stop(stop)
    ids = tokenizer.encode(prompt)
    options |= dict(piece=PIECE, stop=[tokenizer.eos_id], with_state=False)
    pieces = decode.stream(model, variables, [ids], **options)
    return text_parts(pieces, tokenizer, stop, context=ids[-CONTEXT:].tolist())


def check_stop(stop: Sequence[str]) -> None:
    """Raises ArgumentError unless `stop` is a list of strings that are not empty."""
    if isinstance(stop, str):
        raise ArgumentError(f"stop must be a list, got {quote(stop)}; write [{quote(stop)}].")
    if "" in stop:
        raise ArgumentError("stop must have no empty string, got ''; leave it out.")


def text_parts(
    pieces: Iterable[decode.Generation],
    tokenizer: Tokenizer,
    stop: Sequence[str],
    context: Sequence[int] = (),
) -> Iterator[str]:
    """The text of tokens that arrive in pieces, up to a stop string; `context` came before."""
    # Decoded with it: sentencepiece drops the space before the first token of a text.
    tokens = [*context]
    start = len(tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}"))
    num_emitted = 0  # characters of the continuation that were yielded
    for piece in pieces:
        # Ids that only pad the vocabulary of the model have no text.
        tokens += [token for token in piece.tokens[0] if token < tokenizer.vocab_size]
        # All tokens are decoded again: a character may consist of bytes of several tokens.
        text = tokenizer.decode(tokens)[start:]
        ends = [end for end in map(text.find, stop) if end >= 0]
        if ends:
            yield text[num_emitted : min(ends)]
            return
        # Hold back a suffix that later tokens may complete: a partial character or stop string.
        partial = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        prefixes = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
        num_final = len(text) - max(partial, *prefixes, 0)
        if num_final > num_emitted:
            yield text[num_emitted:num_final]
            num_emitted = num_final
    yield tokenizer.decode(tokens)[start + num_emitted :]
