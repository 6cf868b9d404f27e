"""Metrics of a logging interval, accumulated on the device and fetched in one transfer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.typing import Array, Float

Metrics = dict[str, Array]
"""The metrics of one step by name, each a scalar."""

# How the metrics of single steps are combined to those of an interval.
PER_TOKEN = ("loss", "z_loss", "accuracy")  # mean over steps, weighted by their tokens
PER_STEP = ("grad_norm", "update_norm", "param_norm", "padding_fraction")  # mean over steps
SUMMED = ("tokens", "documents", "skipped")
LAST = ("lr",)
MAXIMUM = ("skipped_in_a_row",)

NO_LR = -1.0  # the total of `lr` if steps do not report it; not NaN, which JSON lacks


class Totals(NamedTuple):
    """Sums over the steps of one logging interval.

    Skipped steps count in `steps` and in the `SUMMED` metrics, but not in any mean.
    """

    values: dict[str, Float[Any, ""]]
    tokens: Float[Any, ""]  # of the steps that were not skipped
    taken: Float[Any, ""]  # number of steps that were not skipped
    steps: Float[Any, ""]  # number of all steps


def empty() -> Totals:
    """Totals of no steps, on the host."""
    names = PER_TOKEN + PER_STEP + SUMMED + LAST + MAXIMUM
    # Separate arrays: totals are donated, and no buffer may be donated twice.
    zeros = [np.zeros((), np.float32) for _ in range(len(names) + 3)]
    return Totals(dict(zip(names, zeros[3:], strict=True)), *zeros[:3])


def add(totals: Totals, metrics: Metrics) -> Totals:
    """The totals including one more step."""
    taken = metrics["skipped"] == 0
    tokens = jnp.where(taken, metrics["tokens"], 0.0).astype(jnp.float32)
    count = taken.astype(jnp.float32)
    values = {}
    for name, value in totals.values.items():
        metric = jnp.asarray(metrics.get(name, NO_LR) if name in LAST else metrics[name])
        metric = metric.astype(jnp.float32)
        if name in PER_TOKEN + PER_STEP:
            weighted = metric * tokens if name in PER_TOKEN else metric
            # `where`, because a product with 0 would keep the NaN of a skipped step.
            values[name] = value + jnp.where(taken, weighted, 0.0)
        elif name in SUMMED:
            # The tokens of a batch with weights of NaN are not counted.
            values[name] = value + jnp.where(jnp.isfinite(metric), metric, 0.0)
        else:
            values[name] = metric if name in LAST else jnp.maximum(value, metric)
    return Totals(values, totals.tokens + tokens, totals.taken + count, totals.steps + 1)


def summarize(totals: Totals) -> dict[str, float | None]:
    """The metrics of an interval; means are None if all of its steps were skipped."""
    host = jax.device_get(totals)
    summary: dict[str, float | None] = {}
    for name, value in host.values.items():
        if name in PER_TOKEN + PER_STEP:
            count = host.tokens if name in PER_TOKEN else host.taken
            summary[name] = float(value / count) if count else None
        elif name not in LAST:
            summary[name] = int(value)
        elif value >= 0:
            summary[name] = float(value)
    loss = summary["loss"]
    summary["perplexity"] = None if loss is None else math.exp(min(loss, 700.0))  # no overflow
    return summary
