"""Pooling over the positions of documents."""

import jax.numpy as jnp

from xlstm_jax.typing import Array, Float, Int


def document_means(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], num_documents: int = 1
) -> Float[Array, "B documents D"]:
    """The mean of x over each of the documents 1, 2, ..., num_documents; 0 for an empty one.

    With one document, every position with an id other than 0 counts.
    """
    if num_documents == 1:
        segment_ids = jnp.minimum(segment_ids, 1)
    documents = jnp.arange(1, num_documents + 1)
    is_inside = (segment_ids[:, None] == documents[None, :, None]).astype(x.dtype)
    counts = jnp.maximum(jnp.sum(is_inside, axis=-1, keepdims=True), 1)
    return jnp.einsum("bnt,btd->bnd", is_inside, x) / counts
