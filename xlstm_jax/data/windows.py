"""Documents to one array of tokens, and windows of it by index."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.readers import Document
from xlstm_jax.data.tokenizers import Tokenizer


def concatenate(documents: Iterable[Document], tokenizer: Tokenizer) -> UInt[np.ndarray, "N"]:
    """All documents one after the other, each closed by the end-of-document token.

    That token belongs to the document it closes: a model is asked for it there, and what follows
    it is another document, of which it must know nothing.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eos_id], dtype)
    parts = [np.empty(0, dtype)]
    for document in documents:
        parts += tokenizer.encode(document.data).astype(dtype, copy=False), end
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text in windows of T + 1 tokens, the last token of one being the first of the next.

    So every token but the first of the text is the target of exactly one window. The last window
    is padded; nothing is dropped.

    Within a window, documents are numbered from 1 (`segment_ids`). A target counts (weight 1) where
    it lies in the same document as its input: the token that closes a document counts, the first
    token of the next one does not, as nothing of its own document stands before it.
    """

    tokens: UInt[np.ndarray, "N"]  # closed documents, see `concatenate`
    seq_len: int  # T
    tokenizer: Tokenizer
    description: dict[str, Any]

    shuffle = True

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens in the text, ends of documents included."""
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Targets that count: all tokens but the first of each document."""
        return len(self.tokens) - len(self._first_tokens())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per target that counts: what turns nats per token into bits per byte."""
        num_bytes = self.tokenizer.num_bytes
        return (num_bytes(self.tokens) - num_bytes(self._first_tokens())) / self.num_targets

    def _first_tokens(self) -> UInt[np.ndarray, "num_documents"]:
        """The first token of every document."""
        ends = np.flatnonzero(self.tokens == self.tokenizer.eos_id)
        return self.tokens[np.append(0, ends[:-1] + 1)]

    def __len__(self) -> int:
        """Windows in the text."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these numbers; the last window repeats its final token as padding.

        Raises:
            ConfigError: a number is not one of a window.
        """
        strange = index[(index < 0) | (index >= len(self))]
        if strange.size:
            raise ConfigError(
                f"window numbers must lie in 0..{len(self) - 1} for this text, got {strange[0]}; "
                "a run that counts on more has been given another text than it began with."
            )
        place = index[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        inside = place < len(self.tokens)
        tokens = self.tokens[np.minimum(place, len(self.tokens) - 1)].astype(np.int32)
        closes = tokens == self.tokenizer.eos_id
        segment = (1 + np.cumsum(closes, axis=1) - closes) * inside
        counts = inside[:, 1:] & (segment[:, 1:] == segment[:, :-1])
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            segment_ids=segment[:, :-1].astype(np.int32),
            weights=counts.astype(np.float32),
            index=index,
        )
