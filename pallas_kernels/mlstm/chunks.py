"""Length of the chunks of the mLSTM kernels for GPUs."""

from pallas_kernels import common

LONG_CHUNK, SHORT_CHUNK = 256, 128
"""Per token, a chunk costs L (K + V) operations for its weights and K V / L of state traffic.
They balance at L near sqrt(K V); `chunk_length` has the threshold between the two lengths."""


def chunk_length(K: int, V: int, T: int, chunk_size: int | None, multiple: int) -> int:
    """Positions in a chunk, a multiple of `multiple`, for padded widths."""
    if chunk_size is not None:
        return min(chunk_size, common.round_up(T, multiple))
    longest = LONG_CHUNK if K * V > 128 * 256 else SHORT_CHUNK
    return common.best_chunk(T, longest, multiple)
