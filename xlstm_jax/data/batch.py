"""The batch that a training step consumes, and the interface of a data set."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from xlstm_jax.config.compare import differences


class Batch(NamedTuple):
    """The sequences of one step: NumPy arrays on the host, `jax.Array`s on devices."""

    inputs: Int32[Any, "B T"] | Float32[Any, "B T C"]  # tokens, or vectors for `modules.heads`
    # Tokens, classes or numbers; -1 where a synthetic task has no target.
    targets: Int32[Any, "B T"] | Float32[Any, "B T"]
    segment_ids: Int32[Any, "B T"]  # 0 is padding; documents count from 1 within a sequence
    weights: Float32[Any, "B T"]  # 1 for a target of the loss, 0 elsewhere
    index: Int64[Any, "B"]  # window number in the data set; -1 pads a short batch


@runtime_checkable  # so that signatures can be checked at run time
class Examples(Protocol):
    """An indexed data set: the `Windows` of a text or the `Samples` of a synthetic task."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that a model needs for these data; 0 if they are vectors."""

    @property
    def description(self) -> dict[str, Any]:
        """The identity of the data, as JSON values; `differences_of_data` compares it on resume."""

    @property
    def shuffle(self) -> bool:
        """Whether training permutes the windows; independent samples need no shuffling."""

    def __len__(self) -> int:
        """Number of windows or samples in an epoch."""

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows or samples with these indices, as a pure function of the indices."""


def differences_of_data(new: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of a description from that of an earlier run, one line per field.

    Data are identified by content: neither their path nor the names of their files count.
    """
    # Earlier versions stored the path of a text and the version of Python, and no hash without
    # names of files.
    ignored = {"source", "python"} - new.keys()
    ignored |= {"sha256"} if "content_sha256" in stored else {"content_sha256"}
    old, current = ({k: v for k, v in d.items() if k not in ignored} for d in (stored, new))
    return differences(current, old)


def pad_batch(batch: Batch, batch_size: int) -> Batch:
    """`batch` padded to `batch_size` with sequences of segment 0, weight 0 and index -1."""
    missing = batch_size - len(batch.index)
    # Inputs and targets are padded with token 0, a valid id in every vocabulary.
    leaves = [np.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1))) for leaf in batch[:-1]]
    return Batch(*leaves, index=np.pad(batch.index, (0, missing), constant_values=-1))
