"""`xlstm-jax plan CONFIG.py --topology v5e:16x16`: a run compiled for a target, ahead of time."""

import dataclasses
import json
import math
from pathlib import Path

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.plan.report import Plan, plan
from xlstm_jax.plan.search import Candidate, search
from xlstm_jax.plan.topology import find_target

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(options.WithConfig):
    """Compiles the training program of a run for a target that is not attached; runs nothing.

    Memory and collectives are the compiled program's. Times are bounds by the peaks of data sheets:
    no step is faster than the largest of them.
    """

    topology: str = "v5e:4x4"  # or v5p:8x8x4; GPUs as hosts x GPUs: h100:32x8
    slices: int = 1  # so many such TPUs, joined by a slower network
    search: bool = False  # for the fastest mesh, rematerialization policy and batch size that fit
    out: Path | None = None  # all figures as JSON


def run(args: list[str]) -> int:
    """Raises ConfigError if the config does not fit the hardware, or `out` has no folder."""
    # Nothing is computed, and a compiler that is installed would be looked for as a device.
    jax.config.update("jax_platforms", "cpu")
    chosen = options.parse_with_config("plan", PlanRun, args, presets_too=True)
    if chosen.out is not None and not chosen.out.parent.is_dir():
        raise ConfigError(
            f"out={str(chosen.out)!r} must lie in a folder that exists; make "
            f"{str(chosen.out.parent)!r} or name another."
        )
    target = find_target(chosen.topology, chosen.slices)
    if chosen.search:
        best, result = search(
            chosen.experiment,
            target,
            on_plan=lambda tried, its_plan: console.say(f"{_flags(tried)}: {_peak(its_plan)}\n"),
        )
        console.facts(rows(result) | {"flags": _flags(best)})
    else:
        result = plan(chosen.experiment, target)
        console.facts(rows(result))
    if chosen.out is not None:
        figures = dataclasses.asdict(result) | {"fits": result.fits, "limit": result.limit}
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return DONE


def _peak(result: Plan) -> str:
    used = f"{result.peak_bytes / GIB:.2f} of {result.memory_bytes / GIB:.2f} GiB"
    return f"{used}, {'fits' if result.fits else 'does not fit'}"


def _flags(candidate: Candidate) -> str:
    cfg, mesh = candidate.cfg, candidate.estimate.mesh
    axes = [f"--mesh.{name} {n}" for name, n in mesh.items() if n > 1 or name == "data"]
    batch = f"--data.batch-size {cfg.data.batch_size}"
    return " ".join([*axes, f"--model.remat {cfg.model.remat}", batch])


def rows(result: Plan) -> dict[str, str]:
    """A plan for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in result.mesh.items() if size > 1)
    each = result.flops / math.prod(result.mesh.values())
    memory = {
        "parameters": result.params_bytes,
        "optimizer": result.optimizer_bytes,
        "activations": result.activations_bytes,
        "temporaries": result.temporary_bytes,
    }
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    least = "at least " if result.refusal else ""
    rows = {
        "hardware": f"{result.topology}, {result.num_chips:,} chips",
        "mesh": f"{mesh or 'one device'} under {result.rules}",
        "parameters": f"{result.num_params:,}",
        "tokens per step": f"{result.tokens_per_step:,}",
        "FLOPs per step": f"{result.flops:.4g}, {each:.4g} a device",
        "memory a device": f"{least}{_peak(result)} ({parts})",
    }
    for kind, (times, sent) in sorted(result.collectives.items()):
        count = "" if result.refusal else f"{times:,} a step, "
        rows[kind] = f"{count}{sent / GIB:.3f} GiB sent by a device"
    for name, seconds in result.seconds.items():
        rows[f"{name} bound"] = f"{1e3 * seconds:,.1f} ms"
    rate = result.tokens_per_step / result.step_seconds
    share = result.seconds["compute"] / result.step_seconds
    rows["step"] = (
        f"at least {1e3 * result.step_seconds:,.1f} ms, limited by {result.limit}: at most "
        f"{rate:,.0f} tokens/s, {share:.0%} of the peak"
    )
    rows["compiled in"] = f"{result.compile_seconds:.0f} s"
    if result.refusal:
        rows["compiled in"] = f"not compiled, all of it by formula: {result.refusal}"
    return rows
