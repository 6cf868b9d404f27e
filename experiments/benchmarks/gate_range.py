"""Errors of every implementation with one extreme gate in a sequence of ordinary ones.

    TRITON_INTERPRET=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python experiments/benchmarks/gate_range.py --out RESULT.json

Float32 is compared with the float64 recurrence. Kernels are interpreted, so no accelerator is
needed. Needs the test dependencies: calls are those of `tests/ops`.
"""

import contextlib
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import measure
from tests.ops import runs, tolerances
from tests.ops.subjects import Case, Subject, make_case
from xlstm_jax.sharding import get_rules, make_mesh, use_rules

LENGTH = 136
POSITIONS = (40, 90)  # of the extreme gates
SHARDED = "8 shards"
VALUES = (-np.inf, -1e30, -1e8, -1e5, -1e3, -30.0, 0.0, 30.0, 1e3, 1e30)
GATES = (("mlstm", "i"), ("mlstm", "f"), ("mlstm_exp", "f"), ("slstm", "i"), ("slstm", "f"))
MLSTM = ("recurrent", "parallel", "chunkwise", SHARDED, "pallas_tpu", "triton")
SLSTM = ("recurrent", "pallas_tpu", "triton")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Options of the gate range."""

    values: tuple[float, ...] = VALUES


def records(values: tuple[float, ...]) -> list[dict[str, Any]]:
    """One record per gate, value and implementation, with the errors of h, state and gradients."""
    result = []
    for (variant, gate), value in itertools.product(GATES, values):
        case = make_case(variant, LENGTH)
        inputs = case.inputs
        array = inputs[gate] if gate in inputs else inputs["x"][:, :, "if".index(gate)]
        array[:, POSITIONS] = value
        cotangents = runs.random_cotangents(variant, case)
        expected = runs.run_reference(variant, case, cotangents)
        for name in MLSTM if variant.startswith("mlstm") else SLSTM:
            key = {"op": variant, "gate": gate, "value": value, "implementation": name}
            result.append(key | errors(run(variant, name, case, cotangents), expected))
            print(*result[-1].values(), flush=True)
    return result


def errors(actual: runs.Result, expected: runs.Result) -> dict[str, float]:
    """Largest errors, each relative to the largest element of its array."""
    state = tolerances.with_common_scale(actual.state, expected.state).values()
    largest = max(np.abs(gradient).max() for gradient in expected.gradients.values())
    return {
        "h": relative(actual.h, expected.h),
        "state": max(relative(a, b) for a, b in state),
        "gradients": max(
            relative(actual.gradients[name], gradient, tolerances.FLOOR * largest)
            for name, gradient in expected.gradients.items()
        ),
    }


def run(variant: str, name: str, case: Case, cotangents: runs.Cotangents) -> runs.Result:
    """The call by one implementation, or by `chunkwise` on shards of the sequence."""
    if name != SHARDED:
        return runs.run(Subject(variant, name), case, cotangents)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_rules(get_rules("fsdp_seq")))
        stack.enter_context(jax.set_mesh(make_mesh(data=1, seq=8)))
        # Another chunk size, as programs are cached by options.
        return runs.run(Subject(variant, "chunkwise"), case, cotangents, chunk_size=16)


def relative(actual: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """The largest error relative to the largest expected element; inf if `actual` is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    scale = max(np.abs(expected).max(), floor)
    return float(np.abs(actual - expected).max() / scale) if scale else 0.0


def table(rows: list[dict[str, Any]]) -> str:
    """The largest error of h, state and gradients per gate and value, by implementation."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        error = max(row["h"], row["state"], row["gradients"])
        key = f"{row['op']}, {row['gate']}", f"{row['value']:g}"
        cells.setdefault(key, {})[row["implementation"]] = f"{error:.0e}"
    body = [[*key, *(errors.get(name, "") for name in MLSTM)] for key, errors in cells.items()]
    return measure.table(("op, gate", "value", *MLSTM), body)


def main(args: Arguments) -> int:
    """Prints a table, and writes all errors to `args.out`."""
    rows = records(args.values)
    print(table(rows))
    measure.write(args.out, measure.run_info("gate_range") | {"records": rows})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
