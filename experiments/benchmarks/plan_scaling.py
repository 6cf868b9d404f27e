"""Compiles train steps ahead of time for 16 to 4,096 chips.

For each model and target, reports peak memory, lower bounds on the step time from the peak rates of
compute, memory and network, and the bytes that each chip sends, compared with the estimate of
`xlstm_jax/plan/formula.py`. Nothing is timed.

    .venv-compile/bin/python experiments/benchmarks/plan_scaling.py --kinds v5p h100

Each chip has one sequence of `--seq-len` tokens; all blocks are rematerialized. `--table 7b`
compiles the targets and batches of `tests.workloads.PLANS_7B` instead.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax

from experiments.benchmarks import measure
from tests.workloads import PLANS_7B, PlanWorkload
from xlstm_jax.cli.options import experiment_from_preset
from xlstm_jax.plan import find_target, plan
from xlstm_jax.plan.formula import estimate
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import ExperimentConfig

TOPOLOGIES = {
    "v5e": ("4x4", "8x8", "16x16"),
    "v6e": ("4x4", "8x8", "16x16"),
    "v5p": ("2x2x4", "4x4x4", "8x8x4", "8x8x16", "16x16x16"),
    "h100": ("2x8", "8x8", "32x8", "128x8", "512x8"),
}

FSDP = {"scaling_1.4b": (16, 8), "xlstm_7b": (16, 8), "xlstm_70b": (64, 64)}
"""Size of the `fsdp` mesh axis on TPUs and on GPUs, at most all devices of the target."""

COLUMNS = ("model", "hardware", "chips", "mesh", "GiB", "ms compute", "ms memory", "ms network")
COLUMNS += ("GiB sent", "formula", "M tokens/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Options; `models`, `kinds` and `shapes` apply to the table `scaling` only."""

    table: Literal["7b", "scaling"] = "scaling"
    models: tuple[str, ...] = tuple(FSDP)
    kinds: tuple[Literal["v5e", "v6e", "v5p", "h100"], ...] = ("v5p", "h100")
    seq_len: int = 8192
    shapes: tuple[str, ...] = ()  # topologies such as 8x8; empty: all of each kind


def planned_workloads(args: Arguments) -> Iterator[PlanWorkload]:
    """The workloads of the selected table."""
    if args.table == "7b":
        yield from (dataclasses.replace(workload, seq_len=args.seq_len) for workload in PLANS_7B)
        return
    for kind in args.kinds:
        for topology in (f"{kind}:{shape}" for shape in args.shapes or TOPOLOGIES[kind]):
            count = find_target(topology).num_devices
            for model in args.models:
                fsdp = min(FSDP[model][kind == "h100"], count)
                sizes = dict(fsdp=fsdp, batch_size=count, seq_len=args.seq_len)
                yield PlanWorkload(preset=model, topology=topology, **sizes)


def config(workload: PlanWorkload) -> ExperimentConfig:
    """The config of a workload, with full rematerialization."""
    cfg = experiment_from_preset(workload.preset)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, remat="full"),
        mesh=MeshConfig(fsdp=workload.fsdp),
        data=dataclasses.replace(
            cfg.data, batch_size=workload.batch_size, seq_len=workload.seq_len
        ),
    )


def make_record(workload: PlanWorkload) -> dict[str, Any]:
    """The compiled plan of a workload, and the formula's estimate of its communication."""
    cfg, target = config(workload), find_target(workload.topology)
    compiled = plan(cfg, target)
    formula = estimate(cfg, target, compiled.mesh)
    return dataclasses.asdict(compiled) | {
        "model": workload.preset,
        "fits": compiled.fits,
        "limit": compiled.limit,
        "step_seconds": compiled.step_seconds,
        "sent": sum(sent for _, sent in compiled.collectives.values()),
        "formula_sent": sum(formula.bytes_sent.values()),
        "formula_network_seconds": formula.network_seconds,
    }


def cells(record: dict[str, Any]) -> list[str]:
    """The cells of a record, in the order of `COLUMNS`."""
    gib = 2**30
    largest = max(record["collectives"], key=lambda kind: record["collectives"][kind][1])
    return [
        record["model"],
        record["topology"],
        f"{record['num_chips']:,}",
        " x ".join(f"{name} {n}" for name, n in record["mesh"].items() if n > 1),
        f"{record['peak_bytes'] / gib:.1f} of {record['memory_bytes'] / gib:.0f}",
        *(f"{1e3 * record['seconds'][name]:,.0f}" for name in ("compute", "memory", "network")),
        f"{record['sent'] / gib:.1f}, mostly {largest}",
        f"{record['formula_sent'] / gib:.1f} ({record['formula_sent'] / record['sent'] - 1:+.0%})",
        f"{record['tokens_per_step'] / record['step_seconds'] / 1e6:,.2f}",
    ]


def main(args: Arguments) -> int:
    """Plans all workloads, prints a table and writes the result."""
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    records = []
    for workload in planned_workloads(args):
        records.append(make_record(workload))
        with_header = len(records) == 1
        print(measure.table(COLUMNS, [cells(records[-1])], with_header=with_header), flush=True)
    worst = max(abs(math.log(record["formula_sent"] / record["sent"])) for record in records)
    print(f"the formula is within a factor of {math.exp(worst):.2f} of the bytes sent")
    info = measure.run_info("plan_scaling", ("jax", "libtpu"))
    measure.write(args.out, {**info, "records": records})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
