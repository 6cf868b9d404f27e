"""The directory of a run: its config, its records, and what else is in it besides checkpoints."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

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
from xlstm_jax.train.config import ExperimentConfig, TrainConfig

CONFIG, RUN, METRICS = "config.json", "run.json", "metrics.jsonl"
CURVE, DIVERGED = "loss.png", "diverged.json"

# What may change when a run is resumed, as it changes no number the run computes.
FREE = frozenset({"name", IMPORTS}) | {
    f"train.{field}"
    for field in (
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep",
    )
}
# Nor any but in its last digits: a run may be resumed on other devices.
ANYWHERE = "mesh."

_PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check(run_dir: Path, cfg: ExperimentConfig) -> None:
    """Raises ConfigError unless `run_dir` is free or belongs to `cfg`; changes nothing."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={str(run_dir)!r} must be a folder, but it is a file; move it.")
    if not (run_dir / CONFIG).exists():
        if checkpoint.latest_step(run_dir) is not None:
            raise ConfigError(
                f"run_dir={str(run_dir)!r} must have a {CONFIG} beside its checkpoints, but it has "
                "none; use another directory, or fresh=True (--fresh) to discard this run."
            )
        return
    stored = ExperimentConfig.upgrade(read_json(run_dir / CONFIG))
    lines = [
        line
        for line in differences(to_dict(cfg), stored)
        if line.split(":")[0] not in FREE | _extendable(cfg.train, stored)
        and not line.startswith(ANYWHERE)
    ]
    if lines:
        steps = any(line.startswith("train.steps:") for line in lines)
        raise ConfigError(
            f"run_dir={str(run_dir)!r} belongs to another config ({'; '.join(lines)}); use another "
            "directory, the same values, or fresh=True (--fresh) to discard that run."
            + (f" {_STEPS}" if steps else "")
        )


_STEPS = (
    "Its number of steps shapes its learning rates, so only a constant schedule without cool-down "
    "and with a warm-up counted in steps can be extended."
)


def _extendable(here: TrainConfig, stored: dict[str, Any]) -> frozenset[str]:
    """`train.steps` if the learning rates up to now stay what they were, whatever it is."""
    lengths_count = here.warmup_steps == 0 or here.warmup_steps >= 1
    fixed = here.schedule == "constant" and here.cooldown_steps == 0 and lengths_count
    return frozenset({"train.steps"} if fixed else ())


def discard(run_dir: Path) -> None:
    """Removes a run, and nothing else that may be in its directory."""
    shutil.rmtree(run_dir / checkpoint.FOLDER, ignore_errors=True)
    for name in (CONFIG, RUN, METRICS, CURVE, DIVERGED):
        (run_dir / name).unlink(missing_ok=True)


def begin(run_dir: Path, cfg: ExperimentConfig, facts: dict[str, Any], step: int) -> None:
    """Writes config.json and run.json, and takes the metrics back to `step`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / CONFIG, with_imports(to_dict(cfg)))
    about = {
        "name": cfg.name,
        "fingerprint": fingerprint(cfg),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "git": _git_state(),
        **facts,
        "config": to_dict(cfg),
    }
    write_json(run_dir / RUN, about)
    _rewind(run_dir / METRICS, step)


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is never seen half written."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(draft, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut off does not count."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _rewind(path: Path, step: int) -> None:
    """Drops what a killed run wrote after its last checkpoint: it will be written again."""
    records = read_metrics(path)
    draft = path.with_suffix(".tmp")
    lines = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    draft.write_text("".join(lines))
    os.replace(draft, path)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit of the repository around the working directory, and whether files differ from it."""

    def git(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
