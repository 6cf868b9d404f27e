"""Nearest-neighbor search: the value of the vector most similar to the first one, so far.

Source: Beck et al. 2024, arXiv:2405.04517, figure 2. Every vector has three numbers: a random unit
vector in two dimensions, and a value uniform between 0 and 1. The first vector is the reference,
whose value plays no role. The target at every later position is the value of the vector closest to
the reference among those after it, up to and including this position.
"""

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import Split
from xlstm_jax.data.synthetic.samples import sample_keys
from xlstm_jax.errors import ConfigError

VECTOR_DIM = 3
MIN_LEN = 2
"""The reference and one vector to compare with it."""

CONSTANT_MSE = 1 / 12
"""Mean squared error of the prediction 1/2, the variance of a value."""

_LENGTH, _VECTORS = range(2)  # streams of random numbers of a sample


def batch(
    seed: int, split: Split, index: Int64[np.ndarray, "B"], seq_len: int, min_len: int = MIN_LEN
) -> Batch:
    """Sequences of `min_len` to `seq_len` vectors, uniform, padded to `seq_len`; `index` selects.

    Inputs are vectors `B T 3`, and targets are numbers with weight 1, from position 1 on.

    Raises:
        ConfigError: the range of lengths is empty or allows a reference without other vectors.
    """
    if not MIN_LEN <= min_len <= seq_len:
        raise ConfigError(
            f"min_len must be from {MIN_LEN} to seq_len={seq_len}, got {min_len}; a sequence is a "
            "reference and at least one vector."
        )
    keys = sample_keys(seed, split, index)
    span = seq_len - min_len + 1
    lengths = min_len + hashing.below(hashing.fold(keys, np.full(1, _LENGTH, np.uint64)), span)
    x = vectors(keys, seq_len)
    position = np.arange(seq_len)
    inside = position < lengths[:, None]
    return Batch(
        inputs=np.where(inside[..., None], x, np.float32(0)),
        targets=np.where(inside, nearest_values(x), np.float32(0)),
        segment_ids=inside.astype(np.int32),
        weights=(inside & (position > 0)).astype(np.float32),
        index=index,
    )


def vectors(keys: UInt64[np.ndarray, "N"], seq_len: int) -> Float32[np.ndarray, "N T 3"]:
    """Unit vectors, uniform on the circle, each followed by its value."""
    stream = hashing.fold(keys, np.full(1, _VECTORS, np.uint64))
    draws = hashing.fold(stream[:, None], np.arange(2 * seq_len, dtype=np.uint64)[None])
    angle, value = np.split(hashing.uniform(draws), 2, axis=1)
    angle = 2 * np.pi * angle
    return np.stack([np.cos(angle), np.sin(angle), value], axis=-1).astype(np.float32)


def nearest_values(x: Float[np.ndarray, "N T 3"]) -> Float[np.ndarray, "N T"]:
    """The target at every position; 0 at the reference. Of equally close vectors the last counts."""
    # Unit vectors: the closest one has the largest inner product.
    similarity = np.einsum("ntc,nc->nt", x[..., :2], x[:, 0, :2])
    similarity[:, 0] = -np.inf
    is_closest = similarity >= np.maximum.accumulate(similarity, axis=1)
    closest = np.maximum.accumulate(np.where(is_closest, np.arange(x.shape[1]), 0), axis=1)
    values = np.take_along_axis(x[..., 2], closest, axis=1)
    values[:, 0] = 0
    return values
