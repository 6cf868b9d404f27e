"""The train state: everything that a step reads and writes, except the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xlstm_jax.modules.initializers import jit_once
from xlstm_jax.sharding.devices import Devices
from xlstm_jax.train.averages import average_of, start_ema
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import Guard
from xlstm_jax.train.lora import adapters
from xlstm_jax.train.trainable import combine, partition
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree


class TrainState(struct.PyTreeNode):
    """The state of one run, or of many runs with a leading axis on every leaf for `jax.vmap`.

    Fields have no shapes in their types, because trees of shapes, shardings and flags have this
    structure too.
    """

    step: Any  # scalar: batches seen, including skipped ones; determines the next batch
    params: PyTree  # of gradients (`eval_params` gives those to evaluate); adapters under "lora"
    opt_state: PyTree  # of the trained parameters
    guard: Any  # Guard
    lr_scale: Any  # scalar: factor on the schedule, for grids of learning rates
    ema: PyTree = None  # moving average of the trained ones, float32 or wider; None: none
    carry: Any = None  # Carry: recurrent state between steps; None: not carried


def init_state(
    model: Any,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    tokens: Int[Array, "B T"] | Float[Array, "B T C"],
    *,
    lr_scale: Float[ArrayLike, ""] = 1.0,
    devices: Devices | None = None,
    freeze: str | None = None,
    ema: bool = False,
) -> TrainState:
    """The initial state, computed in one compiled program.

    Args:
        model: a Flax module called with tokens, or with vectors.
        key: initializes the parameters; `jax.vmap` over keys gives the state of many runs.
        tokens: any inputs: their values do not matter, and zeros of one position suffice.
        devices: the mesh on which the state is created, sharded; None creates it on one device.
        freeze: `TrainConfig.freeze`: the frozen parameters have no optimizer state.
        ema: whether to average the parameters, which `TrainConfig.ema_decay` needs.
    """

    def build(key, tokens, lr_scale):
        params = model.init(key, tokens)["params"]
        return first_state(params, tx, lr_scale, freeze=freeze, ema=ema)

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
    freeze: str | None = None,
    ema: bool = False,
) -> TrainState:
    """The initial state for given parameters, with optimizer state for the trained ones only."""
    trained, _ = partition(params, freeze)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(trained),
        guard=Guard.start(),
        lr_scale=jnp.asarray(lr_scale, jnp.float32),
        ema=start_ema(trained) if ema else None,
    )


def eval_params(cfg: ExperimentConfig, params: PyTree, opt_state: PyTree) -> PyTree:
    """The parameters to evaluate, generate with and export, from those of a train state.

    Adapters are merged. Those of a schedule-free optimizer are its average, which the parameters
    and the optimizer state determine; within `jax.vmap`, that of each run.
    """
    trained, frozen = partition(params, cfg.train.freeze)
    return adapters.merged(combine(average_of(trained, opt_state), frozen), cfg.lora)
