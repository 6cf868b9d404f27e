"""`xlstm-jax plan CONFIG.py --topology v5e:16x16`: compiles a train step ahead of time."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.plan.report import Plan, plan
from xlstm_jax.plan.search import Candidate, search
from xlstm_jax.plan.topology import find_target

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(options.ConfigCommand):
    """Compiles the train step of a run for a target that is not attached, without running it.

    Memory and collectives are those of the compiled program. Times are lower bounds, computed from
    the peak rates of data sheets: no step is faster than the largest of them.
    """

    topology: str = "v5e:4x4"  # e.g. v5p:8x8x4; GPUs as hosts x GPUs: h100:32x8
    slices: int = 1  # TPU slices of this topology, joined by the data-center network
    search: bool = False  # find the fastest mesh, remat policy and batch size that fit
    out: Path | None = None  # JSON file to write the plan to
    json: bool = False  # print the plan as JSON


def run(argv: list[str]) -> int:
    """Runs `plan`.

    Raises:
        ConfigError: an option or the config is invalid, the config does not fit the target, or the
            folder of `--out` does not exist.
    """
    # Nothing is computed; on its own JAX would look for a device of each installed compiler.
    jax.config.update("jax_platforms", "cpu")
    args = options.parse_with_config("plan", PlanRun, argv, allow_presets=True)
    if args.out is not None:  # before minutes of compilation
        options.check_out(args.out)
    target = find_target(args.topology, args.slices)
    flags: dict[str, str] = {}
    with console.output_to_stderr() if args.json else contextlib.nullcontext():
        if args.search:
            best, result = search(
                args.experiment,
                target,
                on_plan=lambda c, compiled: console.write(f"{_flags(c)}: {_peak(compiled)}\n"),
            )
            flags = {"flags": _flags(best)}
        else:
            result = plan(args.experiment, target)
    fields = dataclasses.asdict(result) | {"fits": result.fits, "limit": result.limit}
    if args.json:
        console.print_json(fields | flags)
    else:
        console.print_fields(summary(result) | flags)
    if args.out is not None:
        args.out.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return DONE


def _peak(result: Plan) -> str:
    used = f"{result.peak_bytes / GIB:.2f} of {result.memory_bytes / GIB:.2f} GiB"
    return f"{used}, {'fits' if result.fits else 'does not fit'}"


def _flags(candidate: Candidate) -> str:
    cfg, mesh = candidate.cfg, candidate.estimate.mesh
    axes = [f"--mesh.{name} {n}" for name, n in mesh.items() if n > 1 or name == "data"]
    batch = f"--data.batch-size {cfg.data.batch_size}"
    return " ".join([*axes, f"--model.remat {cfg.model.remat}", batch])


def summary(result: Plan) -> dict[str, str]:
    """The printed fields of a plan, by label."""
    mesh = " x ".join(f"{name} {size}" for name, size in result.mesh.items() if size > 1)
    flops_per_device = result.flops / math.prod(result.mesh.values())
    memory = {
        "parameters": result.params_bytes,
        "optimizer": result.optimizer_bytes,
        "activations": result.activations_bytes,
        "temporaries": result.temporary_bytes,
    }
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    bound = "at least " if result.refusal else ""
    fields = {
        "hardware": f"{result.topology}, {result.num_chips:,} chips",
        "mesh": f"{mesh or 'one device'} under {result.rules}",
        "parameters": f"{result.num_params:,}",
        "tokens per step": f"{result.tokens_per_step:,}",
        "FLOPs per step": f"{result.flops:.4g}, {flops_per_device:.4g} per device",
        "memory per device": f"{bound}{_peak(result)} ({parts})",
    }
    for kind, (calls, sent) in sorted(result.collectives.items()):
        frequency = "" if result.refusal else f"{calls:,} per step, "
        fields[kind] = f"{frequency}{sent / GIB:.3f} GiB sent per device"
    for name, seconds in result.seconds.items():
        fields[f"{name} bound"] = f"{1e3 * seconds:,.1f} ms"
    rate = result.tokens_per_step / result.step_seconds
    share = result.seconds["compute"] / result.step_seconds
    fields["step"] = (
        f"at least {1e3 * result.step_seconds:,.1f} ms, limited by {result.limit}: at most "
        f"{rate:,.0f} tokens/s, {share:.0%} of the peak"
    )
    fields["compiled in"] = f"{result.compile_seconds:.0f} s"
    if result.refusal:
        fields["compiled in"] = f"not compiled, estimated by formula: {result.refusal}"
    return fields
