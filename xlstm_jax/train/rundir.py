"""The run directory: config, records and compiled programs; all files except checkpoints."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import (
    IMPORTS,
    ConfigError,
    differences,
    fingerprint,
    flatten,
    from_dict,
    read_json,
    to_dict,
    with_imports,
)
from xlstm_jax.data.loader import DATASETS
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.train import checkpoint, lock
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.processes import log

CONFIG, RUN, METRICS = "config.json", "run.json", "metrics.jsonl"
BAD_METRICS = "metrics.bad.jsonl"  # lines of METRICS that are not records
CURVE, DIVERGED = "loss.png", "diverged.json"

# What else a run writes, besides its checkpoints, CONFIG and RUN; patterns.
_FILES = (METRICS, BAD_METRICS, CURVE, DIVERGED, "process_*.log", "special_tokens.json")
_FILES += ("WEIGHTS_LICENSE.txt",)
TOKENIZER, GATES, PROFILE, EXPORT = "tokenizer", "gates", "profile", "export"
_FOLDERS = (TOKENIZER, GATES, "tensorboard", PROFILE, EXPORT, "diverged")

# Fields that may differ when a run is resumed, because they do not affect its results.
_INTERVALS = "log_every eval_every eval_batches checkpoint_every checkpoint_minutes keep".split()
_INTERVALS += "export_every watch watch_every writers profile".split()
_LOADING = ("data.verify", "data.workers", "data.cache_dir")
MUTABLE = frozenset({"name", IMPORTS, *_LOADING, *(f"train.{field}" for field in _INTERVALS)})
# These affect results by rounding only: a run may be resumed on other devices.
MUTABLE_PREFIX = "mesh."
MAX_LISTED = 3  # fields that differ, in an error message

_PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def expand(run_dir: str | Path) -> Path:
    """The path with "~" replaced by the home directory."""
    try:
        return Path(run_dir).expanduser()
    except RuntimeError as error:  # no such user
        raise ConfigError(
            f"run_dir={quote(str(run_dir))} must name a user with a home directory; write the path."
        ) from error


MARKS = (checkpoint.FOLDER, RUN, CONFIG)
"""A folder with none of these is neither a run nor a model of transformers."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run, complete or not, rather than one of other weights."""
    # Functions of `os.path`, which are False for a path that is too long.
    if any(os.path.exists(path / name) for name in (checkpoint.FOLDER, RUN)):
        return True
    # Both have a config.json. An invalid one counts as a run, whose loading names the error.
    values = read_json(path / CONFIG) if os.path.isfile(path / CONFIG) else None
    return not isinstance(values, dict) or "model" in values


def tokenizer_of(run_dir: Path, name: str) -> str:
    """The name or path of the tokenizer of a run: its own copy if it has one, else `name`."""
    folder = run_dir / TOKENIZER
    return str(folder) if folder.is_dir() else name


def check_folder(run_dir: Path) -> None:
    """Raises ConfigError unless `run_dir` is, or can become, a folder to write to."""
    # Orbax looks for the files of a checkpoint by a pattern that starts with this path: it would
    # not find them, and save checkpoints that cannot be read.
    if special := [character for character in "*?[" if character in str(run_dir.absolute())]:
        raise ConfigError(
            f"run_dir={quote_path(run_dir)!r} must be a path without {special[0]}, as checkpoints "
            "below it could not be read back; use another."
        )
    # The nearest ancestor that exists, as the directory itself may be new.
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(
            f"run_dir={quote_path(run_dir)!r} must be a folder to write to, but "
            f"{quote_path(existing)} {reason}; use another."
        )


def check(run_dir: Path, cfg: ExperimentConfig) -> None:
    """Checks that `run_dir` is free or belongs to `cfg`; changes nothing.

    Raises:
        ConfigError: the directory contains a run of another config.
    """
    shown = quote_path(run_dir)
    if not (run_dir / CONFIG).exists():
        if checkpoint.latest_step(run_dir) is not None:
            raise ConfigError(
                f"run_dir={shown!r} must have a {CONFIG} beside its checkpoints, but it has "
                "none; use another directory, or fresh=True (--fresh) to discard this run."
            )
        return
    new, stored = to_dict(cfg), stored_config(run_dir / CONFIG)
    train, mutable = cfg.train, MUTABLE
    if train.schedule == "constant" and not train.cooldown_steps and not 0 < train.warmup_steps < 1:
        # The learning rates of past steps do not depend on the number of steps.
        mutable |= {"train.steps"}
    mutable |= {path for path in flatten(new) | flatten(stored) if _is_path(path, new, stored)}
    lines = {
        name: line
        for line in differences(new, stored)
        if (name := line.split(":")[0]) not in mutable and not name.startswith(MUTABLE_PREFIX)
    }
    if lines:
        hint = (
            " Only a constant schedule without cool-down, and with a warm-up counted in steps, can "
            "be extended: other learning rates depend on the number of steps."
        )
        listed = "; ".join([*lines.values()][:MAX_LISTED])
        more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        raise ConfigError(
            f"run_dir={shown!r} belongs to another config ({listed}{more}); "
            "use another directory, the same values, or fresh=True (--fresh) to discard that run."
            + (hint if "train.steps" in lines else "")
        )


def stored_config(path: Path) -> dict[str, Any]:
    """The values of a config.json, with the defaults of fields that are newer than it."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a table of fields, got {quote(values)}; restore it.")
    try:
        return to_dict(from_dict(ExperimentConfig, values))
    except ConfigError:  # of another program, or of block kinds that are not imported
        return ExperimentConfig.upgrade(values)


def _is_path(field: str, new: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a field only locates data, which are compared by content after they are loaded."""
    if field not in ("data.source", "data.pattern") and not field.startswith(
        ("data.sources.", "data.eval_sets.")
    ):
        return False
    values = (flatten(values).get(field) for values in (new, stored))
    return not any(isinstance(value, str) and value in DATASETS for value in values)


def check_fresh(run_dir: Path) -> None:
    """Raises ConfigError unless `run_dir` is empty or contains a run, which can be discarded."""
    names = {path.name for path in run_dir.iterdir()} - {lock.NAME} if run_dir.exists() else ()
    if names and not _is_run(run_dir):
        raise ConfigError(
            f"run_dir={quote_path(run_dir)!r} must be empty or a run to start afresh, but it has "
            f"no {RUN} of a run; use another directory, or delete its files yourself."
        )


def _is_run(run_dir: Path) -> bool:
    try:
        about = read_json(run_dir / RUN)
    except (ConfigError, OSError):
        return False
    return isinstance(about, dict) and {"fingerprint", "versions", "config"} <= about.keys()


def discard(run_dir: Path) -> None:
    """Deletes the files of a run, and no other files in its directory."""
    checkpoint.delete_all(run_dir)
    for pattern in _FILES:
        for path in run_dir.glob(pattern):
            path.unlink()
    for name in _FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    # `prepare` replaces RUN: an interrupted deletion can be repeated.
    (run_dir / CONFIG).unlink(missing_ok=True)


def tracker_id(run_dir: Path, *, fresh: bool) -> str:
    """What identifies the run to services of `train.writers`: the stored id, or a new one."""
    stored = {} if fresh or not _is_run(run_dir) else read_json(run_dir / RUN)
    return str(stored.get("tracker_id") or secrets.token_hex(4))


def add_facts(run_dir: Path, facts: dict[str, Any]) -> None:
    """Adds values to run.json."""
    write_json(run_dir / RUN, read_json(run_dir / RUN) | facts)


def prepare(run_dir: Path, cfg: ExperimentConfig, facts: dict[str, Any], step: int) -> None:
    """Writes config.json and run.json, and drops metrics after `step`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    about = {
        "name": cfg.name,
        "fingerprint": fingerprint(cfg),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "versions": versions(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "git": _git_state(),
        **facts,
        "config": to_dict(cfg),
    }
    write_json(run_dir / RUN, about)  # first: it marks the directory as that of a run
    write_json(run_dir / CONFIG, with_imports(to_dict(cfg)))
    lines = _read_lines(run_dir / METRICS)
    if bad := {number: line for number, (line, record) in enumerate(lines, 1) if record is None}:
        _set_aside(run_dir, bad)
    # Records that a killed run wrote after its last checkpoint will be written again.
    records = [line for line, record in lines if record is not None and record["step"] <= step]
    write(run_dir / METRICS, b"".join(line + b"\n" for line in records))


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect results."""
    numbers = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers


def drop_metrics(run_dir: Path, step: int) -> None:
    """Drops records after a step, in place: a writer may append to the file meanwhile."""
    path, end = run_dir / METRICS, 0
    with path.open("rb+") as file:
        for line in file:
            record = _parse_record(line)
            if record is not None and record["step"] > step:
                break
            end += len(line)
        file.truncate(end)


def _set_aside(run_dir: Path, lines: dict[int, bytes]) -> None:
    """Appends lines of METRICS to BAD_METRICS; a crash may repeat but not lose them."""
    with (run_dir / BAD_METRICS).open("ab") as file:
        file.writelines(line + b"\n" for line in lines.values())
    numbers = ", ".join(map(str, list(lines)[:5])) + (", ..." if len(lines) > 5 else "")
    log.warning(
        "%s: %d lines are not records and were moved to %s: %s",
        quote_path(run_dir / METRICS), len(lines), BAD_METRICS, numbers,
    )  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write(path, json.dumps(value, indent=2).encode() + b"\n")


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically: a draft beside it, which is then renamed."""
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    except OSError as error:  # such as a full disk, which needs the space
        draft.unlink(missing_ok=True)
        error.filename = str(path)  # absent from errors of writing
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; lines that are not records are ignored."""
    return [record for _, record in _read_lines(path) if record is not None]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The non-empty lines of a metrics file, each with its record or None if it is damaged."""
    lines = path.read_bytes().split(b"\n") if path.exists() else ()
    return [(line, _parse_record(line)) for line in lines if line.strip()]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    def number(text: str) -> float:
        value = float(text)  # also of integers: bounded by the range of a float
        if not math.isfinite(value):
            raise ValueError(text)
        return value if set(text) & set(".eE") else int(text)

    try:
        record = json.loads(
            line.decode(), parse_int=number, parse_float=number, parse_constant=number
        )
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record and 0 <= record["step"] < 2**63 else None


def _git_state() -> dict[str, Any] | None:
    """Commit of the repository around the working directory, and whether files differ from it."""
    # Without tags it prints the commit, followed by "-dirty" if files differ.
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    commit, _, dirty = process.stdout.strip().partition("-")
    return {"commit": commit, "changed": bool(dirty)}
