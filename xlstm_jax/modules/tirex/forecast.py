"""Forecasts of TiRex-2 for one series: targets, past covariates and covariates with a known future.

All functions are pure and have static shapes: for several series of the same shapes, `jax.vmap`
them over the arrays. Missing values are NaN.

Source: Podest et al. 2026, arXiv:2607.01204; the defaults are those of `forecast` of the package
`tirex-2`, 0.4.0.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.modules.tirex import scaling
from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.modules.tirex.network import CellState, Roles, TiRex
from xlstm_jax.modules.tirex.scaling import Scale, Trend
from xlstm_jax.typing import Array, Float, PyTree


class StreamState(NamedTuple):
    """What is known of a series after the patches so far.

    Every leaf has a leading axis: the series, and with `sign_flip` also the negated series.
    """

    cells: tuple[CellState, ...]
    hidden: Float[Array, "signs V 1 D"]  # of the last patch, from which the next one is predicted
    scale: Scale  # of the first context, fixed
    trend: Trend


class _Inputs(NamedTuple):
    """Variates of a series before scaling, targets first."""

    values: Float[Array, "V T"]  # targets may be differences
    trend: Trend  # of the targets


@functools.partial(jax.jit, static_argnames=("cfg", "horizon", "pad_context"))
def forecast(
    cfg: TiRexConfig,
    params: PyTree,
    targets: Float[Array, "V T"],
    horizon: int,
    *,
    past: Float[Array, "V_past T"] | None = None,
    future: Float[Array, "V_future T_long"] | None = None,
    pad_context: bool = True,
) -> Float[Array, "V quantiles horizon"]:
    """Quantiles of the `horizon` values that follow the targets.

    Args:
        targets: the series to forecast, which depend on each other.
        horizon: at most `cfg.future_len`.
        past: covariates that end with the targets.
        future: covariates that are known for the horizon too; later values are ignored.
        pad_context: pad a short context to `cfg.context_len` with missing values, on which the
            forecast depends. False is faster.

    Raises:
        ArgumentError: shapes do not agree, or the horizon is not in range.
    """
    _check(cfg, targets, horizon, past, future)

    def one_sign(sign: Array) -> Array:
        x = _inputs(cfg, sign * targets, None if past is None else sign * past)
        known = None if future is None else sign * future[:, : targets.shape[1] + horizon]
        values = _with_future(cfg, x.values, known)
        values = _fix_length(values, cfg.context_len + cfg.future_len, pad=pad_context)
        scale = scaling.fit_scale(values, cfg)
        patches = scaling.to_patches(scaling.apply_scale(scale, values, cfg), cfg.patch_size)
        roles = _roles(cfg, values, len(targets), has_future=future is not None)
        hidden, _ = TiRex(cfg).apply({"params": params}, patches, None, roles)
        # A position predicts the patch after it.
        last = hidden[: len(targets), -cfg.future_len // cfg.patch_size - 1 : -1]
        return _finish(cfg, params, last, _of_targets(scale, len(targets)), x.trend, horizon)

    return _merge_signs(cfg, jax.vmap(one_sign)(_signs(cfg, targets.dtype)))


@functools.partial(jax.jit, static_argnames=("cfg", "pad_context"))
def start(
    cfg: TiRexConfig,
    params: PyTree,
    targets: Float[Array, "V T"],
    *,
    past: Float[Array, "V_past T"] | None = None,
    future: Any = None,
    pad_context: bool = True,
) -> StreamState:
    """The state after a context, which `append` and `predict` take.

    The scale of each variate, and whether its differences are forecast, are those of this context.
    `predict` right after it is `forecast`. Arguments and errors are those of `forecast`.

    Raises:
        UnsupportedError: `future` is given, as it cannot be streamed.
    """
    if future is not None:
        raise UnsupportedError(
            "start: covariates with a known future cannot be streamed, as they are read backward "
            "from the end of the horizon, so that new values change all of their states; call "
            "`forecast` with the context, or pass their past as `past`."
        )
    _check(cfg, targets, 1, past, None)

    def one_sign(sign: Array) -> StreamState:
        x = _inputs(cfg, sign * targets, None if past is None else sign * past)
        values = _fix_length(x.values, cfg.context_len, pad=pad_context)
        scale = scaling.fit_scale(values, cfg)
        hidden, cells = _run(cfg, params, values, scale, None, len(targets))
        return StreamState(cells, hidden[:, -1:], scale, x.trend)

    return jax.vmap(one_sign)(_signs(cfg, targets.dtype))


@functools.partial(jax.jit, static_argnames=("cfg",))
def append(
    cfg: TiRexConfig,
    params: PyTree,
    state: StreamState,
    targets: Float[Array, "V T"],
    *,
    past: Float[Array, "V_past T"] | None = None,
) -> StreamState:
    """The state after more values: a multiple of `cfg.patch_size`, NaN where they are missing.

    The cost of a patch does not depend on what came before it.

    Raises:
        ArgumentError: shapes do not agree with each other or with the state, or the last patch is
            not complete.
    """
    _check(cfg, targets, 1, past, None)
    _check_stream(cfg, state, targets, past)

    def one_sign(sign: Array, state: StreamState) -> StreamState:
        x = _inputs(cfg, sign * targets, None if past is None else sign * past, state.trend)
        hidden, cells = _run(cfg, params, x.values, state.scale, state.cells, len(targets))
        return StreamState(cells, hidden[:, -1:], state.scale, x.trend)

    return jax.vmap(one_sign)(_signs(cfg, targets.dtype), state)


@functools.partial(jax.jit, static_argnames=("cfg", "horizon"))
def predict(
    cfg: TiRexConfig, params: PyTree, state: StreamState, horizon: int
) -> Float[Array, "V quantiles horizon"]:
    """Quantiles of the `horizon` values that follow the state, which stays as it is."""
    num_targets = state.trend.level.shape[1]
    num_variates, dtype = state.scale.mean.shape[1], state.scale.mean.dtype
    _check_horizon(cfg, horizon)

    def one_sign(state: StreamState) -> Array:
        hidden = state.hidden
        if horizon > cfg.patch_size:
            length = (math.ceil(horizon / cfg.patch_size) - 1) * cfg.patch_size
            empty = jnp.full((num_variates, length), jnp.nan, dtype)
            more, _ = _run(cfg, params, empty, state.scale, state.cells, num_targets)
            hidden = jnp.concatenate([hidden, more], axis=1)
        scale = _of_targets(state.scale, num_targets)
        return _finish(cfg, params, hidden[:num_targets], scale, state.trend, horizon)

    return _merge_signs(cfg, jax.vmap(one_sign)(state))


def _signs(cfg: TiRexConfig, dtype: Any) -> Float[Array, "signs"]:
    return jnp.asarray([1, -1] if cfg.sign_flip else [1], dtype)


def _merge_signs(
    cfg: TiRexConfig, y: Float[Array, "signs V quantiles horizon"]
) -> Float[Array, "V quantiles horizon"]:
    """Mean of the forecasts of the series and of the negated one, whose quantiles are mirrored."""
    if not cfg.sign_flip:
        return y[0]
    return (y[0] - y[1][:, jnp.asarray(cfg.complements)]) / 2


def _inputs(
    cfg: TiRexConfig,
    targets: Float[Array, "V T"],
    past: Float[Array, "V_past T"] | None,
    before: Trend | None = None,
) -> _Inputs:
    """Targets, or their differences, and past covariates; `before` is the trend so far."""
    if before is None:
        nothing = jnp.zeros(len(targets), targets.dtype)
        is_diff = scaling.has_trend(targets) if cfg.difference else jnp.zeros(len(targets), bool)
        before, diffs = Trend(is_diff, nothing, nothing), scaling.difference(targets)
    else:
        diffs = scaling.difference(targets, before.previous)
    level = scaling.last_level(targets, before.level)
    values = jnp.where(before.is_diff[:, None], diffs, targets)
    values = values if past is None else jnp.concatenate([values, past])
    return _Inputs(values, Trend(before.is_diff, targets[:, -1], level))


def _run(
    cfg: TiRexConfig,
    params: PyTree,
    values: Float[Array, "V T"],
    scale: Scale,
    cells: tuple[CellState, ...] | None,
    num_targets: int,
) -> tuple[Float[Array, "V N D"], tuple[CellState, ...]]:
    """The network on more values of variates without a known future."""
    patches = scaling.to_patches(scaling.apply_scale(scale, values, cfg), cfg.patch_size)
    roles = _roles(cfg, values, num_targets, has_future=False)
    return TiRex(cfg).apply({"params": params}, patches, cells, roles)


def _roles(
    cfg: TiRexConfig, values: Float[Array, "V T"], num_targets: int, *, has_future: bool
) -> Roles | None:
    """One group; None for a single variate."""
    V = len(values)
    if V == 1:
        return None
    is_target = jnp.arange(V) < num_targets
    is_known = ~jnp.isnan(values[:, -cfg.future_len :]).all(axis=1) & ~is_target
    return Roles(jnp.zeros(V, jnp.int32), is_target, is_known if has_future else None)


def _with_future(
    cfg: TiRexConfig, values: Float[Array, "V T"], known: Float[Array, "V_future T_long"] | None
) -> Float[Array, "V_all T_all"]:
    """All variates up to the longest horizon; what is not known there is missing."""
    length = values.shape[1] + cfg.future_len
    parts = [values] if known is None else [values, known]
    return jnp.concatenate(
        [jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=jnp.nan) for x in parts]
    )


def _fix_length(values: Float[Array, "V T"], length: int, *, pad: bool) -> Float[Array, "V T2"]:
    """The last `length` values, after missing ones if there are fewer."""
    missing = max(0, length - values.shape[1]) if pad else 0
    padded = jnp.pad(values, ((0, 0), (missing, 0)), constant_values=jnp.nan)
    return padded[:, -length:]


def _of_targets(scale: Scale, num_targets: int) -> Scale:
    return jax.tree.map(lambda leaf: leaf[:num_targets], scale)


def _finish(
    cfg: TiRexConfig,
    params: PyTree,
    hidden: Float[Array, "V N D"],
    scale: Scale,
    trend: Trend,
    horizon: int,
) -> Float[Array, "V quantiles horizon"]:
    """Quantiles in units of the series, from the hidden states of targets."""
    y: Any = TiRex(cfg).apply({"params": params}, hidden, method=TiRex.head)
    y = scaling.undo_scale(scale, y[..., :horizon], cfg)
    return scaling.calibrate(y, trend)


def _check(
    cfg: TiRexConfig, targets: Array, horizon: int, past: Array | None, future: Array | None
) -> None:
    """Raises ArgumentError unless shapes agree and the horizon is in range."""
    _check_horizon(cfg, horizon)
    T = targets.shape[1] if targets.ndim == 2 else 0
    if not T or not len(targets):
        raise ArgumentError(
            "targets must have the shape (variates, values), both at least 1, got "
            f"{targets.shape}; pass a single series as targets[None]."
        )
    if past is not None and (past.ndim != 2 or past.shape[1] != T):
        raise ArgumentError(
            f"past must have the shape (variates, {T}), as long as the targets, got {past.shape}; "
            "pad it with NaN."
        )
    if future is not None and (future.ndim != 2 or future.shape[1] < T + horizon):
        raise ArgumentError(
            f"future must have the shape (variates, {T + horizon}) or be longer, that of targets "
            f"and horizon, got {future.shape}; shorten the horizon or pad it with NaN."
        )


def _check_horizon(cfg: TiRexConfig, horizon: int) -> None:
    if not 1 <= horizon <= cfg.future_len:
        raise ArgumentError(
            f"horizon must be from 1 to {cfg.future_len}, what the model was trained for, got "
            f"{horizon}; change it."
        )


def _check_stream(cfg: TiRexConfig, state: StreamState, targets: Array, past: Array | None) -> None:
    """Raises ArgumentError unless the variates are those of the state, in complete patches."""
    expected = state.trend.level.shape[1], state.scale.mean.shape[1]
    V = len(targets), len(targets) + (0 if past is None else len(past))
    if V != expected:
        raise ArgumentError(
            f"append must get the {expected[0]} targets and {expected[1] - expected[0]} past "
            f"covariates of the state, got {V[0]} and {V[1] - V[0]}; pass all, NaN where missing."
        )
    if targets.shape[1] % cfg.patch_size:
        raise ArgumentError(
            f"append must get complete patches, a multiple of {cfg.patch_size} values, got "
            f"{targets.shape[1]}; collect more values first."
        )
