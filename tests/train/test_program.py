"""The training program: AOT compilation matches execution, and the step is traced once."""

import chex
import jax
import numpy as np
import pytest

from xlstm_jax.data import batch_at, load
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import metrics
from xlstm_jax.train.program import TrainProgram


def arguments(program):
    """The arguments with which a run calls the step."""
    cfg, devices = program.cfg, program.devices
    batch = devices.batch(batch_at(load(cfg.data, "train"), cfg.data, 0))
    return program.init(), devices.replicate(metrics.empty()), batch


def test_the_ahead_of_time_program_is_the_one_a_run_executes(tiny_lm, experiment, assert_same):
    """The program compiled from shapes accepts a run's arrays and computes the same results."""
    with jax.default_device(None):
        cfg = experiment()
        program = TrainProgram(cfg, make_devices(MeshConfig(data=2, fsdp=2, tensor=2)))
        args = arguments(program)
        chex.assert_trees_all_equal_shapes_and_dtypes(program.arguments, args)
        chex.assert_trees_all_equal_structs(program.arguments, args)
        for shape, value in zip(*map(jax.tree.leaves, (program.arguments, args)), strict=True):
            assert value.sharding.is_equivalent_to(shape.sharding, value.ndim)
        compiled = program.compile()
        with program.devices.active():
            state, totals = compiled(*args)
            expected = program.step(*arguments(program))
        assert float(totals.steps) == 1 and int(state.step) == 1
        assert_same((state, totals), expected)


def test_a_second_trace_is_an_error(tiny_lm, experiment):
    program = TrainProgram(experiment(), make_devices(MeshConfig(data=1)))
    state, totals, batch = arguments(program)
    with program.devices.active():
        state, totals = program.step(state, totals, batch)
        state, totals = program.step(state, totals, batch)
        half = jax.tree.map(np.asarray, batch)
        half = half._replace(**{name: getattr(half, name)[:, :8] for name in half._fields[:-1]})
        with pytest.raises(AssertionError, match="traced > 1 times"):
            program.step(state, totals, program.devices.batch(half))


def test_traces_are_counted_separately_for_each_program(tiny_lm, experiment):
    for _ in range(2):
        program = TrainProgram(experiment(), make_devices(MeshConfig(data=1)))
        with program.devices.active():
            state, _ = program.step(*arguments(program))
        assert state.step == 1
