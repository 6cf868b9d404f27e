"""`xlstm-jax sweep PLAN.py`: trains the runs of a sweep and collects their results."""

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import call_function
from xlstm_jax.errors import ConfigError, quote_path
from xlstm_jax.scaling.collect import TABLE, collect
from xlstm_jax.scaling.estimate import calibrate, estimate
from xlstm_jax.scaling.grids import Grids
from xlstm_jax.scaling.launch import Local, Slurm
from xlstm_jax.scaling.runs import run as run_sweep
from xlstm_jax.scaling.runs import statuses
from xlstm_jax.scaling.status import RunStatus
from xlstm_jax.scaling.sweep import RunSpec, Sweep, plan
from xlstm_jax.sharding.distributed import Processes, init_distributed
from xlstm_jax.train.processes import exit_on_signal

PlanPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PLAN.py")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepCommand(options.ModelCommand):
    """Trains the runs of a sweep that are not finished, and collects results in OUT/table.csv.

    The same command continues a sweep that was interrupted.
    """

    plan: PlanPath  # a file that defines sweep(size=...)
    size: str | None = None  # argument of sweep(size=...)
    out: Path | None = None  # folder of the runs; None: runs/NAME for NAME.py
    # "local": one run after the other in this process; "grids": those that differ only in seed and
    # learning rate as one program; "slurm": jobs of a cluster
    launch: Literal["local", "grids", "slurm"] = "local"
    slurm: Slurm = Slurm()
    processes: Processes = Processes()  # of "local": several that train every run together
    dry_run: bool = False  # print the plan, and minutes estimated from a few steps of some runs
    allow_mixed: bool = False  # accept results of another source of this library
    json: bool = False  # print the result as JSON


def run(argv: list[str]) -> int:
    """Runs `sweep`, and returns the largest exit code of its runs.

    Raises:
        ConfigError: an option, the plan or the folder of the runs is invalid.
    """
    args = options.parse("sweep", SweepCommand, argv)
    if args.plan.suffix != ".py" or not args.plan.is_file():
        raise ConfigError(
            f"{quote_path(args.plan)} must be an existing .py file; pass one that defines "
            "sweep(size=...)."
        )
    if args.launch != "slurm":
        init_distributed(args.processes)
    specs = plan(call_function(args.plan, Sweep, args.size, "sweep"))
    out = Path("runs", args.plan.stem) if args.out is None else args.out
    if args.dry_run:
        _show_plan(specs, out, as_json=args.json)
        return DONE
    with console.output_to_stderr() if args.json else contextlib.nullcontext():
        with exit_on_signal():
            states = run_sweep(
                specs, out, launcher=_launcher(args, specs), allow_mixed=args.allow_mixed
            )
        if jax.process_index() > 0:  # process 0 reports for all
            return max(DONE, *(one.code for one in states))
        table = collect(out, allow_mixed=args.allow_mixed)
    if args.json:
        console.print_json({"runs": states, "records": table.records})
    else:
        _show_states(states, out)
    return max(DONE, *(one.code for one in states))


def _launcher(args: SweepCommand, specs: list[RunSpec]) -> Any:
    if args.launch == "slurm":
        return args.slurm
    names = {spec.run_id: spec.cfg.name for spec in specs}

    def show_end(one: RunStatus) -> None:
        console.write(f"  {one.state}{': ' if one.reason else ''}{one.reason}\n")

    launcher = Grids if args.launch == "grids" else Local
    return launcher(
        on_start=lambda folder: console.write(f"{folder.name} {names[folder.name]}\n"),
        on_end=show_end,
    )


def _show_states(states: list[RunStatus], out: Path) -> None:
    counts = Counter(one.state for one in states)
    fields = {state: f"{n:,} of {len(states):,} runs" for state, n in sorted(counts.items())}
    failed = [one for one in states if one.state == "failed"]
    fields |= {one.run_id: f"{one.name}: {one.reason}" for one in failed}
    console.print_fields(fields | {"table": quote_path(out / TABLE)})


def _show_plan(specs: list[RunSpec], out: Path, *, as_json: bool) -> None:
    """Prints the runs, their states and estimated minutes."""
    states = [one.state for one in statuses(specs, out)]
    speeds = calibrate(specs)
    minutes = [estimate(spec, speeds) / 60 for spec in specs]
    records = [
        spec.record() | {"state": state, "minutes": time}
        for spec, state, time in zip(specs, states, minutes, strict=True)
    ]
    left = sum(one["minutes"] for one in records if one["state"] != "finished")
    if as_json:
        console.print_json({"runs": records, "minutes_left": left})
        return
    header = ["run", "parameters", "tokens", "FLOPs", "steps", "batch", "lr", "state", "minutes"]
    console.print_table(header, [_cells(record) for record in records])
    console.write("\n")
    note = "of training, estimated from a few steps on this machine as it is loaded now"
    console.print_fields({"runs": f"{len(records):,}", "left": f"{left:,.1f} minutes {note}"})


def _cells(record: dict[str, Any]) -> list[str]:
    counts = [f"{record[name]:,}" for name in ("num_params", "train_tokens")]
    numbers = [f"{record['train_flops']:.4g}", f"{record['steps']:,}", f"{record['batch_size']:,}"]
    rate = f"{record['learning_rate']:g}"
    return [record["name"], *counts, *numbers, rate, record["state"], f"{record['minutes']:.2f}"]
