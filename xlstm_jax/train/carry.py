"""Truncated backpropagation through time: the recurrent state that is carried between steps.

Sequence b of a step continues sequence b of the step before (`data.packing="stream"`). The state
enters the step as a value that is not differentiated, so gradients end at the start of the window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.data.batch import Batch
from xlstm_jax.typing import PyTree


class Carry(NamedTuple):
    """The state after the last step, and which windows it had."""

    state: PyTree  # of the model; leaves "layers B ..."
    index: Any  # "B"; `Batch.index` of the last step

    @classmethod
    def start(cls, model: Any, batch_size: int) -> "Carry":
        """The initial state of the model."""
        index = jnp.zeros(batch_size, jax.dtypes.canonicalize_dtype(jnp.int64))
        return cls(model.init_state(batch_size), index)


def state_before(carry: Carry, batch: Batch, *, document_resets: bool) -> PyTree:
    """The state from which the sequences of a batch start.

    A sequence starts from the initial state if its window does not follow that of the last step, as
    at the end of an epoch or after a skipped update, or if a document begins with it.
    """
    is_start = jnp.asarray(batch.index) != carry.index + 1
    if document_resets:
        # The first id of a window that continues a document is 1.
        is_start |= batch.segment_ids[:, 0] != 1
    return jax.tree.map(
        lambda x: jnp.where(is_start.reshape(1, -1, *[1] * (x.ndim - 2)), 0, x), carry.state
    )
