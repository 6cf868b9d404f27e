"""What the forward pass of a step leaves for the backward pass, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.data import Batch
from xlstm_jax.modules.lm import LM, param_shapes
from xlstm_jax.sharding.rules import Rules
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.losses import language_model_loss


def kept_for_backward(cfg: ExperimentConfig) -> int:
    """Bytes of what a micro-batch keeps besides the parameters, on all devices together."""
    model, rows = LM(cfg.model), cfg.data.batch_size // cfg.train.accumulation
    shape = (rows, cfg.data.seq_len)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(ids, ids, ids, weights, jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def backward(params, batch):
        def loss(params):
            return language_model_loss(model, params, batch, cfg.train)[0]

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    closed = jax.make_jaxpr(backward)(param_shapes(cfg.model), batch)
    # A variable may be kept more than once; what was handed in lives elsewhere, constants do not
    # count.
    inputs = set(closed.jaxpr.invars)
    kept = {id(out): out for out in closed.jaxpr.outvars if not hasattr(out, "val")}
    return sum(_bytes(out.aval) for out in kept.values() if out not in inputs)


def kept_per_row(cfg: ExperimentConfig) -> tuple[int, int]:
    """Bytes that a row of a micro-batch adds to what is kept, and those that none adds: parameters
    in the dtype of activations."""

    def kept(rows: int) -> int:
        data = dataclasses.replace(cfg.data, batch_size=rows * cfg.train.accumulation)
        return kept_for_backward(dataclasses.replace(cfg, data=data))

    one, two = kept(1), kept(2)
    return two - one, 2 * one - two


def cuts_of_batch(rules: Rules, sizes: dict[str, int]) -> int:
    """How many devices share the activations of a micro-batch, by rows and by time."""
    return math.prod(sizes[axis] for axis in (*rules["batch"], *rules["time"]))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
