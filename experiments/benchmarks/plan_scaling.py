"""How far does training scale, before anybody pays for it?

An answer: the real step of three models, compiled for 16 to 4,096 chips, with the bounds that peaks
of computing, memory and network set to its time, and what each chip sends. Beside it what the
formula of `xlstm_jax/plan/formula.py` says of the same, for what lies beyond.

    .venv-compile/bin/python experiments/benchmarks/plan_scaling.py --kinds v5p h100

Nothing is timed. A row of 8,192 tokens per chip, everything within a block computed again.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal

import jax
import tyro

from pallas_kernels.hardware import Gpu
from xlstm_jax.cli.options import with_preset
from xlstm_jax.plan import Target, find_target, plan
from xlstm_jax.plan.formula import estimate
from xlstm_jax.sharding import MeshConfig
from xlstm_jax.train import ExperimentConfig

TOPOLOGIES = {
    "v5e": ("4x4", "8x8", "16x16"),
    "v6e": ("4x4", "8x8", "16x16"),
    "v5p": ("2x2x4", "4x4x4", "8x8x4", "8x8x16", "16x16x16"),
    "h100": ("2x8", "8x8", "32x8", "128x8", "512x8"),
}

FSDP = {
    "scaling_1.4b": {"tpu": 16, "gpu": 8},
    "xlstm_7b": {"tpu": 16, "gpu": 8},
    "xlstm_70b": {"tpu": 64, "gpu": 64},
}
"""Chips that share the state of a model, as far as there are as many; the others repeat it."""

RUNS_7B = {
    "v5e:16x16": (64, 256),
    "v6e:16x16": (16, 256),
    "v5p:8x8x4": (16, 256),
    "v5p:16x16x16": (16, 4096),
    "h100:1x8": (8, 8),
    "h100:32x8": (8, 512),
}
"""Hardware -> fsdp and rows of the 7B model; the last as in arXiv:2503.13427."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    table: Literal["7b", "scaling"] = "scaling"
    models: tuple[str, ...] = tuple(FSDP)
    kinds: tuple[str, ...] = ("v5p", "h100")
    seq_len: int = 8192
    shapes: tuple[str, ...] = ()  # of the chips; all of a kind if none is named
    out: pathlib.Path | None = None


def config(model: str, fsdp: int, rows: int, seq_len: int) -> ExperimentConfig:
    """A run of a preset; what is within a block is computed again."""
    cfg = with_preset(model)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, remat="full"),
        mesh=MeshConfig(fsdp=fsdp),
        data=dataclasses.replace(cfg.data, batch_size=rows, seq_len=seq_len),
    )


def runs(args: Arguments) -> Iterator[tuple[str, Target, int, int]]:
    """Model, hardware, fsdp and rows of every line."""
    if args.table == "7b":
        for topology, (fsdp, rows) in RUNS_7B.items():
            yield "xlstm_7b", find_target(topology), fsdp, rows
        return
    for kind in args.kinds:
        for shape in args.shapes or TOPOLOGIES[kind]:
            target = find_target(f"{kind}:{shape}")
            of = "gpu" if isinstance(target.chip, Gpu) else "tpu"
            for model in args.models:
                fsdp = min(FSDP[model][of], target.num_devices)
                yield model, target, fsdp, target.num_devices


def row(model: str, target: Target, fsdp: int, rows: int, seq_len: int) -> dict[str, Any]:
    """A plan, and what the formula says of its exchanges."""
    cfg = config(model, fsdp, rows, seq_len)
    found = plan(cfg, target)
    formula = estimate(cfg, target, found.mesh)
    return dataclasses.asdict(found) | {
        "model": model,
        "fits": found.fits,
        "limit": found.limit,
        "step_seconds": found.step_seconds,
        "sent": sum(sent for _, sent in found.collectives.values()),
        "formula_sent": sum(formula.sent.values()),
        "formula_network_seconds": formula.network_seconds,
    }


def line(found: dict[str, Any]) -> str:
    """A row of a table in Markdown."""
    mesh = " x ".join(f"{name} {n}" for name, n in found["mesh"].items() if n > 1)
    bounds = [f"{1e3 * found['seconds'][name]:,.0f}" for name in ("compute", "memory", "network")]
    gib = 2**30
    limit = max(found["collectives"], key=lambda kind: found["collectives"][kind][1])
    cells = [
        found["model"],
        found["topology"],
        f"{found['num_chips']:,}",
        mesh,
        f"{found['held_bytes'] / gib:.1f} of {found['memory_bytes'] / gib:.0f}",
        *bounds,
        f"{found['sent'] / gib:.1f}, most by {limit}",
        f"{found['formula_sent'] / gib:.1f} ({found['formula_sent'] / found['sent'] - 1:+.0%})",
        f"{found['tokens_per_step'] / found['step_seconds'] / 1e6:,.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(args: Arguments) -> int:
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for model, target, fsdp, num_rows in runs(args):
        rows.append(row(model, target, fsdp, num_rows, args.seq_len))
        print(line(rows[-1]), flush=True)
    worst = max(abs(math.log(r["formula_sent"] / r["sent"])) for r in rows)
    print(f"the formula is off by a factor of {math.exp(worst):.2f} at most")
    if args.out is not None:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        result = {"date": f"{datetime.date.today()}", "versions": versions, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
