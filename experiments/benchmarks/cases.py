"""The train step of a workload, as executed in training, to be compiled and timed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tests.workloads import ModelWorkload
from xlstm_jax.data import Batch, DataConfig
from xlstm_jax.modules import LM
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import (
    ExperimentConfig,
    TrainConfig,
    init_state,
    make_optimizer,
    make_train_step,
    metrics,
)
from xlstm_jax.train.program import TrainProgram

# One document per sequence, and the peer does not support documents: both skip document resets.
TRAIN = TrainConfig(steps=1000, grad_clip=1.0, document_resets=False)


def make_program(workload: ModelWorkload, rules: str = "data") -> TrainProgram:
    """The training program for a workload, on a mesh of one device."""
    data = DataConfig(batch_size=workload.batch_size, seq_len=workload.seq_len)
    cfg = ExperimentConfig(name="benchmark", model=workload.model, data=data, train=TRAIN)
    return TrainProgram(cfg, make_devices(MeshConfig(rules=rules), jax.devices()[:1]))


def start_training(
    program: TrainProgram, compiled: jax.stages.Compiled, workload: ModelWorkload
) -> Callable[[], metrics.Totals]:
    """A function that runs one more train step and returns the metric totals of all steps."""
    state, totals = program.init(), metrics.empty()
    batch = program.devices.batch(jax.device_get(random_batch(workload)))

    def advance() -> metrics.Totals:
        nonlocal state, totals
        with program.devices.active():
            state, totals = compiled(state, totals, batch)
        # Copied, because the next step donates the totals.
        return jax.tree.map(jnp.copy, totals)

    return advance


def compiled_step(
    workload: ModelWorkload, rules: str = "data"
) -> tuple[Callable[[], metrics.Totals], jax.stages.Compiled]:
    """A function that runs one more train step, and the compiled program behind it."""
    program = make_program(workload, rules)
    compiled = program.compile()
    return start_training(program, compiled, workload), compiled


def plain_step(
    workload: ModelWorkload,
) -> tuple[Callable[[], dict[str, jax.Array]], jax.stages.Compiled]:
    """As `compiled_step`, but only the pure train step, without mesh and metric totals."""
    lm, tx = LM(workload.model), make_optimizer(TRAIN)
    step = jax.jit(make_train_step(lm, tx, TRAIN), donate_argnums=0)
    state = init_state(lm, tx, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    batch = random_batch(workload)
    compiled = step.lower(state, batch).compile()

    def advance() -> dict[str, jax.Array]:
        nonlocal state
        state, step_metrics = compiled(state, batch)
        return step_metrics

    return advance, compiled


def random_batch(workload: ModelWorkload) -> Batch:
    """Uniformly random tokens, one document per sequence."""
    shape = (workload.batch_size, workload.seq_len)
    tokens = jax.random.randint(
        jax.random.key(1), (shape[0], shape[1] + 1), 0, workload.model.vocab_size, jnp.int32
    )
    ones = jnp.ones(shape, jnp.int32)
    index = jnp.arange(workload.batch_size)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(jnp.float32), index)
