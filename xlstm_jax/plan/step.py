"""The real train step of a run, compiled from shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.data import Batch
from xlstm_jax.modules import LM
from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding import Devices, make_devices, use_rules
from xlstm_jax.train.config import ExperimentConfig, check_lengths
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import TrainState, first_state
from xlstm_jax.train.step import make_train_step
from xlstm_jax.typing import PyTree


class Compiled(NamedTuple):
    """A step, and what it was compiled of."""

    program: jax.stages.Compiled
    state: TrainState  # shapes with shardings
    devices: Devices


def compile_step(cfg: ExperimentConfig, target: Target) -> Compiled:
    """The step of a run on hardware that is not here, optimiser and guard included.

    Raises:
        ConfigError: the mesh does not fit the hardware, or the batch not the mesh.
    """
    devices = make_devices(cfg.mesh, target.devices)
    check_lengths(cfg, devices.rules, devices.mesh.shape)
    model, tx = LM(cfg.model), make_optimizer(cfg.train)
    step = make_train_step(model, tx, cfg.train)

    def start(seed):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return first_state(model.init(jax.random.key(seed), tokens)["params"], tx)

    def update(state: TrainState, batch: Batch):
        with use_rules(devices.rules):
            state, metrics = step(state, batch)
        return devices.hold(state), metrics

    state = jax.eval_shape(start, jax.ShapeDtypeStruct((), jnp.uint32))
    state = _placed(state, devices.of_tree(state))
    with target.compiling(), devices.active():
        lowered = jax.jit(update, donate_argnums=0).lower(state, _batch(cfg, devices))
        return Compiled(lowered.compile(), state, devices)


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _batch(cfg: ExperimentConfig, devices: Devices) -> Batch:
    shape = cfg.data.batch_size, cfg.data.seq_len

    def rows(dtype: Any, sizes: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=devices.of_batch(len(sizes)))

    ids = rows(jnp.int32, shape)
    return Batch(ids, ids, ids, rows(jnp.float32, shape), rows(jnp.int32, shape[:1]))
