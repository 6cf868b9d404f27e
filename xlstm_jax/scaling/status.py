"""The folder of one run of a sweep, and its state.

OUT/RUN_ID/spec.json      the record of the run before training
OUT/RUN_ID/config.json    and everything else that `train.fit` writes: metrics.jsonl, checkpoints
OUT/RUN_ID/result.json    its record with results; written last, by rename
OUT/RUN_ID/failure.json   why the last attempt failed, until one succeeds
OUT/RUN_ID/job.json       the job of a scheduler that trains it
"""

from pathlib import Path
from typing import Literal, NamedTuple

from xlstm_jax.config import read_json
from xlstm_jax.train import checkpoint, lock

SPEC, RESULT, FAILURE, JOB = "spec.json", "result.json", "failure.json", "job.json"


class RunStatus(NamedTuple):
    """The state of a run on disk."""

    run_id: str
    name: str
    state: Literal["finished", "failed", "running", "stopped", "planned"]
    code: int = 0  # exit code of a failed run
    reason: str = ""  # of the failure


def status(folder: Path, name: str) -> RunStatus:
    """The state of the run in a folder, which need not exist."""
    if (folder / RESULT).exists():
        return RunStatus(folder.name, name, "finished")
    if lock.may_be_locked(folder):
        return RunStatus(folder.name, name, "running")
    if (folder / FAILURE).exists():
        values = read_json(folder / FAILURE)
        return RunStatus(folder.name, name, "failed", values["code"], values["reason"])
    is_saved = checkpoint.latest_step(folder) is not None
    return RunStatus(folder.name, name, "stopped" if is_saved else "planned")
