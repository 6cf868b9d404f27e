"""The Pallas kernels that a function calls."""

import jax
from jax.extend.core import jaxprs_in_params

from pallas_kernels import common


def calls(function, *arguments, lanes: int = 8) -> list:
    """Every `pallas_call` equation of `function` whose results are used, nested ones included."""

    def calls_of(jaxpr):
        used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        for eqn in jaxpr.eqns:
            if eqn.primitive.name != "pallas_call":
                for inner in jaxprs_in_params(eqn.params):
                    yield from calls_of(inner)
            elif used & {id(v) for v in eqn.outvars}:
                yield eqn

    with common.interpreted(lanes=lanes):
        return list(calls_of(jax.make_jaxpr(function)(*arguments).jaxpr))
