"""Everything a step reads and writes besides the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xlstm_jax.sharding.devices import Devices
from xlstm_jax.train.guard import Guard
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree


class TrainState(struct.PyTreeNode):
    """One value per run; a leading axis on every leaf makes it many runs under `jax.vmap`.

    Fields have no shapes in their types, as trees of shapes, shardings or flags have this one too.
    """

    step: Any  # scalar: batches seen, skipped ones included; also the position in the data
    params: PyTree
    opt_state: PyTree
    guard: Any  # Guard
    lr_scale: Any  # scalar: factor on the schedule; differs over a grid of learning rates


def init_state(
    model: Any,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    tokens: Int[Array, "B T"],
    *,
    lr_scale: Float[ArrayLike, ""] = 1.0,
    devices: Devices | None = None,
) -> TrainState:
    """The state before the first step, made in one compiled program.

    Args:
        model: a Flax module called with tokens.
        tx: as for the step.
        key: decides the parameters; `jax.vmap` over keys makes a state of many runs.
        tokens: any tokens, as only parameters are made: a 1 x 1 array of zeros is enough.
        lr_scale: factor on the learning rate.
        devices: the mesh on which it is created, each leaf sharded; None: on one device.
    """

    def build(key, tokens, lr_scale):
        return first_state(model.init(key, tokens)["params"], tx, lr_scale)

    args = key, tokens, lr_scale
    if devices is None:
        return jax.jit(build)(*args)
    shardings = devices.shardings(jax.eval_shape(build, *args))
    with devices.active():
        return jax.jit(build, out_shardings=shardings)(*args)


def first_state(
    params: PyTree, tx: optax.GradientTransformation, lr_scale: Float[ArrayLike, ""] = 1.0
) -> TrainState:
    """The state before the first step, of given parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        guard=Guard.start(),
        lr_scale=jnp.asarray(lr_scale, jnp.float32),
    )
