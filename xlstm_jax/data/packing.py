"""Documents to one flat array of tokens."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt

from xlstm_jax.data.readers import Document
from xlstm_jax.data.tokenizers import Tokenizer


def concatenate(documents: Iterable[Document], tokenizer: Tokenizer) -> UInt[np.ndarray, "N"]:
    """All documents one after the other, each closed by the end-of-document token.

    That token belongs to the document it closes: a model is asked for it there, and what follows
    it is another document, of which it must know nothing.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eos_id], dtype)
    pieces = [np.empty(0, dtype)]
    for document in documents:
        pieces += tokenizer.encode(document.data).astype(dtype, copy=False), end
    return np.concatenate(pieces)
