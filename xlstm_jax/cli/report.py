"""`xlstm-jax report RUN...`: one HTML page that compares runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from xlstm_jax import report
from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.errors import quote_path

RunPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Compares runs, also unfinished ones, on one HTML page that loads nothing from elsewhere."""

    runs: RunPaths  # directories of runs
    out: Path = Path("report.html")  # file to write; an existing one is replaced
    json: bool = False  # print the final values as JSON


def run(argv: list[str]) -> int:
    """Runs `report`; raises ConfigError if an option or a run is invalid."""
    args = options.parse("report", ReportCommand, argv)
    options.check_out(args.out)
    result = report.write(args.runs, args.out)
    if args.json:
        console.print_json(result)
        return DONE
    lines = [
        [s.name, s.status, f"{s.step:,}", _loss(s.loss), _loss(s.evaluation.get("valid_loss"))]
        for s in result.runs
    ]
    console.print_table(["run", "status", "step", "training loss", "validation loss"], lines)
    console.write("\n")
    console.print_fields({"written": quote_path(args.out)})
    return DONE


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
