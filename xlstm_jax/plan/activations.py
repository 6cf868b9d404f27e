"""Residuals that the forward pass of a step saves for the backward pass, from shapes alone."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.data.batch import Batch
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.lm import LM, param_shapes
from xlstm_jax.sharding.rules import get_rules
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.train.losses import language_model_loss


def residuals_per_device(
    cfg: ExperimentConfig, sizes: dict[str, int], platform: str
) -> tuple[int, int]:
    """Bytes of one micro-batch's residuals on each device, and of parameters cast to their dtype.

    The latter do not grow with the batch.

    Args:
        sizes: devices along each mesh axis.
        platform: target that functions are traced for, which decides the kernels they use.
    """
    # Linear in the batch size: the slope is one sequence, the intercept does not grow.
    one, two = (
        _residual_bytes(cfg.model, cfg.train, (n, cfg.data.seq_len), platform) for n in (1, 2)
    )
    rules = get_rules(cfg.mesh.rules_name())
    # Most residuals have a feature axis, which `tensor` shards.
    shards = math.prod(sizes[axis] for axis in (*rules["batch"], *rules["time"], "tensor"))
    num_sequences = cfg.data.batch_size // cfg.train.accumulation
    copies = (2 * one - two) // (sizes["fsdp"] * sizes["tensor"])
    return (two - one) * num_sequences // shards, copies


@functools.lru_cache(maxsize=64)
def _residual_bytes(
    cfg: LMConfig, train: TrainConfig, shape: tuple[int, int], platform: str
) -> int:
    """Bytes of the residuals of a batch of shape `B T`, over all devices."""
    del platform  # part of the cache key
    model, params = LM(cfg), param_shapes(cfg)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(ids, ids, ids, weights, jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def residuals(params, batch):
        _, pullback = jax.vjp(lambda p: language_model_loss(model, p, batch, train)[0], params)
        return jax.tree.leaves(pullback)

    closed = jax.make_jaxpr(residuals)(params, batch)
    # A variable may be saved more than once. Inputs and constants are not residuals.
    inputs = set(closed.jaxpr.invars)
    saved = {id(out): out for out in closed.jaxpr.outvars if not hasattr(out, "val")}
    avals: list[Any] = [out.aval for out in saved.values() if out not in inputs]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
