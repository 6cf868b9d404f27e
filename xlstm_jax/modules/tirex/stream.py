"""Forecasts of TiRex-2 from a state that reads a series patch by patch.

Targets and past covariates are read forward only, so that their state after a patch says all about
the patches before. Two things of a context are fixed by its start: the scale of each variate, and
whether a target is forecast by its differences.

Source: Podest et al. 2026, arXiv:2607.01204.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.modules.tirex import scaling, series
from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.modules.tirex.network import CellState, TiRex
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
    series.check(cfg, targets, 1, past, None)

    def one_sign(sign: Array) -> StreamState:
        x = series.inputs(cfg, sign * targets, None if past is None else sign * past)
        values = series.fix_length(x.values, cfg.context_len, pad=pad_context)
        scale = scaling.fit_scale(values, cfg)
        hidden, cells = _run(cfg, params, values, scale, None, len(targets))
        return StreamState(cells, hidden[:, -1:], scale, x.trend)

    return jax.vmap(one_sign)(series.signs(cfg, targets.dtype))


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
    series.check(cfg, targets, 1, past, None)
    _check_stream(cfg, state, targets, past)

    def one_sign(sign: Array, state: StreamState) -> StreamState:
        x = series.inputs(cfg, sign * targets, None if past is None else sign * past, state.trend)
        hidden, cells = _run(cfg, params, x.values, state.scale, state.cells, len(targets))
        return StreamState(cells, hidden[:, -1:], state.scale, x.trend)

    return jax.vmap(one_sign)(series.signs(cfg, targets.dtype), state)


@functools.partial(jax.jit, static_argnames=("cfg", "horizon"))
def predict(
    cfg: TiRexConfig, params: PyTree, state: StreamState, horizon: int
) -> Float[Array, "V quantiles horizon"]:
    """Quantiles of the `horizon` values that follow the state, which stays as it is."""
    num_targets = state.trend.level.shape[1]
    num_variates, dtype = state.scale.mean.shape[1], state.scale.mean.dtype
    series.check_horizon(cfg, horizon)

    def one_sign(state: StreamState) -> Array:
        hidden = state.hidden
        if horizon > cfg.patch_size:
            length = (math.ceil(horizon / cfg.patch_size) - 1) * cfg.patch_size
            empty = jnp.full((num_variates, length), jnp.nan, dtype)
            more, _ = _run(cfg, params, empty, state.scale, state.cells, num_targets)
            hidden = jnp.concatenate([hidden, more], axis=1)
        scale = series.of_targets(state.scale, num_targets)
        return series.finish(cfg, params, hidden[:num_targets], scale, state.trend, horizon)

    return series.merge_signs(cfg, jax.vmap(one_sign)(state))


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
    roles = series.roles(cfg, values, num_targets, has_future=False)
    return TiRex(cfg).apply({"params": params}, patches, cells, roles)


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
