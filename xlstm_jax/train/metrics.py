"""Metrics of many steps, accumulated on the device and fetched in one transfer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.typing import Array, Float

Metrics = dict[str, Array]
"""The metrics of one step by name, each a scalar."""

# How each metric of a step becomes one of many steps.
PER_TOKEN = ("loss", "z_loss", "accuracy")  # weighted by the tokens of the step
PER_STEP = ("grad_norm", "update_norm", "param_norm", "padding_fraction")
ADDED = ("tokens", "documents", "skipped")
LAST = ("lr",)
LARGEST = ("skipped_in_a_row",)


class Totals(NamedTuple):
    """Sums over the steps of one logging interval.

    Skipped steps count in `steps` and in what is added, but no loss or norm of theirs, finite or
    not, enters a mean.
    """

    values: dict[str, Float[Any, ""]]
    tokens: Float[Any, ""]  # of the steps that were taken
    taken: Float[Any, ""]
    steps: Float[Any, ""]


def empty() -> Totals:
    """No step yet; on the host, to be replicated over the devices of a step."""
    names = PER_TOKEN + PER_STEP + ADDED + LAST + LARGEST
    zeros = [np.zeros((), np.float32) for _ in range(len(names) + 3)]
    return Totals(dict(zip(names, zeros[3:], strict=True)), *zeros[:3])


def add(totals: Totals, metrics: Metrics) -> Totals:
    """The totals with one more step in them."""
    taken = metrics["skipped"] == 0
    tokens = jnp.where(taken, metrics["tokens"], 0.0).astype(jnp.float32)
    count = taken.astype(jnp.float32)
    values = {}
    for name, value in totals.values.items():
        now = metrics[name].astype(jnp.float32)
        if name in PER_TOKEN + PER_STEP:
            weighted = now * tokens if name in PER_TOKEN else now
            values[name] = value + jnp.where(taken, weighted, 0.0)
        elif name in ADDED:
            values[name] = value + now
        else:
            values[name] = now if name in LAST else jnp.maximum(value, now)
    return Totals(values, totals.tokens + tokens, totals.taken + count, totals.steps + 1)


def summarize(totals: Totals) -> dict[str, float | None]:
    """Means, sums and maxima of the interval; None where every step of it was skipped."""
    host = jax.device_get(totals)
    summary: dict[str, float | None] = {}
    for name, value in host.values.items():
        if name in PER_TOKEN + PER_STEP:
            count = host.tokens if name in PER_TOKEN else host.taken
            summary[name] = float(value / count) if count else None
        else:
            summary[name] = float(value) if name in LAST else int(value)
    loss = summary["loss"]
    summary["perplexity"] = None if loss is None else math.exp(min(loss, 700.0))
    return summary
