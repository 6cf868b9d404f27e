"""`xlstm-jax fit TABLE`: scaling laws fitted to a table of runs, with pictures."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError, load_config
from xlstm_jax.errors import quote_path
from xlstm_jax.scaling import fitting, plots, store, table
from xlstm_jax.scaling.analysis import Analysis
from xlstm_jax.scaling.fitting import GroupFit
from xlstm_jax.scaling.prediction import MIN_SAMPLES
from xlstm_jax.scaling.surface import LossSurface

TablePath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TABLE")]

FILE = "fit.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitCommand:
    """Fits IsoFLOP parabolas, power laws and loss surfaces to a table of runs."""

    table: TablePath  # .csv or .parquet, a run per line
    analysis: Path | None = None  # Python file with config() -> Analysis, or JSON: filters, labels
    out: Path = Path("fits")  # folder of fit.json and pictures; existing files are replaced
    plots: bool = True  # draw pictures
    json: bool = False  # print the fits as JSON


def run(argv: list[str]) -> int:
    """Runs `fit`; raises ConfigError if an option, the table or the analysis is invalid."""
    args = options.parse("fit", FitCommand, argv)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(
            f"--out must be a folder, got the file {quote_path(args.out)}; choose one."
        )
    analysis = load_config(args.analysis, Analysis) if args.analysis else Analysis()
    runs = table.read_table(args.table, analysis.columns)
    fits = fitting.fit_table(runs, analysis)
    args.out.mkdir(parents=True, exist_ok=True)
    store.save(fits, args.out / FILE)
    pictures = plots.write(fits, runs, analysis, args.out) if args.plots else []
    if args.json:
        console.print_json(fits)
        return DONE
    for fit in fits.groups:
        _print_group(fit)
    for note in fits.notes:
        console.write(f"note: {note}\n")
    _print_files(args.out, pictures)
    return DONE


def _print_group(fit: GroupFit) -> None:
    runs = "run" if fit.num_runs == 1 else "runs"
    console.write(f"{', '.join(fit.group.values()) or 'all runs'}: {fit.num_runs} {runs}\n")
    if fit.budgets:
        header = ["budget", "runs", "FLOPs", "parameters", "tokens", "loss", "bias of parabola"]
        lines = [
            [
                f"{b.label:.3g}",
                str(b.num_runs),
                f"{b.flops:.4g}",
                f"{b.params.x_opt:.4g}" if b.params.is_valid else "-",
                f"{b.tokens.x_opt:.4g}" if b.tokens.is_valid else "-",
                f"{b.params.loss_opt:.4f}" if b.params.is_valid else "-",
                "-" if b.bias is None else f"{10**b.bias - 1:+.1%}",
            ]
            for b in fit.budgets
        ]
        console.print_table(header, lines)
    fields = _fields(fit)
    if fields:
        console.print_fields(fields)
    for flag in fit.flags:
        console.write(f"flag: {flag}\n")
    console.write("\n")


def _fields(fit: GroupFit) -> dict[str, str]:
    fields = {}
    if fit.laws:
        for name, law in (("N", fit.laws.params), ("D", fit.laws.tokens)):
            fields[f"optimal {name}"] = (
                f"{law.prefactor:.5g} C^{law.exponent:.5f} (standard error of the exponent "
                f"{law.exponent_stderr:.4f}, {law.num_points} budgets)"
            )
    if fit.surface and fit.surface_errors:
        s = fit.surface
        fields["L(N, D)"] = (
            f"ln E {s.e:.5g}, ln A {s.a:.5g}, ln B {s.b:.5g}, alpha {s.alpha:.5f}, "
            f"beta {s.beta:.5f}, gamma {s.gamma:.5f}{_bootstrap(s)}"
        )
        fields["its fit"] = (
            f"objective {s.objective:.6g}, gradient {s.gradient_norm:.1e}, {s.num_at_best} of "
            f"{s.num_starts} starts at the best; rms error {fit.surface_errors.rms:.4f} nats over "
            f"{s.num_points} runs"
        )
    for ratio, line in fit.ratios:
        name = f"{ratio:g} tokens per parameter"
        fields[name] = f"slope {line.slope:.5f}, {line.num_points} runs"
    if fit.holdout:
        h = fit.holdout
        fields["holdout"] = (
            f"{h.label:.3g} FLOPs: N {h.num_params:.4g} for {h.num_params_measured:.4g}, D "
            f"{h.tokens:.4g} for {h.tokens_measured:.4g}, loss {h.loss:.4f} for "
            f"{h.loss_measured:.4f}"
        )
        if h.surface_loss is not None:
            fields["holdout, L(N, D)"] = f"loss {h.surface_loss:.4f} for {h.loss_measured:.4f}"
    return fields


def _bootstrap(surface: LossSurface) -> str:
    """The interval of beta / (alpha + beta), unlike those of coefficients a narrow one."""
    if len(surface.samples) < MIN_SAMPLES:
        return ""
    low, high = np.percentile([s.size_exponent for s in surface.resampled()], [5, 95])
    return f"; beta / (alpha + beta) {surface.size_exponent:.3f} ({low:.3f} to {high:.3f})"


def _print_files(out: Path, pictures: list[Path]) -> None:
    names = sorted({path.name.rsplit("_", 1)[0] for path in pictures})
    fields = {"written": quote_path(out / FILE)}
    if names:
        fields["pictures"] = f"{', '.join(names)}, light and dark, SVG and PNG"
    console.print_fields(fields)
