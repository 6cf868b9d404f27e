"""What fits predict for a budget: size, tokens and loss with intervals, and the preset to train."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xlstm_jax.errors import ArgumentError, shorten
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.modules import presets
from xlstm_jax.scaling.fitting import Fits, GroupFit
from xlstm_jax.scaling.surface import FlopsPerToken, LossSurface

FAMILIES = {
    "xlstm": (r"scaling_d\d+_l\d+_h\d+", ("mlstm", "xlstm", "xlstm[1:0]")),
    "llama": (r"scaling_llama_d\d+_l\d+_h\d+", ("llama", "transformer")),
}
"""Family -> presets of its architecture grid, and how tables spell it."""

# 95 % quantiles of Student's t distribution by degrees of freedom, from 1.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)

MIN_SAMPLES = 20
"""Bootstraps below which no interval is computed from them."""


class Interval(NamedTuple):
    """From the 5 % to the 95 % quantile."""

    low: float
    high: float


class Architecture(NamedTuple):
    """A preset of a family, with its exact costs."""

    preset: str
    num_params: int
    flops_per_token: float  # of training, at the sequence length of the prediction


class Choice(NamedTuple):
    """The preset nearest to the optimal size, at the budget of the prediction."""

    preset: str
    num_params: int
    tokens: float
    loss: float  # NaN without a loss surface


class Prediction(NamedTuple):
    """The compute-optimal run at a budget."""

    flops: float
    num_params: float
    tokens: float
    loss: float
    num_params_interval: Interval | None  # None without the data for one
    tokens_interval: Interval | None
    loss_interval: Interval | None
    method: str  # of size and tokens, then of the loss
    extrapolation: float  # the budget over the FLOPs of the largest fitted run
    choice: Choice | None  # None for a family without presets


def predict(fit: GroupFit, flops: float, *, seq_len: int, family: str) -> Prediction:
    """The compute-optimal size, tokens and loss at a budget.

    Size and tokens follow the power laws of the parabolas, or else the minimum of the loss surface
    at the exact FLOPs of the family's architectures. The loss is that of the surface, or else of
    the line through the optima. Intervals of power laws come from the scatter of the budgets, those
    of the surface from its bootstrap.

    Args:
        seq_len: tokens per sequence, on which FLOPs depend.
        family: "xlstm" or "llama"; other families have no presets, and count 6 N FLOPs per token.

    Raises:
        ArgumentError: `flops` is not positive, or the fit has neither power laws nor a surface.
    """
    if not (np.isfinite(flops) and flops > 0):
        raise ArgumentError(f"flops must be positive and finite, got {flops}; 1e20 is an example.")
    grid = architectures(family, seq_len)
    surface, laws = fit.surface, fit.laws
    flops_per_token = flops_per_token_of(grid) if grid else None
    if laws is not None:
        size, tokens = float(laws.params(flops)), float(laws.tokens(flops))
        intervals = [
            _law_interval(x, law, flops) for x, law in ((size, laws.params), (tokens, laws.tokens))
        ]
        method = "power laws of IsoFLOP optima"
    elif surface is not None:
        size, tokens, _ = surface.optimum(flops, flops_per_token=flops_per_token)
        intervals = _surface_intervals(surface, flops, flops_per_token)
        method = "minimum of the loss surface"
    else:
        raise ArgumentError(
            f"the fit of {_describe(fit)} has neither power laws nor a loss surface; see its "
            "flags, and fit more runs."
        )
    if surface is not None:
        loss = float(surface(size, tokens))
        values = [float(sample(size, tokens)) for sample in surface.resampled()]
        loss_interval = _quantiles(values)
        method += "; loss of the surface"
    else:
        assert laws is not None
        loss = float(laws.loss(flops))
        loss_interval = _law_interval(loss, laws.loss, flops)
        method += "; loss of the line through them"
    choice = None
    if grid:
        distance = [abs(np.log(x.num_params / size)) for x in grid]
        best = grid[int(np.argmin(distance))]
        best_tokens = flops / best.flops_per_token
        best_loss = np.nan if surface is None else float(surface(best.num_params, best_tokens))
        choice = Choice(best.preset, best.num_params, best_tokens, best_loss)
    return Prediction(
        flops=float(flops),
        num_params=size,
        tokens=tokens,
        loss=loss,
        num_params_interval=intervals[0],
        tokens_interval=intervals[1],
        loss_interval=loss_interval,
        method=method,
        extrapolation=flops / fit.flops_range[1],
        choice=choice,
    )


def family_of(name: str) -> str:
    """The family that a table calls `name`, or the name itself if it is not one of `FAMILIES`."""
    lower = name.lower()
    return next((family for family, (_, names) in FAMILIES.items() if lower in names), name)


def architectures(family: str, seq_len: int) -> list[Architecture]:
    """The presets of a family's grid, by size; none for a family that is not in `FAMILIES`."""
    if family not in FAMILIES:
        return []
    pattern = FAMILIES[family][0]
    grid = []
    for name in filter(re.compile(pattern).fullmatch, presets.names()):
        cfg = presets.get(name)
        flops = train_flops(cfg, seq_len) / seq_len
        grid.append(Architecture(name, count_params(cfg), flops))
    return sorted(grid, key=lambda x: x.num_params)


def flops_per_token_of(grid: Sequence[Architecture]) -> FlopsPerToken:
    """FLOPs per token of any size, from a parabola through those of the grid in logarithms.

    Architectures of similar size differ by percents; interpolated, these steps would be minima
    of the loss. Beyond the grid the FLOPs are proportional to the parameters.
    """
    log_sizes = np.log([x.num_params for x in grid])
    log_ratios = np.log([x.flops_per_token / x.num_params for x in grid])
    curve = np.polynomial.Polynomial.fit(log_sizes, log_ratios, 2)
    low, high = log_sizes.min(), log_sizes.max()
    return lambda n: n * np.exp(curve(np.clip(np.log(n), low, high)))


def find_group(fits: Fits, *, family: str | None = None, seq_len: int | None = None) -> GroupFit:
    """The group of a family and a context length.

    Raises:
        ArgumentError: no group matches, or several do.
    """
    matches = [
        group
        for group in fits.groups
        if family in (None, family_of(group.group.get("model", "")), group.group.get("model"))
        and str(seq_len) in ("None", group.group.get("context_length", str(seq_len)))
    ]
    if len(matches) == 1:
        return matches[0]
    known = "; ".join(_describe(group) for group in fits.groups)
    problem = "select one of the groups" if matches else "be those of a group"
    raise ArgumentError(
        f"family={family!r} and seq_len={seq_len} must {problem} of the fit, "
        f"{shorten(known, 400)}; set --family and --seq-len."
    )


def _describe(fit: GroupFit) -> str:
    return " ".join(f"{name}={value}" for name, value in fit.group.items()) or "all runs"


def _law_interval(value: float, law, flops: float) -> Interval | None:
    """Of a prediction of a line in logarithms, by Student's t distribution."""
    freedom = law.num_points - 2
    if freedom < 1:
        return None
    z = 1.645
    t = _T95[freedom - 1] if freedom <= len(_T95) else z + (z**3 + z) / (4 * freedom)
    factor = float(np.exp(t * law.log_stderr(flops)))
    return Interval(value / factor, value * factor)


def _surface_intervals(
    surface: LossSurface, flops: float, flops_per_token: FlopsPerToken | None
) -> list[Interval | None]:
    """Of size and tokens, from the bootstrap; samples without a minimum are left out."""
    optima = [
        sample.optimum(flops, flops_per_token=flops_per_token)
        for sample in surface.resampled()
        if min(sample.alpha, sample.beta, sample.gamma) > 0
    ]
    sizes, tokens = [x.num_params for x in optima], [x.tokens for x in optima]
    return [_quantiles(sizes), _quantiles(tokens)]


def _quantiles(values: Sequence[float]) -> Interval | None:
    if len(values) < MIN_SAMPLES:
        return None
    return Interval(*map(float, np.percentile(values, [5, 95])))
