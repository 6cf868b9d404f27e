"""Losses of the models in `modules.heads`, as sums over a batch, for `make_train_step`.

Bind the model, and pass the result as its `loss_fn`:
`functools.partial(classification_loss, model)`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.typing import Array, Float, Int, PRNGKeyArray, PyTree

Loss = tuple[Float[Array, ""], CrossEntropy]


def classification_loss(
    model: Any, params: PyTree, batch: Batch, dropout_key: PRNGKeyArray | None = None
) -> Loss:
    """Cross entropy of one class per sequence, for a `Classifier`.

    The class is the target at the one position of the sequence whose weight is not 0. Sequences
    without such a position, which pad a batch, do not count. The sums are over sequences.
    """
    logits = _apply(model, params, batch, dropout_key)
    is_labeled = batch.weights > 0
    classes = jnp.sum(jnp.where(is_labeled, batch.targets, 0), axis=1)
    return _cross_entropy(logits, classes, jnp.sum(batch.weights, axis=1))


def position_classification_loss(
    model: Any, params: PyTree, batch: Batch, dropout_key: PRNGKeyArray | None = None
) -> Loss:
    """Cross entropy of a class at each position, weighted, for a `PositionHead`."""
    logits = _apply(model, params, batch, dropout_key)
    return _cross_entropy(logits, jnp.maximum(batch.targets, 0), jnp.asarray(batch.weights))


def squared_error_loss(
    model: Any, params: PyTree, batch: Batch, dropout_key: PRNGKeyArray | None = None
) -> Loss:
    """Squared errors of one number at each position, weighted, for a `PositionHead`.

    The sums have the fields of a cross entropy: `ce_sum` is the sum of squared errors, so that the
    loss of a train step is the mean squared error; `z_sum` and `correct_sum` are 0.

    Raises:
        ArgumentError: the model has more than one output.
    """
    outputs = _apply(model, params, batch, dropout_key)
    if outputs.shape[-1] != 1:
        raise ArgumentError(
            f"num_outputs must be 1 for squared errors, got {outputs.shape[-1]}; targets are one "
            "number per position."
        )
    errors = jnp.square(outputs[..., 0] - batch.targets) * batch.weights
    zero = jnp.zeros((), errors.dtype)
    total = jnp.sum(errors)
    return total, CrossEntropy(total, zero, jnp.sum(batch.weights), zero)


def _apply(model: Any, params: PyTree, batch: Batch, dropout_key: PRNGKeyArray | None) -> Array:
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    deterministic = dropout_key is None
    arguments = (batch.inputs, batch.segment_ids)
    return model.apply({"params": params}, *arguments, deterministic=deterministic, rngs=rngs)


def _cross_entropy(
    logits: Float[Array, "*batch classes"],
    classes: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
) -> Loss:
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, classes[..., None], axis=-1)[..., 0]
    is_correct = jnp.argmax(logits, axis=-1) == classes
    total = jnp.sum(nats * weights)
    correct = jnp.sum(weights * is_correct)
    return total, CrossEntropy(total, jnp.zeros((), total.dtype), jnp.sum(weights), correct)
