"""The fits of a table: parabolas, power laws, loss surface and fixed ratios of each group."""

import platform
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax import __version__
from xlstm_jax.config import to_dict
from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling import table
from xlstm_jax.scaling.analysis import Analysis, all_hold
from xlstm_jax.scaling.checks import Errors, prediction_errors
from xlstm_jax.scaling.laws import Line, PowerLaw, fit_fixed_ratio, fit_power_law
from xlstm_jax.scaling.parabolas import Parabola, fit_isoflop
from xlstm_jax.scaling.surface import LossSurface, parabola_bias
from xlstm_jax.scaling.surface_fit import fit_loss_surface
from xlstm_jax.scaling.table import Runs

MIN_BUDGETS = 3
"""Budgets that a holdout prediction needs besides the one that it predicts."""


class Budget(NamedTuple):
    """The runs of one compute budget."""

    label: float  # FLOPs
    flops: float  # mean of the runs
    num_runs: int
    params: Parabola  # in the number of parameters
    tokens: Parabola  # in the number of tokens
    bias: float | None = None  # `parabola_bias` of the group's loss surface


class Laws(NamedTuple):
    """Power laws through the optima of the valid parabolas."""

    params: PowerLaw
    tokens: PowerLaw
    loss: Line
    labels: tuple[float, ...]  # of the budgets that were used


class Ratio(NamedTuple):
    """Loss over FLOPs of runs with equal tokens per parameter."""

    tokens_per_param: float
    line: Line


class Holdout(NamedTuple):
    """The largest budget, predicted by fits to all smaller ones."""

    label: float
    flops: float
    num_params: float  # predicted by the power law
    num_params_measured: float  # minimum of the holdout parabola; NaN if it is not valid
    tokens: float
    tokens_measured: float
    loss: float  # predicted by the line through the optima of the smaller budgets
    loss_measured: float
    run_errors: Errors | None  # of a loss surface without these runs, over the holdout runs
    surface_loss: float | None  # of that surface, at the holdout optimum


class GroupFit(NamedTuple):
    """All fits of one group of runs; what the runs do not support is None or empty."""

    group: dict[str, str]  # column -> value
    num_runs: int
    budgets: tuple[Budget, ...]
    laws: Laws | None
    surface: LossSurface | None
    surface_errors: Errors | None
    ratios: tuple[Ratio, ...]
    holdout: Holdout | None
    flops_range: tuple[float, float]  # of the runs
    flags: tuple[str, ...]  # what was left out, and why


class Fits(NamedTuple):
    """The fits of a table, and what they were made from."""

    groups: tuple[GroupFit, ...]
    notes: tuple[str, ...]  # what was dropped from the table
    sha256: str  # of the table
    num_rows: int  # of the table
    versions: dict[str, str]
    analysis: dict[str, Any]  # fields of the `Analysis`


def fit_table(runs: Runs, analysis: Analysis | None = None) -> Fits:
    """Fits every group of the selected runs.

    What a group does not support, such as a budget with two sizes, is left out and flagged; an
    inconsistent table is refused.

    Raises:
        ConfigError: as `Analysis.select`, or runs that are fitted together differ in a convention.
    """
    analysis = analysis or Analysis()
    selected = analysis.select(runs)
    names = [name for name in analysis.groups if name in selected.columns]
    split = analysis.split(selected)
    for key, members in split.items():  # before the first fit, which takes seconds
        table.check_conventions(members, " ".join(key) or "the table")
    groups = [
        fit_group(dict(zip(names, key, strict=True)), members, analysis)
        for key, members in split.items()
    ]
    versions = {"xlstm-jax": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("jax", "numpy")}
    return Fits(
        tuple(groups), selected.notes, runs.sha256, runs.num_rows, versions, to_dict(analysis)
    )


def fit_group(group: dict[str, str], runs: Runs, analysis: Analysis) -> GroupFit:
    """All fits of runs that belong together."""
    flags: list[str] = []
    surface, errors = fit_surface(runs, analysis, flags)
    budgets = fit_budgets(runs, analysis, flags, surface)
    laws = fit_laws(budgets, analysis, flags)
    try:
        largest = holdout(runs, analysis)
    except ArgumentError as error:
        largest = None
        flags.append(str(error))
    flops = runs["train_flops"]
    return GroupFit(
        group=group,
        num_runs=len(runs),
        budgets=budgets,
        laws=laws,
        surface=surface,
        surface_errors=errors,
        ratios=fit_ratios(runs, analysis, flags),
        holdout=largest,
        flops_range=(float(flops.min()), float(flops.max())),
        flags=tuple(flags),
    )


def fit_budgets(
    runs: Runs, analysis: Analysis, flags: list[str], surface: LossSurface | None = None
) -> tuple[Budget, ...]:
    """The parabolas of each budget, by increasing FLOPs; appends what is not usable to `flags`."""
    runs = runs.select(all_hold(analysis.isoflop, runs))
    labels = analysis.budget_of(runs)
    budgets = []
    for label in sorted(set(labels[~np.isnan(labels)])):
        members = runs.select(labels == label)
        sizes, tokens, loss = (members[name] for name in table.REQUIRED)
        try:
            parabolas = fit_isoflop(sizes, loss), fit_isoflop(tokens, loss)
        except ArgumentError as error:
            flags.append(f"budget {label:.3g}: {error}")
            continue
        for name, parabola in zip(("parameters", "tokens"), parabolas, strict=True):
            if not parabola.is_valid:
                flags.append(
                    f"budget {label:.3g}: parabola in {name} is not used, {parabola.problem}"
                )
        bias = None
        if surface is not None and min(surface.alpha, surface.beta, surface.gamma) > 0:
            bias = parabola_bias(surface, sizes, tokens)
            if not np.isfinite(bias):
                bias = None
        flops = float(members["train_flops"].mean())
        budgets.append(Budget(float(label), flops, len(members), *parabolas, bias))
    return tuple(budgets)


def fit_laws(budgets: tuple[Budget, ...], analysis: Analysis, flags: list[str]) -> Laws | None:
    """Power laws through the budgets whose parabolas are both valid and in the range."""
    low, high = analysis.flops_range or (0.0, np.inf)
    used = [b for b in budgets if b.params.is_valid and b.tokens.is_valid]
    used = [b for b in used if low <= b.flops <= high]
    if len(used) < 2:
        if budgets:
            flags.append(f"power laws need two valid budgets, got {len(used)} of {len(budgets)}")
        return None
    flops = [b.flops for b in used]
    return Laws(
        params=fit_power_law([b.params.x_opt for b in used], flops),
        tokens=fit_power_law([b.tokens.x_opt for b in used], flops),
        loss=fit_fixed_ratio(flops, [b.params.loss_opt for b in used]),
        labels=tuple(b.label for b in used),
    )


def fit_surface(
    runs: Runs, analysis: Analysis, flags: list[str], *, bootstraps: int | None = None
) -> tuple[LossSurface | None, Errors | None]:
    """The loss surface and its errors; None and a flag if there are too few runs."""
    runs = runs.select(all_hold(analysis.surface, runs))
    if not len(runs):  # the analysis selects none of this group
        return None, None
    columns = [runs[name] for name in table.REQUIRED]
    options = dict(free_gamma=analysis.free_gamma, delta=analysis.delta, seed=analysis.seed)
    try:
        surface = fit_loss_surface(
            *columns,
            starts=analysis.starts,
            bootstraps=analysis.bootstraps if bootstraps is None else bootstraps,
            **options,
        )
    except ArgumentError as error:
        flags.append(f"no loss surface: {error}")
        return None, None
    if surface.num_at_best < 3:
        flags.append(
            f"only {surface.num_at_best} of {surface.num_starts} starts reached the best "
            "objective of the loss surface; use more starts"
        )
    return surface, prediction_errors(surface(*columns[:2]), columns[2])


def fit_ratios(runs: Runs, analysis: Analysis, flags: list[str]) -> tuple[Ratio, ...]:
    """A line for each label of tokens per parameter."""
    if analysis.ratio_column not in runs.columns:
        return ()
    ratios = analysis.ratio_of(runs)
    lines = []
    for ratio in sorted(set(ratios[~np.isnan(ratios)])):
        members = runs.select(ratios == ratio)
        try:
            line = fit_fixed_ratio(members["train_flops"], members["val_loss"])
        except ArgumentError as error:
            flags.append(f"ratio {ratio:g}: {error}")
            continue
        lines.append(Ratio(float(ratio), line))
    return tuple(lines)


def holdout(runs: Runs, analysis: Analysis | None = None) -> Holdout:
    """Fits without the largest budget, and predicts it.

    Raises:
        ArgumentError: fewer than three valid budgets remain.
    """
    analysis = analysis or Analysis()
    budgets = fit_budgets(runs, analysis, [])
    low, high = analysis.flops_range or (0.0, np.inf)
    used = [b for b in budgets if low <= b.flops <= high]
    smaller = tuple(b for b in used[:-1] if b.params.is_valid and b.tokens.is_valid)
    if len(smaller) < MIN_BUDGETS:
        names = ", ".join(f"{b.label:.3g}" for b in smaller) or "none"
        raise ArgumentError(
            f"a holdout prediction needs {MIN_BUDGETS} valid budgets below the largest, got "
            f"{len(smaller)} ({names}); add budgets."
        )
    last = used[-1]
    laws = fit_laws(smaller, analysis, [])
    assert laws is not None
    is_holdout = (analysis.budget_of(runs) == last.label) & all_hold(analysis.isoflop, runs)
    surface, _ = fit_surface(runs.select(~is_holdout), analysis, [], bootstraps=0)
    last_runs = runs.select(is_holdout)
    sizes, tokens, loss = (last_runs[name] for name in table.REQUIRED)
    errors = surface_loss = None
    if surface is not None:
        errors = prediction_errors(surface(sizes, tokens), loss)
        surface_loss = float(surface(last.params.x_opt, last.tokens.x_opt))
    return Holdout(
        label=last.label,
        flops=last.flops,
        num_params=float(laws.params(last.flops)),
        num_params_measured=last.params.x_opt if last.params.is_valid else np.nan,
        tokens=float(laws.tokens(last.flops)),
        tokens_measured=last.tokens.x_opt if last.tokens.is_valid else np.nan,
        loss=float(laws.loss(last.flops)),
        loss_measured=last.params.loss_opt if last.params.is_valid else np.nan,
        run_errors=errors,
        surface_loss=surface_loss,
    )
