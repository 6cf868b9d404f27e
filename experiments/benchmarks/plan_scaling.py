"""How far does training scale, before anybody pays for it?

An answer: the train step of three models, compiled for 16 to 4,096 chips, with the bounds that
peaks of computing, memory and network set to its time, and what each chip sends. Beside it what the
formula of `xlstm_jax/plan/formula.py` says of the same, for what lies beyond.

    .venv-compile/bin/python experiments/benchmarks/plan_scaling.py --kinds v5p h100

Nothing is timed. One sequence of 8,192 tokens per chip, with full rematerialization.
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
"""TPUs, and GPUs, that share the state of a model, if there are as many; the others repeat it."""

COLUMNS = ("model", "hardware", "chips", "mesh", "GiB", "ms compute", "ms memory", "ms network")
COLUMNS += ("GiB sent", "by the formula", "M tokens/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    table: Literal["7b", "scaling"] = "scaling"
    models: tuple[str, ...] = tuple(FSDP)
    kinds: tuple[Literal["v5e", "v6e", "v5p", "h100"], ...] = ("v5p", "h100")
    seq_len: int = 8192
    shapes: tuple[str, ...] = ()  # of the chips; all of a kind if none is named


def runs(args: Arguments) -> Iterator[PlanWorkload]:
    """The workload of every line."""
    if args.table == "7b":
        yield from (dataclasses.replace(run, seq_len=args.seq_len) for run in PLANS_7B)
        return
    for kind in args.kinds:
        for topology in (f"{kind}:{shape}" for shape in args.shapes or TOPOLOGIES[kind]):
            count = find_target(topology).num_devices
            for model in args.models:
                fsdp = min(FSDP[model][kind == "h100"], count)
                sizes = dict(fsdp=fsdp, batch_size=count, seq_len=args.seq_len)
                yield PlanWorkload(preset=model, topology=topology, **sizes)


def config(run: PlanWorkload) -> ExperimentConfig:
    """A run of a preset with full rematerialization."""
    cfg = experiment_from_preset(run.preset)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, remat="full"),
        mesh=MeshConfig(fsdp=run.fsdp),
        data=dataclasses.replace(cfg.data, batch_size=run.batch_size, seq_len=run.seq_len),
    )


def row(run: PlanWorkload) -> dict[str, Any]:
    """A plan, and what the formula says of its collectives."""
    cfg, target = config(run), find_target(run.topology)
    found = plan(cfg, target)
    formula = estimate(cfg, target, found.mesh)
    return dataclasses.asdict(found) | {
        "model": run.preset,
        "fits": found.fits,
        "limit": found.limit,
        "step_seconds": found.step_seconds,
        "sent": sum(sent for _, sent in found.collectives.values()),
        "formula_sent": sum(formula.bytes_sent.values()),
        "formula_network_seconds": formula.network_seconds,
    }


def cells(found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    gib = 2**30
    limit = max(found["collectives"], key=lambda kind: found["collectives"][kind][1])
    return [
        found["model"],
        found["topology"],
        f"{found['num_chips']:,}",
        " x ".join(f"{name} {n}" for name, n in found["mesh"].items() if n > 1),
        f"{found['peak_bytes'] / gib:.1f} of {found['memory_bytes'] / gib:.0f}",
        *(f"{1e3 * found['seconds'][name]:,.0f}" for name in ("compute", "memory", "network")),
        f"{found['sent'] / gib:.1f}, most by {limit}",
        f"{found['formula_sent'] / gib:.1f} ({found['formula_sent'] / found['sent'] - 1:+.0%})",
        f"{found['tokens_per_step'] / found['step_seconds'] / 1e6:,.2f}",
    ]


def main(args: Arguments) -> int:
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for run in runs(args):
        rows.append(row(run))
        print(measure.table(COLUMNS, [cells(rows[-1])], with_header=len(rows) == 1), flush=True)
    worst = max(abs(math.log(found["formula_sent"] / found["sent"])) for found in rows)
    print(f"the formula is off by a factor of {math.exp(worst):.2f} at most")
    measure.write(args.out, {**measure.about("plan_scaling", ("jax", "libtpu")), "rows": rows})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
