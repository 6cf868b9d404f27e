"""Times calls of our ops, and of attention in JAX, in a process of its own; see `kernels.py`.

The one argument is JSON; every case is answered with a line of JSON.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from experiments.benchmarks.kernel_cases import ATTENTION_WIDTH, Case
from pallas_kernels.aot import resources
from xlstm_jax import cells, ops

Call = Callable[..., Any]


def arrays(case: Case, candidate: str) -> tuple[jax.Array, ...]:
    """Random inputs, as of a model's projections: products of zeros would be faster."""
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    dtype = jnp.dtype(case.dtype)
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape, of=dtype):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(of)

    if candidate == "attention":
        return tuple(normal(B, T, case.attention_heads, ATTENTION_WIDTH) for _ in range(3))
    if case.op == "slstm":
        r = normal(H, K, 4, K) / math.sqrt(K)
        return normal(B, T, 4, H, K), r.astype(dtype), normal(H, 4, K, of=jnp.float32)
    gates = normal(B, T, H), 3 + normal(B, T, H)
    return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), *gates


def function(case: Case, candidate: str) -> Call:
    """h of the arrays; with a state as well, h and the state after."""
    if candidate == "attention":
        how = "cudnn" if jax.default_backend() == "gpu" and case.dtype != "float32" else None
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=how
        )
    op = ops.slstm if case.op == "slstm" else ops.mlstm
    if case.part == "decode":
        return lambda *args: op(*args, implementation=candidate)
    return lambda *args: op(*args, implementation=candidate)[0]


def inputs(case: Case, candidate: str) -> tuple[Any, ...]:
    """The arguments of `timed`: arrays, behind the cotangent of h or the states of decoding."""
    args = arrays(case, candidate)
    if case.part == "gradient":
        like = jax.eval_shape(function(case, candidate), *args)
        return jax.random.normal(jax.random.key(1), like.shape).astype(like.dtype), *args
    if case.part == "decode":
        return [_state(case, number) for number in range(case.num_states)], *args
    return args


def _state(case: Case, number: int) -> Any:
    first, second = jax.random.split(jax.random.key(2 + number))
    B, H, K, V = case.B, case.H, case.K, case.V
    if case.op == "slstm":
        c, n, h = jax.random.normal(first, (3, B, H, K))
        return cells.SLSTMState(c, 1 + jnp.abs(n), h, jnp.zeros((B, H, K)))
    C, n = jax.random.normal(first, (B, H, K, V)), jax.random.normal(second, (B, H, K))
    return cells.MLSTMState(C, n, jnp.zeros((B, H)))


def timed(case: Case, candidate: str) -> Call:
    """What is compiled and timed, a function of `inputs`."""
    fn = function(case, candidate)

    def gradient(cotangent, *args):
        h, pull = jax.vjp(fn, *args)
        return h, pull(cotangent)

    def steps(states, *args):
        found = []
        for state in states:
            h, state = fn(*args, state)
            found.append(state)
            if case.op == "mlstm":  # each takes what the one before gives, as layers do
                args = (*args[:2], h, *args[3:])
        return found

    return {"forward": fn, "gradient": gradient, "decode": steps}[case.part]


def compiled(case: Case, candidate: str, fn: Call | None = None) -> jax.stages.Compiled:
    """The timed function of a case, or `fn` in its place, compiled from shapes alone."""
    shapes = jax.eval_shape(lambda: inputs(case, candidate))
    donate = 0 if case.part == "decode" else ()
    return jax.jit(fn or timed(case, candidate), donate_argnums=donate).lower(*shapes).compile()


def repeatable(case: Case, candidate: str, program: jax.stages.Compiled) -> Callable[[], Any]:
    """A call of the compiled function on random inputs; decoding continues from its last states."""
    # Compiled, so that random numbers take no more memory than the arrays.
    args = jax.jit(lambda: inputs(case, candidate))()
    if case.part != "decode":
        return lambda: program(*args)
    states, *rest = args
    del args

    def decode():
        nonlocal states
        states = program(states, *rest)
        return states

    return decode


def measured(case: Case, candidate: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Times of one call (of one state, where there are several), memory, and tiles."""
    program = compiled(case, candidate)
    call = repeatable(case, candidate, program)
    jax.block_until_ready(call())
    peak = _peak_bytes(program)  # before several calls are under way together
    times = [seconds / case.num_states for seconds in samples(call, **settings)]
    shapes = jax.eval_shape(lambda: inputs(case, candidate))
    launches = resources.launches(timed(case, candidate), *shapes)
    tiles = {
        launch.name: {k: v for k, v in (*launch.constants, *launch.options) if type(v) is int}
        for launch in launches
    }
    return {**measure.summary(times), **peak, "tiles": tiles}


def samples(run: Call, *, repeats: int, warmup: int, sample_seconds: float) -> list[float]:
    """Seconds of one call, `repeats` times: as many are dispatched at once as take a while."""

    def several(launches: int) -> Any:
        for _ in range(launches - 1):
            run()  # nothing is kept: results of many calls may not fit the memory
        return run()

    (each,) = measure.seconds(lambda: several(warmup), 1)
    launches = min(1000, max(1, math.ceil(sample_seconds * warmup / each)))
    return [seconds / launches for seconds in measure.seconds(lambda: several(launches), repeats)]


def _peak_bytes(program: jax.stages.Compiled) -> dict[str, Any]:
    """The most memory in use so far in this process, and what the compiler says of the program.

    The first may hold what XLA tries its own products with; the second is all there is on a CPU.
    """
    analysis = program.memory_analysis()
    assert analysis is not None  # on CPUs and GPUs there is one
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes)
    planned = sum(sizes) + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    allocated = measure.peak_bytes()
    return {
        "peak_bytes": planned if allocated is None else allocated,
        "peak_from": "compiler" if allocated is None else "allocator",
        "planned_bytes": planned,
    }


def refusal(case: Case, candidate: str) -> str | None:
    """Why a candidate has no answer to a case, before it is tried."""
    known = {"attention": None, **ops.implementations(case.op)}
    return known.get(candidate, f"{case.op} has no such implementation")


def main(request: dict[str, Any]) -> int:
    for fields in request["cases"]:
        case = Case(**fields)
        answer: dict[str, Any] = {"device": jax.devices()[0].device_kind}
        try:
            reason = refusal(case, request["candidate"])
            found = {"skipped": reason} if reason else None
            answer |= found or measured(case, request["candidate"], request["settings"])
        except Exception as error:  # too large for the device, say: other cases go on
            answer["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
