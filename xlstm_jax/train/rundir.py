"""The run directory: config, records and compiled programs; all files except checkpoints."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from xlstm_jax.config import (
    IMPORTS,
    ConfigError,
    differences,
    fingerprint,
    read_json,
    to_dict,
    with_imports,
)
from xlstm_jax.train import checkpoint
from xlstm_jax.train.config import ExperimentConfig

CONFIG, RUN, METRICS = "config.json", "run.json", "metrics.jsonl"
CURVE, DIVERGED, CACHE = "loss.png", "diverged.json", "cache"

# Fields that may differ when a run is resumed, because they do not affect its results.
_INTERVALS = "log_every eval_every eval_batches checkpoint_every checkpoint_minutes keep".split()
MUTABLE = frozenset({"name", IMPORTS, *(f"train.{field}" for field in _INTERVALS)})
# These affect results by rounding only: a run may be resumed on other devices.
MUTABLE_PREFIX = "mesh."

_PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check(run_dir: Path, cfg: ExperimentConfig) -> None:
    """Checks that `run_dir` is free or belongs to `cfg`; changes nothing.

    Raises:
        ConfigError: the directory cannot be written to, or contains a run of another config.
    """
    # The nearest ancestor that exists, as the directory itself may be new.
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(
            f"run_dir={str(run_dir)!r} must be a folder to write to, but {existing} {reason}; "
            "use another."
        )
    if not (run_dir / CONFIG).exists():
        if checkpoint.latest_step(run_dir) is not None:
            raise ConfigError(
                f"run_dir={str(run_dir)!r} must have a {CONFIG} beside its checkpoints, but it has "
                "none; use another directory, or fresh=True (--fresh) to discard this run."
            )
        return
    stored = ExperimentConfig.upgrade(read_json(run_dir / CONFIG))
    train, mutable = cfg.train, MUTABLE
    if train.schedule == "constant" and not train.cooldown_steps and not 0 < train.warmup_steps < 1:
        # The learning rates of past steps do not depend on the number of steps.
        mutable |= {"train.steps"}
    lines = {
        name: line
        for line in differences(to_dict(cfg), stored)
        if (name := line.split(":")[0]) not in mutable and not name.startswith(MUTABLE_PREFIX)
    }
    if lines:
        hint = (
            " Only a constant schedule without cool-down, and with a warm-up counted in steps, can "
            "be extended: other learning rates depend on the number of steps."
        )
        raise ConfigError(
            f"run_dir={str(run_dir)!r} belongs to another config ({'; '.join(lines.values())}); "
            "use another directory, the same values, or fresh=True (--fresh) to discard that run."
            + (hint if "train.steps" in lines else "")
        )


def discard(run_dir: Path) -> None:
    """Deletes the files of a run, and no other files in its directory."""
    shutil.rmtree(run_dir / checkpoint.FOLDER, ignore_errors=True)
    for name in (CONFIG, RUN, METRICS, CURVE, DIVERGED):
        (run_dir / name).unlink(missing_ok=True)


def prepare(run_dir: Path, cfg: ExperimentConfig, facts: dict[str, Any], step: int) -> None:
    """Writes config.json and run.json, and drops metrics after `step`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / CONFIG, with_imports(to_dict(cfg)))
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about = {
        "name": cfg.name,
        "fingerprint": fingerprint(cfg),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "versions": versions,
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "git": _git_state(),
        **facts,
        "config": to_dict(cfg),
    }
    write_json(run_dir / RUN, about)
    # Records that a killed run wrote after its last checkpoint will be written again.
    records = read_metrics(run_dir / METRICS)
    lines = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    _write(run_dir / METRICS, "".join(lines))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")  # in the same folder, so that the rename is atomic
    draft.write_text(text)
    os.replace(draft, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; an incomplete last line is ignored."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


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


@contextlib.contextmanager
def compiled_programs(run_dir: Path) -> Iterator[None]:
    """Within the context, JAX's compilation cache is RUN/cache, unless the user has set another.

    A restart of the same program, by any command, then compiles nothing. The setting is global to
    the process and is restored at the end.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str((run_dir / CACHE).resolve()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()  # else JAX keeps the folder it has opened
