"""Text in, text out: what a person at a prompt sees of `decode.stream`."""

from collections.abc import Iterator, Sequence
from typing import Any

from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.generate import decode
from xlstm_jax.modules.lm import LM

PIECE = 8  # tokens between two updates of the answer: few to be responsive, many to be fast


def stream_text(
    model: LM,
    variables: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """The answer to a prompt as it grows, each part said once; it ends with the document.

    Args:
        stop: texts that end the answer and do not appear in it.
        options: those of `decode.stream`, without its own `stop` and `piece`.

    Raises:
        ConfigError: as `decode.stream`, before any text is made.
    """
    ids = tokenizer.encode(prompt).tolist()
    pieces = decode.stream(model, variables, [ids], piece=PIECE, stop=[tokenizer.eos_id], **options)
    return _parts(pieces, tokenizer, stop)


def _parts(pieces, tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    tokens: list[int] = []
    said = 0
    for piece in pieces:
        tokens += piece.tokens[0]
        text = tokenizer.decode(tokens)
        ends = [end for end in map(text.find, stop) if end >= 0]
        if ends:
            yield text[said : min(ends)]
            return
        # Later tokens may complete what ends the text: half a character, or half a stop text.
        partial = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
        settled = len(text) - max(partial, *begun, 0)
        if settled > said:
            yield text[said:settled]
            said = settled
    yield tokenizer.decode(tokens)[said:]
