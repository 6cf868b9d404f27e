"""What the pipeline hands to a training step, and what it asks of a data set."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64


class Batch(NamedTuple):
    """Rows for one step: NumPy arrays on the host, `jax.Array`s once placed on devices."""

    inputs: Int32[Any, "B T"]
    targets: Int32[Any, "B T"]  # -1 where a synthetic task asks for nothing
    segment_ids: Int32[Any, "B T"]  # 0 is padding; documents count from 1 within a row
    weights: Float32[Any, "B T"]  # 1 where the target counts, 0 elsewhere
    index: Int64[Any, "B"]  # which row of the data set, for replay; -1 fills up a short batch


@runtime_checkable  # so that signatures can be checked at run time
class Examples(Protocol):
    """A data set as rows by index: `Windows` of a text, or the `Samples` of a synthetic task."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids a model of these rows needs."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """Where the rows come from, ready for JSON: to be recorded beside every result."""
        ...

    @property
    def shuffle(self) -> bool:
        """Whether training permutes the rows; independent samples need no shuffling."""
        ...

    def __len__(self) -> int:
        """Number of rows in an epoch."""
        ...

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The rows with these numbers, a pure function of them."""
        ...


def fill_up(batch: Batch, batch_size: int) -> Batch:
    """`batch` with rows of pure padding (segment 0, weight 0, index -1) up to `batch_size`."""
    missing = batch_size - len(batch.index)
    # Targets as well as inputs become token 0, a valid id in every vocabulary.
    rows = [np.pad(leaf, ((0, missing), (0, 0))) for leaf in batch[:-1]]
    return Batch(*rows, index=np.pad(batch.index, (0, missing), constant_values=-1))
