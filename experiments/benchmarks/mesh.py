"""Measures the overhead of a mesh of one device over the same train step without a mesh.

Target: less than 2 %. Nothing is sharded, so sharding constraints and `shard_map` are skipped.

    python experiments/benchmarks/mesh.py --out RESULT.json

Steps of both alternate, a few at a time, so that other load affects both alike; use an otherwise
idle machine.
"""

import dataclasses
import functools
from typing import Any

from experiments.benchmarks import cases, measure
from tests import workloads
from tests.workloads import ModelWorkload
from xlstm_jax import cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """Options of the mesh benchmark."""

    repeats: int = 60  # timed steps with and without a mesh, each
    rules: str = "fsdp"  # of the mesh


def compare(workload: ModelWorkload, args: Arguments) -> dict[str, Any]:
    """Statistics of a workload without and with a mesh, and the overhead of the mesh."""
    steps = {
        "plain": cases.plain_step(workload),
        "mesh": cases.compiled_step(workload, args.rules),
    }
    for advance, _ in steps.values():
        measure.seconds(advance, 3)
    product = measure.matrix_product(measure.MATRIX_SIZE)
    calls = {name: advance for name, (advance, _) in steps.items()} | {"product": product}
    timers = {name: functools.partial(measure.seconds, call) for name, call in calls.items()}
    times = measure.interleaved(timers, args.repeats)
    summaries = {name: measure.summary(times[name]) for name in steps}
    overhead = summaries["mesh"]["median_seconds"] / summaries["plain"]["median_seconds"] - 1
    return {
        **summaries,
        "temporary_bytes": {name: measure.temporary_bytes(p) for name, (_, p) in steps.items()},
        "matrix_product_flops_per_second": measure.product_rate(times["product"]),
        "overhead": overhead,
    }


def main(args: Arguments) -> int:
    """Compares all model workloads and writes one result."""
    cpu.prepare()
    result = {**measure.run_info("mesh"), "rules": args.rules}
    for name, workload in workloads.MODELS.items():
        record = result[name] = compare(workload, args)
        plain, mesh = (1e3 * record[kind]["median_seconds"] for kind in ("plain", "mesh"))
        print(
            f"{name}: {plain:.1f} ms without a mesh, {mesh:.1f} ms on a mesh of one device, "
            f"{record['overhead']:+.1%}"
        )
    measure.write(args.out, result)
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
