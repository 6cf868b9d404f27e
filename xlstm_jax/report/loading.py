"""Reads run directories, in whatever state they are, for a report."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import ConfigError, flatten, read_json, user_path
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.report import gates
from xlstm_jax.report.runs import Run, Status, Summary
from xlstm_jax.report.series import (
    MAX_POINTS,
    Table,
    make_table,
    number,
    thin_table,
    training_seconds,
    with_axes,
)
from xlstm_jax.train import lock, rundir

# Metrics of training records; "skipped" becomes the number of all skipped steps so far.
TRAINING = ("loss", "tokens_per_second", "mfu", "data_wait", "goodput", "grad_norm", "lr")
TRAINING += ("skipped", "tokens_seen", "step_time", "skipped_in_a_row")
# "valid_loss", and the like for each set of `data.eval_sets`.
VALIDATION = re.compile(r"(.+)_(loss|bits_per_byte|accuracy)")
NOT_VALIDATION = ("z_loss",)

BYTES_PER_VALUE = 9  # of the page; about


def find(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The directories of runs by names that tell them apart; a repeated directory counts once.

    Raises:
        ConfigError: `paths` is empty, or one is not the directory of a run.
    """
    folders = list({(path := user_path(p)).resolve(): path for p in paths}.values())
    if not folders:
        raise ConfigError("a report needs at least one run, got none; pass run directories.")
    for folder in folders:
        if not any((folder / name).is_file() for name in _FILES):
            problem = "has none of these" if folder.is_dir() else "is not a directory"
            raise ConfigError(
                f"RUN must be the directory of a run, with {' or '.join(_FILES)}, but "
                f"{quote_path(folder)} {problem}; pass another."
            )
    return dict(zip(_names(folders), folders, strict=True))


_FILES = (rundir.CONFIG, rundir.RUN, rundir.METRICS)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    names = [gates.label(path[-1]) for path in parts]
    for depth in range(2, max(map(len, parts)) + 2):
        if len(set(names)) == len(names):
            return names
        names = [gates.label("/".join(path[-depth:])) for path in parts]
    return [f"{name} ({n})" for n, name in enumerate(names, 1)]  # equal where truncated


@np.errstate(all="ignore")  # any number may be in a file; what overflows is not shown
def load(name: str, folder: Path, *, series_bytes: float, gate_bytes: float) -> Run:
    """Reads a run; its series take about these bytes of the page.

    Raises:
        ConfigError: a file of the run is damaged. Lines of metrics.jsonl may be.
    """
    records = rundir.read_metrics(folder / rundir.METRICS)
    config, about = _read_table(folder / rundir.CONFIG), _read_table(folder / rundir.RUN)
    train = training_seconds(make_table(records, TRAINING))
    train = with_axes(train, train)
    if "skipped" in train:
        train["skipped"] = np.cumsum(np.nan_to_num(train["skipped"]))
    validation = with_axes(make_table(records, _validation_names(records)), train)
    validation = {gates.label(name): values for name, values in validation.items()}
    summary = _summarize(name, folder, config, about, train, validation)
    if {"data_wait", "step_time"} <= train.keys():
        train["data_wait"] = train["data_wait"] / train["step_time"]
    shown = {x: v for x, v in train.items() if x not in ("step_time", "skipped_in_a_row")}
    limit = int(series_bytes / (BYTES_PER_VALUE * (len(shown) + len(validation))))
    # Enough for the extremes of every metric.
    limits = [min(MAX_POINTS, max(limit, 4 + 2 * len(table))) for table in (shown, validation)]
    return Run(
        summary=summary,
        config=config,
        about=about,
        train=thin_table(shown, limits[0]),
        validation=thin_table(validation, limits[1]),
        gates=gates.collect(records, train, gate_bytes),
    )


def _read_table(path: Path) -> dict[str, Any]:
    """The values of a JSON file of a run, config.json with the defaults of new fields."""
    if not path.is_file():
        return {}
    try:
        values = rundir.stored_config(path) if path.name == rundir.CONFIG else read_json(path)
        if isinstance(values, dict) and flatten(values) is not None:
            return values
    except RecursionError as error:
        raise ConfigError(f"{quote_path(path)} is nested too deeply; restore it.") from error
    raise ConfigError(
        f"{quote_path(path)} must be a table of fields, got {quote(values)}; restore it."
    )


def _validation_names(records: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if VALIDATION.fullmatch(name) and name not in NOT_VALIDATION]


def _summarize(
    name: str,
    folder: Path,
    config: dict[str, Any],
    about: dict[str, Any],
    train: Table,
    validation: Table,
) -> Summary:
    steps = _integer(flatten(config).get("train.steps"))
    last_steps = [int(table["step"][-1]) for table in (train, validation) if len(table["step"])]
    step = max(last_steps, default=0)
    evaluation = {x: _last(validation, x) for x in validation if VALIDATION.fullmatch(x)}
    return Summary(
        name=name,
        path=str(folder),
        status=_status(folder, config, train, step, steps),
        step=step,
        steps=steps,
        tokens_seen=_integer(_last(train, "tokens_seen")),
        seconds=_last(train, "seconds"),
        num_params=_integer(about.get("num_params")),
        loss=_last(train, "loss"),
        evaluation={x: value for x, value in evaluation.items() if value is not None},
        tokens_per_second=_median(train, "tokens_per_second"),
        mfu=_median(train, "mfu"),
        goodput=_last(train, "goodput"),
        skipped=_integer(_last(train, "skipped")) or 0,
    )


def _status(
    folder: Path, config: dict[str, Any], train: Table, step: int, steps: int | None
) -> Status:
    if steps is not None and step >= steps:
        return "finished"
    if lock.may_be_locked(folder):
        return "training"
    if step == 0:
        return "no records"
    dump = _read_table(folder / rundir.DIVERGED)
    limit = number(flatten(config).get("train.max_consecutive_skips"))
    # The dump remains when a resumed run passes these steps.
    is_last = step <= number(dump.get("first_skipped_step")) + limit
    is_last |= (_last(train, "skipped_in_a_row") or 0) >= limit
    return "diverged" if dump and is_last else "stopped"


def _last(table: Table, name: str) -> float | None:
    """The last number of a column."""
    values = table.get(name, np.array([]))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _median(table: Table, name: str) -> float | None:
    values = table.get(name, np.array([]))
    values = values[np.isfinite(values)]
    return float(np.percentile(values, 50, method="lower")) if len(values) else None


def _integer(value: Any) -> int | None:
    value = number(value)
    return int(value) if value == value else None
