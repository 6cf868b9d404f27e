"""The library's own train step of a workload, ready to be compiled and timed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests.workloads import ModelWorkload
from xlstm_jax.data import Batch
from xlstm_jax.modules import LM
from xlstm_jax.sharding import MeshConfig, make_devices, use_rules
from xlstm_jax.sharding.rules import RulesName
from xlstm_jax.train import TrainConfig, TrainState, init_state, make_optimizer, make_train_step

Metrics = dict[str, jax.Array]

# One document per sequence, and the peer knows no documents: neither side looks for boundaries.
TRAIN = TrainConfig(steps=1000, grad_clip=1.0, document_resets=False)


class Training(NamedTuple):
    """A train step that donates its state, and its arguments."""

    step: jax.stages.Wrapped
    arguments: Callable[[], tuple[TrainState, Batch]]
    shapes: Callable[[], tuple[TrainState, Batch]]  # of the arguments, for the compiler
    mesh: Callable[[], AbstractContextManager]  # to enter around compiling and calling

    def lower(self) -> jax.stages.Lowered:
        """The step, traced for the shapes of its arguments."""
        with self.mesh():
            return self.step.lower(*self.shapes())

    def start(self, program: jax.stages.Compiled) -> Callable[[], Metrics]:
        """A call that trains one step more with the compiled program and returns its metrics."""
        state, batch = self.arguments()

        def advance() -> Metrics:
            nonlocal state
            with self.mesh():
                state, metrics = program(state, batch)
            return metrics

        return advance


def training(workload: ModelWorkload, rules: RulesName | None = None) -> Training:
    """The train step of a workload: without a mesh, or as a run has it on a mesh of one device.

    No other benchmark builds a train step.
    """
    lm, tx = LM(workload.model), make_optimizer(TRAIN)
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    step = make_train_step(lm, tx, TRAIN)
    if rules is None:

        def arguments():
            return init_state(lm, tx, key, tokens), random_batch(workload)

        jitted = jax.jit(step, donate_argnums=0)
        return Training(jitted, arguments, lambda: jax.eval_shape(arguments), nullcontext)
    devices = make_devices(MeshConfig(rules=rules), jax.devices()[:1])

    def sharded_step(state, batch):
        with use_rules(devices.rules):
            state, metrics = step(state, batch)
        return devices.hold(state), metrics

    def sharded_arguments():
        state = init_state(lm, tx, key, tokens, devices=devices)
        return state, devices.batch(jax.device_get(random_batch(workload)))

    jitted = jax.jit(sharded_step, donate_argnums=0)
    return Training(jitted, sharded_arguments, sharded_arguments, devices.active)


def random_batch(workload: ModelWorkload) -> Batch:
    """Uniformly random tokens, one document per sequence."""
    shape = (workload.batch_size, workload.seq_len)
    tokens = jax.random.randint(
        jax.random.key(1), (shape[0], shape[1] + 1), 0, workload.model.vocab_size, jnp.int32
    )
    ones = jnp.ones(shape, jnp.int32)
    index = jnp.arange(workload.batch_size)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(jnp.float32), index)


def compiled_step(
    workload: ModelWorkload, rules: RulesName | None = None
) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A call that trains one step more, and its compiled program."""
    of = training(workload, rules)
    program = of.lower().compile()
    return of.start(program), program
