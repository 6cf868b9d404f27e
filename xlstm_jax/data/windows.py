"""Tokens of documents as windows by index."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.batch import Batch
from xlstm_jax.data.documents.document import Document
from xlstm_jax.data.packing import Layout
from xlstm_jax.data.shards.manifest import token_dtype
from xlstm_jax.data.shards.store import ArrayTokens, TokenStore
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ConfigError


def concatenate(documents: Iterable[Document], tokenizer: Tokenizer) -> ArrayTokens:
    """The tokens of all documents, with the end-of-document token after each.

    This token belongs to the document that it ends, and is its last target.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id], dtype)
    parts, ends, size = [np.empty(0, dtype)], [], 0
    for document in documents:
        tokens = tokenizer.encode(document.data).astype(dtype, copy=False)
        parts += tokens, end
        ends.append(size := size + len(tokens) + 1)
    return ArrayTokens(np.concatenate(parts), np.array(ends, np.int64))


@dataclasses.dataclass(frozen=True)
class Consecutive:
    """The layout "windows": T + 1 tokens, of which the last is the first of the next window.

    Every token but the first of all is therefore the target of exactly one window. The last window
    is padded, and nothing is dropped.
    """

    num_tokens: int
    seq_len: int  # T

    def __len__(self) -> int:
        """Number of windows."""
        return -(-(self.num_tokens - 1) // self.seq_len)

    def pieces(self, index: int) -> Sequence[tuple[int, int]]:
        """The one range of a window."""
        start = index * self.seq_len
        return ((start, min(start + self.seq_len + 1, self.num_tokens)),)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Tokens as windows of T + 1.

    Within a window, documents are numbered from 1 (`segment_ids`). A target has weight 1 if it is
    in the same document as its input. So the end-of-document token has weight 1, and the first
    token of a document has weight 0, because no token of its document precedes it.

    With `continued`, ids start at 2 where a document begins with the window, so that 1 is always
    the document at the end of the window before. So a carried state is reset at the right position.
    """

    store: TokenStore
    seq_len: int  # T
    tokenizer: Tokenizer
    description: dict[str, Any]
    layout: Layout | None = None  # None: `Consecutive`
    continued: bool = False

    shuffle = True

    def __post_init__(self):
        if self.layout is None:
            layout = Consecutive(self.store.num_tokens, self.seq_len)
            object.__setattr__(self, "layout", layout)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        """Number of windows."""
        assert self.layout is not None
        return len(self.layout)

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these indices, padded with token 0.

        Raises:
            ConfigError: an index or a token is out of range.
        """
        self._check(index)
        shape = len(index), self.seq_len + 1
        # `marks`: 1 where a document begins; its sum along a sequence numbers the documents.
        tokens, marks, is_target = np.zeros((3, *shape), np.int32)
        is_target += 1
        lengths = np.empty((len(index), 1), np.int64)
        assert self.layout is not None
        for i, number in enumerate(index.tolist()):
            at = 0
            for start, stop in self.layout.pieces(number):
                end = at + stop - start
                tokens[i, at:end] = self.store.read(start, stop)
                marks[i, at] = 1
                ends = self.store.ends(start, stop - 1) - start if stop - start > 1 else ()
                marks[i, at + np.asarray(ends, np.int64)] = 1
                if (mask := self.store.loss_mask(start, stop)) is not None:
                    is_target[i, at:end] = mask
                at = end
            lengths[i] = at
        if tokens.max(initial=0) >= self.vocab_size:
            raise ConfigError(
                f"the tokens of data.source must be below {self.vocab_size}, the vocabulary of "
                f"tokenizer={self.tokenizer.name!r}, got {tokens.max()}; prepare the data again."
            )
        inside = np.arange(shape[1]) < lengths
        if self.continued:
            marks[:, 0] += self._starts_document(index)
        segments = np.cumsum(marks, axis=1, dtype=np.int32) * inside
        is_same = inside[:, 1:] & (segments[:, 1:] == segments[:, :-1])
        return Batch(
            # Contiguous: worker processes then hand them over in shared memory.
            inputs=np.ascontiguousarray(tokens[:, :-1]),
            targets=np.ascontiguousarray(tokens[:, 1:]),
            segment_ids=np.ascontiguousarray(segments[:, :-1]),
            weights=(is_same & (is_target[:, 1:] > 0)).astype(np.float32),
            index=index,
        )

    def _starts_document(self, index: Int64[np.ndarray, "B"]) -> list[bool]:
        """Whether each window, of the layout `Consecutive`, begins with a document."""
        starts = (index * self.seq_len).tolist()
        return [start == 0 or len(self.store.ends(start - 1, start)) > 0 for start in starts]

    def _check(self, index: Int64[np.ndarray, "B"]) -> None:
        invalid = index[(index < 0) | (index >= len(self))]
        if invalid.size:
            raise ConfigError(
                f"window indices must be in 0..{len(self) - 1} for this text, got {invalid[0]}; "
                "pass the text that the run began with."
            )
