"""How long a sweep takes on this machine, from a few steps of some of its runs."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from xlstm_jax.scaling.sweep import RunSpec
from xlstm_jax.train.run import fit

STEPS, INTERVAL = 12, 4
"""Steps of a calibration run, and steps that are timed together; the first ones compile."""


class Speed(NamedTuple):
    """The measured speed of one family."""

    flops: list[float]  # of a step, ascending: of its smallest and its largest run
    seconds: list[float]  # of such a step
    start_seconds: float  # before the second interval: data, initialization, compilation


def calibrate(specs: Sequence[RunSpec]) -> dict[str, Speed]:
    """Trains `STEPS` steps of the runs of every family with the cheapest and the costliest step.

    Uses the data of the runs and saves nothing.
    """
    speeds = {}
    for family in dict.fromkeys(spec.model for spec in specs):
        mine = sorted((spec for spec in specs if spec.model == family), key=_step_flops)
        ends = mine[:1] if _step_flops(mine[0]) == _step_flops(mine[-1]) else [mine[0], mine[-1]]
        times = [_time(spec) for spec in ends]
        speeds[family] = Speed(
            [_step_flops(spec) for spec in ends],
            [seconds for seconds, _ in times],
            max(start for _, start in times),
        )
    return speeds


def estimate(spec: RunSpec, speeds: Mapping[str, Speed]) -> float:
    """Seconds of a run: its start, and its steps, interpolated in their FLOPs; no evaluations."""
    speed = speeds[spec.model]
    per_step = float(np.interp(_step_flops(spec), speed.flops, speed.seconds))
    return speed.start_seconds + spec.cfg.train.steps * per_step


def _step_flops(spec: RunSpec) -> float:
    return spec.train_flops / spec.cfg.train.steps


def _time(spec: RunSpec) -> tuple[float, float]:
    """Median seconds of a step, and seconds of the start."""
    train = dataclasses.replace(
        spec.cfg.train,
        steps=STEPS,
        warmup_steps=0,
        cooldown_steps=0,
        log_every=INTERVAL,
        eval_every=0,
        checkpoint_every=0,
        checkpoint_minutes=0.0,
        watch="none",
        writers=(),
        profile=None,
    )
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(spec.cfg, train=train)
        fit(cfg, Path(folder) / "run", on_metrics=lambda step, record: records.append(record))
    jax.clear_caches()
    times = [record["step_time"] for record in records if record.get("step_time") is not None]
    later = times[1:] or times
    seconds = float(np.median(later))
    return seconds, max(0.0, INTERVAL * (times[0] - seconds))
