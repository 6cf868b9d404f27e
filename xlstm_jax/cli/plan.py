"""`xlstm-jax plan CONFIG.py --topology v5e:16x16`: a run compiled for a target, ahead of time."""

import dataclasses
import json
import math
from pathlib import Path

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.plan import Plan, find_target, fit, plan
from xlstm_jax.plan.search import Candidate

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(options.WithConfig):
    """Compiles the training program of a run for a target that is not attached; runs nothing.

    Memory and collectives are the compiled program's. Times are bounds by the peaks of data sheets:
    no step is faster than the largest of them.
    """

    topology: str = "v5e:4x4"  # or v5p:8x8x4; GPUs as hosts x GPUs: h100:32x8
    slices: int = 1  # so many such TPUs, joined by a slower network
    fit: bool = False  # search mesh, rematerialisation and batch size for the fastest that fits
    out: Path | None = None  # all figures as JSON


def run(args: list[str]) -> int:
    """Returns 0, whether the run fits or not.

    Raises:
        ConfigError: the config cannot be used, its mesh or batch does not fit the hardware, or
            `out` has no folder.
    """
    # Nothing is computed, and a compiler that is installed would be looked for as a device.
    jax.config.update("jax_platforms", "cpu")
    chosen = options.parse_with_config("plan", PlanRun, args, presets_too=True)
    if chosen.out is not None and not chosen.out.parent.is_dir():
        raise ConfigError(
            f"out={str(chosen.out)!r} must lie in a folder that is there; make "
            f"{str(chosen.out.parent)!r} or name another."
        )
    target = find_target(chosen.topology, chosen.slices)
    if chosen.fit:
        best, found = fit(chosen.experiment, target, tell=_tell)
        console.facts(rows(found) | {"flags": _flags(best)})
    else:
        found = plan(chosen.experiment, target)
        console.facts(rows(found))
    if chosen.out is not None:
        figures = dataclasses.asdict(found) | {"fits": found.fits, "limit": found.limit}
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return DONE


def _tell(candidate: Candidate, found: Plan) -> None:
    """A line for everything that the search compiles."""
    verdict = "fits" if found.fits else "does not fit"
    needs = f"{found.held_bytes / GIB:.1f} of {found.memory_bytes / GIB:.1f} GiB"
    console.say(f"{_flags(candidate)}: {needs}, {verdict}\n")


def _flags(candidate: Candidate) -> str:
    cfg = candidate.cfg
    axes = [f"--mesh.{name} {n}" for name, n in candidate.sizes.items() if n > 1 or name == "data"]
    batch = f"--data.batch-size {cfg.data.batch_size}"
    return " ".join([*axes, f"--model.remat {cfg.model.remat}", batch])


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
        count = "" if found.refusal else f"{times:,} a step, "
        rows[kind] = f"{count}{sent / GIB:.3f} GiB sent by a device"
    for name, seconds in found.seconds.items():
        rows[f"{name} bound"] = f"{1e3 * seconds:,.1f} ms"
    rate = found.tokens_per_step / found.step_seconds
    share = found.seconds["compute"] / found.step_seconds
    rows["step"] = (
        f"at least {1e3 * found.step_seconds:,.1f} ms, limited by {found.limit}: at most "
        f"{rate:,.0f} tokens/s, {share:.0%} of the peak"
    )
    rows["compiled in"] = f"{found.compile_seconds:.0f} s"
    if found.refusal:
        rows["compiled in"] = f"not compiled, all of it by formula: {found.refusal}"
    return rows


def _memory(found: Plan) -> str:
    parts = {
        "parameters": found.params_bytes,
        "optimiser": found.optimizer_bytes,
        "activations": found.activations_bytes,
        "temporaries": found.temporary_bytes,
    }
    words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    verdict = "fits" if found.fits else "does not fit"
    there = f"{found.held_bytes / GIB:.2f} of {found.memory_bytes / GIB:.2f} GiB"
    least = "at least " if found.refusal else ""
    return f"{least}{there}, {verdict} ({words})"
