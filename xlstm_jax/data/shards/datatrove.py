"""Tokens of datatrove: `NAME.ds`, the ends of documents in `NAME.ds.index`, and more beside them.

`NAME.ds.index` has a little-endian u8 per document, counted in tokens; `NAME.ds.loss`, if it
exists, a byte per token; and `NAME.ds.metadata` the tokenizer and the bytes of a token ("gpt2|2";
two bytes without "|") on its first line, and the number of tokens on its second.
"""

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.shards import remote
from xlstm_jax.data.shards.columns import Column
from xlstm_jax.data.shards.store import Shard
from xlstm_jax.errors import ConfigError

SUFFIX = ".ds"
_MAX_METADATA = 1 << 16


def read_shard(stem: str) -> Shard:
    """The tokens and documents of a file, by its path without the suffix.

    Raises:
        ConfigError: a file is absent or damaged, or they do not belong together.
    """
    path = f"{stem}{SUFFIX}"
    size, index_size, loss_size, metadata_size = remote.file_sizes(
        [path, f"{path}.index", f"{path}.loss", f"{path}.metadata"]
    )
    if size is None or not index_size or index_size % 8:
        raise ConfigError(
            f"{remote.shown(path)} must have {remote.shown(path)}.index beside it, with 8 bytes "
            f"per document, got {index_size or 'no'} bytes; copy both files."
        )
    ends = remote.column(f"{path}.index", "<u8", index_size // 8)
    num_tokens = int(ends.read(ends.length - 1, ends.length)[0])
    item = 2 if metadata_size is None else _token_bytes(f"{path}.metadata")
    if metadata_size is None and size == 4 * num_tokens:
        item = 4
    if size != item * num_tokens or loss_size not in (None, num_tokens):
        raise ConfigError(
            f"{remote.shown(path)} must have {item} bytes per token for the {num_tokens:,} tokens "
            f"of its index, and .loss one, if it exists; got {size:,} and {loss_size} bytes; copy "
            "the files again."
        )
    mask = None if loss_size is None else remote.column(f"{path}.loss", "|u1", num_tokens)
    tokens = remote.column(path, f"<u{item}", num_tokens)
    return Shard(tokens, _document_ends(ends), mask)


def _document_ends(ends: Column) -> Column | Int64[np.ndarray, "D"]:
    """The ends of documents that have tokens."""
    array = ends.array
    if not (array[1:] >= array[:-1]).all():
        raise ConfigError(
            f"the ends of documents in {remote.shown(ends.path)} must increase; copy it again."
        )
    is_empty = np.diff(array, prepend=np.uint64(0)) == 0
    return array[~is_empty].astype(np.int64) if is_empty.any() else ends


def _token_bytes(path: str) -> int:
    """The bytes of a token, from the metadata."""
    line = remote.read_bytes(path, _MAX_METADATA).split(b"\n")[0]
    _, separator, item = line.rpartition(b"|")
    if separator and item.strip() not in (b"2", b"4"):
        raise ConfigError(
            f"{remote.shown(path)} must name tokens of 2 or 4 bytes on its first line, as in "
            "'gpt2|2'; copy the file again."
        )
    return int(item) if separator else 2
