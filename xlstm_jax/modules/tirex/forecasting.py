"""Forecasts of TiRex-2 for one series: targets, past covariates and covariates with a known future.

All functions are pure and have static shapes: for several series of the same shapes, `jax.vmap`
them over the arrays. Missing values are NaN.

Source: Podest et al. 2026, arXiv:2607.01204; the defaults are those of `forecast` of the package
`tirex-2`, 0.4.0.
"""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.modules.tirex import scaling, series
from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.modules.tirex.network import TiRex
from xlstm_jax.typing import Array, Float, PyTree


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
    series.check(cfg, targets, horizon, past, future)

    def one_sign(sign: Array) -> Array:
        x = series.inputs(cfg, sign * targets, None if past is None else sign * past)
        known = None if future is None else sign * future[:, : targets.shape[1] + horizon]
        values = _with_future(cfg, x.values, known)
        values = series.fix_length(values, cfg.context_len + cfg.future_len, pad=pad_context)
        scale = scaling.fit_scale(values, cfg)
        patches = scaling.to_patches(scaling.apply_scale(scale, values, cfg), cfg.patch_size)
        roles = series.roles(cfg, values, len(targets), has_future=future is not None)
        hidden, _ = TiRex(cfg).apply({"params": params}, patches, None, roles)
        # A position predicts the patch after it.
        last = hidden[: len(targets), -cfg.future_len // cfg.patch_size - 1 : -1]
        return series.finish(
            cfg, params, last, series.of_targets(scale, len(targets)), x.trend, horizon
        )

    return series.merge_signs(cfg, jax.vmap(one_sign)(series.signs(cfg, targets.dtype)))


def _with_future(
    cfg: TiRexConfig, values: Float[Array, "V T"], known: Float[Array, "V_future T_long"] | None
) -> Float[Array, "V_all T_all"]:
    """All variates up to the longest horizon, where unknown values are missing."""
    length = values.shape[1] + cfg.future_len
    parts = [values] if known is None else [values, known]
    return jnp.concatenate(
        [jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=jnp.nan) for x in parts]
    )
