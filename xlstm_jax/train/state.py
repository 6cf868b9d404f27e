"""The train state: everything that a step reads and writes, except the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xlstm_jax.modules.initializers import jit_once
from xlstm_jax.sharding.devices import Devices
from xlstm_jax.train.averages import start_ema
from xlstm_jax.train.guard import Guard
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree


class TrainState(struct.PyTreeNode):
    """The state of one run, or of many runs with a leading axis on every leaf for `jax.vmap`.

    Fields have no shapes in their types, because trees of shapes, shardings and flags have this
    structure too.
    """

    step: Any  # scalar: batches seen, including skipped ones; determines the next batch
    params: PyTree  # of gradients; `averages.eval_params` gives those to evaluate
    opt_state: PyTree
    guard: Any  # Guard
    lr_scale: Any  # scalar: factor on the schedule, for grids of learning rates
    ema: PyTree = None  # moving average of the parameters, float32 or wider; None: none


def init_state(
    model: Any,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    tokens: Int[Array, "B T"],
    *,
    lr_scale: Float[ArrayLike, ""] = 1.0,
    devices: Devices | None = None,
    ema: bool = False,
) -> TrainState:
    """The initial state, computed in one compiled program.

    Args:
        model: a Flax module called with tokens.
        key: initializes the parameters; `jax.vmap` over keys gives the state of many runs.
        tokens: any tokens: their values do not matter, and 1 x 1 zeros suffice.
        devices: the mesh on which the state is created, sharded; None creates it on one device.
        ema: whether to average the parameters, which `TrainConfig.ema_decay` needs.
    """

    def build(key, tokens, lr_scale):
        return first_state(model.init(key, tokens)["params"], tx, lr_scale, ema=ema)

    args = key, tokens, lr_scale
    if devices is None:
        return jit_once(build)(*args)
    # Created sharded: the state may not fit on a single device.
    shardings = devices.shardings(jax.eval_shape(build, *args))
    with devices.active():
        return jit_once(build, out_shardings=shardings)(*args)


def first_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    lr_scale: Float[ArrayLike, ""] = 1.0,
    *,
    ema: bool = False,
) -> TrainState:
    """The initial state for given parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        guard=Guard.start(),
        lr_scale=jnp.asarray(lr_scale, jnp.float32),
        ema=start_ema(params) if ema else None,
    )
