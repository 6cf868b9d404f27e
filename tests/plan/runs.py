"""Configs and targets for the tests of `xlstm_jax.plan`."""

import contextlib
import dataclasses

import jax

from pallas_kernels.hardware import GPUS
from xlstm_jax.cli.options import experiment_from_preset
from xlstm_jax.modules import LargeConfig, LMConfig
from xlstm_jax.plan import Target
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import ExperimentConfig

SMALL = LMConfig(
    vocab_size=512, dim=256, pattern="MMMM", large=LargeConfig(num_heads=4), dtype="bfloat16"
)
ONE_DEVICE = MeshConfig()


def config(
    mesh: MeshConfig = ONE_DEVICE, batch_size: int = 8, seq_len: int = 256, **model
) -> ExperimentConfig:
    cfg = experiment_from_preset("scaling_160m")
    data = dataclasses.replace(cfg.data, batch_size=batch_size, seq_len=seq_len)
    return dataclasses.replace(cfg, model=dataclasses.replace(SMALL, **model), data=data, mesh=mesh)


def sizes(**axis_sizes: int) -> dict[str, int]:
    """Mesh sizes; axes that are not named have size 1."""
    return {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1} | axis_sizes


def target(count: int = 8, hbm_bytes: int = 2**30, intra_size: int = 8) -> Target:
    """H100s without a compiler, so that plans are estimated by formula."""
    chip = GPUS["H100"]._replace(hbm_bytes=hbm_bytes)
    return Target("h100:test", chip, (), count, count, intra_size, "for the test")


class CpuTarget(Target):
    """The CPU devices of this process with the rates of an H100."""

    def compiling(self):
        return contextlib.nullcontext()


def cpu_target(count: int) -> CpuTarget:
    devices = tuple(jax.devices()[:count])
    return CpuTarget("cpu:test", GPUS["H100"], devices, count, count, count)
