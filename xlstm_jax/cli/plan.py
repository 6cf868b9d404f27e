"""`xlstm-jax plan CONFIG.py --topology v5e:16x16`: a run compiled for hardware that is not here."""

import dataclasses
import json
import math
from pathlib import Path

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.plan import Plan, find_target, plan

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(options.WithConfig):
    """Compiles the real train step for hardware that is not here; runs nothing.

    Memory and exchanges are the compiled program's. Times are bounds by the peaks of data sheets:
    no step is faster than the largest of them.
    """

    topology: str = "v5e:4x4"  # or v5p:8x8x4; GPUs as hosts x GPUs: h100:32x8
    out: Path | None = None  # all figures as JSON


def run(args: list[str]) -> int:
    """Returns 0, whether the run fits or not.

    Raises:
        ConfigError: the config cannot be used, or its mesh or batch does not fit the hardware.
    """
    # Nothing is computed, and a compiler that is installed would be looked for as a device.
    jax.config.update("jax_platforms", "cpu")
    chosen = options.parse_with_config("plan", PlanRun, args, presets_too=True)
    found = plan(chosen.experiment, find_target(chosen.topology))
    console.facts(rows(found))
    if chosen.out is not None:
        figures = dataclasses.asdict(found) | {"fits": found.fits, "limit": found.limit}
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return DONE


def rows(found: Plan) -> dict[str, str]:
    """A plan for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
    each = found.flops / math.prod(found.mesh.values())
    rows = {
        "hardware": f"{found.topology}, {found.num_chips:,} chips",
        "mesh": f"{mesh or 'one device'} under {found.rules}",
        "parameters": f"{found.num_params:,}",
        "tokens per step": f"{found.tokens_per_step:,}",
        "FLOPs per step": f"{found.flops:.4g}, {each:.4g} a device",
        "memory a device": _memory(found),
    }
    for kind, (times, sent) in sorted(found.collectives.items()):
        rows[kind] = f"{times:,} a step, {sent / GIB:.3f} GiB sent by a device"
    for name, seconds in found.seconds.items():
        rows[f"{name} bound"] = f"{1e3 * seconds:,.1f} ms"
    rate = found.tokens_per_step / found.step_seconds
    share = found.seconds["compute"] / found.step_seconds
    rows["step"] = (
        f"at least {1e3 * found.step_seconds:,.1f} ms, limited by {found.limit}: at most "
        f"{rate:,.0f} tokens/s, {share:.0%} of the peak"
    )
    rows["compiled in"] = f"{found.compile_seconds:.0f} s"
    return rows


def _memory(found: Plan) -> str:
    parts = {
        "parameters": found.params_bytes,
        "optimiser": found.optimizer_bytes,
        "temporaries with activations": found.temporary_bytes,
    }
    words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    verdict = "fits" if found.fits else "does not fit"
    there = f"{found.held_bytes / GIB:.2f} of {found.memory_bytes / GIB:.2f} GiB"
    return f"{there}, {verdict} ({words})"
