"""The training program of a run, compiled from shapes alone."""

from typing import NamedTuple

import jax

from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding.devices import Devices, make_devices
from xlstm_jax.train.config import ExperimentConfig, check_lengths
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState


class Compiled(NamedTuple):
    """A training program, and what it was compiled of."""

    program: jax.stages.Compiled
    state: TrainState  # shapes with shardings
    devices: Devices


def compile_step(cfg: ExperimentConfig, target: Target) -> Compiled:
    """What a run executes at each step, compiled for a target: `train.program`, nothing else.

    Raises:
        ConfigError: the mesh does not fit the hardware, or the batch not the mesh.
    """
    devices = make_devices(cfg.mesh, target.devices)
    check_lengths(cfg, devices.rules, devices.mesh.shape)
    program = TrainProgram(cfg, devices)
    with target.compiling():
        return Compiled(program.compile(), program.arguments[0], devices)
