"""Cost estimates of the mLSTM TPU kernels, against operations counted in their jaxprs."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.mlstm import backends
from tests.kernels import mlstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import in_bfloat16, make_case

pytestmark = pytest.mark.slow  # like all tests of these kernels

run = functools.partial(mlstm_cases.run, backends.tpu())


def equations(jaxpr, times: int = 1):
    """Every equation of a program and how often it runs, nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner_times = times
        if eqn.primitive.name == "pallas_call":
            inner_times = times * math.prod(eqn.params["grid_mapping"].grid)
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, inner_times)


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products, counted from their shapes."""

    def operations(eqn):
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * depth * math.prod(eqn.outvars[0].aval.shape)

    products = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "dot_general"]
    return sum(times * operations(eqn) for eqn, times in products)


def num_exponentials(jaxpr) -> int:
    """Number of elements that are exponentiated."""
    exps = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "exp"]
    return sum(times * math.prod(eqn.outvars[0].aval.shape) for eqn, times in exps)


def traffic(call) -> int:
    """Bytes of all operands and results of a kernel, once each."""
    arrays = [v.aval for v in (*call.invars, *call.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def num_programs(call) -> int:
    """Number of programs in the grid of a kernel."""
    return math.prod(call.params["grid_mapping"].grid)


@pytest.mark.parametrize("state", ["given", "zero"])
@pytest.mark.parametrize(
    "chunk_size,K,V,dtype",
    [(128, 128, 256, "float32"), (256, 128, 256, "bfloat16"), (512, 128, 256, "float32")]
    + [(256, 64, 128, "float32"), (256, 64, 128, "bfloat16"), (128, 32, 128, "bfloat16")],
)
def test_cost_estimates_match_counted_operations(chunk_size, K, V, dtype, state):
    """Within 2 %: the estimates omit sums over one vector. Narrow heads share a tile of lanes."""
    case = mlstm_cases.STATES[state](make_case(B=2, T=1024, H=4, K=K, V=V))
    case = jax.tree.map(jnp.asarray, in_bfloat16(case, dtype))
    function = functools.partial(run, chunk_size=chunk_size)
    kernel_calls = calls(jax.grad(lambda c: function(c)[0].sum()), case, lanes=128)
    kernel_calls += calls(function, case, lanes=128)
    assert [call.params["name"][6:] for call in kernel_calls] == ["forward", "backward", "forward"]
    for call in kernel_calls:
        cost = call.params["cost_estimate"]
        body, times = call.params["jaxpr"], num_programs(call)
        assert cost.flops == pytest.approx(times * product_flops(body), rel=0.02)
        assert cost.transcendentals == times * num_exponentials(body)
        assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.02)


def test_one_step_costs_five_operations_per_element_of_the_matrix_memory():
    """f_scaled * C + key * v, and the sum of query * C."""
    K, V = 64, 256
    case = jax.tree.map(jnp.asarray, make_case(T=1, K=K, V=V))
    (call,) = calls(run, case, lanes=128)

    def uses_matrix_memory(eqn):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        return eqn.primitive.name in ("mul", "add", "reduce_sum") and (K, V) in shapes

    count = sum(times for e, times in equations(call.params["jaxpr"]) if uses_matrix_memory(e))
    cost = call.params["cost_estimate"]
    assert cost.flops == num_programs(call) * count * K * V
    assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.07)  # gates are omitted
