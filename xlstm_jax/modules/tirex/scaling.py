"""What surrounds the network of TiRex-2: scales, patches, trends, and the width of its quantiles.

Missing values are NaN. Gradients stay finite where values are missing or constant.

Source: Podest et al. 2026, arXiv:2607.01204, appendix C; the constants below are those of the
package `tirex-2`, 0.4.0, which are not part of its checkpoints.
"""

from typing import NamedTuple

import jax.numpy as jnp

from xlstm_jax.modules.tirex.config import TiRexConfig
from xlstm_jax.typing import Array, Bool, Float

MIN_TREND_R2, MIN_TREND = 0.87, 1.5
"""A target has a trend if a line explains this share of its variance, and rises or falls over the
context by this many standard deviations."""

MIN_TREND_VALUES = 4

RAW_SCALE, RAW_EXPONENT = 0.90, 0.52
DIFF_SCALE, DIFF_EXPONENT = 1.68, 0.51
"""Distances from the median at step h are multiplied by sqrt(scale) * h ** (exponent - 1/2)."""

MAX_ARCSINH = 20.0  # sinh of it is 2e8, far from overflow


class Scale(NamedTuple):
    """Of each variate; a binary one, of zeros and ones alone, is not scaled."""

    mean: Float[Array, "V"]
    std: Float[Array, "V"]
    is_binary: Bool[Array, "V"]


class Trend(NamedTuple):
    """What turns differences of targets back into levels."""

    is_diff: Bool[Array, "V"]  # the network gets and predicts differences
    previous: Float[Array, "V"]  # the last value; NaN if it is missing
    level: Float[Array, "V"]  # the last value that is not missing; 0 before the first


def masked_mean(x: Float[Array, "V T"], mask: Bool[Array, "V T"]) -> Float[Array, "V 1"]:
    """Mean over the positions of a mask; 0 where it is empty."""
    count = mask.sum(axis=1, keepdims=True).astype(x.dtype)
    return jnp.where(mask, x, 0).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)


def fit_scale(values: Float[Array, "V T"], cfg: TiRexConfig) -> Scale:
    """Mean and standard deviation of the values that are not missing."""
    is_present = ~jnp.isnan(values)
    x = jnp.where(is_present, values, 0)
    mean = masked_mean(x, is_present)
    variance = masked_mean(jnp.square(x - mean), is_present)
    # The square of a tiny bound may underflow, and the derivative of sqrt at 0 is infinite.
    is_tiny = variance <= jnp.finfo(values.dtype).tiny
    std = jnp.where(is_tiny, 0, jnp.sqrt(jnp.where(is_tiny, 1, variance)))
    std = jnp.where(is_present.any(axis=1, keepdims=True), jnp.maximum(std, cfg.scale_eps), 1)
    if not cfg.binary_aware:
        return Scale(mean[:, 0], std[:, 0], jnp.zeros(values.shape[:1], bool))
    is_binary = (~is_present | (x == 0) | (x == 1)).all(axis=1)
    return Scale(jnp.where(is_binary, 0, mean[:, 0]), jnp.where(is_binary, 1, std[:, 0]), is_binary)


def apply_scale(scale: Scale, values: Float[Array, "V T"], cfg: TiRexConfig) -> Float[Array, "V T"]:
    """Standardized values, compressed by arcsinh."""
    is_present = ~jnp.isnan(values)
    x = jnp.where(is_present, values, 0)  # a gradient through NaN is NaN
    x = (x - scale.mean[:, None]) / scale.std[:, None]
    if cfg.arcsinh:
        x = jnp.where(scale.is_binary[:, None], x, jnp.arcsinh(x))
    return jnp.where(is_present, x, jnp.nan)


def undo_scale(
    scale: Scale, y: Float[Array, "V quantiles T"], cfg: TiRexConfig
) -> Float[Array, "V quantiles T"]:
    """The inverse of `apply_scale`, for quantiles."""
    mean, std, is_binary = (leaf[:, None, None] for leaf in scale)
    if cfg.arcsinh:
        y = jnp.where(is_binary, y, jnp.sinh(jnp.clip(y, -MAX_ARCSINH, MAX_ARCSINH)))
    return y * std + mean


def to_patches(values: Float[Array, "V T"], size: int) -> Float[Array, "V N P"]:
    """Patches of `size` values; the first one is padded with missing values."""
    padding = -values.shape[1] % size
    values = jnp.pad(values, ((0, 0), (padding, 0)), constant_values=jnp.nan)
    return values.reshape(values.shape[0], -1, size)


def has_trend(values: Float[Array, "V T"]) -> Bool[Array, "V"]:
    """Whether a line, fitted by least squares, explains most of the values."""
    T, is_present = values.shape[1], ~jnp.isnan(values)
    t = jnp.broadcast_to(jnp.arange(T, dtype=values.dtype)[None], values.shape)

    def centered(x):
        x = x - masked_mean(x, is_present)
        return jnp.where(is_present, x - masked_mean(x, is_present), 0)  # what rounding left over

    t, x = centered(t), centered(jnp.where(is_present, values, 0))
    count = is_present.sum(axis=1)
    tt, xx, tx = (jnp.sum(a * b, axis=1) for a, b in ((t, t), (x, x), (t, x)))
    std = jnp.sqrt(xx / jnp.maximum(count - 1, 1).astype(x.dtype))
    is_valid = (count >= MIN_TREND_VALUES) & (std >= 1e-12)
    tt, xx, std = (jnp.where(is_valid, a, 1) for a in (tt, xx, std))
    r2, rise = tx * tx / (tt * xx), T * jnp.abs(tx) / (tt * std)
    return is_valid & (rise >= MIN_TREND) & (r2 >= MIN_TREND_R2)


def difference(
    values: Float[Array, "V T"], previous: Float[Array, "V"] | None = None
) -> Float[Array, "V T"]:
    """Differences of successive values; `previous` is before the first one, None: none is."""
    before = jnp.nan if previous is None else previous[:, None]
    before = jnp.broadcast_to(before, values[:, :1].shape).astype(values.dtype)
    diffs = jnp.diff(jnp.concatenate([before, values], axis=1), axis=1)
    return diffs if previous is not None else diffs.at[:, 0].set(0)


def last_level(values: Float[Array, "V T"], before: Float[Array, "V"]) -> Float[Array, "V"]:
    """The last value that is not missing, or `before`."""
    is_present = ~jnp.isnan(values)
    index = values.shape[1] - 1 - jnp.argmax(jnp.flip(is_present, axis=1), axis=1)
    last = jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
    return jnp.where(is_present.any(axis=1), last, before)


def calibrate(y: Float[Array, "V quantiles T"], trend: Trend) -> Float[Array, "V quantiles T"]:
    """Quantiles with a width that fits the horizon, as levels."""
    dtype, middle = y.dtype, y.shape[1] // 2
    h = jnp.arange(1, y.shape[2] + 1, dtype=dtype)[None, None]
    median = y[:, middle : middle + 1]
    offset = y - median
    raw = median + RAW_SCALE**0.5 * h ** (RAW_EXPONENT - 0.5) * offset
    # Offsets of differences add up like those of independent errors.
    square = jnp.cumsum(jnp.square(offset), axis=2)
    is_zero = square == 0  # where the derivative of sqrt is infinite
    root = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    sign = jnp.sign(offset.sum(axis=2, keepdims=True))
    level = trend.level[:, None, None] + jnp.cumsum(median, axis=2)
    levels = level + DIFF_SCALE**0.5 * h ** (DIFF_EXPONENT - 0.5) * sign * root
    return jnp.where(trend.is_diff[:, None, None], levels, raw)
