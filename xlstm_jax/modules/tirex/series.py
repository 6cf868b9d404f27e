"""What forecasts and streams of TiRex-2 share: their inputs, outputs and checks.

A series is forecast once, or with `sign_flip` twice: as it is and negated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.tirex import scaling
from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.modules.tirex.network import Roles, TiRex
from xlstm_jax.modules.tirex.scaling import Scale, Trend
from xlstm_jax.typing import Array, Float, PyTree


class Inputs(NamedTuple):
    """Variates of a series before scaling, targets first."""

    values: Float[Array, "V T"]  # targets may be differences
    trend: Trend  # of the targets


def signs(cfg: TiRexConfig, dtype: Any) -> Float[Array, "signs"]:
    """What a series is multiplied by, once per pass."""
    return jnp.asarray([1, -1] if cfg.sign_flip else [1], dtype)


def merge_signs(
    cfg: TiRexConfig, y: Float[Array, "signs V quantiles horizon"]
) -> Float[Array, "V quantiles horizon"]:
    """Mean of the forecasts of the series and of the negated one, whose quantiles are mirrored."""
    if not cfg.sign_flip:
        return y[0]
    return (y[0] - y[1][:, jnp.asarray(cfg.complements)]) / 2


def inputs(
    cfg: TiRexConfig,
    targets: Float[Array, "V T"],
    past: Float[Array, "V_past T"] | None,
    before: Trend | None = None,
) -> Inputs:
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
    return Inputs(values, Trend(before.is_diff, targets[:, -1], level))


def roles(
    cfg: TiRexConfig, values: Float[Array, "V T"], num_targets: int, *, has_future: bool
) -> Roles | None:
    """One group; None for a single variate."""
    V = len(values)
    if V == 1:
        return None
    is_target = jnp.arange(V) < num_targets
    is_known = ~jnp.isnan(values[:, -cfg.future_len :]).all(axis=1) & ~is_target
    return Roles(jnp.zeros(V, jnp.int32), is_target, is_known if has_future else None)


def fix_length(values: Float[Array, "V T"], length: int, *, pad: bool) -> Float[Array, "V T2"]:
    """The last `length` values; `pad` puts missing ones before a shorter series."""
    missing = max(0, length - values.shape[1]) if pad else 0
    padded = jnp.pad(values, ((0, 0), (missing, 0)), constant_values=jnp.nan)
    return padded[:, -length:]


def of_targets(scale: Scale, num_targets: int) -> Scale:
    """The scale without that of covariates."""
    return jax.tree.map(lambda leaf: leaf[:num_targets], scale)


def finish(
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


def check(
    cfg: TiRexConfig, targets: Array, horizon: int, past: Array | None, future: Array | None
) -> None:
    """Raises ArgumentError unless shapes agree and the horizon is in range."""
    check_horizon(cfg, horizon)
    for name, x in (("targets", targets), ("past", past), ("future", future)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ArgumentError(
                f"{name} must be floating-point numbers, got {x.dtype}; convert them to float32."
            )
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


def check_horizon(cfg: TiRexConfig, horizon: int) -> None:
    """Raises ArgumentError unless the network can forecast so many values."""
    if not 1 <= horizon <= cfg.future_len:
        raise ArgumentError(
            f"horizon must be from 1 to {cfg.future_len}, what the model was trained for, got "
            f"{horizon}; change it."
        )
