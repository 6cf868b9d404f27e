"""Residuals that the forward pass of a step saves for the backward pass, from shapes alone."""

import functools
import math

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
    """Bytes that a micro-batch saves on each device besides the parameters.

    Args:
        sizes: of the mesh axes.
        platform: what functions are traced for, as far as it decides which kernels they use.

    Returns the bytes of activations, and those that do not grow with the batch: parameters cast to
    the dtype of activations.
    """
    one, two = (
        _residual_bytes(cfg.model, cfg.train, (n, cfg.data.seq_len), platform) for n in (1, 2)
    )
    rules = get_rules(cfg.mesh.rules_name())
    # Most of it are features, which devices along `tensor` share.
    shards = math.prod(sizes[axis] for axis in (*rules["batch"], *rules["time"], "tensor"))
    num_sequences = cfg.data.batch_size // cfg.train.accumulation
    copies = (2 * one - two) // (sizes["fsdp"] * sizes["tensor"])
    return (two - one) * num_sequences // shards, copies


@functools.lru_cache(maxsize=64)
def _residual_bytes(
    cfg: LMConfig, train: TrainConfig, shape: tuple[int, int], platform: str
) -> int:
    """Of a batch `B T`, on all devices together."""
    del platform  # part of the cache key
    model, params = LM(cfg), param_shapes(cfg)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(ids, ids, ids, weights, jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def residuals(params, batch):
        _, pullback = jax.vjp(lambda p: language_model_loss(model, p, batch, train)[0], params)
        return jax.tree.leaves(pullback)

    closed = jax.make_jaxpr(residuals)(params, batch)
    # A variable may be saved more than once; inputs are stored elsewhere, constants do not count.
    inputs = set(closed.jaxpr.invars)
    saved = {id(out): out for out in closed.jaxpr.outvars if not hasattr(out, "val")}
    avals = [out.aval for out in saved.values() if out not in inputs]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
