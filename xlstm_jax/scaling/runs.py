"""Training the runs of a sweep that are not finished: each ends with a result or a failure."""

import datetime
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from xlstm_jax.config import (
    ConfigError,
    differences,
    load_config,
    read_json,
    to_dict,
    with_imports,
)
from xlstm_jax.errors import ArgumentError, UnsupportedError, printable, quote, quote_path
from xlstm_jax.scaling.collect import MAX_NAMED, PLAN, listed, results_of
from xlstm_jax.scaling.launch import Execute, Local
from xlstm_jax.scaling.source import source_fingerprint
from xlstm_jax.scaling.status import FAILURE, RESULT, SPEC, RunStatus, status
from xlstm_jax.scaling.sweep import RunSpec, run_id
from xlstm_jax.sharding.distributed import is_peer_failure
from xlstm_jax.train import lock, rundir
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.processes import sync_processes
from xlstm_jax.train.run import FitResult, fit

# Exit codes of commands.
BUG, BAD_ARGUMENT, DIVERGED, MACHINE_FAILED = 1, 2, 3, 4


@runtime_checkable  # so that signatures can be checked at run time
class Launcher(Protocol):
    """Trains runs: `Local`, `Slurm`, or a class of the caller."""

    def launch(self, folders: Sequence[Path], execute: Execute) -> None:
        """Calls `execute`, here or in other processes, with each of these prepared folders."""


def run(
    specs: Sequence[RunSpec],
    out: str | Path,
    *,
    launcher: Launcher | None = None,
    allow_mixed: bool = False,
) -> list[RunStatus]:
    """Trains the runs that are not finished, each in its folder of `out`, and returns all states.

    Repeating the call continues: finished runs stay, stopped and failed ones resume from their
    checkpoints, those that another process trains are left alone. A run that diverged would do so
    again and is not repeated; delete its folder to try. If `jax.distributed` is initialized, all
    processes call this, with `out` on a file system that they share, and train every run together.

    Args:
        launcher: `Local()` by default, which trains one run after the other in this process.
        allow_mixed: accept results of another source of this library beside new ones.

    Raises:
        ConfigError: `out` has runs of another plan, or finished runs of another source.
    """
    out = rundir.expand(out)
    rundir.check_folder(out)
    _check_plan(specs, out)
    states = statuses(specs, out)
    if not allow_mixed and any(one.state != "finished" for one in states):
        _check_source(out, specs)
    is_first = jax.process_index() == 0
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_json(out / PLAN, {"runs": [spec.record() for spec in specs]})
    folders = []
    for spec, one in zip(specs, states, strict=True):
        # A run may only seem to be running, after a job was killed on another host.
        if one.state != "finished" and one.code != DIVERGED:
            if is_first:
                prepare(out / spec.run_id, spec)
            folders.append(out / spec.run_id)
    sync_processes("the runs are prepared")
    (launcher or Local()).launch(folders, execute)
    return statuses(specs, out)


def statuses(specs: Iterable[RunSpec], out: Path) -> list[RunStatus]:
    """The state of every run."""
    return [status(out / spec.run_id, spec.cfg.name) for spec in specs]


def prepare(folder: Path, spec: RunSpec) -> None:
    """Writes what a process needs to train the run, wherever it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / rundir.CONFIG).exists():
        rundir.write_json(folder / rundir.CONFIG, with_imports(to_dict(spec.cfg)))
    rundir.write_json(folder / SPEC, spec.record())


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
        cfg = load_run(folder)
        per_step = spec["train_flops"] / spec["steps"]
        result = fit(cfg, folder, flops_per_step=per_step)
    except Exception as error:
        if is_peer_failure(error):
            raise  # the other processes will not come
        if jax.process_index() == 0:
            record_failure(folder, error)
        sync_processes("the failure is recorded")
        return status(folder, spec["name"])
    if _is_complete(result, cfg) and jax.process_index() == 0:
        assert result.evaluation is not None
        record_result(folder, spec, result.evaluation["valid_loss"])
    sync_processes("the result is written")  # all of them read the same state
    return status(folder, spec["name"])


def load_run(folder: Path) -> ExperimentConfig:
    """The config of the run in a folder that was prepared; raises ConfigError if it was changed."""
    cfg = load_config(folder / rundir.CONFIG, ExperimentConfig)
    if run_id(cfg) != folder.name:
        raise ConfigError(
            f"{quote_path(folder / rundir.CONFIG)} must be that of the run {folder.name}, but "
            "was changed; delete the folder and run the sweep again."
        )
    return cfg


def _is_complete(result: FitResult, cfg: ExperimentConfig) -> bool:
    """Whether the run was trained and evaluated; a signal may come between both."""
    return result.finished and (result.evaluation or {}).get("step") == cfg.train.steps


def record_result(folder: Path, spec: dict[str, Any], val_loss: float) -> None:
    """Writes the record of a finished run, whose metrics are in its folder."""
    records = rundir.read_metrics(folder / rundir.METRICS)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    seconds = sum(r["step_time"] * (r["step"] - s) for r, s in _intervals(records))
    values = {
        "val_loss": val_loss,
        "train_loss": losses[-1] if losses else None,
        "train_seconds": seconds,
        "source": source_fingerprint(),
        "versions": rundir.versions(),
    }
    (folder / FAILURE).unlink(missing_ok=True)
    rundir.write_json(folder / RESULT, spec | values)


def _intervals(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The records of steps, each with the step before its interval."""
    timed = [record for record in records if record.get("step_time") is not None]
    starts = [0, *(record["step"] for record in timed)]
    return list(zip(timed, starts, strict=False))


def record_failure(folder: Path, error: Exception) -> None:
    """Writes why a run failed, with the exit code of that error."""
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


def _check_source(out: Path, specs: Sequence[RunSpec]) -> None:
    """Raises ConfigError if finished runs are of another source than new ones would be."""
    finished, ids = results_of(out), {spec.run_id for spec in specs}
    source = source_fingerprint()
    others = [i for i, result in finished.items() if i in ids and result["source"] != source]
    if others:
        raise ConfigError(
            f"{quote_path(out)} has {len(others)} results of the source "
            f"{finished[others[0]]['source']} of xlstm_jax ({listed(others)}), and new ones would "
            f"be of {source}; use another folder, delete theirs, or pass allow_mixed=True "
            "(--allow-mixed)."
        )


def _check_plan(specs: Sequence[RunSpec], out: Path) -> None:
    """Raises ConfigError, with the fields that differ, if `out` has runs that are not planned."""
    ids, names = {spec.run_id for spec in specs}, {spec.cfg.name: spec for spec in specs}
    for path in sorted(out.glob(f"*/{SPEC}")):
        if path.parent.name in ids:
            continue
        stored = read_json(path.parent / rundir.CONFIG)
        new = names.get(stored.get("name", ""))
        lines = differences(to_dict(new.cfg), stored)[:MAX_NAMED] if new else ["not in this plan"]
        raise ConfigError(
            f"{quote_path(out)} has the run {path.parent.name} of another plan "
            f"({quote(stored.get('name'))}: {'; '.join(lines)}); use another folder, or delete "
            "that run."
        )
