"""What the mLSTM's TPU kernels tell XLA that they cost, counted in their programs."""

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

# Beside the kernels whose costs they are.
pytestmark = pytest.mark.slow

run = functools.partial(mlstm_cases.run, backends.tpu())


def equations(jaxpr, times: int = 1):
    """Every equation of a program with how often it runs, also inside of what it calls."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inside = times
        if eqn.primitive.name == "pallas_call":
            inside = times * math.prod(eqn.params["grid_mapping"].grid)
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, inside)


def products(jaxpr) -> int:
    """Operations of all matrix products, counted from their shapes."""

    def operations(eqn):
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * depth * math.prod(eqn.outvars[0].aval.shape)

    found = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "dot_general"]
    return sum(times * operations(eqn) for eqn, times in found)


def exponentials(jaxpr) -> int:
    found = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "exp"]
    return sum(times * math.prod(eqn.outvars[0].aval.shape) for eqn, times in found)


def traffic(call) -> int:
    """Bytes of everything that a kernel reads and writes, once each."""
    arrays = [v.aval for v in (*call.invars, *call.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def grid_of(call) -> int:
    return math.prod(call.params["grid_mapping"].grid)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [128, 256, 512])
def test_costs_are_those_of_the_products_exponentials_and_arrays(chunk_size, dtype):
    """Within 2 %: sums over single rows are left out."""
    case = in_bfloat16(make_case(B=2, T=1024, K=128, V=256), dtype)
    case = jax.tree.map(jnp.asarray, case)
    function = functools.partial(run, chunk_size=chunk_size)
    found = calls(jax.grad(lambda c: function(c)[0].sum()), case, lanes=128)
    found += calls(function, case, lanes=128)
    assert [call.params["name"][6:] for call in found] == ["forward", "backward", "forward"]
    for call in found:
        cost = call.params["cost_estimate"]
        body, times = call.params["jaxpr"], grid_of(call)
        assert cost.flops == pytest.approx(times * products(body), rel=0.02)
        assert cost.transcendentals == times * exponentials(body)
        assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.02)


def test_the_cost_of_one_step_is_five_operations_per_element_of_the_memory():
    """kept * C + key * v, and the sum of query * C."""
    K, V = 64, 256
    case = jax.tree.map(jnp.asarray, make_case(T=1, K=K, V=V))
    (call,) = calls(run, case, lanes=128)

    def touches_the_memory(eqn):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        return eqn.primitive.name in ("mul", "add", "reduce_sum") and (K, V) in shapes

    count = sum(times for e, times in equations(call.params["jaxpr"]) if touches_the_memory(e))
    cost = call.params["cost_estimate"]
    assert cost.flops == grid_of(call) * count * K * V
    assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.07)  # factors are left out
