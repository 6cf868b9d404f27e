"""Time models: seconds of an inference step from its FLOPs and the bytes that it moves.

Source: arXiv:2510.02228; the roofline: Williams et al. 2009.
"""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.scaling.checks import Column, points
from xlstm_jax.scaling.minimize import float64_on_cpu, minimize
from xlstm_jax.typing import Array

TimeModelName = Literal[
    "compute", "memory", "max", "sum", "smooth_max", "roofline", "smooth_roofline"
]
"""With w FLOPs, m bytes, rates F and R and overhead eps: "compute" is w / F + eps; "memory" is
m / R + eps + eps_b * batch size; "max", "sum" and "smooth_max" combine w / F and m / R, and add
eps; "roofline" is w / min(F, R w / m) + eps, and "smooth_roofline" has a smooth minimum."""

SHARPNESS = 8.0
"""Of smooth maxima and minima, relative to the mean of their arguments."""

FLOPS_SCALE, BYTES_SCALE, SECONDS_SCALE = 1e14, 1e12, 1e-3
"""Units in which parameters are of order 1. In raw units, 1e14 beside 1e-3, least squares fail."""


class TimeModel(NamedTuple):
    """A fitted time model; rates that the model does not have are infinite."""

    model: str
    flop_per_s: float
    bytes_per_s: float
    overhead_s: float  # >= 0
    per_sequence_s: float  # >= 0, of each sequence of the batch; "memory" only
    sharpness: float
    rms: float  # of the residuals: seconds, or differences of ln seconds
    num_points: int

    def __call__(self, flops, num_bytes, batch_size=0.0):
        """Seconds, for numbers or arrays of one shape."""
        fitted = (self.flop_per_s, self.bytes_per_s, self.overhead_s, self.per_sequence_s)
        with float64_on_cpu():
            params = [jnp.asarray(x, jnp.float64) for x in fitted]
            inputs = [jnp.asarray(x, jnp.float64) for x in (flops, num_bytes, batch_size)]
            return np.asarray(_seconds(self.model, params, inputs, self.sharpness))


def smooth_max(x: Array, y: Array, sharpness: float | Array = SHARPNESS) -> Array:
    """log((e^(r x) + e^(r y)) / 2) / r, with r = `sharpness` over the mean of x and y.

    The division by 2 lets equal arguments return themselves. The value is between mean and maximum,
    and tends to the maximum as the sharpness grows; the choice of r makes units irrelevant. Of
    negative numbers it is a smooth minimum of their magnitudes.
    """
    rate = sharpness * 2 / jnp.abs(x + y)
    return (jnp.logaddexp(rate * x, rate * y) - jnp.log(2.0)) / rate


def fit_time_model(
    flops: Column | None,
    bytes: Column | None,
    seconds: Column,
    *,
    model: TimeModelName = "roofline",
    batch_size: Column | None = None,
    residuals: Literal["log", "linear"] = "log",
    sharpness: float = SHARPNESS,
) -> TimeModel:
    """Fits effective rates and overheads, all of which are at least 0, by least squares.

    Args:
        flops, bytes, seconds: of each measurement; those with NaN are dropped. "compute" needs no
            bytes, "memory" no FLOPs.
        batch_size: sequences of each; the model "memory" then has an overhead for each sequence.
        residuals: "log" weighs relative errors alike; "linear" is dominated by the longest times.

    Raises:
        ArgumentError: shapes differ, values are not positive, an option is unknown, or there are
            fewer points than parameters.
    """
    _check(model, residuals, has_flops=flops is not None, has_bytes=bytes is not None)
    is_used = _is_used(model, has_batch=batch_size is not None)
    ones = np.ones(len(seconds))  # for what the model does not use
    named = {"flops": flops, "bytes": bytes, "batch_size": batch_size}
    columns = {name: ones if column is None else column for name, column in named.items()}
    (work, moved, batch, time), _ = points(int(is_used.sum()), **columns, seconds=seconds)
    # The rates if each bound were reached by the fastest point, then slower ones.
    bounds = np.array([np.max(work / time) / FLOPS_SCALE, np.max(moved / time) / BYTES_SCALE])
    grid = np.array(
        [
            [np.log(bounds[0] * x), np.log(bounds[1] * y), root, 0.1]
            for x in (1.0, 0.3)
            for y in (1.0, 0.3)
            for root in (0.1, np.sqrt(time.min() / SECONDS_SCALE))
        ]
    )
    data = (work, moved, time, batch, is_used, np.float64(sharpness))
    function = _RESIDUALS[model, residuals]
    minimum = minimize(function, grid, data, np.ones(len(time)), tolerance=1e-10)
    best = int(np.argmin(minimum.objective))
    flop_per_s, bytes_per_s, overhead, per_sequence = _physical(minimum.params[best], is_used, np)
    rms = float(np.sqrt(2 * minimum.objective[best] / len(time)))
    return TimeModel(
        model=model,
        flop_per_s=float(flop_per_s),
        bytes_per_s=float(bytes_per_s),
        overhead_s=float(overhead),
        per_sequence_s=float(per_sequence),
        sharpness=sharpness,
        rms=rms if residuals == "log" else rms * SECONDS_SCALE,
        num_points=len(time),
    )


def _check(model: str, residuals: str, *, has_flops: bool, has_bytes: bool) -> None:
    for name, value, choices in (
        ("model", model, get_args(TimeModelName)),
        ("residuals", residuals, ("log", "linear")),
    ):
        if value not in choices:
            raise ArgumentError(
                f"{name} must be one of {', '.join(choices)}, got {quote(value)}; choose one."
            )
    for name, is_given, other in (("flops", has_flops, "memory"), ("bytes", has_bytes, "compute")):
        if not is_given and model != other:
            raise ArgumentError(
                f"{name} must be given for the model {model!r}, got None; pass them or choose "
                f"model={other!r}."
            )


def _is_used(model: str, *, has_batch: bool) -> np.ndarray:
    """Which of the two rates, the overhead and the overhead per sequence the model has."""
    return np.array(
        [model != "memory", model != "compute", True, model == "memory" and has_batch], float
    )


def _physical(params, is_used, np_):
    """Rates and overheads from ln rates and square roots of overheads, which keep them positive."""
    rates = np_.exp(params[:2]) * np_.array([FLOPS_SCALE, BYTES_SCALE])
    overheads = params[2:] ** 2 * SECONDS_SCALE * is_used[2:]
    return (*np_.where(is_used[:2] > 0, rates, np_.inf), *overheads)


def _seconds(model: str, params, inputs, sharpness):
    flops, num_bytes, batch_size = inputs
    flop_per_s, bytes_per_s, overhead, per_sequence = params
    compute, memory = flops / flop_per_s, num_bytes / bytes_per_s
    if model == "smooth_roofline":
        busy = flops / -smooth_max(-flop_per_s, -bytes_per_s * flops / num_bytes, sharpness)
    elif model == "smooth_max":
        busy = smooth_max(compute, memory, sharpness)
    elif model in ("max", "roofline"):
        busy = jnp.maximum(compute, memory)
    else:
        busy = compute + memory
    return busy + overhead + per_sequence * batch_size


def _make_residuals(model: str, kind: str):
    def residuals(params, data):
        flops, num_bytes, seconds, batch_size, is_used, sharpness = data
        inputs = (flops, num_bytes, batch_size)
        predicted = _seconds(model, _physical(params, is_used, jnp), inputs, sharpness)
        if kind == "log":
            return jnp.log(predicted / seconds)
        return (predicted - seconds) / SECONDS_SCALE

    return residuals


# Made once: `minimize` compiles a program for each function.
_RESIDUALS = {
    (model, kind): _make_residuals(model, kind)
    for model in get_args(TimeModelName)
    for kind in ("log", "linear")
}
