"""Errors of every implementation with extreme gates in a sequence of ordinary ones.

    TRITON_INTERPRET=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python experiments/benchmarks/gate_range.py --out RESULT.json

Float32 is compared with the float64 recurrence. Kernels are interpreted: no accelerator is needed.
"""

import contextlib
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure
from pallas_kernels import common
from xlstm_jax import cells, ops
from xlstm_jax.sharding import get_rules, make_mesh, use_rules

B, T, H, K, V = 1, 136, 2, 8, 12
POSITIONS = (40, 90)  # of the extreme gates
VALUES = (-np.inf, -1e30, -1e8, -1e5, -1e3, -30.0, 0.0, 30.0, 1e3, 1e30)
ACTIVATIONS = (("i", "sigmoid"), ("f", "sigmoid"), ("f", "exp"))  # extreme gate, forget gate
REFERENCE, SHARDED = "reference", "8 shards"
SLSTM = ("recurrent", "pallas_tpu", "triton")
MLSTM = ("recurrent", "parallel", "chunkwise", SHARDED, "pallas_tpu", "triton")


def inputs_of(op: str, gate: str, value: float) -> dict[str, np.ndarray]:
    """Standard normal inputs, with this value of the gate at `POSITIONS`."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    if op == "slstm":
        x = normal(B, T, 4, H, K)
        x[:, POSITIONS, "if".index(gate)] = value
        return {"x": x, "r": 0.2 * normal(H, K, 4, K)}
    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    inputs |= {"i": normal(B, T, H), "f": normal(B, T, H)}
    inputs[gate][:, POSITIONS] = value
    return inputs


@functools.cache
def program(op: str, forget_gate: str, name: str):
    """A function from inputs to h, the final state, and the gradients of a projection of h."""
    options: dict[str, Any] = {"forget_gate": forget_gate}
    function = getattr(cells, f"{op}_scan") if name == REFERENCE else getattr(ops, op)
    if name != REFERENCE:
        options["implementation"] = "chunkwise" if name == SHARDED else name
    weights = np.random.default_rng(1).standard_normal((B, T, H, 1)).astype(np.float32)

    def loss(inputs):
        h, state = function(**inputs, **options)
        return jnp.sum(h * weights), (h, state)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call(inputs):
        with contextlib.ExitStack() as stack:
            stack.enter_context(common.interpreted(lanes=8))
            stack.enter_context(jax.enable_x64(name == REFERENCE))
            if name == SHARDED:
                stack.enter_context(use_rules(get_rules("fsdp_seq")))
                stack.enter_context(jax.set_mesh(make_mesh(data=1, seq=8)))
            dtype = "float64" if name == REFERENCE else "float32"
            (_, outputs), gradients = compiled({n: x.astype(dtype) for n, x in inputs.items()})
            return jax.tree.map(lambda x: np.asarray(x, np.float64), (*outputs, gradients))

    return call


def errors(actual, expected) -> dict[str, float]:
    """Largest errors of h, state and gradients, relative to the largest expected element."""
    (h, state, gradients), (h_64, state_64, gradients_64) = actual, expected
    largest = max(np.abs(gradient).max() for gradient in gradients_64.values())
    # In units of exp(m) of the reference: equivalent states may have different m.
    scale = np.exp(np.clip(state.m - state_64.m, -80, 80))
    names = set(state._fields) - {"h", "m"}
    unscaled = {n: (getattr(state, n).T * scale.T).T for n in names}
    return {
        "h": relative(h, h_64),
        "state": max(relative(x, getattr(state_64, n)) for n, x in unscaled.items()),
        "gradients": max(relative(gradients[n], g, largest) for n, g in gradients_64.items()),
    }


def relative(actual: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """The largest error; inf if a value is not finite."""
    scale = np.abs(expected).max() if scale is None else scale
    return float(np.abs(actual - expected).max() / scale) if np.isfinite(actual).all() else np.inf


def main(args: measure.Arguments) -> int:
    """Prints the largest of the three errors; writes all to `args.out`."""
    records, lines = [], []
    for op, (gate, forget), value in itertools.product(("mlstm", "slstm"), ACTIVATIONS, VALUES):
        inputs = inputs_of(op, gate, value)
        expected = program(op, forget, REFERENCE)(inputs)
        key = {"op": op, "gate": gate, "forget_gate": forget, "value": f"{value:g}"}
        by_name = {}
        for name in MLSTM if op == "mlstm" else SLSTM:
            by_name[name] = errors(program(op, forget, name)(inputs), expected)
            records.append(key | {"implementation": name} | by_name[name])
        cells = (f"{max(by_name[n].values()):.0e}" if n in by_name else "" for n in MLSTM)
        lines.append([*key.values(), *cells])
    print(measure.table(("op", "gate", "forget gate", "value", *MLSTM), lines))
    measure.write(args.out, measure.run_info("gate_range") | {"records": records})
    return 0


if __name__ == "__main__":
    measure.run(main, measure.Arguments, __doc__)
