"""Compilation targets by name; `tests/compile` compiles for them."""

import os

import pytest

from pallas_kernels.hardware import GPUS, TPUS
from xlstm_jax.config import ConfigError
from xlstm_jax.plan import find_target
from xlstm_jax.plan.topology import CLUSTERS


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:16", "v5e:0x4", "v9:2x2", "h100:2x2x2", "h100:8", "rtx:1x1", "l4:1x1"]
)
def test_invalid_topology_raises(name):
    with pytest.raises(ConfigError, match="must be a chip and a shape, such as v5e:16x16"):
        find_target(name)


def test_find_target_returns_the_named_chip_without_changing_the_environment():
    before = dict(os.environ)
    target = find_target("v7x:2x2x1", slices=2)
    assert (target.num_chips, target.num_devices, target.intra_size) == (8, 16, 8)
    assert target.chip.flops == TPUS["v7x"].flops / 2
    gpus = find_target("h100:4x8")
    assert gpus.chip == GPUS["H100"] and (gpus.num_devices, gpus.intra_size) == (32, 8)
    assert dict(os.environ) == before
    assert set(CLUSTERS) == {"a100", "h100", "h200", "b200"}
