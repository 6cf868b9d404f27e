"""`xlstm-jax replay RUN/diverged.json`: recomputes a skipped step."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE, WRONG_RESULT
from xlstm_jax.train import rundir
from xlstm_jax.train.replay import Replay as Result
from xlstm_jax.train.replay import replay

DumpPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN/diverged.json")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(options.ModelCommand):
    """Recomputes a skipped step, and lists the norm of the gradient of every parameter.

    Exits with code 5 if loss or gradient norm differ from those of the run in any bit.
    """

    dump: DumpPath  # the file that a run writes when it skips updates
    json: bool = False  # print the results as JSON


def run(argv: list[str]) -> int:
    """Runs `replay`; raises ConfigError if the dump or its data cannot be used."""
    args = options.parse("replay", Replay, argv)
    path = args.dump / rundir.DIVERGED if args.dump.is_dir() else args.dump
    result = replay(path)
    code = DONE if result.reproduced else WRONG_RESULT
    if args.json:
        console.print_json(result)
        return code
    lines = [[name, f"{value:.4g}"] for name, value in result.gradient_norms.items()]
    console.print_table(["parameter", "gradient norm"], lines)
    console.write("\n")
    console.print_fields(_fields(result))
    return code


def _fields(result: Result) -> dict[str, str]:
    about, step = result.dump, result.dump.first_skipped_step
    fields = {
        "step": f"{step}, the first of {len(about.index_of_step)} consecutive skipped steps",
        "loss": f"{result.loss!r}, in the run {about.loss}",
        "gradient norm": f"{result.grad_norm!r}, in the run {about.grad_norm}; "
        f"average of earlier steps {about.ema_grad_norm:.4g}",
        "not finite": ", ".join(result.non_finite[:5]) or "no gradient",
        "reproduced": "yes, bit for bit" if result.reproduced else "no",
    }
    if result.from_step < step:
        fields["repeated"] = f"steps {result.from_step} to {step}"
    versions = rundir.versions()
    if others := [
        f"{name} {versions.get(name)}, in the run {version}"
        for name, version in about.versions.items()
        if versions.get(name) != version
    ]:
        fields["versions"] = "; ".join(others)
    return fields
