"""Tokens of Megatron-LM: `PREFIX.bin` has the tokens, and `PREFIX.idx` describes them.

The index is, little-endian: the magic bytes, a version (u8), the code of the dtype (u1), the
numbers of sequences S and of document boundaries D (u8), the lengths of sequences in tokens (S i4),
their byte offsets (S i8), and the sequences at which documents begin, with S at the end (D i8).
"""

import struct

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.shards import remote
from xlstm_jax.data.shards.store import Shard
from xlstm_jax.errors import ConfigError

SUFFIX = ".idx"
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: "|u1", 4: "<u4", 8: "<u2"}
"""Dtypes by code. Megatron writes uint16 for small vocabularies, else int32; ids are positive."""

_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # sequences that are checked at once, to bound the memory


def read_shard(prefix: str) -> Shard:
    """The tokens and documents of a prefix; documents without tokens are dropped.

    Raises:
        ConfigError: the index is damaged, of another kind, or does not belong to the tokens.
    """
    index, data = f"{prefix}{SUFFIX}", f"{prefix}.bin"
    index_size, data_size = remote.file_sizes([index, data])
    if index_size is None or data_size is None:
        raise ConfigError(
            f"{remote.shown(prefix)} must be the prefix of a .bin and an .idx file, but one of "
            "them is absent; copy both."
        )
    dtype, num_sequences, num_boundaries = _read_header(index, index_size)
    lengths = remote.column(index, "<i4", num_sequences, _HEADER.size)
    offsets = remote.column(index, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries = remote.column(index, "<i8", num_boundaries, _HEADER.size + 12 * num_sequences)
    item = np.dtype(dtype).itemsize
    _check_offsets(index, lengths.array, offsets.array, item, data_size)
    ends = _document_ends(index, offsets.array, boundaries.array, data_size) // item
    return Shard(remote.column(data, dtype, data_size // item), ends)


def _read_header(path: str, size: int) -> tuple[str, int, int]:
    """The dtype and the numbers of sequences and of document boundaries."""
    header = b"".join(remote.read_parts(path, min(size, _HEADER.size)))
    if not header.startswith(MAGIC) or len(header) < _HEADER.size:
        raise ConfigError(
            f"{remote.shown(path)} must be an index of Megatron-LM with the header MMIDIDX; "
            "convert older formats with its tools."
        )
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise ConfigError(
            f"{remote.shown(path)} must have version 1 and tokens of uint8, uint16 or int32 (codes "
            f"1, 8, 4), got version {version} and code {code}; preprocess the data again."
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    # Multimodal data append one byte per sequence.
    if size not in (expected, expected + num_sequences) or not num_sequences:
        raise ConfigError(
            f"{remote.shown(path)} must have {expected:,} bytes for its {num_sequences:,} "
            f"sequences, at least one, but it has {size:,}; copy the file again."
        )
    return DTYPES[code], num_sequences, num_boundaries


def _check_offsets(
    path: str, lengths: np.ndarray, offsets: np.ndarray, item: int, data_size: int
) -> None:
    """Raises ConfigError unless sequences follow each other and fill the file of tokens."""
    end = 0
    for first in range(0, len(lengths), _CHUNK):
        part = lengths[first : first + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(part) * item
        if part.min() < 0 or (offsets[first : first + _CHUNK] != ends - part * item).any():
            raise ConfigError(
                f"the sequences in {remote.shown(path)} must follow each other, but they do not "
                f"after number {first:,}; copy the file again."
            )
        end = int(ends[-1])
    if end != data_size or not end:
        raise ConfigError(
            f"the sequences in {remote.shown(path)} have {end:,} bytes of tokens, but the .bin "
            f"file has {data_size:,}; copy both files again."
        )


def _document_ends(
    path: str, offsets: np.ndarray, boundaries: np.ndarray, data_size: int
) -> Int64[np.ndarray, "D"]:
    """The byte offsets at which documents end, from the numbers of their last sequences."""
    if not (
        len(boundaries) > 1
        and boundaries[0] == 0
        and boundaries[-1] == len(offsets)
        and (boundaries[1:] >= boundaries[:-1]).all()
    ):
        raise ConfigError(
            f"the documents in {remote.shown(path)} must begin with sequence 0 and end with "
            f"sequence {len(offsets):,}, in order; copy the file again."
        )
    stops = boundaries[1:]
    ends = np.full(len(stops), data_size, np.int64)
    ends[stops < len(offsets)] = offsets[stops[stops < len(offsets)]]
    return ends[np.diff(ends, prepend=0) > 0]
