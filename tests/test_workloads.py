"""The table of workloads agrees with the presets."""

import pytest

from tests import workloads
from xlstm_jax.modules import presets


@pytest.mark.parametrize("name", workloads.MLSTM_LADDER)
def test_heads_of_the_ladder_equal_those_of_the_presets(name):
    preset = presets.get(f"scaling_{name}")
    num_heads = preset.large.num_heads
    v_dim = preset.dim // num_heads
    assert workloads.MLSTM[name].heads == (num_heads, v_dim // 2, v_dim)


def test_mlstm_workloads_have_the_same_number_of_tokens():
    assert {w.B * w.T for w in workloads.MLSTM.values()} == {workloads.TOKENS}
