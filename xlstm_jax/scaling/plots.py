"""Pictures of fits: IsoFLOP curves, Pareto front, loss over size and tokens, residuals, allocation.

Every function draws on axes of matplotlib; `write` makes files of all that the fits support, on
light and on dark backgrounds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.scaling.analysis import Analysis, all_hold
from xlstm_jax.scaling.fitting import Fits, GroupFit
from xlstm_jax.scaling.table import Runs

THEMES = {
    "light": {"ground": "#ffffff", "text": "#1a1a1a", "grid": "#d9d9d9"},
    "dark": {"ground": "#15181c", "text": "#e6e6e6", "grid": "#3a3f45"},
}

# Distinguishable with any color vision, on both backgrounds: Okabe and Ito 2008.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"

FORMATS = ("svg", "png")


class Group(NamedTuple):
    """One fitted group with its runs."""

    name: str
    fit: GroupFit
    runs: Runs
    labels: np.ndarray  # budget of each run; NaN without one
    is_fitted: np.ndarray  # whether the loss surface was fitted to the run


def write(fits: Fits, runs: Runs, analysis: Analysis, folder: Path) -> list[Path]:
    """Writes every picture that the fits support as SVG and PNG, light and dark.

    Returns the files, NAME_THEME.FORMAT.
    """
    groups = _groups(fits, runs, analysis)
    with_budgets = [g for g in groups if g.fit.budgets]
    with_laws = [g for g in groups if g.fit.laws]
    with_surface = [g for g in groups if g.fit.surface]
    pictures: dict[str, tuple[Sequence[Group], Callable]] = {
        "isoflop": (with_budgets, isoflop),
        "surface": (with_surface, surface),
        "residuals": (with_surface, residuals),
    }
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with _style(theme):
            for name, (members, panel) in pictures.items():
                if members:
                    paths += _save(_panels(members, panel), folder, name, theme)
            paths += _save(_single(groups, pareto), folder, "pareto", theme)
            if with_laws:
                paths += _save(_single(with_laws, allocation), folder, "allocation", theme)
    return paths


def isoflop(axes: Any, group: Group) -> None:
    """Loss over parameters at each budget, with its parabola and optimum."""
    for number, budget in enumerate(group.fit.budgets):
        color, marker = _look(number)
        members = group.runs.select(group.labels == budget.label)
        x, parabola = members["num_params"], budget.params
        axes.plot(x, members["val_loss"], marker, color=color, markersize=3.5, alpha=0.7)
        grid = np.geomspace(*parabola.x_range, 100)
        style = "-" if parabola.is_valid else ":"
        axes.plot(grid, parabola(grid), style, color=color, label=f"{budget.label:.3g} FLOPs")
        if parabola.is_valid:
            axes.plot(
                parabola.x_opt, parabola.loss_opt, "*", color=color, markersize=13,
                markeredgecolor=_text_color(), markeredgewidth=0.7, zorder=4,
            )  # fmt: skip
    if group.fit.laws:
        used = [b for b in group.fit.budgets if b.label in group.fit.laws.labels]
        flops = np.geomspace(used[0].flops, used[-1].flops, 50)
        sizes, losses = group.fit.laws.params(flops), group.fit.laws.loss(flops)
        axes.plot(sizes, losses, "--", color=_text_color(), linewidth=1, label="power laws")
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss in nats per token")
    axes.legend(frameon=False, fontsize=8)


def surface(axes: Any, group: Group) -> None:
    """Contours of the fitted loss over parameters and tokens, with the runs and the optima."""
    fit = group.fit.surface
    assert fit is not None
    sizes, tokens = group.runs["num_params"], group.runs["train_tokens"]
    x, y = (np.geomspace(v.min() / 1.3, v.max() * 1.3, 80) for v in (sizes, tokens))
    losses = fit(*np.meshgrid(x, y))
    low, high = losses.min(), losses.max()
    levels = np.linspace(low, high, 16)[1:-1]
    style: Any = dict(colors=_text_color(), linewidths=0.8, alpha=0.5)
    axes.clabel(axes.contour(x, y, losses, levels=levels, **style), fontsize=7, fmt="%.2f")
    axes.scatter(
        sizes, tokens, c=group.runs["val_loss"], vmin=low, vmax=high, s=16, zorder=3,
        edgecolors=_text_color(), linewidths=0.4,
    )  # fmt: skip
    if min(fit.alpha, fit.beta, fit.gamma) > 0:
        flops = np.geomspace(*group.fit.flops_range, 30)
        best = [fit.optimum(float(c)) for c in flops]
        path = [b.num_params for b in best], [b.tokens for b in best]
        axes.plot(*path, "--", color=COLORS[1], label="compute-optimal, C = 6 N D")
        axes.legend(frameon=True, fontsize=8, loc="lower right", edgecolor="none")
    axes.set(xscale="log", yscale="log", xlim=x[[0, -1]], ylim=y[[0, -1]])
    axes.set_xlabel("parameters")
    axes.set_ylabel("training tokens")


def residuals(axes: Any, group: Group) -> None:
    """Observed minus fitted loss of all runs, over FLOPs."""
    fit = group.fit.surface
    assert fit is not None
    runs, is_fitted = group.runs, group.is_fitted
    errors = runs["val_loss"] - fit(runs["num_params"], runs["train_tokens"])
    for number, (mask, name) in enumerate(((is_fitted, "fitted"), (~is_fitted, "not fitted"))):
        if mask.any():
            color, marker = _look(number)
            label = f"{name} runs, rms {np.sqrt(np.mean(errors[mask] ** 2)):.4f}"
            axes.plot(
                runs["train_flops"][mask],
                errors[mask],
                marker,
                color=color,
                markersize=4,
                alpha=0.8,
                label=label,
            )
    axes.axhline(0, color=_text_color(), linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("observed minus fitted loss, nats")
    axes.legend(frameon=False, fontsize=8)


def pareto(axes: Any, groups: Sequence[Group]) -> None:
    """Loss over FLOPs of all runs; the lowest loss so far at increasing FLOPs is the front."""
    for number, group in enumerate(groups):
        color, marker = _look(number)
        order = np.argsort(group.runs["train_flops"])
        flops, loss = group.runs["train_flops"][order], group.runs["val_loss"][order]
        axes.plot(flops, loss, marker, color=color, markersize=3, alpha=0.35)
        lowest = np.minimum.accumulate(loss)
        is_front = loss == lowest
        axes.plot(flops[is_front], loss[is_front], "-", color=color, label=group.name)
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss in nats per token")
    axes.legend(frameon=False, fontsize=8)
    _title(axes, "runs and Pareto front")


def allocation(axes: Any, groups: Sequence[Group]) -> None:
    """A table of optimal parameters and tokens at budgets around those of the runs."""
    import matplotlib

    lines = []
    for group in groups:
        assert group.fit.laws is not None
        smallest, *_, largest = [b.flops for b in group.fit.budgets]
        exponents = range(int(np.ceil(np.log10(smallest))), int(np.log10(largest)) + 3)
        for flops in (10.0**k for k in exponents):
            size, tokens = float(group.fit.laws.params(flops)), float(group.fit.laws.tokens(flops))
            loss = (
                group.fit.surface(size, tokens) if group.fit.surface else group.fit.laws.loss(flops)
            )
            is_outside = flops > 1.1 * largest
            lines.append(
                [group.name, f"{flops:.0e}", f"{size:.3g}", f"{tokens:.3g}", f"{tokens / size:.1f}",
                 f"{float(loss):.3f}", "extrapolated" if is_outside else ""]
            )  # fmt: skip
    header = ["", "FLOPs", "parameters", "tokens", "tokens/parameter", "loss", ""]
    axes.axis("off")
    axes.figure.set_size_inches(6.8, 0.7 + 0.22 * (len(lines) + 1))
    cells = axes.table(
        lines, colLabels=header, loc="upper center", cellLoc="right", edges="horizontal"
    )
    cells.auto_set_font_size(False)
    cells.set_fontsize(8)
    cells.auto_set_column_width(list(range(len(header))))
    for cell in cells.get_celld().values():
        cell.set_edgecolor(matplotlib.rcParams["grid.color"])
        cell.set_facecolor("none")
    _title(axes, "compute-optimal allocation")


def _groups(fits: Fits, runs: Runs, analysis: Analysis) -> list[Group]:
    split = analysis.split(analysis.select(runs))
    groups = []
    for fit, members in zip(fits.groups, split.values(), strict=True):
        is_isoflop = all_hold(analysis.isoflop, members)
        labels = np.where(is_isoflop, analysis.budget_of(members), np.nan)
        is_fitted = all_hold(analysis.surface, members)
        name = ", ".join(fit.group.values()) or "all runs"
        groups.append(Group(name, fit, members, labels, is_fitted))
    return groups


@contextmanager
def _style(theme: str) -> Iterator[None]:
    """Within the context, new figures have the colors of a theme."""
    import matplotlib

    colors = THEMES[theme]
    text = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = dict.fromkeys(text, colors["text"]) | dict.fromkeys(ground, colors["ground"])
    settings |= {"grid.color": colors["grid"], "svg.hashsalt": "xlstm-jax", "font.size": 9}
    with matplotlib.rc_context(settings):
        yield


def _panels(groups: Sequence[Group], panel: Callable[[Any, Group], None]) -> Any:
    """A figure with a panel for each group."""
    from matplotlib.figure import Figure

    columns = min(len(groups), 2)
    num_rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.6 * columns, 4.2 * num_rows), dpi=110, layout="constrained")
    all_axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(groups) :]:
        axes.remove()
    for axes, group in zip(all_axes, groups, strict=False):
        panel(axes, group)
        _finish(axes)
        _title(axes, group.name)
    return figure


def _single(groups: Sequence[Group], panel: Callable[[Any, Sequence[Group]], None]) -> Any:
    """A figure with one panel for all groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    panel(axes, groups)
    _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.6, linewidth=0.5)
    axes.set_axisbelow(True)


def _save(figure: Any, folder: Path, name: str, theme: str) -> list[Path]:
    paths = [folder / f"{name}_{theme}.{suffix}" for suffix in FORMATS]
    for path in paths:
        # Without a date, so that equal fits make equal files.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _look(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def _text_color() -> str:
    import matplotlib

    return matplotlib.rcParams["text.color"]


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", parse_math=False)  # a "$" in a name is not a formula
