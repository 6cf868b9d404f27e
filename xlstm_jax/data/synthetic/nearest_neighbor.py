"""Nearest-neighbor search: the value of the vector most similar to the first one, so far.

Source: Beck et al. 2024, arXiv:2405.04517, figure 2. Every vector has three numbers: a random unit
vector in two dimensions, and a value uniform between 0 and 1. The first vector is the reference,
whose value plays no role. The target at every later position is the value of the vector closest to
the reference among those after it, up to and including this position.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import DataConfig, Split
from xlstm_jax.data.synthetic.samples import sample_keys
from xlstm_jax.errors import ConfigError

VECTOR_DIM = 3
CONSTANT_MSE = 1 / 12
"""Mean squared error of the prediction 1/2, the variance of a value."""

_LENGTH, _VECTORS = range(2)  # streams of random numbers of a sample
_ENDLESS = 1 << 40  # samples in an epoch: training never repeats one


@dataclasses.dataclass(frozen=True)
class NearestNeighbor:
    """Sequences of min_len to max_len vectors (None: seq_len), uniform, padded to seq_len.

    Batches have vectors `B T 3` as inputs, and numbers as targets, with weight 1 from position 1
    on. `vocab_size` is 0, as inputs are not tokens.

    Raises:
        ConfigError: the range of lengths is empty, or exceeds `seq_len`.
    """

    cfg: DataConfig
    split: Split

    # The samples are independent and identically distributed, so shuffling changes nothing.
    shuffle = False
    vocab_size = 0

    def __post_init__(self):
        if not self.cfg.min_len <= self._max_len <= self.cfg.seq_len:
            raise ConfigError(
                f"max_len must be from min_len={self.cfg.min_len} to seq_len={self.cfg.seq_len} "
                f"vectors, got {self._max_len}; leave it None for seq_len, or raise data.seq_len."
            )

    @property
    def _max_len(self) -> int:
        return self.cfg.seq_len if self.cfg.max_len is None else self.cfg.max_len

    @property
    def description(self) -> dict[str, Any]:
        """The values that determine the samples."""
        fields = {name: getattr(self.cfg, name) for name in ("source", "seed", "min_len")}
        return fields | {"split": self.split, "max_len": self._max_len}

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return _ENDLESS if self.split == "train" else self.cfg.num_eval_samples

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The samples with these indices."""
        keys = sample_keys(self.cfg.seed, self.split, index)
        draws = hashing.fold(keys, np.full(1, _LENGTH, np.uint64))
        lengths = self.cfg.min_len + hashing.below(draws, self._max_len - self.cfg.min_len + 1)
        x, position = vectors(keys, self.cfg.seq_len), np.arange(self.cfg.seq_len)
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
    numbers = hashing.uniform(draws)  # two for each position
    angle, value = 2 * np.pi * numbers[:, ::2], numbers[:, 1::2]
    return np.stack([np.cos(angle), np.sin(angle), value], axis=-1).astype(np.float32)


def nearest_values(x: Float[np.ndarray, "N T 3"]) -> Float[np.ndarray, "N T"]:
    """The target at every position; 0 at the reference. Of vectors that tie the last counts."""
    # Unit vectors: the closest one has the largest inner product.
    similarity = np.einsum("ntc,nc->nt", x[..., :2], x[:, 0, :2])
    similarity[:, 0] = -np.inf
    is_closest = similarity >= np.maximum.accumulate(similarity, axis=1)
    closest = np.maximum.accumulate(np.where(is_closest, np.arange(x.shape[1]), 0), axis=1)
    values = np.take_along_axis(x[..., 2], closest, axis=1)
    values[:, 0] = 0
    return values
