"""Documents concatenated to one array of tokens, and its windows by index."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.documents import Document
from xlstm_jax.data.tokenizers import Tokenizer


def concatenate(documents: Iterable[Document], tokenizer: Tokenizer) -> UInt[np.ndarray, "N"]:
    """The tokens of all documents, with the end-of-document token after each.

    This token belongs to the document that it ends, and is its last target.
    """
    # Two bytes per token suffice for vocabularies up to 65,536.
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eos_id], dtype)
    parts = [np.empty(0, dtype)]
    for document in documents:
        parts += tokenizer.encode(document.data).astype(dtype, copy=False), end
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text as windows of T + 1 tokens; the last token of one is the first token of the next.

    Every token but the first of the text is therefore the target of exactly one window. The last
    window is padded, and nothing is dropped.

    Within a window, documents are numbered from 1 (`segment_ids`). A target has weight 1 if it is
    in the same document as its input. So the end-of-document token has weight 1, and the first
    token of a document has weight 0, because no token of its document precedes it.
    """

    tokens: UInt[np.ndarray, "N"]  # ended documents, see `concatenate`
    seq_len: int  # T
    tokenizer: Tokenizer
    description: dict[str, Any]

    shuffle = True

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def num_targets(self) -> int:
        """Targets with weight 1: all tokens but the first of each document."""
        return len(self.tokens) - len(self._first_tokens())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per target with weight 1; converts nats per token to bits per byte."""
        # First tokens are not targets, so their bytes do not count.
        num_bytes = self.tokenizer.num_bytes
        return (num_bytes(self.tokens) - num_bytes(self._first_tokens())) / self.num_targets

    def _first_tokens(self) -> UInt[np.ndarray, "num_documents"]:
        """The first token of every document."""
        ends = np.flatnonzero(self.tokens == self.tokenizer.eos_id)
        return self.tokens[np.append(0, ends[:-1] + 1)]

    def __len__(self) -> int:
        """Number of windows in the text."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these indices; the last window is padded with its final token.

        Raises:
            ConfigError: an index is out of range.
        """
        invalid = index[(index < 0) | (index >= len(self))]
        if invalid.size:
            raise ConfigError(
                f"window indices must be in 0..{len(self) - 1} for this text, got {invalid[0]}; "
                "pass the text that the run began with."
            )
        position = index[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        inside = position < len(self.tokens)
        tokens = self.tokens[np.minimum(position, len(self.tokens) - 1)].astype(np.int32)
        ends = tokens == self.tokenizer.eos_id
        # Exclusive cumulative sum: an end-of-document token is part of the document it ends.
        segment = (1 + np.cumsum(ends, axis=1) - ends) * inside
        same_document = inside[:, 1:] & (segment[:, 1:] == segment[:, :-1])
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            segment_ids=segment[:, :-1].astype(np.int32),
            weights=same_document.astype(np.float32),
            index=index,
        )
