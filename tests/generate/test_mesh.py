"""Generation on meshes: every rule table and type of mesh axes gives the tokens of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.generate.test_prepare import random_model
from xlstm_jax.generate import generate
from xlstm_jax.sharding import MESH_AXES, RULES, use_rules

PROMPTS = [[1, 2, 3], [4] * 20, [5, 6], [7]]
SIZES = {
    "data": (4, 1, 1, 1),
    "fsdp": (2, 2, 1, 1),
    "fsdp_tensor": (1, 2, 1, 2),
    "fsdp_seq": (1, 2, 2, 1),
}
assert SIZES.keys() == RULES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize("pattern", ["Ms", "ma", "bdr"])
@pytest.mark.parametrize("rules", SIZES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_tokens_are_those_of_one_device(axis_type, rules, pattern):
    model, variables = random_model(pattern)
    expected = generate(model, variables, PROMPTS, max_new_tokens=4)
    mesh = jax.make_mesh(SIZES[rules], MESH_AXES, axis_types=(axis_type,) * len(MESH_AXES))
    with jax.set_mesh(mesh), use_rules(rules):
        actual = generate(model, variables, PROMPTS, max_new_tokens=4)
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)
