"""The directory of a run: config, records, compiled programs, and all else but checkpoints."""

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

# What may change when a run is resumed, as it changes no number the run computes.
_INTERVALS = "log_every eval_every eval_batches checkpoint_every checkpoint_minutes keep".split()
FREE = frozenset({"name", IMPORTS, *(f"train.{field}" for field in _INTERVALS)})
# Nor any but in its last digits: a run may be resumed on other devices.
ANYWHERE = "mesh."

_PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check(run_dir: Path, cfg: ExperimentConfig) -> None:
    """Raises ConfigError unless `run_dir` is free or belongs to `cfg`; changes nothing."""
    found = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (found.is_dir() and os.access(found, os.W_OK)):
        what = "cannot be written to" if found.is_dir() else "is a file"
        raise ConfigError(
            f"run_dir={str(run_dir)!r} must be a folder to write to, but {found} {what}; "
            "name another."
        )
    if not (run_dir / CONFIG).exists():
        if checkpoint.latest_step(run_dir) is not None:
            raise ConfigError(
                f"run_dir={str(run_dir)!r} must have a {CONFIG} beside its checkpoints, but it has "
                "none; use another directory, or fresh=True (--fresh) to discard this run."
            )
        return
    stored = ExperimentConfig.upgrade(read_json(run_dir / CONFIG))
    train, free = cfg.train, FREE
    if train.schedule == "constant" and not train.cooldown_steps and not 0 < train.warmup_steps < 1:
        # Learning rates up to now stay what they were, whatever the number of steps is.
        free |= {"train.steps"}
    lines = {
        name: line
        for line in differences(to_dict(cfg), stored)
        if (name := line.split(":")[0]) not in free and not name.startswith(ANYWHERE)
    }
    if lines:
        hint = (
            " Its number of steps shapes its learning rates, so only a constant schedule without "
            "cool-down and with a warm-up counted in steps can be extended."
        )
        raise ConfigError(
            f"run_dir={str(run_dir)!r} belongs to another config ({'; '.join(lines.values())}); "
            "use another directory, the same values, or fresh=True (--fresh) to discard that run."
            + (hint if "train.steps" in lines else "")
        )


def discard(run_dir: Path) -> None:
    """Removes a run, and nothing else that may be in its directory."""
    shutil.rmtree(run_dir / checkpoint.FOLDER, ignore_errors=True)
    for name in (CONFIG, RUN, METRICS, CURVE, DIVERGED):
        (run_dir / name).unlink(missing_ok=True)


def begin(run_dir: Path, cfg: ExperimentConfig, facts: dict[str, Any], step: int) -> None:
    """Writes config.json and run.json, and takes the metrics back to `step`."""
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
    # What a killed run wrote after its last checkpoint will be written again.
    records = read_metrics(run_dir / METRICS)
    lines = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    _write(run_dir / METRICS, "".join(lines))


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is never seen half written."""
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut off does not count."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _git_state() -> dict[str, Any] | None:
    """Commit of the repository around the working directory, and whether files differ from it."""
    # Without tags: the bare commit, and "-dirty" behind it.
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "changed": bool(dirty)}


@contextlib.contextmanager
def compiled_programs(run_dir: Path) -> Iterator[None]:
    """Within, compiled programs are stored in RUN/cache, unless the user has set another folder.

    A second start of the same program, by any command, then compiles nothing. The setting is global
    to the process: it is restored at the end.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str((run_dir / CACHE).resolve()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
