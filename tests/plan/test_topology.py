"""Hardware by its name; what is compiled for it is tested where its compilers are installed."""

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.plan import find_target
from xlstm_jax.plan.chips import GPUS, TPUS


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:16", "v5e:0x4", "v9:2x2", "h100:2x2x2", "h100:8", "rtx:1x1"]
)
def test_hardware_that_cannot_be_is_refused(name):
    with pytest.raises(ConfigError, match="must be a kind of chip and a shape, such as v5e:16x16"):
        find_target(name)


def test_chips_have_the_figures_of_their_data_sheets():
    for chip in (*TPUS.values(), *GPUS.values()):
        assert 1e14 < chip.flops < 3e15 and 1e10 < chip.memory < 3e11
        assert chip.far_rate < chip.near_rate < chip.memory_rate < chip.flops
    assert set(GPUS) == {"a100", "h100", "h200", "b200"}
