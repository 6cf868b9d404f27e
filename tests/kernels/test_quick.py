"""A few quick interpreted cases of every kernel; all others are slow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import backends as mlstm_backends
from pallas_kernels.slstm import backends as slstm_backends
from tests import quick
from tests.kernels import mlstm_cases, slstm_cases
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE

CASES = {"mlstm": mlstm_cases, "slstm": slstm_cases}
BACKENDS = {"mlstm": mlstm_backends, "slstm": slstm_backends}


def _params():
    for op in CASES:
        for name, kind in (("tpu", "pallas_tpu"), ("triton", "triton")):
            refusal = implementations(op)[kind]
            skip = pytest.mark.skipif(refusal is not None, reason=str(refusal))
            yield pytest.param(op, name, id=f"{op}-{name}", marks=skip)


every_kernel = pytest.mark.parametrize("op,name", list(_params()))


@every_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_match_recurrence(op, name, dtype):
    """Two chunks, with resets and masked steps."""
    cases = CASES[op]
    case = cases.in_bfloat16(cases.make_case(B=1, T=9, H=1, flags=True))
    actual = cases.interpret(getattr(BACKENDS[op], name)(), cases.in_bfloat16(case, dtype))
    cases.assert_results_match(actual, cases.reference(case), TABLE[dtype])


@every_kernel
def test_single_steps_match_a_sequence(op, name):
    cases, kernels = CASES[op], getattr(BACKENDS[op], name)()
    case = jax.tree.map(jnp.asarray, cases.make_case(B=1, T=3, H=1, flags=True))
    time_fields = [field for field in case._fields if field in ("x", *"qkvif", "reset", "mask")]

    def step_by_step(case):
        state, outputs = case.state, []
        for t in range(3):
            one = {field: getattr(case, field)[:, t : t + 1] for field in time_fields}
            h, state = cases.run(kernels, case._replace(state=state, **one))
            outputs.append(h)
        return jnp.concatenate(outputs, 1), state

    with common.interpreted(lanes=cases.LANES):
        expected = quick.jit(lambda case: cases.run(kernels, case))(case)
        actual = quick.jit(step_by_step)(case)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )
