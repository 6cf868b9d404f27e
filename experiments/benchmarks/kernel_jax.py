"""Times calls of our ops, and of attention in JAX, in a separate process; see `kernels.py`.

The only argument is a request in JSON; one line of JSON is printed per case.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.benchmarks import measure
from experiments.benchmarks.kernel_cases import ATTENTION_WIDTH, Case
from pallas_kernels.aot import resources
from xlstm_jax import cells, ops

Call = Callable[..., Any]


def arrays(case: Case, candidate: str) -> tuple[jax.Array, ...]:
    """Random inputs, distributed as those in a model: products of zeros would be faster."""
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    dtype = jnp.dtype(case.dtype)
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape, of: DTypeLike = dtype):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(of)

    if candidate == "attention":
        return tuple(normal(B, T, case.attention_heads, ATTENTION_WIDTH) for _ in range(3))
    if case.op == "slstm":
        r = normal(H, K, 4, K) / math.sqrt(K)
        return normal(B, T, 4, H, K), r.astype(dtype), normal(H, 4, K, of=jnp.float32)
    gates = normal(B, T, H), 3 + normal(B, T, H)
    return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), *gates


def function(case: Case, candidate: str) -> Call:
    """The function under test: arrays to h; for decoding, arrays and a state to (h, state)."""
    if candidate == "attention":
        backend = "cudnn" if jax.default_backend() == "gpu" and case.dtype != "float32" else None
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=backend
        )
    op = ops.slstm if case.op == "slstm" else ops.mlstm
    if case.part == "decode":
        return lambda *args: op(*args, implementation=candidate)
    return lambda *args: op(*args, implementation=candidate)[0]


def inputs(case: Case, candidate: str) -> tuple[Any, ...]:
    """Arguments of `timed_function`: first the cotangent of h or the decode states, if any."""
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


def timed_function(case: Case, candidate: str) -> Call:
    """The function of `inputs` that is compiled and timed."""
    fn = function(case, candidate)

    def gradient(cotangent, *args):
        h, pullback = jax.vjp(fn, *args)
        return h, pullback(cotangent)

    def steps(states, *args):
        updated = []
        for state in states:
            h, state = fn(*args, state)
            updated.append(state)
            if case.op == "mlstm":  # each step depends on the one before, as layers do
                args = (*args[:2], h, *args[3:])
        return updated

    return {"forward": fn, "gradient": gradient, "decode": steps}[case.part]


def compile_case(case: Case, candidate: str, fn: Call | None = None) -> jax.stages.Compiled:
    """Compiles the timed function of a case, or `fn` instead, from shapes."""
    shapes = jax.eval_shape(lambda: inputs(case, candidate))
    donate = 0 if case.part == "decode" else ()  # new states overwrite the old ones
    jitted = jax.jit(fn or timed_function(case, candidate), donate_argnums=donate)
    return jitted.lower(*shapes).compile()


def bind_inputs(case: Case, candidate: str, program: jax.stages.Compiled) -> Callable[[], Any]:
    """A call of `program` on random inputs; each decode call continues from the last states."""
    # Jitted, so that generating the random numbers needs no extra memory.
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


def measure_case(case: Case, candidate: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Times per call (per state, if several), peak memory, and tiles."""
    program = compile_case(case, candidate)
    call = bind_inputs(case, candidate, program)
    jax.block_until_ready(call())
    peak = _peak_bytes(program)  # before several calls are in flight
    times = [seconds / case.num_states for seconds in samples(call, **settings)]
    shapes = jax.eval_shape(lambda: inputs(case, candidate))
    launches = resources.launches(timed_function(case, candidate), *shapes)
    tiles = {
        launch.name: {k: v for k, v in (*launch.constants, *launch.options) if type(v) is int}
        for launch in launches
    }
    return {**measure.summary(times), **peak, "tiles": tiles}


def samples(run: Call, *, repeats: int, warmup: int, sample_seconds: float) -> list[float]:
    """Seconds per call, `repeats` samples; calls of `sample_seconds` are dispatched together."""

    def several(launches: int) -> Any:
        for _ in range(launches - 1):
            run()  # results are dropped: those of many calls may not fit in memory
        return run()

    (each,) = measure.seconds(lambda: several(warmup), 1)
    launches = min(1000, max(1, math.ceil(sample_seconds * warmup / each)))
    return [seconds / launches for seconds in measure.seconds(lambda: several(launches), repeats)]


def _peak_bytes(program: jax.stages.Compiled) -> dict[str, Any]:
    """Peak memory of this process so far, and the compiler's figure for the program.

    The first may include buffers of XLA's autotuning; a CPU has only the second.
    """
    analysis = program.memory_analysis()
    assert analysis is not None  # CPUs and GPUs report one
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes)
    planned = sum(sizes) + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    allocated = measure.peak_bytes()
    return {
        "peak_bytes": planned if allocated is None else allocated,
        "peak_from": "compiler" if allocated is None else "allocator",
        "planned_bytes": planned,
    }


def refusal(case: Case, candidate: str) -> str | None:
    """Why a candidate cannot run a case; None if it can be tried."""
    known = {"attention": None, **ops.implementations(case.op)}
    return known.get(candidate, f"{case.op} has no such implementation")


def main(request: dict[str, Any]) -> int:
    """Prints the measurement of every requested case, the reason it was skipped, or its error."""
    for fields in request["cases"]:
        case = Case(**fields)
        record: dict[str, Any] = {"device": jax.devices()[0].device_kind}
        try:
            reason = refusal(case, request["candidate"])
            skipped = {"skipped": reason} if reason else None
            record |= skipped or measure_case(case, request["candidate"], request["settings"])
        except Exception as error:  # such as out of memory: measure the other cases
            record["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
