"""What does a mesh of one device cost, beside the same train step without any?

An answer: less than 2 %. Nothing is sharded then, and constraints and `shard_map` are left out.

    python experiments/benchmarks/mesh.py --out RESULT.json

The two take turns, a few steps each, so that a busy moment of the machine hits both; use a machine
that does nothing else.
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
    repeats: int = 60  # timed steps of each side
    rules: str = "fsdp"  # of the mesh


def compare(workload: ModelWorkload, args: Arguments) -> dict[str, Any]:
    """Both sides of a workload, and by how much the mesh takes longer."""
    steps = {
        "plain": cases.plain_step(workload),
        "mesh": cases.compiled_step(workload, args.rules),
    }
    for advance, _ in steps.values():
        measure.seconds(advance, 3)
    product = measure.matrix_product(measure.MATRIX_SIZE)
    calls = {name: advance for name, (advance, _) in steps.items()} | {"product": product}
    sides = {name: functools.partial(measure.seconds, call) for name, call in calls.items()}
    times = measure.in_turns(sides, args.repeats)
    found = {name: measure.summary(times[name]) for name in steps}
    overhead = found["mesh"]["median_seconds"] / found["plain"]["median_seconds"] - 1
    return {
        **found,
        "temporary_bytes": {name: measure.temporary_bytes(p) for name, (_, p) in steps.items()},
        "matrix_product_flops_per_second": measure.product_rate(times["product"]),
        "overhead": overhead,
    }


def main(args: Arguments) -> int:
    cpu.prepare()
    result = {**measure.about("mesh"), "rules": args.rules}
    for name, workload in workloads.MODELS.items():
        found = result[name] = compare(workload, args)
        plain, mesh = (1e3 * found[side]["median_seconds"] for side in ("plain", "mesh"))
        print(
            f"{name}: {plain:.1f} ms without a mesh, {mesh:.1f} ms on a mesh of one device, "
            f"{found['overhead']:+.1%}"
        )
    measure.write(args.out, result)
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
