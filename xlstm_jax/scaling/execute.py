"""One run of a sweep in its folder: trained or resumed, then its result or its failure."""

import datetime
import traceback
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import ConfigError, load_config, read_json, to_dict, with_imports
from xlstm_jax.errors import ArgumentError, UnsupportedError, printable, quote_path
from xlstm_jax.scaling.source import source_fingerprint
from xlstm_jax.scaling.status import FAILURE, RESULT, SPEC, RunStatus, status
from xlstm_jax.scaling.sweep import RunSpec, run_id
from xlstm_jax.train import lock, rundir
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.run import FitResult, fit

# Exit codes of commands.
BUG, BAD_ARGUMENT, DIVERGED, MACHINE_FAILED = 1, 2, 3, 4


def prepare(folder: Path, spec: RunSpec) -> None:
    """Writes what a process needs to train the run, wherever it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / rundir.CONFIG).exists():
        rundir.write_json(folder / rundir.CONFIG, with_imports(to_dict(spec.cfg)))
    rundir.write_json(folder / SPEC, spec.row())


def execute(folder: Path) -> RunStatus:
    """Trains the run in a folder that was prepared, or resumes it; all processes of it call this.

    Does nothing if another process trains it. Everything that ends a run early is recorded in the
    folder, except what concerns the caller too: an interrupt, and an error of the disk while that
    record is written.
    """
    spec = read_json(folder / SPEC)
    try:
        with lock.hold(folder):
            pass
    except ConfigError:
        return RunStatus(folder.name, spec["name"], "running")
    try:
        cfg = load_config(folder / rundir.CONFIG, ExperimentConfig)
        if run_id(cfg) != folder.name:
            raise ConfigError(
                f"{quote_path(folder / rundir.CONFIG)} must be that of the run {folder.name}, but "
                "was changed; delete the folder and run the sweep again."
            )
        per_step = spec["train_flops"] / spec["steps"]
        result = fit(cfg, folder, flops_per_step=per_step)
    except Exception as error:
        if jax.process_index() == 0:
            _record_failure(folder, error)
        return status(folder, spec["name"])
    if _is_complete(result, cfg) and jax.process_index() == 0:
        (folder / FAILURE).unlink(missing_ok=True)
        rundir.write_json(folder / RESULT, _result(folder, spec, result))
    return status(folder, spec["name"])


def _is_complete(result: FitResult, cfg: ExperimentConfig) -> bool:
    """Whether the run was trained and evaluated; a signal may come between both."""
    return result.finished and (result.evaluation or {}).get("step") == cfg.train.steps


def _result(folder: Path, spec: dict[str, Any], result: FitResult) -> dict[str, Any]:
    assert result.evaluation is not None
    records = rundir.read_metrics(folder / rundir.METRICS)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    seconds = sum(r["step_time"] * (r["step"] - s) for r, s in _intervals(records))
    return spec | {
        "val_loss": result.evaluation["valid_loss"],
        "train_loss": losses[-1] if losses else None,
        "train_seconds": seconds,
        "source": source_fingerprint(),
        "versions": rundir.versions(),
    }


def _intervals(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The records of steps, each with the step before its interval."""
    timed = [record for record in records if record.get("step_time") is not None]
    starts = [0, *(record["step"] for record in timed)]
    return list(zip(timed, starts, strict=False))


def _record_failure(folder: Path, error: Exception) -> None:
    code, text = exit_code(error), printable(f"{type(error).__name__}: {error}")
    values = {
        "code": code,
        "reason": text,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "traceback": traceback.format_exception(error) if code == BUG else [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / FAILURE, values)


def exit_code(error: Exception) -> int:
    """The exit code of a command that ends with an error."""
    if isinstance(error, DivergedError):
        return DIVERGED
    if isinstance(error, (ArgumentError, UnsupportedError)):
        return BAD_ARGUMENT
    # XLA reports exhausted memory by the text of its errors only.
    is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]
    return MACHINE_FAILED if is_memory or isinstance(error, OSError) else BUG
