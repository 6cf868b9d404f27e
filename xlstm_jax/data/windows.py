"""Rows of a text by index."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt

from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text cut into windows of T + 1 tokens, the last token of one being the first of the next.

    So every token but the first of the text is the target of exactly one window. The last window
    is filled up with padding; nothing is dropped.

    Within a row, documents are numbered from 1 (`segment_ids`). A target counts (weight 1) where it
    lies in the same document as its input: the token that closes a document counts, the first
    token of the next one does not, as nothing of its own document stands before it.
    """

    tokens: UInt[np.ndarray, "N"]  # closed documents, see `packing.concatenate`
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

    def window(self, i: int) -> Int32[np.ndarray, "window"]:
        """The T + 1 tokens of window i; the last window repeats its final token."""
        return self._gather(np.array([i], np.int64))[0][0]

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these numbers as rows: a pure function of them.

        Raises:
            ConfigError: a number is not one of a window.
        """
        tokens, inside = self._gather(index)
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

    def _gather(
        self, index: Int64[np.ndarray, "B"]
    ) -> tuple[Int32[np.ndarray, "B window"], Bool[np.ndarray, "B window"]]:
        """Tokens of the windows, and which of them lie inside the text."""
        strange = index[(index < 0) | (index >= len(self))]
        if strange.size:
            raise ConfigError(
                f"window numbers must lie in 0..{len(self) - 1} for this text, got {strange[0]}; "
                "a run that counts on more has been given another text than it began with."
            )
        place = index[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        inside = place < len(self.tokens)
        return self.tokens[np.minimum(place, len(self.tokens) - 1)].astype(np.int32), inside
