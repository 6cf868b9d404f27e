"""Sequences with one class each, as an indexed data set."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from xlstm_jax.data.batch import Batch
from xlstm_jax.data.synthetic.samples import IGNORED
from xlstm_jax.errors import ConfigError, quote_path

Sequences = tuple[Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T C"], Int32[np.ndarray, "B T"]]
"""Inputs, `B T` tokens or `B T C` vectors, and segment ids: 0 is padding, documents from 1."""


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Sequences with classes, the target at the last valid position, for a `Classifier`.

    Attributes:
        read: indices -> inputs and segment ids, a pure function of the indices.
        labels: the class of every sequence.
        vocab_size: token ids; 0: the inputs are vectors.
        name: of the set and its split.
    """

    read: Callable[[Int64[np.ndarray, "B"]], Sequences]
    labels: Int64[np.ndarray, "N"]
    vocab_size: int
    name: str

    shuffle = True

    def __post_init__(self):
        if not len(self.labels):
            raise ConfigError(
                f"{quote_path(self.name)} must have at least one sequence, got none; check the "
                "files."
            )

    @property
    def description(self) -> dict[str, Any]:
        """The name and the number of sequences."""
        return {"source": self.name, "sequences": len(self)}

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.labels)

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The sequences with these indices."""
        inputs, segment_ids = self.read(index)
        return labeled_batch(inputs, segment_ids, self.labels[index], index)


def labeled_batch(
    inputs: Any,
    segment_ids: Int32[np.ndarray, "B T"],
    labels: Int64[np.ndarray, "B"],
    index: Int64[np.ndarray, "B"],
) -> Batch:
    """A batch whose only targets are the classes, at the last valid position, with weight 1."""
    last = (segment_ids != 0).sum(axis=1, keepdims=True) - 1
    is_last = np.arange(segment_ids.shape[1]) == last
    return Batch(
        inputs=inputs,
        targets=np.where(is_last, labels[:, None], IGNORED).astype(np.int32),
        segment_ids=segment_ids,
        weights=is_last.astype(np.float32),
        index=index,
    )


def padded(sequences: list[Int[np.ndarray, "L"]], seq_len: int) -> Sequences:
    """Sequences of different lengths, truncated or padded with 0 to `seq_len`."""
    tokens = np.zeros((len(sequences), seq_len), np.int32)
    segment_ids = np.zeros((len(sequences), seq_len), np.int32)
    for n, sequence in enumerate(sequences):
        length = min(len(sequence), seq_len)
        tokens[n, :length], segment_ids[n, :length] = sequence[:length], 1
    return tokens, segment_ids
